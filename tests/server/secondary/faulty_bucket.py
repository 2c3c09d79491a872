"""A real store that fails as a test says: errors on some requests, corrupt or cut bytes, late answers."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Sequence
from threading import Event

from kvtier_server.secondary.object_store.bucket import Bucket, Buffer, Found
from kvtier_server.secondary.object_store.parameters import ObjectParameters

WAIT_S = 20.0


class FaultyBucket(Bucket):
    """`share` of the requests of the kinds in `failing` fail; while `open` is cleared none ends."""

    def __init__(self, parameters: ObjectParameters, seed: int = 1) -> None:
        super().__init__(parameters)
        self.failing: tuple[str, ...] = ()
        self.share = 1.0
        self.flip_bit: int | None = None
        """Of what is read, this bit is wrong."""
        self.cut_bytes = 0
        """Of what is read, so many bytes are missing at the end."""
        self.late: tuple[str, ...] = ()
        """Requests that wait for `open`."""
        self.open = Event()
        self.waiting = Event()
        """Set when a request has begun to wait."""
        self.requests: Counter[str] = Counter()
        self._random = random.Random(seed)

    def break_all(self) -> None:
        """Fail from now on, whatever is asked."""
        self.failing, self.share = ("check", "size", "get", "put_new", "put", "delete"), 1.0

    def mend(self) -> None:
        """Work from now on."""
        self.failing = ()

    def _may_fail(self, request: str) -> None:
        self.requests[request] += 1
        if request in self.late:
            self.waiting.set()
            assert self.open.wait(WAIT_S), "nobody let it go on"
        if request in self.failing and self._random.random() < self.share:
            raise OSError(errno.EIO, "the store answered 503 Slow Down")

    def check(self) -> None:
        self._may_fail("check")
        super().check()

    def size(self, path: str) -> int | None:
        self._may_fail("size")
        return super().size(path)

    def get(self, path: str, num_bytes: int, first_bytes: int) -> Found | None:
        self._may_fail("get")
        found = super().get(path, num_bytes, first_bytes)
        if found is None:
            return None
        data = bytearray(found.data)[: len(found.data) - self.cut_bytes]
        if self.flip_bit is not None:
            data[self.flip_bit // 8] ^= 1 << self.flip_bit % 8
        return Found(found.num_bytes - self.cut_bytes, memoryview(data))

    def put_new(self, path: str, data: Buffer) -> bool:
        self._may_fail("put_new")
        return super().put_new(path, data)

    def put(self, path: str, data: Buffer) -> None:
        self._may_fail("put")
        super().put(path, data)

    def delete(self, paths: Sequence[str]) -> None:
        self._may_fail("delete")
        super().delete(paths)
