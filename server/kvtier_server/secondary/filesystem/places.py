"""Where a chunk's file lies below the root, and which chunk a file's place says it is.

    <root>/kvtier-1/<space>/space.json      what the directory is for, for people and for a new index
    <root>/kvtier-1/<space>/<2 digits>/<key>.chunk
    <root>/kvtier-1/<space>/<2 digits>/tmp-...      being written

The two hex digits spread a space over 256 directories: with 4,096 a small tier made one for nearly every
file, and stored a fifth slower. Names of spaces and keys are `chunk_names.py`'s. Opens
directories, and keeps none open.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import xxhash

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.chunk_names import FORMAT_DIRECTORY, space_directory
from kvtier_server.secondary.filesystem.disk import Disk

SPACE_FILE = "space.json"
TEMPORARY = "tmp-"
MAX_SPACE_FILE_BYTES = 65_536


def temporary_name(token: str) -> str:
    """Name a file that is being written. `token`: of whoever writes, so that what it leaves can be told."""
    return f"{TEMPORARY}{token}-{secrets.token_hex(6)}"


def spread_directory(key: bytes) -> str:
    """Name the directory that a key's file is in."""
    return f"{xxhash.xxh3_64_intdigest(key) & 0xFF:02x}"


class Places:
    """Opens directories below one root."""

    def __init__(self, disk: Disk, fd: int) -> None:
        """Work below `fd`, which is to be that of other Places, perhaps of another process."""
        self._disk = disk
        self.fd = fd

    @classmethod
    def below(cls, disk: Disk, root: str, *, create: bool = True) -> Places:
        """Open a root, made if need be and allowed. Raises OSError."""
        root_fd = disk.open_root(root, create=create)
        try:
            return cls(disk, disk.open_directory(root_fd, FORMAT_DIRECTORY, create=create))
        finally:
            disk.close(root_fd)

    def close(self) -> None:
        """Close the root."""
        self._disk.close(self.fd)

    @contextmanager
    def directory(self, space: SpaceName, key: bytes, *, create: bool = False) -> Iterator[int]:
        """Open the directory of a key's file. Raises FileNotFoundError if it is not there."""
        with (
            self.opened(self.fd, space_directory(space), create=create) as space_fd,
            self._spread(space, space_fd, spread_directory(key), create=create) as fd,
        ):
            yield fd

    @contextmanager
    def _spread(self, space: SpaceName, space_fd: int, name: str, *, create: bool) -> Iterator[int]:
        try:
            fd = self._disk.open_directory(space_fd, name)
        except FileNotFoundError:
            if not create:
                raise
            self._describe(space, space_fd)
            fd = self._disk.open_directory(space_fd, name, create=True)
        try:
            yield fd
        finally:
            self._disk.close(fd)

    @contextmanager
    def opened(self, parent: int, name: str, *, create: bool = False) -> Iterator[int]:
        """Open a directory."""
        fd = self._disk.open_directory(parent, name, create=create)
        try:
            yield fd
        finally:
            self._disk.close(fd)

    def _describe(self, space: SpaceName, space_fd: int) -> None:
        """Write down what a space's directory is for, unless that was done."""
        if self.read_space(space_fd) == space:
            return
        told = {"namespace": space.namespace, "tenant": space.tenant, "epoch": space.epoch}
        temporary = temporary_name("space")
        fd = self._disk.create(space_fd, temporary, direct=False)
        try:
            self._disk.write(fd, [json.dumps(told).encode()], 0)
        finally:
            self._disk.close(fd)
        self._disk.rename(space_fd, temporary, SPACE_FILE)

    def read_space(self, space_fd: int) -> SpaceName | None:
        """Read what a space's directory is for; None if it does not say so."""
        try:
            fd = self._disk.open(space_fd, SPACE_FILE, direct=False)
        except FileNotFoundError:
            return None
        buffer = bytearray(MAX_SPACE_FILE_BYTES)
        try:
            length = self._disk.read(fd, [memoryview(buffer)], 0)
        finally:
            self._disk.close(fd)
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            told = json.loads(bytes(buffer[:length]))
            return SpaceName(str(told["namespace"]), str(told["tenant"]), int(told["epoch"]))
        return None
