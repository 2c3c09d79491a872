"""What waits to be told in Complete: coalesced into few messages, in order.

The daemon applies a message field by field and messages one after the other. So everything of one kind keeps
its order within a message, and what must not be reordered between kinds goes into different messages: an
announcement for a request id that the same message would finish (the id is used again).

Pure: no I/O, no clock. Not thread-safe: the gate's lock is held around every method.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvtier.v1 import offload_pb2
from kvtier_client.costs import TokenCosts
from kvtier_client.reports import LoadReportItem, StoreReportItem


@dataclass(slots=True)
class Batch:
    """One Complete message. `entries` counts its slots, keys and ids."""

    request: offload_pb2.CompleteRequest
    entries: int = 0
    finished: list[str] = field(default_factory=list)
    sealed: bool = False
    """Takes nothing more: it was sent, or what comes next must not be in one message with it."""

    @property
    def ends_holds(self) -> bool:
        """Whether it ends something that the daemon otherwise keeps until the session ends."""
        request = self.request
        return bool(request.store_reports or request.load_reports or request.credit_returns)


class CompletionBuffer:
    """The queue of one session: at most one batch in flight, the others behind it.

    No batch has more than `max_entries` slots, keys and ids, unless a single load start or load report has.
    """

    def __init__(self, session_id: str, max_entries: int) -> None:
        self._session_id = session_id
        self._max_entries = max_entries
        self._waiting: deque[Batch] = deque()
        self._in_flight: Batch | None = None
        # Request ids whose end is not confirmed: a lookup of the same id must not overtake it.
        self._finishing: Counter[str] = Counter()
        self.entries = 0
        """Queued and in flight together."""
        self.urgent = False
        """Whether something waits that others wait for: everything but ends of requests and of leases."""

    @property
    def empty(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return self._in_flight is None and not self._waiting

    @property
    def waits(self) -> bool:
        """Whether something is queued that is not in flight. May be read without the lock."""
        return bool(self._waiting)

    def is_finishing(self, request_id: str) -> bool:
        """Tell whether the end of this request is queued or in flight."""
        return request_id in self._finishing

    def announce(
        self, request_id: str, slot_ids: Sequence[int], generations: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        """Queue which key goes into which credit slot."""
        assert len(slot_ids) == len(generations) == len(keys), (len(slot_ids), len(generations), len(keys))
        if self._waiting and request_id in self._waiting[-1].finished:
            self._waiting[-1].sealed = True
        for piece in self._pieces(len(slot_ids)):
            self._room(len(slot_ids[piece])).request.announcements.add(
                request_id=request_id,
                slot_ids=slot_ids[piece],
                generations=generations[piece],
                keys=keys[piece],
            )

    def start_load(self, lookup_lease_id: int, load_lease_id: int, slot_ids: Sequence[int]) -> None:
        """Queue that a lookup lease became a load."""
        self._room(1 + len(slot_ids)).request.load_starts.add(
            lookup_lease_id=lookup_lease_id, load_lease_id=load_lease_id, slot_ids=slot_ids
        )

    def report_store(self, item: StoreReportItem) -> None:
        """Queue one rank's stores; bytes and seconds of a split report go with its first piece."""
        failed = frozenset(item.failed)
        for piece in self._pieces(len(item.slot_ids)):
            self._room(len(item.slot_ids[piece])).request.store_reports.add(
                part=item.part,
                slot_ids=item.slot_ids[piece],
                generations=item.generations[piece],
                keys=item.keys[piece],
                checksums=item.checksums[piece] or [0] * len(item.slot_ids[piece]),
                failed=sorted(index - piece.start for index in failed if piece.start <= index < piece.stop),
                bytes=item.num_bytes if piece.start == 0 else 0,
                seconds=item.seconds if piece.start == 0 else 0.0,
            )

    def report_load(self, item: LoadReportItem) -> None:
        """Queue one rank's end of a load."""
        self._room(1 + len(item.torn_slot_ids) + len(item.mismatches)).request.load_reports.add(
            lease_id=item.lease_id,
            torn_slot_ids=item.torn_slot_ids,
            mismatches=[
                offload_pb2.Mismatch(slot_id=m.slot_id, generation=m.generation, checksum=m.checksum)
                for m in item.mismatches
            ],
            bytes=item.num_bytes,
            seconds=item.seconds,
        )

    def return_credits(self, slot_ids: Sequence[int], generations: Sequence[int]) -> None:
        """Queue unused credits."""
        assert len(slot_ids) == len(generations), (len(slot_ids), len(generations))
        for piece in self._pieces(len(slot_ids)):
            self._room(len(slot_ids[piece])).request.credit_returns.add(
                slot_ids=slot_ids[piece], generations=generations[piece]
            )

    def release(self, lease_id: int) -> None:
        """Queue the end of a lease."""
        self._room(1, urgent=False).request.released_lease_ids.append(lease_id)

    def report_costs(self, costs: TokenCosts) -> None:
        """Queue what tokens have cost."""
        told = self._room(1, urgent=False).request.costs
        told.loaded_tokens += costs.loaded_tokens
        told.load_seconds += costs.load_s
        told.computed_tokens += costs.computed_tokens
        told.compute_seconds += costs.compute_s

    def finish(self, request_id: str) -> None:
        """Queue the end of a request."""
        batch = self._room(1, urgent=False)
        batch.request.finished_request_ids.append(request_id)
        batch.finished.append(request_id)
        self._finishing[request_id] += 1

    def next_batch(self) -> Batch | None:
        """Take the oldest batch to send it; None while one is in flight, or when nothing waits."""
        if self._in_flight is not None or not self._waiting:
            return None
        self._in_flight = self._waiting.popleft()
        self._in_flight.sealed = True
        self.urgent = self.urgent and bool(self._waiting)
        return self._in_flight

    def acknowledge(self, batch: Batch) -> None:
        """The batch in flight was answered, or will not be sent again."""
        assert batch is self._in_flight, "acknowledged a batch that is not in flight"
        self._in_flight = None
        self.entries -= batch.entries
        self._finishing.subtract(batch.finished)
        for request_id in batch.finished:
            if self._finishing[request_id] <= 0:
                del self._finishing[request_id]

    def put_back(self, batch: Batch) -> None:
        """The batch in flight got no answer: it goes first again. Repeating it is not an error."""
        assert batch is self._in_flight, "put back a batch that is not in flight"
        self._in_flight = None
        self._waiting.appendleft(batch)

    def _pieces(self, count: int) -> Iterator[slice]:
        """Cut columns of `count` entries into pieces that one message may carry."""
        return (
            slice(start, min(start + self._max_entries, count))
            for start in range(0, count, self._max_entries)
        )

    def _room(self, entries: int, urgent: bool = True) -> Batch:
        """Return the batch that takes `entries` more, and count them."""
        self.urgent |= urgent
        batch = self._waiting[-1] if self._waiting else None
        if batch is None or batch.sealed or batch.entries + entries > self._max_entries:
            batch = Batch(offload_pb2.CompleteRequest(session_id=self._session_id))
            self._waiting.append(batch)
        batch.entries += entries
        self.entries += entries
        return batch
