"""The engine goes on when there is no daemon, or one that does not speak."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtier.v1 import offload_pb2 as pb
from kvtier_client import (
    ClientOptions,
    LoadReportItem,
    LookupStatus,
    OffloadClient,
    ReqContext,
    StoreReportItem,
    StoreVerdict,
)
from kvtier_client.lookups import PendingLookup

from . import scripted_peer
from .builders import KEYS, Notes, make_client, wait_until
from .scripted_peer import Context, Peer

CTX = ReqContext("r1", {"max_offload_tokens": 5})
LONG_S = 10
"""Far above every deadline: whoever takes longer hangs."""


def call_everything(client: OffloadClient) -> None:
    """Make every call of an engine; all must miss, none may raise or hang."""
    started = time.monotonic()
    answer = client.lookup(CTX, KEYS)
    assert list(answer.statuses) == [LookupStatus.MISS] * len(KEYS)
    assert answer.reason
    assert not answer.lease_id
    assert not answer.leased
    pending = client.lookup_async(CTX, KEYS)
    pending.wait(LONG_S)
    assert list(pending.answer().statuses) == [LookupStatus.MISS] * len(KEYS)
    pending.cancel()
    assert client.prepare_load(CTX, KEYS) is None
    assert client.prepare_store(CTX, KEYS).verdicts == [StoreVerdict.FULL] * len(KEYS)
    client.request_credits(0, 8)
    client.touch(CTX, KEYS)
    client.announce("r1", [1], [1], [KEYS[0]])
    client.start_load(1, 2, [1])
    client.report_store(StoreReportItem(0, [1], [1], [KEYS[0]]))
    client.report_load(LoadReportItem(2))
    client.return_credits([1], [1])
    client.release(1)
    client.keep_lease(1)
    assert not client.lease_valid(1)
    client.finish("r1")
    client.flush()
    assert not client.flush_and_wait(0.01)
    assert not client.ready
    assert time.monotonic() - started < LONG_S


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def mute_socket(directory: Path) -> Iterator[str]:
    """A socket that accepts and never says a word."""
    path = directory / "mute.sock"
    accepted = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def accept() -> None:
            while True:
                try:
                    accepted.append(listening.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"unix://{path}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in accepted:
        connection.close()


def test_without_a_daemon_every_call_misses(directory: Path) -> None:
    client = make_client(f"unix://{directory}/nobody.sock")
    call_everything(client)
    client.start()
    wait_until(lambda: "no daemon answers" in client.away_reason, "the client says why it is away")
    assert "kvtier serve" in client.away_reason
    call_everything(client)
    assert not client.wait_attached(0)
    client.close()
    call_everything(client)
    assert client.lookup(CTX, KEYS).reason == "closed"
    client.close()


def test_a_daemon_that_comes_later_is_found_at_the_next_attempt(directory: Path) -> None:
    options = ClientOptions(prepare_deadline_ms=5000, reconnect_min_ms=10, reconnect_max_ms=20)
    client = make_client(f"unix://{directory}/s", options=options)
    client.start()
    wait_until(lambda: client.stats.snapshot()["rpc_describe"] >= 20, "the client asks again and again")
    with Peer(directory / "s", directory / "pool"):
        asked = client.stats.snapshot()["rpc_describe"]
        assert client.wait_attached(LONG_S)
        # One may have been on its way before the socket was there.
        assert client.stats.snapshot()["rpc_describe"] <= asked + 2
        client.close()


def test_a_socket_that_accepts_and_says_nothing_costs_the_engine_nothing(mute_socket: str) -> None:
    client = make_client(mute_socket)
    client.start()
    wait_until(lambda: client.stats.snapshot()["rpc_describe"] >= 2, "the client asks again")
    call_everything(client)
    assert client.stats.snapshot()["rpc_lookup"] == 0
    assert client.away_reason
    client.close()


def test_a_client_that_was_never_started_can_be_closed(directory: Path) -> None:
    client = make_client(f"unix://{directory}/nobody.sock")
    client.close()
    client.start()
    assert client.lookup(CTX, KEYS).reason == "closed"


def test_three_missed_deadlines_open_the_breaker_and_only_an_answered_probe_closes_it(
    directory: Path,
) -> None:
    stalled = threading.Event()
    go_on = threading.Event()

    def stall(request: object, context: Context) -> pb.DescribeResponse:
        if stalled.is_set():
            go_on.wait(LONG_S)
        return pb.DescribeResponse(boot_id=peer.boot_id, pool=peer.pool)

    def stall_lookup(request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        if stalled.is_set():
            go_on.wait(LONG_S)
        return pb.LookupResponse(
            boot_id=peer.boot_id, statuses=bytes([pb.LOOKUP_STATUS_MISS]) * len(request.keys)
        )

    with Peer(directory / "s", directory / "pool") as peer:
        peer.scripts |= {"Describe": stall, "Lookup": stall_lookup}
        # A generous deadline: on a busy machine an answer must not miss it by itself.
        client = make_client(peer.address, options=ClientOptions(lookup_deadline_ms=300))
        client.start()
        assert client.wait_attached(LONG_S)
        assert client.lookup(CTX, KEYS).reason == ""
        stalled.set()
        assert [client.lookup(CTX, KEYS).reason for _ in range(4)] == ["deadline"] * 3 + ["breaker_open"]
        asked = len(peer.asked("Lookup"))
        call_everything(client)
        assert len(peer.asked("Lookup")) == asked, "an open breaker lets nothing through"
        assert client.attached
        assert not client.ready
        go_on.set()
        wait_until(lambda: client.ready, "the background thread closes the breaker")
        assert client.lookup(ReqContext("r2"), KEYS).reason == ""
        assert client.stats.snapshot()["breaker_opens"] == 1
        client.close()


def stall_lookups(peer: Peer) -> threading.Event:
    """Have the peer answer no lookup until the event is set."""
    go_on = threading.Event()

    def stall(request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        go_on.wait(LONG_S)
        return pb.LookupResponse(
            boot_id=peer.boot_id, statuses=bytes([pb.LOOKUP_STATUS_MISS]) * len(request.keys)
        )

    peer.scripts["Lookup"] = stall
    return go_on


def give_up_when_overdue(lookup: PendingLookup) -> None:
    wait_until(lambda: lookup.age_s >= 0.1, "the lookup is overdue")
    lookup.cancel()


def test_lookups_that_the_engine_gives_up_at_their_deadline_open_the_breaker_too(directory: Path) -> None:
    with Peer(directory / "s", directory / "pool") as peer:
        go_on = stall_lookups(peer)
        client = make_client(peer.address, options=ClientOptions(lookup_deadline_ms=100))
        client.start()
        assert client.wait_attached(LONG_S)
        for number in range(3):
            assert client.ready, "the daemon answers everything else in time"
            pending = client.lookup_async(ReqContext(f"r{number}"), KEYS)
            give_up_when_overdue(pending)
        assert client.stats.snapshot()["deadline_misses"] == 3
        assert client.stats.snapshot()["breaker_opens"] == 1
        go_on.set()
        client.close()


@pytest.mark.parametrize("num_keys", [1, 2048, 8192])
def test_a_stopped_daemon_costs_three_deadlines_however_much_is_asked(directory: Path, num_keys: int) -> None:
    # More than the socket buffers hold: a message that waits there must not hold the call past its deadline.
    keys = [number.to_bytes(32) + bytes(4) for number in range(num_keys)]
    with peer_process(directory) as process:
        client = make_client(f"unix://{directory}/s", options=ClientOptions(prepare_deadline_ms=2000))
        client.start()
        assert client.wait_attached(LONG_S)
        assert client.lookup(CTX, keys, timeout_s=LONG_S).reason == ""
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        started = time.monotonic()
        pending = [client.lookup_async(ReqContext(f"r{number}"), keys) for number in range(10)]
        reasons = {client.lookup(ReqContext(f"s{number}"), keys).reason for number in range(10)}
        reasons |= {lookup.answer().reason for lookup in pending}
        assert reasons == {"deadline", "breaker_open"}
        assert time.monotonic() - started < LONG_S
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: client.ready, "the daemon goes on and is asked again")
        assert client.lookup(CTX, keys, timeout_s=LONG_S).reason == ""
        client.close()


@contextmanager
def peer_process(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a peer in a process of its own."""
    script = Path(scripted_peer.__file__)
    with subprocess.Popen(
        [sys.executable, str(script), str(directory / "s"), str(directory / "pool")],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.communicate()


def test_a_deadline_shorter_than_the_usual_one_does_not_open_the_breaker(directory: Path) -> None:
    with Peer(directory / "s", directory / "pool") as peer:
        go_on = stall_lookups(peer)
        client = make_client(peer.address)
        client.start()
        assert client.wait_attached(LONG_S)
        reasons = [client.lookup(CTX, KEYS, timeout_s=0.001).reason for _ in range(5)]
        assert reasons == ["deadline"] * 5
        assert client.ready
        go_on.set()
        client.close()


def test_the_child_of_a_fork_only_misses_and_the_parent_goes_on(directory: Path) -> None:
    with Peer(directory / "s", directory / "pool") as peer:
        notes = Notes()
        client = make_client(peer.address, listener=notes)
        client.start()
        assert client.wait_attached(LONG_S)
        assert client.lookup(CTX, KEYS).reason == ""
        owners = list((directory / "pool" / "owners").iterdir())
        in_flight = client.lookup_async(CTX, KEYS)
        with client._gate.lock:  # a lock that some thread of the parent may hold at the fork
            child = os.fork()
            if not child:
                status = 1
                try:
                    call_everything(client)
                    in_flight.answer()
                    in_flight.cancel()
                    assert client.lookup(CTX, KEYS).reason == "forked"
                    assert not client.attached
                    assert client.session is None
                    assert not client.reset()
                    client.close()
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert list((directory / "pool" / "owners").iterdir()) == owners, "the child let the lock file go"
        assert client.lookup(CTX, KEYS).reason == ""
        assert notes.names() == ["attached"]
        client.close()
        assert not list((directory / "pool" / "owners").iterdir())


def test_lease_ids_are_never_zero_and_never_the_same(directory: Path) -> None:
    clients = [make_client(f"unix://{directory}/nobody.sock") for _ in range(20)]
    ids: list[int] = []

    def take(client: OffloadClient) -> None:
        ids.extend([client.new_lease_id() for _ in range(500)])

    threads = [threading.Thread(target=take, args=(client,)) for client in clients for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == len(ids) == 20_000
    assert all(0 < lease_id < 1 << 64 for lease_id in ids)
