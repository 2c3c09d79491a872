"""EventsService on a real daemon: what watchers are told, in what order, and what they are refused."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import grpc
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import CHANNEL_OPTIONS, WAIT_S, DaemonProcess, wait_until
from tests.raw_engine import Failure, RawEngine, failure_of, refusal, to_key, to_keys

from kvtier.v1 import admin_pb2, events_pb2_grpc
from kvtier.v1 import events_pb2 as pb

STORED, REMOVED = pb.EVENT_KIND_STORED, pb.EVENT_KIND_REMOVED
Change = tuple[str, int, bytes]
"""Tier, kind and key."""


class WatchCall(Protocol):
    """A Watch stream."""

    def __next__(self) -> pb.WatchResponse: ...
    def cancel(self) -> bool: ...


class Observer:
    """The stub of one channel, and the streams that it has opened."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = events_pb2_grpc.EventsServiceStub(channel)

    def watch(self, first: int = 0, boot_id: str = "", namespace: str = "") -> WatchCall:
        """Open a stream."""
        asked = pb.WatchRequest(from_sequence=first, boot_id=boot_id, namespace=namespace)
        call: WatchCall = self.stub.Watch(asked, timeout=WAIT_S)
        return call

    def snapshot(self, namespace: str = "") -> tuple[set[Change], pb.SnapshotResponse]:
        """Take a snapshot; returns its chunks, and its last message."""
        replies = list(self.stub.Snapshot(pb.SnapshotRequest(namespace=namespace), timeout=WAIT_S))
        assert all(not reply.next_sequence for reply in replies[:-1])
        events = [event for reply in replies for event in reply.events]
        assert all((event.kind, event.sequence, event.reason) == (STORED, 0, "snapshot") for event in events)
        return {(event.tier, STORED, key) for event in events for key in event.keys}, replies[-1]

    def refusal(self, first: int = 0, boot_id: str = "", namespace: str = "") -> Failure:
        """Open a stream that must be refused."""
        return refusal(lambda: next(self.watch(first, boot_id, namespace)))


@contextmanager
def observer(daemon: DaemonProcess, *options: tuple[str, int]) -> Iterator[Observer]:
    with grpc.insecure_channel(daemon.address, options=[*CHANNEL_OPTIONS, *options]) as channel:
        yield Observer(channel)


def changes_of(events: Sequence[pb.OffloadingEvent]) -> list[Change]:
    return [(event.tier, event.kind, key) for event in events for key in event.keys]


def read_until(call: WatchCall, is_enough: int) -> list[pb.OffloadingEvent]:
    """Read a stream until it has told of so many keys; the numbers must be without a gap."""
    events: list[pb.OffloadingEvent] = []
    while sum(len(event.keys) for event in events) < is_enough:
        reply = next(call)
        assert not reply.overflow
        events += reply.events
        if events:
            assert reply.next_sequence == events[-1].sequence + 1
    first = events[0].sequence
    assert [event.sequence for event in events] == list(range(first, first + len(events)))
    return events


def read_to_overflow(call: WatchCall) -> pb.WatchResponse:
    while not (reply := next(call)).overflow:
        pass
    return reply


def store_one_by_one(engine: RawEngine, numbers: range) -> None:
    for number in numbers:
        engine.store([to_key(number)], f"store-{number}")
        engine.complete(finished_request_ids=[f"store-{number}"])


def namespace_of(engine: RawEngine) -> str:
    assert engine.scheduler is not None
    return engine.scheduler.attached.namespace_digest


def test_a_watcher_hears_live_and_in_order_what_is_stored_and_evicted(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes=256 * 4096)
    engine = make_engine(daemon, tenant="team").attach()
    with observer(daemon) as own:
        call = own.watch()
        hello = next(call)
        assert hello.boot_id == daemon.status().boot_id
        assert not hello.events
        assert hello.next_sequence == 1
        store_one_by_one(engine, range(260))
        events = read_until(call, 264)
        told = changes_of(events)
        assert [key for _, kind, key in told if kind == STORED] == to_keys(range(260))
        assert [key for _, kind, key in told if kind == REMOVED] == to_keys(range(4))
        for number in range(4):
            removed = told.index(("primary", REMOVED, to_key(number)))
            assert told[removed + 1] == ("primary", STORED, to_key(number + 256))
        assert {event.reason for event in events} == {"store", "evict"}
        assert {(event.namespace, event.tenant) for event in events} == {(namespace_of(engine), "team")}
        assert {event.epoch for event in events} == {
            engine.scheduler.attached.epoch if engine.scheduler else 0
        }
        again = own.watch(1, hello.boot_id)
        assert changes_of(read_until(again, 264)) == told


def test_events_and_snapshots_fit_the_smallest_message_there_is(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes="8MiB", config='[limits]\nmax_message = "64KiB"\nmax_params = "4KiB"\n')
    engine = make_engine(daemon, tenant="t" * 64).attach()
    keys = [number.to_bytes(128, "big") for number in range(1_000)]
    with observer(daemon) as own:
        call = own.watch()
        for first in range(0, len(keys), 200):
            engine.store(keys[first : first + 200], f"store-{first}")
        assert sum(len(event.keys) for event in read_until(call, 1_000)) == 1_000
        assert {key for _, _, key in own.snapshot()[0]} == set(keys)


def test_a_watcher_of_one_namespace_hears_nothing_of_others_but_where_it_may_continue(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="[limits]\nevents = 2\n")
    quiet, busy = make_engine(daemon).attach(), make_engine(daemon).attach()
    with observer(daemon) as own:
        quiet.store(to_keys(range(3)))
        call = own.watch(1, daemon.status().boot_id, namespace_of(quiet))
        assert changes_of(read_until(call, 3)) == [("primary", STORED, key) for key in to_keys(range(3))]
        position = 0
        for number in range(4):
            busy.store([to_key(number)], f"r{number}")
            while (reply := next(call)).next_sequence == position:
                assert not reply.events
            assert not reply.events
            assert not reply.overflow
            position = reply.next_sequence
        call.cancel()
        # More of others' events than are kept have passed, and it goes on all the same.
        call = own.watch(position, reply.boot_id, namespace_of(quiet))
        assert not next(call).overflow
        quiet.store([to_key(9)], "next")
        assert changes_of(read_until(call, 1)) == [("primary", STORED, to_key(9))]


def test_what_is_no_longer_kept_or_of_another_boot_is_out_of_range(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="[limits]\nevent_keys = 8\n")
    engine = make_engine(daemon).attach()
    store_one_by_one(engine, range(20))
    boot_id = daemon.status().boot_id
    gone = (grpc.StatusCode.OUT_OF_RANGE, "EVENTS_GONE")
    with observer(daemon) as own:
        failed = own.refusal(1, boot_id)
        assert (failed.code, failed.reason) == gone
        assert int(failed.metadata["next_sequence"]) > int(failed.metadata["oldest_sequence"]) > 1
        next(own.watch(int(failed.metadata["oldest_sequence"]), boot_id))
        failed = own.refusal(1, "0" * 16)
        assert (failed.code, failed.reason) == gone
        assert boot_id in failed.message
        assert own.refusal(0, "0" * 16).reason == "EVENTS_GONE"
        assert own.refusal(int(1e9), boot_id).reason == "BAD_REQUEST"
        assert own.refusal(3).metadata["field"] == "boot_id"
        assert own.refusal(namespace="engine").metadata["field"] == "namespace"
        assert len(own.refusal(1, "x" * 60_000).message) < 200
        assert refusal(lambda: own.snapshot("xyz")).metadata["field"] == "namespace"
    daemon.restart()
    with observer(daemon) as own:
        assert own.refusal(3, boot_id).reason == "EVENTS_GONE"
        # Its predecessor's chunks are no events of its own: the first number is gone from the beginning.
        assert own.refusal(1, daemon.status().boot_id).reason == "EVENTS_GONE"
        chunks, _ = own.snapshot()
        assert chunks == {("primary", STORED, key) for key in to_keys(range(20))}


def test_a_watcher_too_many_is_refused_and_counted_and_one_that_leaves_makes_room(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="[limits]\nwatchers = 3\n")

    def metric(name: str) -> float:
        lines = daemon.page("/metrics")[1].splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    with observer(daemon) as own:
        calls = [own.watch() for _ in range(3)]
        for call in calls:
            next(call)
        failed = own.refusal()
        assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_WATCHERS")
        assert "limits.watchers" in failed.message
        assert refusal(own.snapshot).reason == "LIMIT_WATCHERS"
        wait_until(lambda: metric("kvtier_watchers") == 3, "watchers are counted")
        assert metric('kvtier_limit{name="limits.watchers"}') == 3
        assert metric('kvtier_limit{name="limits.event_keys"}') == 1 << 20
        calls.pop().cancel()

        def is_let_in() -> bool:
            with contextlib.suppress(grpc.RpcError):
                return bool(own.snapshot()[1].next_sequence)
            return False

        wait_until(is_let_in, "there is room for one")
        make_engine(daemon).attach().store(to_keys(range(5)))
        wait_until(lambda: metric('kvtier_event_keys_total{kind="stored"}') == 5, "events are counted")
        assert metric('kvtier_event_keys_total{kind="removed"}') == 0
        assert metric("kvtier_event_overflows_total") == 0


def test_a_watcher_that_reads_too_slowly_is_told_and_goes_on_with_what_is_new(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="[limits]\nevents = 64\n")
    engine = make_engine(daemon).attach()
    keys = [number.to_bytes(128, "big") for number in range(8_192)]
    with observer(daemon) as own:
        slow = own.watch()
        next(slow)
        for _ in range(40):  # two megabytes each, and a stream holds some hundred kilobytes
            for first in range(0, len(keys), 256):
                engine.store(keys[first : first + 256], f"store-{first}")
                engine.complete(finished_request_ids=[f"store-{first}"])
            text = daemon.page("/metrics")[1]
            if "kvtier_event_overflows_total 0.0" not in text:
                break
        reply = read_to_overflow(slow)
        assert not reply.events
        engine.store([to_key(1)], "last")
        while not (told := next(slow)).events:
            pass
        assert told.events[0].sequence >= reply.next_sequence


def test_a_snapshot_has_every_chunk_of_every_tier(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    config = (
        '[[tiers]]\ntype = "example"\nname = "spare"\ncapacity = "64MiB"\n'
        f'[[tiers]]\ntype = "filesystem"\nname = "disk"\nroot = "{tmp_path}/root"\ncapacity = "64MiB"\n'
        f'reserve_free = 0.0\nstate_directory = "{tmp_path}/state"\n'
    )
    daemon = start_daemon(pool_bytes=512 * 4096, config=config)
    engine, other = make_engine(daemon).attach(), make_engine(daemon).attach()
    keys = to_keys(range(1_500))
    for first in range(0, len(keys), 100):
        engine.store(keys[first : first + 100], f"store-{first}")
        engine.complete(finished_request_ids=[f"store-{first}"])
        wait_until(partial(_are_below, daemon, first + 100), "all of it is below")
    other.store([to_key(1)])
    resident = {key for key, status in zip(keys, _statuses(engine, keys), strict=True) if status}
    with observer(daemon) as own:
        chunks, last = own.snapshot(namespace_of(engine))
        assert {key for tier, _, key in chunks if tier == "primary"} == resident
        assert {key for tier, _, key in chunks if tier == "spare"} == set(keys)
        assert {key for tier, _, key in chunks if tier == "disk"} == set(keys)
        assert not last.unlisted_tiers
        assert last.exact_sequence >= last.next_sequence
        cleared = admin_pb2.ClearRequest(everything=True, wait_ms=10_000)
        call = own.watch(last.next_sequence, last.boot_id, namespace_of(engine))
        engine.admin.Clear(cleared, timeout=WAIT_S)
        gone = changes_of(read_until_gone(call, len(chunks)))
        assert {(tier, STORED, key) for tier, kind, key in gone if kind == REMOVED} == chunks
        assert own.snapshot()[0] == set()


def _are_below(daemon: DaemonProcess, count: int) -> bool:
    return all(tier.chunks == count for tier in daemon.status().tiers[1:])


def _statuses(engine: RawEngine, keys: Sequence[bytes]) -> list[bool]:
    found = engine.lookup(keys).statuses
    return [status in (1, 2) for status in found]


def read_until_gone(call: WatchCall, count: int) -> list[pb.OffloadingEvent]:
    events: list[pb.OffloadingEvent] = []
    while sum(len(event.keys) for event in events if event.kind == REMOVED) < count:
        events += next(call).events
    return events


def test_a_snapshot_that_is_read_too_slowly_is_ended_and_says_why(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes="64MiB", config="[limits]\nevent_keys = 4000\n")
    engine = make_engine(daemon).attach()
    keys = [number.to_bytes(128, "big") for number in range(16_000)]
    for first in range(0, len(keys), 4_000):
        engine.store(keys[first : first + 4_000], f"store-{first}")
    # Without the probe a stream holds 64 KiB; with it, on a slow machine, all of it in the end.
    with observer(daemon, ("grpc.http2.bdp_probe", 0)) as own:
        call = own.stub.Snapshot(pb.SnapshotRequest(), timeout=WAIT_S)
        next(call)  # two megabytes are to come
        engine.store(to_keys(range(4_100, 8_200)), "more")
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        assert failure_of(raised.value).reason == "EVENTS_GONE"


def test_a_daemon_that_stops_says_so_to_its_watchers(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    engine.prepare_store([to_key(1)])  # a store that goes on: the daemon waits for it
    with observer(daemon) as own:
        call = own.watch()
        next(call)
        daemon.signal(signal.SIGTERM)
        failed = refusal(lambda: [next(call) for _ in range(100)])
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert own.refusal().reason == "DRAINING"
        assert refusal(own.snapshot).reason == "DRAINING"
    engine.close()
    assert daemon.wait() == 0
