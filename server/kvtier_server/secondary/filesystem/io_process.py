"""The I/O of a filesystem tier in a process of its own, from the daemon's side.

Owns the process: begun with the tier, begun again when it has died or hangs, ended with the tier. What it
does is `io_helper.py`'s. Its death is an error of the chunks that it was writing, and of nothing else: what
it was reading, the next one reads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from threading import Lock

from kvtier_ops.helper_lines import relay_lines
from kvtier_server.secondary.base import JobKind, OffloadingSpec, TierChunk, TierError
from kvtier_server.secondary.filesystem.chunk_files import ChunkIo, IoResult
from kvtier_server.secondary.filesystem.io_wire import LAYOUT, MAX_BYTES, pack_request, unpack_answer

logger = logging.getLogger(__name__)

START_S = 30.0
"""What its start may take: 0.3 s, unless the machine is busy with something else."""

_MODULE = "kvtier_server.secondary.filesystem.io_helper"


class ChunkProcess(ChunkIo):
    """Has another process do it: at most `num_threads` chunks at once, and as many callers."""

    def __init__(
        self,
        name: str,
        spec: OffloadingSpec,
        root_fd: int,
        *,
        durability: str,
        direct: str,
        num_threads: int,
        patience_s: float,
    ) -> None:
        """Open the pool's file and begin the process. Raises TierError.

        `root_fd`: of `Places`; it and the spec's files stay the caller's, and open until `close`.
        `patience_s`: an I/O that takes longer is ended with its process, and so lets go of the pool.
        """
        if not spec.pool_file:
            raise TierError(
                'its I/O process has to map the pool, and this pool has no file; set io = "threads"'
            )
        self._name = name
        self._num_threads = num_threads
        self._patience_s = patience_s
        self._lock = Lock()
        self._closed = False
        try:
            self._pool_fd = os.open(spec.pool_file, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TierError(f"the pool's file {spec.pool_file} cannot be opened: {error.strerror}") from error
        self._fds = [fd for fd in (self._pool_fd, root_fd, spec.pool_lock_fd) if fd >= 0]
        self._settings = {
            "root": root_fd,
            "durability": durability,
            "direct": direct,
            "pool": self._pool_fd,
            "pool_bytes": spec.pool_bytes,
            "pool_offset": spec.pool_file_offset,
            "layout": LAYOUT,
        }
        try:
            self._process = _Process(self._settings, self._fds, num_threads)
            self._process.wait_ready(START_S)
        except OSError as error:
            os.close(self._pool_fd)
            raise TierError(f"its I/O process cannot be begun: {error.strerror}") from error

    def run(self, kind: JobKind, chunk: TierChunk) -> IoResult:
        request = pack_request(kind, chunk)
        try:
            return self._running().run(request, self._patience_s)
        except _NotSent:
            pass
        except ProcessLost as lost:
            # A read can be done again, in a process that others' chunks did not end.
            if kind is JobKind.STORE or lost.hung:
                raise
        return self._running().run(request, self._patience_s)

    def _running(self) -> _Process:
        """Return the process, a new one if it has died."""
        with self._lock:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the tier has been shut down")
            if self._process.has_ended:
                logger.warning(
                    "tier %s: its I/O process %d has ended (status %s); another is begun",
                    self._name, self._process.pid, self._process.status,
                )  # fmt: skip
                self._process.discard()
                self._process = _Process(self._settings, self._fds, self._num_threads)
            return self._process

    def close(self, timeout_s: float) -> bool:
        with self._lock:
            if not self._closed:
                os.close(self._pool_fd)
            self._closed = True
        return self._process.close(timeout_s)


class ProcessLost(OSError):
    """The process has died over a chunk, perhaps another one: what it did of it, nobody has said.

    `token`: of its files. `hung`: it was ended over an I/O that took too long.
    """

    def __init__(self, token: str, *, hung: bool) -> None:
        why = "an I/O took too long" if hung else "it died"
        super().__init__(errno.EIO, f"the I/O process has ended: {why}")
        self.token = token
        self.hung = hung


class _NotSent(OSError):
    """The process had died before it was asked anything."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the I/O process has ended")


class _Process:
    """One life of the process. `token`: what the names of files begin with that it has not finished."""

    def __init__(self, settings: Mapping[str, object], fds: list[int], num_threads: int) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(1 + num_threads)]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self._life, *channels_of_ours = ours
        life, *channels = [end.fileno() for end in theirs]
        self.token = secrets.token_hex(6)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-P", "-m", _MODULE,
                    json.dumps({**settings, "life": life, "channels": channels, "token": self.token}),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[life, *channels, *fds],
            )  # fmt: skip
        except OSError:
            for end in ours:
                end.close()
            raise
        finally:
            for end in theirs:
                end.close()
        self._lock = Lock()
        self._free = channels_of_ours
        relay_lines(self._process.stderr, partial(logger.warning, "the I/O process says: %s"))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def status(self) -> int | None:
        """What it ended with; negative: the signal. None while it runs."""
        return self._process.returncode

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it works. Raises OSError, with the process gone, if it takes too long or ends."""
        self._life.settimeout(timeout_s)
        try:
            is_ready = bool(self._life.recv(1))
        except OSError:
            is_ready = False
        self._life.settimeout(None)
        if not is_ready:
            self._process.kill()
            self._process.wait()
            self.discard()
            raise OSError(errno.EIO, f"it has ended with status {self.status}, see its last words above")

    def run(self, request: bytes, patience_s: float) -> IoResult:
        """Ask, and wait. Raises what the answer says, _NotSent, ProcessLost with the process gone."""
        with self._lock:
            if not self._free:
                raise _NotSent
            channel = self._free.pop()
        try:
            channel.settimeout(patience_s)
            channel.send(request)
        except OSError:
            self._end(channel)
            raise _NotSent from None
        hung = False
        try:
            answer = channel.recv(MAX_BYTES)
        except TimeoutError:
            answer, hung = b"", True
        except OSError:
            answer = b""
        if not answer:
            self._end(channel)
            raise ProcessLost(self.token, hung=hung)
        with self._lock:
            self._free.append(channel)
        return unpack_answer(answer)

    def _end(self, channel: socket.socket) -> None:
        """End the process, and wait for that, however long: then a chunk's slot is nobody's."""
        channel.close()
        self._process.kill()
        self._process.wait()

    def discard(self) -> None:
        """Close the sockets that nobody waits at. The process has ended."""
        with self._lock:
            for channel in (self._life, *self._free):
                channel.close()
            self._free.clear()

    def close(self, timeout_s: float) -> bool:
        """End it; False if it is in an I/O that nothing ends."""
        with contextlib.suppress(OSError):
            self._life.shutdown(socket.SHUT_RDWR)
        for _ in range(2):
            try:
                self._process.wait(timeout_s / 2)
            except subprocess.TimeoutExpired:
                self._process.kill()
            else:
                self.discard()
                return True
        return False
