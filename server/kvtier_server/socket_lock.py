"""The daemon's unix socket, taken before it is bound: a second bind would succeed and steal its callers.

Owns the lock file beside the socket and the rules for the directory. Binding is gRPC's.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from kvtier_ops.directory import planted_link
from kvtier_server.address import socket_path


class StartError(Exception):
    """The daemon cannot start; the message says why and what to type. `exit_code` is the process's."""

    def __init__(self, message: str, exit_code: int, setting: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.setting = setting
        """The address that is taken, by its dotted path; "" where it is something else."""


class SocketLock:
    """The lock beside a unix socket, held as long as the daemon lives."""

    def __init__(self, path: Path | None, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def of(cls, address: str, setting: str = "server.address") -> SocketLock:
        """Lock a unix socket's address, making its directory (0700); addresses of TCP need none."""
        path = socket_path(address)
        if path is None:
            return cls(None, -1)
        link = planted_link(path.parent)
        if link is not None:
            owner = os.lstat(link).st_uid
            raise StartError(
                f"{link} is a link that uid {owner} has made; remove it or choose another --address", 2
            )
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.parent.stat()
            if status.st_uid not in (os.geteuid(), 0):
                raise StartError(f"{path.parent} belongs to uid {status.st_uid}; choose another --address", 2)
            if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
                raise StartError(
                    f"anybody may write to {path.parent}; chmod it or choose another --address", 2
                )
            fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StartError(f"cannot use {path.parent} for the socket: {error.strerror}", 2) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise StartError(
                f"the daemon with pid {holder} listens on {address}; stop it or choose another --address",
                1,
                setting,
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        path.unlink(missing_ok=True)  # a socket left by a killed daemon: the lock says that nobody listens
        return cls(path, fd)

    def unlink(self) -> None:
        """Remove the socket."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove the socket and let the lock go.

        The lock's file stays: unlinked, it could be locked a second time under the same name.
        """
        if self._fd >= 0:
            self.unlink()
            os.close(self._fd)
            self._fd = -1
