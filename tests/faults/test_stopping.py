"""A daemon that is to stop while its peers do not read what they are sent: it stops, and nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, child_environment, state_of, wait_until
from tests.raw_engine import RawEngine, namespace, to_keys

from kvtier.v1 import offload_pb2 as pb

PROMISED_S = 10 + 15 + 5
"""For copies, tiers and all else; a daemon that has neither needs 2 s."""

WATCHER = """
import sys, grpc
from kvtier.v1 import events_pb2 as pb, events_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    for _ in events_pb2_grpc.EventsServiceStub(channel).Watch(pb.WatchRequest()):
        print("told", flush=True)
"""

KEYS = to_keys(range(100))
FACTS = namespace(weights_id="stopped")

MUCH_BYTES = 8 << 20
"""Of events: far more than a stream and its socket hold."""

NUM_CALLS, AT_ONCE = 2_000, 100
"""The answers to so many do not fit into a socket that nobody reads; so many are let in at once."""


def events(daemon: DaemonProcess, *names: str) -> list[str]:
    """Which of these lines its log has, in their order."""
    lines = (json.loads(line) for line in daemon.log_text().splitlines() if line.startswith("{"))
    return [line["event"] for line in lines if line["event"] in names]


def store_much(engine: RawEngine) -> None:
    keys = [number.to_bytes(128, "big") for number in range(4_096)]
    passed = 0
    while passed < MUCH_BYTES:
        for first in range(0, len(keys), 256):
            some = keys[first : first + 256]
            engine.store(some, f"store-{passed}")
            engine.complete(finished_request_ids=[f"store-{passed}"])
            passed += 2 * sum(map(len, some))


@contextmanager
def stopped_watcher(daemon: DaemonProcess, engine: RawEngine) -> Iterator[None]:
    """A watcher's process that was stopped, and then much has happened."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHER, daemon.address],
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "told\n"
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state_of(process.pid) == "T", "it is stopped")
        store_much(engine)
        yield
    finally:
        process.kill()
        process.wait(WAIT_S)
        process.stdout.close()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def call_headers(path: str) -> bytes:
    """The headers of a gRPC call, none of them compressed."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    strings = [text.encode() for field in fields.items() for text in field]
    pairs = zip(strings[::2], strings[1::2], strict=True)
    return b"".join(b"\0" + bytes((len(n),)) + n + bytes((len(v),)) + v for n, v in pairs)


@contextmanager
def silent_caller(daemon: DaemonProcess, _: RawEngine) -> Iterator[None]:
    """A connection that asks many times where the pool is, and reads no answer."""
    method = "OffloadService/Describe"
    sample = f'kvtier_rpc_duration_seconds_count{{code="OK",method="{method}"}} '

    def num_answered() -> float:
        lines = daemon.page("/metrics")[1].splitlines()
        return next(float(line.removeprefix(sample)) for line in lines if line.startswith(sample))

    def wait_for_answers(number: float) -> None:
        wait_until(lambda: num_answered() >= number, f"{number:.0f} calls are answered")

    before = num_answered()
    headers = call_headers(f"/kvtier.v1.{method}")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        connection.connect(os.fspath(daemon.socket))
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        for number in range(NUM_CALLS):
            stream = 2 * number + 1
            connection.sendall(frame(1, 4, stream, headers) + frame(0, 1, stream, bytes(5)))
            if number % AT_ONCE == 0:
                wait_for_answers(before + number + 1)
        yield


def start_again_and_find(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    """Start the next daemon: it has kept what was stored last."""
    daemon.start()
    assert "chunks kept" in daemon.out_text()
    again = make_engine(daemon, facts=FACTS).attach()
    assert set(again.lookup(KEYS).statuses) == {pb.LOOKUP_STATUS_HIT}


Peer = Callable[[DaemonProcess, RawEngine], AbstractContextManager[None]]


@pytest.mark.parametrize("peer", [stopped_watcher, silent_caller])
def test_a_peer_that_does_not_read_does_not_hold_up_the_end_and_nothing_is_lost(
    start_daemon: StartDaemon, make_engine: MakeEngine, peer: Peer
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon, facts=FACTS).attach()
    with peer(daemon, engine):
        engine.store(KEYS, "the last one")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(PROMISED_S) == 0
        assert events(daemon, "draining", "connections_cut", "stopped", "connections_hang") == [
            "draining",
            "connections_cut",
            "stopped",
        ]
        assert "kvtier stopped." in daemon.out_text()
        assert not daemon.socket.exists()
    start_again_and_find(daemon, make_engine)


def test_without_a_file_to_cut_connections_by_the_process_ends_all_the_same(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon, facts=FACTS).attach()
    with stopped_watcher(daemon, engine):
        engine.store(KEYS, "the last one")
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, hard))
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(PROMISED_S) == 0
        assert events(daemon, "connections_not_cut", "connections_cut", "stopped", "connections_hang") == [
            "connections_not_cut",
            "stopped",
            "connections_hang",
        ]
        assert not daemon.socket.exists()
    start_again_and_find(daemon, make_engine)


def test_drain_wait_returns_while_a_watcher_is_stopped(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    with stopped_watcher(daemon, make_engine(daemon).attach()):
        command = [sys.executable, "-m", "kvtier_server", "admin", "drain", "--wait", "--yes"]
        drained = subprocess.run(
            [*command, "--address", daemon.address],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=PROMISED_S,
            check=False,
        )
        assert (drained.returncode, drained.stdout) == (0, "the daemon is gone\n"), drained.stderr
        assert daemon.wait() == 0
