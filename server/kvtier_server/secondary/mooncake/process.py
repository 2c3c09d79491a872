"""One helper process, from the daemon's side: begun, asked, and ended when it does not answer.

Owns the process, its end of the socket, and who waits for which answer; what it does is `helper.py`'s.
A request that fails does so after the process is gone: until then it might still write into the pool.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count
from threading import Event, Lock, Thread

from kvtier_server.secondary.mooncake.wire import (
    MAX_BYTES,
    READY,
    Operation,
    Request,
    pack_request,
    unpack_answer,
)

logger = logging.getLogger(__name__)

KEPT_LINES = 20
"""Of what the engine writes: enough to say why it would not start."""

_MODULE = "kvtier_server.secondary.mooncake.helper"


class _Waiting:
    """Somebody who waits for an answer."""

    __slots__ = ("code", "event")

    def __init__(self) -> None:
        self.event = Event()
        self.code: int | None = None


class Helper:
    """A running helper. Any thread may ask and kill; the thread that makes it must outlive it.

    (The kernel tells the helper of the end of the thread that began it, as if it were the daemon's.)
    """

    def __init__(
        self, role: str, settings: Mapping[str, object], fds: Sequence[int], env: Mapping[str, str]
    ) -> None:
        """Begin it. Raises OSError if there can be no more processes."""
        self.role = role
        self._lock = Lock()
        self._ids = count(READY + 1)
        ready = _Waiting()
        self._waiting = {READY: ready}
        self._ready = ready
        self._has_ended = False
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            all_settings = {**settings, "role": role, "channel": theirs.fileno(), "parent": os.getpid()}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, json.dumps(all_settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno(), *fds],
                env=dict(env),
            )
        except OSError:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self._threads = [
            Thread(target=target, name=f"kvtier-mooncake-{role}-{kind}", daemon=True)
            for kind, target in (("answers", self._receive), ("lines", self._read_lines))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._has_ended

    @property
    def last_line(self) -> str:
        """The last thing that the engine said."""
        return self._lines[-1] if self._lines else ""

    def wait_ready(self, timeout_s: float) -> int:
        """Wait for its setup; returns the engine's code. Raises OSError if it takes too long or fails."""
        return self._wait(self._ready, timeout_s)

    def ask(
        self,
        operation: Operation,
        name: str,
        timeout_s: float,
        *,
        header: int = 0,
        offset: int = 0,
        num_bytes: int = 0,
    ) -> int:
        """Ask and wait; returns the engine's code. Raises OSError, with the process gone by then."""
        waiting = _Waiting()
        with self._lock:
            if self._has_ended:
                raise OSError(errno.EIO, "the helper process has ended")
            number = next(self._ids)
            self._waiting[number] = waiting
        request = Request(number, operation, name, header, offset, num_bytes)
        # A socket that is closed or full means what a missing answer means.
        with contextlib.suppress(OSError):
            self._channel.sendall(pack_request(request))
        return self._wait(waiting, timeout_s)

    def _wait(self, waiting: _Waiting, timeout_s: float) -> int:
        is_late = not waiting.event.wait(timeout_s)
        if is_late:
            self.kill()
            # Not before it is gone, however long that takes: then its slot is nobody's.
            waiting.event.wait()
        if waiting.code is None:
            if is_late:
                raise OSError(errno.ETIMEDOUT, f"no answer in {timeout_s:.1f} s; its process was ended")
            raise OSError(errno.EIO, "the transfer failed; its process has ended")
        return waiting.code

    def kill(self) -> None:
        """End it now; returns at once. Whoever waits fails as soon as it is gone."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def close(self, timeout_s: float) -> bool:
        """Ask it to end, and end it if it does not; False if it could not be ended."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self.kill()
        for thread in self._threads:
            thread.join(1.0)
        return self._has_ended

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while message := self._channel.recv(MAX_BYTES):
                number, code = unpack_answer(message)
                with self._lock:
                    waiting = self._waiting.pop(number, None)
                if waiting is not None:
                    waiting.code = code
                    waiting.event.set()
        self.kill()
        self._process.wait()
        with self._lock:
            self._has_ended = True
            left = list(self._waiting.values())
            self._waiting.clear()
        self._channel.close()
        for waiting in left:
            waiting.event.set()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                logger.debug("mooncake %s: %s", self.role, text)
