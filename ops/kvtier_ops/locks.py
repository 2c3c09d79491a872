"""Who is alive: the daemon's lock on a pool, and one lock file per process that maps it.

A `flock` belongs to the open file, not to a pid: the kernel drops it when the last process that shares it is
gone, however it went, and it works across containers, where pids do not. A fork shares the open file, as it
shares the mapping; an exec loses both (descriptors are O_CLOEXEC), but for `copies.lock`, which the daemon
hands to the processes that read and write the pool for it.

Owns the files `daemon.lock`, `copies.lock`, `owners/*` and `gates/*` of a pool directory. What a free lock
allows, the daemon decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from pathlib import Path

from kvtier_ops.directory import PoolDirectoryError, PoolError, open_directory

OWNERS_DIRECTORY = "owners"
GATES_DIRECTORY = "gates"
DAEMON_LOCK_FILE = "daemon.lock"
COPIES_LOCK_FILE = "copies.lock"

LEFTOVERS_S = 5.0
"""How long to wait for the processes of a dead daemon: they end in milliseconds, unless an I/O hangs."""

_LEFTOVERS_POLL_S = 0.02

_OWNER_NAME = re.compile(r"[0-9a-f]{1,64}")
_PID_WAIT_S = 0.5
"""How long to wait for a holder that has the lock but has not written its pid yet; it takes microseconds."""


class PoolBusy(PoolError):
    """Another daemon serves this pool. `pid` is its process id, 0 where it could not be read."""

    def __init__(self, directory: Path, pid: int) -> None:
        holder = f"pid {pid}" if pid else "a process whose pid could not be read"
        super().__init__(
            f"the pool {directory} is already served by {holder}; stop that daemon or choose another name"
        )
        self.pid = pid


class PoolStillWritten(PoolError):
    """The daemon of this pool is gone, and processes of its own that may write into it are not."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"processes of the last daemon still use the pool {directory}: an I/O hangs; it is free when "
            f"that ends (who: fuser -v {directory / COPIES_LOCK_FILE})"
        )


class OwnerLock:
    """This process's proof of life for the slots it may write. Held as long as the mapping."""

    def __init__(self, directory: Path, name: str, fd: int) -> None:
        self._directory = directory
        self._fd = fd
        self.name = name
        """What to tell the daemon in Attach."""

    @property
    def fd(self) -> int:
        """The locked file; a process that inherits it holds the lock too, until both have let go."""
        return self._fd

    @classmethod
    def acquire(cls, directory: Path) -> OwnerLock:
        """Create `<directory>/owners/<random hex>` (0600) and lock it. Raises PoolDirectoryError, OSError."""
        os.close(open_directory(directory))
        owners = directory / OWNERS_DIRECTORY
        owners_fd = open_directory(owners, create=True)
        try:
            while True:
                name = secrets.token_hex(16)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(name, flags, 0o600, dir_fd=owners_fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
                # A sweep of the directory may have found the file in the instant before it was locked,
                # taken it for a dead owner's and unlinked it. Then this lock protects nothing: make another.
                if os.fstat(fd).st_nlink:
                    return cls(directory, name, fd)
                os.close(fd)
        finally:
            os.close(owners_fd)

    def release(self) -> None:
        """Drop this process's share of the lock, and unlink the file if nobody else holds one.

        A fork may live on with the mapping, and a missing file means "free": so the one who leaves first
        must not unlink. A second call does nothing.
        """
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        owner_lock_is_free(self._directory, self.name)


def is_lock_name(name: str) -> bool:
    """Tell whether a name that another process gave can be one of an owner lock or a gate."""
    return _OWNER_NAME.fullmatch(name) is not None


def owner_lock_path(directory: Path, name: str) -> Path:
    """Return where an owner lock's file is. Raises PoolDirectoryError for what is no name of one."""
    if not is_lock_name(name):
        raise PoolDirectoryError(f"{name!r} is not the name of an owner lock: only lower-case hex is")
    return directory / OWNERS_DIRECTORY / name


def owner_lock_is_free(directory: Path, name: str) -> bool:
    """Tell whether no process is left that holds the owner lock `name`; unlinks its file if so.

    For who asks once. Who must not be misled by files that others remove watches it: `lock_watch`.

    A missing file is free; one that cannot be tried (no regular file, no permission, no descriptor left) is
    not, because nothing proves it: ask again. Never waits. Raises PoolDirectoryError for a name that is not
    lower-case hex (it comes from a client and becomes part of a path), and nothing else.
    """
    path = owner_lock_path(directory, name)
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        # Whether the file can be removed or not, nobody holds it.
        with contextlib.suppress(OSError):
            path.unlink()
        return True
    finally:
        os.close(fd)


class CopyGate:
    """Whether anything is copied for one registration of memory, and whether anything may be.

    A file in `gates/` of the pool's directory, opened by the process that copies and by the engine that the
    memory belongs to. The one holds it shared while it copies; the other takes it for itself when it has
    lost who answers for the copies: from then on none of them runs, and none begins. So an engine needs
    nobody's answer, and a process that is killed lets go. Any thread may call.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._inside = 0
        self._closing = False
        self._mutex = threading.Lock()

    @staticmethod
    def create(directory: Path) -> str:
        """Make the file, mode 0600, under a random name, and return that. Raises PoolDirectoryError,
        OSError.
        """
        os.close(open_directory(directory))
        gates_fd = open_directory(directory / GATES_DIRECTORY, create=True)
        try:
            name = secrets.token_hex(16)
            os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=gates_fd))
            return name
        finally:
            os.close(gates_fd)

    @classmethod
    def open(cls, directory: Path, name: str) -> CopyGate:
        """Open a gate that is there. Raises PoolDirectoryError for what is no name of one, and OSError."""
        if not is_lock_name(name):
            raise PoolDirectoryError(f"{name!r} is not the name of a gate: only lower-case hex is")
        path = directory / GATES_DIRECTORY / name
        return cls(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))

    @staticmethod
    def remove(directory: Path, name: str) -> None:
        """Remove the file; who has it open keeps the gate."""
        with contextlib.suppress(OSError):
            (directory / GATES_DIRECTORY / name).unlink()

    @staticmethod
    def remove_all(directory: Path) -> None:
        """Remove what an earlier daemon has left."""
        with contextlib.suppress(OSError):
            for path in (directory / GATES_DIRECTORY).iterdir():
                path.unlink()

    def enter(self) -> bool:
        """Begin a copy; False if the engine has taken the gate, and nothing may be copied any more."""
        with self._mutex:
            if self._closing or (not self._inside and not self._lock(fcntl.LOCK_SH)):
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        """End a copy that has entered: none of its bytes moves any more."""
        with self._mutex:
            self._inside -= 1
            if not self._inside:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
                self._close_if_over()

    def take(self) -> bool:
        """Keep every copy out, until this process closes it or ends; False while one runs: try again."""
        with self._mutex:
            return not self._closing and self._lock(fcntl.LOCK_EX)

    def close(self) -> None:
        """Let go of it, with the last copy that has entered. Safe to repeat."""
        with self._mutex:
            self._closing = True
            self._close_if_over()

    def _close_if_over(self) -> None:
        if self._closing and not self._inside and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self, how: int) -> bool:
        try:
            fcntl.flock(self._fd, how | fcntl.LOCK_NB)
        except OSError:  # held by the other side, or the system has no lock left: nothing is proved
            return False
        return True


class DaemonLock:
    """The right to be the one daemon of a pool directory, and that nobody else writes into its pool."""

    def __init__(self, path: Path, fd: int, copies_fd: int) -> None:
        self._path = path
        self._fd = fd
        self.copies_fd = copies_fd
        """For processes of the daemon's own that map the pool: they hold this lock until they end."""

    @classmethod
    def acquire(cls, directory: Path) -> DaemonLock:
        """Lock `<directory>/daemon.lock` and write this pid into it. Never waits for the holder.

        Then waits for what a dead daemon has left behind, LEFTOVERS_S at most. Raises PoolBusy naming the
        holder, PoolStillWritten, PoolDirectoryError, OSError.
        """
        os.close(open_directory(directory))
        path = directory / DAEMON_LOCK_FILE
        while True:
            fd = _open_lock(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _read_pid(fd)
                os.close(fd)
                raise PoolBusy(directory, pid) from None
            if os.fstat(fd).st_nlink:
                break
            # The last daemon removed its pool between our open and our lock: this file is nobody's.
            os.close(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        try:
            return cls(path, fd, _lock_copies(directory))
        except BaseException:
            os.ftruncate(fd, 0)
            os.close(fd)
            raise

    def release(self, *, unlink: bool = False) -> None:
        """Drop the lock; `unlink` also removes the files. A second call does nothing."""
        if self._fd < 0:
            return
        os.ftruncate(self._fd, 0)
        if unlink:
            (self._path.parent / COPIES_LOCK_FILE).unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
        os.close(self.copies_fd)
        os.close(self._fd)
        self._fd = self.copies_fd = -1


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _lock_copies(directory: Path) -> int:
    """Lock `copies.lock`, which nobody else takes while the daemon's lock is held; wait for leftovers."""
    fd = _open_lock(directory / COPIES_LOCK_FILE)
    give_up_at = time.monotonic() + LEFTOVERS_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                os.close(fd)
                raise PoolStillWritten(directory) from None
            time.sleep(_LEFTOVERS_POLL_S)
        else:
            return fd


def daemon_pid(directory: Path) -> int | None:
    """Return the pid of the daemon that holds the pool, 0 if it cannot be read, None if there is none.

    A daemon that stops empties its lock file, so the lock is tried only over what a crashed or a living one
    wrote: a shared lock, held for an instant, on a file whose owner is most likely gone.
    """
    try:
        fd = os.open(directory / DAEMON_LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        text = os.pread(fd, 32, 0).strip()
        if not text:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(text) if text.isdigit() else 0
    else:
        return None
    finally:
        os.close(fd)


def _read_pid(fd: int) -> int:
    deadline = time.monotonic() + _PID_WAIT_S
    while True:
        text = os.pread(fd, 32, 0)
        if text.endswith(b"\n") and text.strip().isdigit():
            return int(text)
        if time.monotonic() > deadline:
            return 0
        time.sleep(0.001)
