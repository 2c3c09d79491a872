"""A unix socket in front of the daemon's: a test can cut its connections, or hold replies back.

Knows nothing of gRPC: bytes go through as they come.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.daemon_process import DaemonProcess

PIECE_BYTES = 1 << 16


class SocketProxy:
    """Forwards connections to a daemon until it is left."""

    def __init__(self, daemon: DaemonProcess, socket_file: Path) -> None:
        self.address = f"unix://{socket_file}"
        self._target = str(daemon.socket)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(socket_file))
        self._listener.listen()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._closing = False
        self._start_thread(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._flowing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def cut(self) -> None:
        """End every connection, on both sides. New ones are taken as before."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):  # the other side was faster
                end.shutdown(socket.SHUT_RDWR)

    def hold_replies(self) -> None:
        """Let nothing of what the daemon says through, until `let_replies`; what engines say goes on."""
        self._flowing.clear()

    def let_replies(self) -> None:
        """Let through what was held back, and what comes."""
        self._flowing.set()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            daemon = socket.socket(socket.AF_UNIX)
            try:
                daemon.connect(self._target)
            except OSError:
                client.close()
                daemon.close()
                continue
            with self._lock:
                self._sockets += [client, daemon]
            # Each end is closed by the thread that reads from it.
            self._start_thread(lambda here=client, there=daemon: self._pump(here, there))
            self._start_thread(lambda here=daemon, there=client: self._pump(here, there, replies=True))

    def _pump(self, here: socket.socket, there: socket.socket, *, replies: bool = False) -> None:
        with here, contextlib.suppress(OSError):
            while data := here.recv(PIECE_BYTES):
                if replies:
                    self._flowing.wait()
                there.sendall(data)
        with contextlib.suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)

    def _start_thread(self, run: object) -> None:
        thread = threading.Thread(target=run, name="socket-proxy", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
