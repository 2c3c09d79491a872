"""The system calls of the filesystem tier, one method each: the seam where tests put a bad disk.

Owns flags and nothing else. Every method may raise OSError. Names are relative to a directory's descriptor,
and no symlink is ever followed below the root: nobody who can write into the root can point it elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class FileInfo(NamedTuple):
    """What a directory says of a file."""

    name: str
    num_bytes: int
    modified_s: float


class Disk:
    """A real disk. Thread-safe: it has no state."""

    def open_root(self, path: str, *, create: bool = True) -> int:
        """Open the root itself, which may be a symlink of whoever configured it."""
        if create:
            os.makedirs(path, mode=0o700, exist_ok=True)
        return os.open(path, _DIRECTORY)

    def open_directory(self, parent: int, name: str, *, create: bool = False) -> int:
        """Open a directory, made before if `create` and need be."""
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, mode=0o700, dir_fd=parent)
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)

    def create(self, parent: int, name: str, *, direct: bool) -> int:
        """Create a file that must not exist, for writing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags | (os.O_DIRECT if direct else 0), 0o600, dir_fd=parent)

    def open(self, parent: int, name: str, *, direct: bool) -> int:
        """Open a file for reading."""
        # Non-blocking: a pipe that somebody has put there must not hold the thread.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(name, flags | (os.O_DIRECT if direct else 0), dir_fd=parent)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write at an offset; returns the bytes written, which may be fewer."""
        return os.pwritev(fd, buffers, offset)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read at an offset; returns the bytes read, which may be fewer."""
        return os.preadv(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        """Make a file or a directory durable."""
        os.fsync(fd)

    def rename(self, parent: int, old: str, new: str) -> None:
        """Give a file its name; one that has it is replaced in the same instant."""
        os.rename(old, new, src_dir_fd=parent, dst_dir_fd=parent)

    def unlink(self, parent: int, name: str) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=parent)

    def size(self, fd: int) -> int:
        """Bytes of an open file."""
        return os.fstat(fd).st_size

    def directories(self, fd: int) -> Iterator[str]:
        """Names of the directories in a directory."""
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield entry.name

    def files(self, fd: int) -> Iterator[FileInfo]:
        """The regular files in a directory."""
        with os.scandir(fd) as entries:
            for entry in entries:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # it has got its name, or was evicted, meanwhile
                if stat.S_ISREG(found.st_mode):
                    yield FileInfo(entry.name, found.st_size, found.st_mtime)

    def free_bytes(self, fd: int) -> tuple[int, int]:
        """Bytes that an ordinary user may still write, and bytes of the whole file system."""
        found = os.fstatvfs(fd)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)
