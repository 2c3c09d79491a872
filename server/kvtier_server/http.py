"""The pages for machines: /metrics, /livez, /readyz and /debug/status, on a port and threads of their own.

Reads the published snapshot and nothing else: when the daemon hangs, it still answers, and says so.
Read-only and without authentication: it listens on loopback unless it is told otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from kvtier_server.address import parse_host_port
from kvtier_server.metrics import CONTENT_TYPE, Metrics
from kvtier_server.stats import PHASE_DEGRADED, PHASE_SERVING, DaemonState

MAX_CONNECTIONS = 8
"""Served at once; a scraper and two probes need three. For one more the oldest makes room."""
REQUEST_S = 5.0
"""Longest time from taking a connection to its last byte, whatever trickles in or out meanwhile."""
ROOM_S = 1.0
"""Longest wait for a connection that was cut to make room: a page that is being made is made to its end."""
MAX_TICK_AGE_S = 5.0
"""A tick comes several times a second. One that is this late hangs, and only a restart helps."""

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"


class _Page(NamedTuple):
    status: HTTPStatus
    content_type: str
    body: bytes


class HttpServer:
    """The HTTP side of a daemon. `state` is called on request threads and must not block."""

    def __init__(self, address: str, metrics: Metrics, state: Callable[[], DaemonState]) -> None:
        self._host, self._wanted_port = parse_host_port(address)
        self._pages: dict[str, Callable[[], _Page]] = {
            "/metrics": lambda: _Page(HTTPStatus.OK, CONTENT_TYPE, metrics.render()),
            "/livez": lambda: _livez(state()),
            "/readyz": lambda: _readyz(state()),
            "/debug/status": lambda: _debug_status(metrics),
        }
        self._server: _BoundedServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Bind and serve on a thread. Raises OSError, naming the address, if it is taken."""
        assert self._server is None, "started twice"
        try:
            self._server = _BoundedServer(self._host, self._wanted_port, self._pages)
        except OSError as error:
            where = f"{self._host}:{self._wanted_port}"
            raise OSError(error.errno, f"cannot serve metrics on {where}: {error.strerror}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.25}, name="kvtier-http", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that is listened on; differs from the configured one if that was 0."""
        assert self._server is not None, "asked before start"
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where its pages are, as this machine reaches them."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def stop(self) -> None:
        """Stop listening. Requests that are being answered are not waited for. A second call does nothing."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = self._thread = None


class _Visit:
    """One connection. `has_asked`: its request is complete, and is being answered."""

    __slots__ = ("end_s", "has_asked")

    def __init__(self, end_s: float) -> None:
        self.end_s = end_s
        self.has_asked = False


_Request = socket.socket | tuple[bytes, socket.socket]


class _BoundedServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a silent client must not hold up the end of the daemon
    request_queue_size = 16

    def __init__(self, host: str, port: int, pages: dict[str, Callable[[], _Page]]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages = pages
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        """Held to cut a connection, and to let one go before it is closed: its file number may be reused."""
        self._visits: dict[_Request, _Visit] = {}
        """By age."""
        super().__init__((host, port), _Handler)

    def process_request(self, request: _Request, client: object) -> None:
        if not self._free.acquire(blocking=False):
            self._make_room()
            if not self._free.acquire(timeout=ROOM_S):
                self.shutdown_request(request)
                return
        with self._lock:
            self._visits[request] = _Visit(time.monotonic() + REQUEST_S)
        try:
            super().process_request(request, client)
        except BaseException:  # no thread could be started, so none will release
            self._free.release()
            raise

    def process_request_thread(self, request: _Request, client: object) -> None:
        try:
            super().process_request_thread(request, client)
        finally:
            self._free.release()

    def service_actions(self) -> None:
        """Cut what has had its time. Called several times a second, and after each connection."""
        now = time.monotonic()
        with self._lock:
            for request, visit in self._visits.items():
                if now < visit.end_s:
                    break
                _cut(request)

    def shutdown_request(self, request: _Request) -> None:
        with self._lock:
            self._visits.pop(request, None)
        super().shutdown_request(request)

    def answers(self, request: _Request) -> None:
        """Note that a request is complete: whoever has not asked yet makes room before it."""
        with self._lock:
            self._visits[request].has_asked = True

    def _make_room(self) -> None:
        with self._lock:
            silent = (request for request, visit in self._visits.items() if not visit.has_asked)
            oldest = next(silent, None) or next(iter(self._visits), None)
            if oldest is not None:
                _cut(oldest)

    def handle_error(self, request: object, client: object) -> None:
        """Say nothing: a client that went away is its own business, and pages do not raise."""


def _cut(request: _Request) -> None:
    """Let reads and writes of a connection end; the thread that serves it closes it."""
    assert isinstance(request, socket.socket), request  # a pair is what servers of datagrams get
    with contextlib.suppress(OSError):  # the client has gone by itself
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _BoundedServer
    server_version = "kvtier"
    sys_version = ""

    def do_GET(self) -> None:
        self.server.answers(self.request)
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            known = ", ".join(self.server.pages)
            self._send(_Page(HTTPStatus.NOT_FOUND, _TEXT, f"no such page; there are {known}\n".encode()))
        else:
            self._send(page())

    def _send(self, page: _Page) -> None:
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        self.wfile.write(page.body)

    def log_message(self, *_: object) -> None:
        """Say nothing: a probe every second is no news."""


def _livez(state: DaemonState) -> _Page:
    if state.tick_age_s > MAX_TICK_AGE_S:
        text = f"the daemon's loop has not come round for {state.tick_age_s:.1f} s\n"
        return _Page(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, text.encode())
    return _Page(HTTPStatus.OK, _TEXT, b"ok\n")


def _readyz(state: DaemonState) -> _Page:
    # A degraded daemon (a tier failed, the pool smaller than asked) still grants and serves.
    hangs = state.tick_age_s > MAX_TICK_AGE_S
    ready = state.phase in (PHASE_SERVING, PHASE_DEGRADED) and not hangs
    status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
    return _Page(status, _TEXT, f"{'hangs' if hangs else state.phase}\n".encode())


def _debug_status(metrics: Metrics) -> _Page:
    body = json.dumps(dataclasses.asdict(metrics.snapshot), indent=2)
    return _Page(HTTPStatus.OK, _JSON, body.encode() + b"\n")
