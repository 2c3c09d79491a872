"""Other processes' owner locks, watched by a descriptor of each file instead of its path.

A path proves nothing: whoever cleans up below /dev/shm (a logout with systemd's RemoveIPC, a tmp cleaner)
takes the files of processes that live and copy. A descriptor stays, and so does the lock on what it names.

Owns the descriptors. The files, and what a lock means, are `locks.py`'s.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

from kvtier_ops.locks import (
    DAEMON_LOCK_FILE,
    OWNERS_DIRECTORY,
    is_lock_name,
    owner_lock_is_free,
    owner_lock_path,
)


class WatchedLock:
    """One owner lock of another process. Any thread may call."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        self._was_free = False
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, directory: Path, name: str) -> WatchedLock:
        """Open the lock's file in the pool directory, whether anybody holds it or not.

        Raises PoolDirectoryError for what is no name of one; OSError, also where it is no regular file.
        """
        path = owner_lock_path(directory, name)
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileNotFoundError(errno.ENOENT, "no regular file, so it locks nothing", str(path))
        return cls(path, fd)

    def is_free(self) -> bool:
        """Tell whether no process is left that holds it, and stay with that; its file is unlinked then.

        False after `close`, unless it was known before: nothing proves it.
        """
        with self._mutex:
            if self._fd >= 0:
                self._try()
            return self._was_free

    def _try(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or the system has no lock left: nothing is proved
            return
        self._was_free = True
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), self._path.lstat()):
                self._path.unlink()
        self._close()

    def close(self) -> None:
        """Let go of the file. Safe to repeat."""
        with self._mutex:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class OwnerLocks:
    """Owner locks that a daemon has to know the end of: one descriptor each until `let_go`. One thread."""

    def __init__(self, directory: Path) -> None:
        """`directory`: of the pool whose daemon lock this process holds."""
        self._directory = directory
        self._daemon_lock = self._find_daemon_lock()
        self._watched: dict[str, WatchedLock] = {}

    def __len__(self) -> int:
        return len(self._watched)

    def hold(self, name: str) -> bool:
        """Watch a lock from now on; False, and nothing is watched anew, unless some process holds it.

        Raises OSError (EMFILE, ENFILE) if there is no descriptor left, PoolDirectoryError for a bad name.
        """
        watched = self._watched.get(name)
        if watched is not None:
            return not watched.is_free()
        try:
            watched = WatchedLock.open(self._directory, name)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return False  # a link, a directory, nothing at all: whatever it is, it is not locked
        if watched.is_free():
            return False
        self._watched[name] = watched
        return True

    def is_free(self, name: str) -> bool:
        """Tell whether no process is left that holds it.

        A lock that is not watched is free if it has no file, as long as the directory is still the one that
        the daemon has locked; else nothing proves it. Raises PoolDirectoryError for a bad name.
        """
        watched = self._watched.get(name)
        if watched is not None:
            return watched.is_free()
        owner_lock_path(self._directory, name)
        return self._has_directory() and owner_lock_is_free(self._directory, name)

    def let_go(self, name: str) -> None:
        """Watch a lock no longer, if it was."""
        watched = self._watched.pop(name, None)
        if watched is not None:
            watched.close()

    def hold_all(self) -> list[str]:
        """Watch all locks that are there, and name those that are not free; dead owners' files are unlinked.

        One that cannot be watched is named too. Raises OSError only where the directory cannot be listed,
        because then nobody knows who lives.
        """
        owners = self._directory / OWNERS_DIRECTORY
        if not owners.is_dir():
            return []
        names = [path.name for path in owners.iterdir() if is_lock_name(path.name)]
        return [name for name in names if self._hold_or_doubt(name)]

    def _hold_or_doubt(self, name: str) -> bool:
        try:
            return self.hold(name) or not self.is_free(name)
        except OSError:
            return True

    def _has_directory(self) -> bool:
        return self._daemon_lock is not None and self._find_daemon_lock() == self._daemon_lock

    def _find_daemon_lock(self) -> tuple[int, int] | None:
        try:
            status = (self._directory / DAEMON_LOCK_FILE).lstat()
        except OSError:
            return None
        return status.st_dev, status.st_ino
