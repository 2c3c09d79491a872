"""A real disk that fails as a test says: errors on a part of the calls, short writes, slow ones."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Sequence

from kvtier_server.secondary.filesystem.disk import Buffer, Disk


class FaultyDisk(Disk):
    """`share` of the calls of the kinds in `calls` fail with `error`."""

    def __init__(self, seed: int = 1) -> None:
        self.error = 0
        self.share = 0.0
        self.calls: tuple[str, ...] = ("write", "create", "rename", "sync", "read", "open")
        self.delay_s = 0.0
        self.most_bytes = 0
        """What one call writes or reads at most; 0 = all."""
        self.free: int | None = None
        self.num_failed = 0
        self._random = random.Random(seed)

    def _may_fail(self, call: str) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.error and call in self.calls and self._random.random() < self.share:
            self.num_failed += 1
            raise OSError(self.error, os.strerror(self.error))

    def create(self, parent: int, name: str, *, direct: bool) -> int:
        self._may_fail("create")
        return super().create(parent, name, direct=direct)

    def open(self, parent: int, name: str, *, direct: bool) -> int:
        self._may_fail("open")
        return super().open(parent, name, direct=direct)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._may_fail("write")
        return super().write(fd, _first(buffers, self.most_bytes), offset)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._may_fail("read")
        return super().read(fd, [memoryview(b) for b in _first(buffers, self.most_bytes)], offset)

    def sync(self, fd: int) -> None:
        self._may_fail("sync")
        super().sync(fd)

    def rename(self, parent: int, old: str, new: str) -> None:
        self._may_fail("rename")
        super().rename(parent, old, new)

    def unlink(self, parent: int, name: str) -> None:
        self._may_fail("unlink")
        super().unlink(parent, name)

    def free_bytes(self, fd: int) -> tuple[int, int]:
        free, total = super().free_bytes(fd)
        return (free, total) if self.free is None else (self.free, total)

    def break_with(self, error: str, share: float = 1.0) -> None:
        """Fail from now on."""
        self.error, self.share = getattr(errno, error), share

    def mend(self) -> None:
        """Work from now on."""
        self.error, self.share, self.delay_s = 0, 0.0, 0.0


def _first(buffers: Sequence[Buffer], most_bytes: int) -> Sequence[Buffer]:
    if not most_bytes:
        return buffers
    left, some = most_bytes, []
    for buffer in buffers:
        some.append(memoryview(buffer)[:left])
        left -= len(some[-1])
        if not left:
            break
    return some
