"""Connections in numbers: idle ones, ones that come and go, and ones that never say who they are."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.certificate_authority import CertificateAuthority, Issued, tls_section
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, wait_until
from tests.raw_engine import to_key

from kvtier_server.grpc_server import HANDSHAKE_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a gRPC client begins: HTTP/2's first words and empty settings. A server answers with its own."""

HALF_HELLO = bytes((22, 3, 1)) + struct.pack("!H", 512) + bytes((1, 0, 1, 252, 3, 3)) + bytes(100)
"""The beginning of a TLS handshake that goes on never."""

Connect = Callable[[], socket.socket]


def to_socket(daemon: DaemonProcess) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(WAIT_S)
    connection.connect(str(daemon.socket))
    return connection


def greeted(connection: socket.socket) -> socket.socket:
    connection.sendall(PREFACE)
    assert connection.recv(9), "the daemon answers"
    return connection


def assert_files_are_back(daemon: DaemonProcess, fds: int, threads: int) -> None:
    wait_until(lambda: daemon.num_fds() <= fds + 2, "the files of the connections are closed")
    wait_until(lambda: daemon.num_threads() <= threads + 2, "no thread is left")


def counted(daemon: DaemonProcess, make_engine: MakeEngine) -> tuple[int, int]:
    """Files and threads of a daemon that has answered everything once."""
    with make_engine(daemon) as engine:
        engine.attach().store([to_key(1)])
    greeted(to_socket(daemon)).close()
    wait_until(lambda: not daemon.status().sessions, "the engine is gone")
    return daemon.num_fds(), daemon.num_threads()


@pytest.mark.parametrize("count", [200, pytest.param(1_000, marks=pytest.mark.slow)])
def test_idle_connections_keep_nobody_from_being_served(
    start_daemon: StartDaemon, make_engine: MakeEngine, count: int
) -> None:
    daemon = start_daemon()
    fds, threads = counted(daemon, make_engine)
    with ExitStack() as idle:
        for _ in range(count):
            idle.enter_context(greeted(to_socket(daemon)))
        assert daemon.num_fds() >= count
        with make_engine(daemon) as engine:
            engine.attach().store([to_key(2)])
            assert len(engine.lookup([to_key(2)]).statuses) == 1
        assert daemon.health() == "SERVING"
    assert_files_are_back(daemon, fds, threads)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_connections_that_come_and_go_leave_nothing(
    start_daemon: StartDaemon, make_engine: MakeEngine, count: int
) -> None:
    daemon = start_daemon()
    fds, threads = counted(daemon, make_engine)
    with make_engine(daemon) as engine:
        engine.attach()
        for number in range(count):
            connection = to_socket(daemon)
            if number % 2:
                greeted(connection)  # the others leave without a word
            connection.close()
            if number % 100 == 0:
                engine.lookup([to_key(number)])
    assert_files_are_back(daemon, fds, threads)


def test_a_daemon_takes_more_connections_than_the_shell_allows_files(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    """1,024 files is what most systems give a process that asks for no more."""
    daemon = start_daemon()
    limits = Path(f"/proc/{daemon.pid}/limits").read_text()
    soft, hard = next(line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files"))
    assert int(soft) == min(int(hard), 65_536)
    with make_engine(daemon) as engine:
        engine.attach()


@pytest.fixture
def tls_daemon(start_daemon: StartDaemon, tmp_path: Path) -> tuple[DaemonProcess, Issued]:
    authority = CertificateAuthority(tmp_path / "ca")
    config = tls_section(authority.issue_for_daemon(), tenants={}, observers='"watch"')
    return start_daemon(config=config), authority.issue("watch")


@pytest.mark.parametrize("said", [b"", HALF_HELLO, b"GET / HTTP/1.1\r\n"])
def test_handshakes_that_are_never_finished_hold_up_nobody_and_are_ended(
    tls_daemon: tuple[DaemonProcess, Issued], make_engine: MakeEngine, said: bytes
) -> None:
    daemon, watch = tls_daemon
    with watch.channel(daemon.tcp_port) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    fds, threads = counted(daemon, make_engine)
    with ExitStack() as halves:
        opened = time.monotonic()
        for _ in range(500):
            half = halves.enter_context(socket.create_connection(("localhost", daemon.tcp_port), WAIT_S))
            half.sendall(said)
        with watch.channel(daemon.tcp_port) as channel:  # a new connection, among them
            stub = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S, wait_for_ready=True)
        with make_engine(daemon) as engine:
            engine.attach().store([to_key(3)])
        # The client's ends are still open: it is the daemon that closes.
        assert_files_are_back(daemon, fds, threads)
        assert time.monotonic() - opened < 5 * HANDSHAKE_S
    assert daemon.log_text().count("\n") < 100, "strangers do not fill the log"
