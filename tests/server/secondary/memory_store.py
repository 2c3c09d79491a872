"""An object store in memory, behind the mooncake tier's seam: it fails as a test says."""

from __future__ import annotations

import errno
import os
from collections import Counter
from threading import Lock

from kvtier_server.secondary.mooncake import codes
from kvtier_server.secondary.mooncake.store import ObjectStore
from kvtier_server.secondary.mooncake.wire import HEADER_BYTES


class MemoryStore(ObjectStore):
    """Objects by name, up to `capacity` bytes. `answers` replaces what a call returns, without doing it."""

    def __init__(self, pool: memoryview, num_headers: int) -> None:
        self.headers = memoryview(bytearray(num_headers * HEADER_BYTES))
        self.objects: dict[str, bytes] = {}
        self.capacity = 1 << 30
        self.answers: dict[str, int] = {}
        self.problem = ""
        self.fails = False
        self.calls: Counter[str] = Counter()
        self._pool = pool
        self._lock = Lock()

    def put(self, name: str, header: int, offset: int, num_bytes: int) -> int:
        with self._lock:
            if (answer := self._answer("put")) is not None:
                return answer
            if name in self.objects:
                return codes.EXISTS
            front, body = self._places(header, offset, num_bytes)
            if sum(map(len, self.objects.values())) + len(front) + len(body) > self.capacity:
                return codes.NO_SPACE
            self.objects[name] = bytes(front) + bytes(body)
            return codes.DONE

    def get(self, name: str, header: int, offset: int, num_bytes: int) -> int:
        with self._lock:
            if (answer := self._answer("get")) is not None:
                return answer
            if name not in self.objects:
                return codes.NOT_FOUND
            found = self.objects[name]
            front, body = self._places(header, offset, num_bytes)
            if len(found) > len(front) + len(body):
                return codes.TOO_SMALL
            front[:] = found[:HEADER_BYTES]
            rest = found[HEADER_BYTES:]
            body[: len(rest)] = rest
            return len(found)

    def exists(self, name: str) -> int:
        with self._lock:
            if (answer := self._answer("exists")) is not None:
                return answer
            return int(name in self.objects)

    def remove(self, name: str) -> int:
        with self._lock:
            if (answer := self._answer("remove")) is not None:
                return answer
            return codes.DONE if self.objects.pop(name, None) is not None else codes.NOT_FOUND

    def keep(self) -> str:
        self.calls["keep"] += 1
        return self.problem

    def close(self, timeout_s: float) -> bool:
        return True

    def _answer(self, call: str) -> int | None:
        self.calls[call] += 1
        if self.fails:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return self.answers.get(call)

    def _places(self, header: int, offset: int, num_bytes: int) -> tuple[memoryview, memoryview]:
        front = self.headers[header * HEADER_BYTES : (header + 1) * HEADER_BYTES]
        return front, self._pool[offset : offset + num_bytes]
