"""Watchers that come and go by the thousand, or are stopped: the daemon holds no more than before."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import (
    CHANNEL_OPTIONS,
    WAIT_S,
    DaemonProcess,
    child_environment,
    state_of,
    wait_until,
)
from tests.raw_engine import RawEngine, to_keys

from kvtier.v1 import events_pb2 as pb
from kvtier.v1 import events_pb2_grpc

AT_ONCE, TIMES = 50, 20
MUCH_BYTES = 64 << 20
MOST_GROWTH_MIB = 24.0

WATCHER = """
import sys, grpc
from kvtier.v1 import events_pb2 as pb, events_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    for reply in events_pb2_grpc.EventsServiceStub(channel).Watch(pb.WatchRequest()):
        print("overflow" if reply.overflow else "told", flush=True)
"""


def own_memory_mib(daemon: DaemonProcess) -> float:
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def num_watchers(daemon: DaemonProcess) -> int:
    lines = daemon.page("/metrics")[1].splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith("kvtier_watchers "))


def watch_and_leave(daemon: DaemonProcess, number: int) -> None:
    """Open streams of both kinds on connections of their own; leave politely, or cut the connection."""
    channels = [grpc.insecure_channel(daemon.address, options=CHANNEL_OPTIONS) for _ in range(AT_ONCE)]
    calls = []
    for index, channel in enumerate(channels):
        stub = events_pb2_grpc.EventsServiceStub(channel)
        is_snapshot = index % 10 == 0
        call = stub.Snapshot(pb.SnapshotRequest()) if is_snapshot else stub.Watch(pb.WatchRequest())
        calls.append(call)
    for call in calls:
        next(call)
    if number % 2:
        for call in calls:
            call.cancel()
    for channel in channels:
        channel.close()
    wait_until(lambda: num_watchers(daemon) == 0, "all have left", timeout_s=2 * WAIT_S)


def test_a_thousand_watchers_that_come_and_go_leave_nothing_open(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes="16MiB")
    engine = make_engine(daemon).attach()
    for first in (0, 2_000):
        engine.store(to_keys(range(first, first + 2_000)), f"store-{first}")
    for number in range(2):
        watch_and_leave(daemon, number)
    fds, threads, memory_mib = daemon.num_fds(), daemon.num_threads(), own_memory_mib(daemon)
    for number in range(TIMES):
        watch_and_leave(daemon, number)
        engine.store(to_keys(range(5_000 + number * 10, 5_010 + number * 10)), f"request-{number}")
    wait_until(lambda: daemon.num_fds() <= fds, f"no more than {fds} files are open")
    wait_until(lambda: daemon.num_threads() <= threads, f"no more than {threads} threads run")
    assert own_memory_mib(daemon) - memory_mib < MOST_GROWTH_MIB
    assert "call_failed" not in daemon.log_text()


@contextmanager
def watcher_process(daemon: DaemonProcess) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHER, daemon.address],
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)
        assert process.stdout is not None
        process.stdout.close()


def store_batches(engine: RawEngine, keys: Sequence[bytes], num_bytes: int) -> None:
    """Store until so many bytes of events have passed."""
    passed = 0
    while passed < num_bytes:
        for first in range(0, len(keys), 256):
            some = keys[first : first + 256]
            request = f"store-{passed}"
            engine.store(some, request)
            engine.complete(finished_request_ids=[request])
            passed += 2 * sum(map(len, some))


def test_a_stopped_watcher_does_not_grow_the_daemon_and_is_told_what_it_missed(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="[limits]\nevent_keys = 20000\n")
    engine = make_engine(daemon).attach()
    keys = [number.to_bytes(128, "big") for number in range(8_192)]
    store_batches(engine, keys, MUCH_BYTES // 8)  # until the log is full
    with watcher_process(daemon) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state_of(process.pid) == "T", "it is stopped")
        store_batches(engine, keys, MUCH_BYTES // 8)  # until the stream holds what it can hold
        memory_mib = own_memory_mib(daemon)
        store_batches(engine, keys, MUCH_BYTES)
        assert own_memory_mib(daemon) - memory_mib < MOST_GROWTH_MIB
        process.send_signal(signal.SIGCONT)
        while (line := process.stdout.readline()) == "told\n":
            pass
        assert line == "overflow\n"
        engine.store(to_keys(range(3)), "and goes on")
        assert process.stdout.readline() == "told\n"
