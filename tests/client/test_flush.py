"""The queue for Complete, against a list that remembers what was told in which order."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.v1 import offload_pb2 as pb
from kvtier_client.flush import Batch, CompletionBuffer
from kvtier_client.reports import LoadReportItem, StoreReportItem

MAX_ENTRIES = 8
Told = tuple[object, ...]


def told_by(request: pb.CompleteRequest) -> Iterator[Told]:
    """What the daemon is told, in the order in which it applies it."""
    for announced in request.announcements:
        columns = zip(announced.slot_ids, announced.generations, announced.keys, strict=True)
        yield from (("announce", announced.request_id, *column) for column in columns)
    for start in request.load_starts:
        yield ("start", start.lookup_lease_id, start.load_lease_id, tuple(start.slot_ids))
    for report in request.store_reports:
        columns = zip(report.slot_ids, report.generations, report.keys, strict=True)
        for index, column in enumerate(columns):
            yield ("store", report.part, *column, index in report.failed)
    for load in request.load_reports:
        yield ("load", load.lease_id, tuple(load.torn_slot_ids))
    for returned in request.credit_returns:
        pairs = zip(returned.slot_ids, returned.generations, strict=True)
        yield from (("return", *pair) for pair in pairs)
    yield from (("release", lease_id) for lease_id in request.released_lease_ids)
    yield from (("finish", request_id) for request_id in request.finished_request_ids)


class BufferModel(RuleBasedStateMachine):
    """Items go in, batches come out; replies come or get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = CompletionBuffer("s1", MAX_ENTRIES)
        self.queued: list[Told] = []
        self.applied: list[Told] = []
        self.in_flight: Batch | None = None
        self.lost: bytes = b""

    @rule(request=st.sampled_from(["a", "b"]), count=st.integers(0, 20), start=st.integers(0, 1000))
    def announce(self, request: str, count: int, start: int) -> None:
        slots = list(range(start, start + count))
        keys = [b"%d" % slot for slot in slots]
        self.buffer.announce(request, slots, slots, keys)
        self.queued += [("announce", request, slot, slot, key) for slot, key in zip(slots, keys, strict=True)]

    @rule(count=st.integers(0, 20), start=st.integers(0, 1000), failed=st.sets(st.integers(0, 19)))
    def report_store(self, count: int, start: int, failed: set[int]) -> None:
        slots = list(range(start, start + count))
        bad = sorted(index for index in failed if index < count)
        keys = [b"%d" % slot for slot in slots]
        self.buffer.report_store(StoreReportItem(1, slots, slots, keys, checksums=slots, failed=bad))
        self.queued += [
            ("store", 1, slot, slot, key, index in bad)
            for index, (slot, key) in enumerate(zip(slots, keys, strict=True))
        ]

    @rule(lease=st.integers(1, 9), count=st.integers(0, 20))
    def start_load(self, lease: int, count: int) -> None:
        self.buffer.start_load(lease, lease + 100, list(range(count)))
        self.queued.append(("start", lease, lease + 100, tuple(range(count))))

    @rule(lease=st.integers(1, 9), torn=st.lists(st.integers(0, 9), max_size=3))
    def report_load(self, lease: int, torn: list[int]) -> None:
        self.buffer.report_load(LoadReportItem(lease, torn))
        self.queued.append(("load", lease, tuple(torn)))

    @rule(count=st.integers(0, 20))
    def return_credits(self, count: int) -> None:
        slots = list(range(count))
        self.buffer.return_credits(slots, slots)
        self.queued += [("return", slot, slot) for slot in slots]

    @rule(lease=st.integers(1, 9))
    def release(self, lease: int) -> None:
        self.buffer.release(lease)
        self.queued.append(("release", lease))

    @rule(request=st.sampled_from(["a", "b"]))
    def finish(self, request: str) -> None:
        self.buffer.finish(request)
        self.queued.append(("finish", request))

    @rule()
    def send(self) -> None:
        batch = self.buffer.next_batch()
        if self.in_flight is not None:
            assert batch is None, "two batches in flight"
            return
        self.in_flight = batch
        if batch is not None and self.lost:
            assert batch.request.SerializeToString() == self.lost, "what was sent before came back changed"
            self.lost = b""

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def reply(self) -> None:
        assert self.in_flight is not None
        self.applied += told_by(self.in_flight.request)
        self.buffer.acknowledge(self.in_flight)
        self.in_flight = None

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def lose_the_reply(self) -> None:
        assert self.in_flight is not None
        self.lost = self.in_flight.request.SerializeToString()
        self.buffer.put_back(self.in_flight)
        self.in_flight = None

    @invariant()
    def a_batch_in_flight_has_something_and_not_too_much(self) -> None:
        if self.in_flight is None:
            return
        alone = len(self.in_flight.request.load_starts) + len(self.in_flight.request.load_reports) == 1
        assert self.in_flight.entries > 0
        assert self.in_flight.entries <= MAX_ENTRIES or alone

    @invariant()
    def unfinished_requests_are_known(self) -> None:
        for request in "ab":
            told = self.queued.count(("finish", request)) - self.applied.count(("finish", request))
            assert self.buffer.is_finishing(request) == (told > 0)

    def teardown(self) -> None:
        if self.in_flight is not None:
            self.reply()
        while (batch := self.buffer.next_batch()) is not None:
            self.in_flight = batch
            self.reply()
        assert self.buffer.empty
        assert self.buffer.entries == 0
        kinds = {told[0] for told in self.queued}
        for kind in kinds:
            assert [t for t in self.applied if t[0] == kind] == [t for t in self.queued if t[0] == kind]
        for request in "ab":  # an id that is used again: what was told after its end is applied after it
            assert ends_before_announcements(self.applied, request) == ends_before_announcements(
                self.queued, request
            )
        assert len(self.applied) == len(self.queued)


def ends_before_announcements(told: list[Told], request: str) -> list[int]:
    """For each announced slot of the request, how many ends of the request came before it, at least."""
    ends = 0
    counts = []
    for item in told:
        if item == ("finish", request):
            ends += 1
        elif item[:2] == ("announce", request):
            counts.append(ends)
    return counts


TestCompletionBuffer = BufferModel.TestCase


def test_only_what_others_wait_for_is_urgent() -> None:
    def state() -> tuple[bool, bool]:
        return buffer.waits, buffer.urgent

    buffer = CompletionBuffer("s1", MAX_ENTRIES)
    buffer.finish("a")
    buffer.release(1)
    assert state() == (True, False)
    buffer.announce("b", [1], [1], [b"key"])
    assert state() == (True, True)
    assert buffer.next_batch() is not None
    assert state() == (False, False)
