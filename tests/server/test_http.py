from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kvtier_server.http import MAX_CONNECTIONS, MAX_TICK_AGE_S, HttpServer
from kvtier_server.metrics import Metrics
from kvtier_server.stats import DaemonState, StatsSnapshot, TierStats


class Daemon:
    """The two things the pages look at."""

    def __init__(self) -> None:
        self.metrics = Metrics(version="1.2.3", limits={})
        self.phase = "serving"
        self.tick_age_s = 0.1

    def state(self) -> DaemonState:
        return DaemonState(self.phase, self.tick_age_s)


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def server(daemon: Daemon) -> Iterator[HttpServer]:
    server = HttpServer("127.0.0.1:0", daemon.metrics, daemon.state)
    server.start()
    yield server
    server.stop()


def get(server: HttpServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()
    finally:
        connection.close()


def test_metrics_are_served_in_prometheus_own_format(server: HttpServer) -> None:
    status, content_type, body = get(server, "/metrics?name[]=x")
    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    assert "kvtier_build_info{" in body


@pytest.mark.parametrize(
    ("address", "host"),
    [("127.0.0.1:0", "127.0.0.1"), ("127.0.0.2:0", "127.0.0.2"), ("0.0.0.0:0", "127.0.0.1")],
)
def test_the_url_is_one_that_this_machine_reaches(daemon: Daemon, address: str, host: str) -> None:
    server = HttpServer(address, daemon.metrics, daemon.state)
    server.start()
    assert server.url == f"http://{host}:{server.port}"
    connection = http.client.HTTPConnection(host, server.port, timeout=30)
    connection.request("GET", "/livez")
    assert connection.getresponse().status == 200
    connection.close()
    server.stop()


def test_the_daemon_lives_while_its_loop_comes_round(server: HttpServer, daemon: Daemon) -> None:
    assert get(server, "/livez")[0] == 200
    daemon.tick_age_s = MAX_TICK_AGE_S + 1
    status, _, body = get(server, "/livez")
    assert (status, "6.0 s" in body) == (503, True)


def test_it_is_ready_only_while_it_serves(server: HttpServer, daemon: Daemon) -> None:
    for phase, status in (("starting", 503), ("serving", 200), ("degraded", 200), ("draining", 503)):
        daemon.phase = phase
        assert get(server, "/readyz")[::2] == (status, f"{phase}\n")
    daemon.phase, daemon.tick_age_s = "serving", MAX_TICK_AGE_S + 1
    assert get(server, "/readyz")[0] == 503


def test_the_debug_page_is_the_snapshot_as_json(server: HttpServer, daemon: Daemon) -> None:
    daemon.metrics.publish(StatsSnapshot(boot_id="b1", tiers=(TierStats("primary", chunks=3),)))
    status, content_type, body = get(server, "/debug/status")
    assert (status, content_type) == (200, "application/json")
    shown = json.loads(body)
    assert (shown["boot_id"], shown["tiers"][0]["chunks"]) == ("b1", 3)


def test_an_unknown_page_names_the_known_ones_and_other_methods_are_refused(server: HttpServer) -> None:
    status, _, body = get(server, "/secret")
    assert (status, "/metrics" in body) == (404, True)
    assert get(server, "/metrics", method="POST")[0] == 501


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 30)


def is_closed(connection: socket.socket, wait_s: float) -> bool:
    """Wait so long at most for the end of a connection on which nothing is sent."""
    connection.settimeout(wait_s)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def trickle(connections: list[socket.socket]) -> None:
    """Send one byte more of each request, whose line never ends."""
    for connection in connections:
        with contextlib.suppress(OSError):  # it has been cut
            connection.sendall(b"x")


def test_silent_connections_make_room_the_oldest_first(server: HttpServer) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS)]
        for oldest in silent[:3]:
            assert get(server, "/livez")[0] == 200
            assert is_closed(oldest, 30)
            stack.enter_context(connect(server))
        # A page's own place is free a moment after its last byte: who comes before takes another's.
        assert not is_closed(silent[-1], 0.01)


def test_connections_that_trickle_do_not_silence_the_pages(server: HttpServer) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS)]
        for _ in range(3 * MAX_CONNECTIONS):
            trickle(connections)
            assert get(server, "/livez")[::2] == (200, "ok\n")


def test_a_request_that_trickles_in_has_its_time_and_no_more(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier_server.http.REQUEST_S", 0.3)
    with connect(server) as connection:
        begin = time.monotonic()
        while not is_closed(connection, 0.05):
            assert time.monotonic() < begin + 30, "it goes on for ever"
            trickle([connection])
        assert time.monotonic() >= begin + 0.3


def test_who_is_being_answered_keeps_its_place_before_the_silent_ones(daemon: Daemon) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()

    def state() -> DaemonState:
        is_asked.set()
        assert may_answer.wait(30)
        return daemon.state()

    server = HttpServer("127.0.0.1:0", daemon.metrics, state)
    server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        stack.callback(may_answer.set)
        asking = stack.enter_context(connect(server))
        asking.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert is_asked.wait(30)
        silent = [stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS)]
        assert is_closed(silent[0], 30), "it made room for the last one"
        may_answer.set()
        assert asking.recv(4096).startswith(b"HTTP/1.0 200 ")


def test_a_request_without_end_is_refused(server: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(b"GET /" + b"x" * 65536 + b" HTTP/1.1\r\n\r\n")
        assert b" 414 " in connection.recv(4096)


def test_a_taken_port_is_one_clear_error(server: HttpServer, daemon: Daemon) -> None:
    second = HttpServer(f"127.0.0.1:{server.port}", daemon.metrics, daemon.state)
    with pytest.raises(
        OSError, match=f"cannot serve metrics on 127.0.0.1:{server.port}: Address already in use"
    ):
        second.start()
    second.stop()


def test_a_silent_client_does_not_hold_up_the_end(daemon: Daemon) -> None:
    server = HttpServer("127.0.0.1:0", daemon.metrics, daemon.state)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port), 30):
        server.stop()
        server.stop()
    with pytest.raises(AssertionError, match="before start"):
        _ = server.port
