"""An engine's process on a GPU: makes device memory and exports it. Answers each line of JSON on stdin.

{"allocate": [bytes, ...]}   handles, as `MemoryHandle` fields
{"fill": number}             every allocation gets this byte
{"event": 0}                 the event's handle
{"spin": ms}                 keeps the device busy, then fills with 0xEE; the event is recorded behind it
{"matmul": seconds}          how many products of 4096 x 4096 half-precision matrices it did per second
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from kvtier_ops.cuda_export import ExportedEvent, export_cuda
from kvtier_ops.ipc import MemoryHandle


class DeviceEngine:
    """The memory of one engine, by plain cudaMalloc: one IPC handle each."""

    def __init__(self) -> None:
        import cupy

        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        self._stream: Any = cupy.cuda.Stream(non_blocking=True)
        self._made: list[tuple[int, int]] = []
        self._event: ExportedEvent | None = None
        self._runtime.free(0)  # makes the context

    def allocate(self, sizes: list[int]) -> list[dict[str, object]]:
        made = [(int(self._runtime.malloc(size)), size) for size in sizes]
        self._made += made
        return [readable(export_cuda(address, size, size, 1)) for address, size in made]

    def fill(self, value: int) -> None:
        for address, size in self._made:
            self._runtime.memset(address, value, size)
        self._runtime.deviceSynchronize()

    def event(self, _: int) -> str:
        self._event = ExportedEvent(lambda: self._stream.ptr)
        return self._event.handle.hex()

    def spin(self, milliseconds: int) -> None:
        """Return at once; what comes before the event takes this long on the device."""
        assert self._event is not None
        kernel = self._cupy.RawKernel(
            'extern "C" __global__ void spin(long long ns) { long long begin, now; '
            'asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin)); do { '
            'asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - begin < ns); }',
            "spin",
        )
        with self._stream:
            kernel((1,), (1,), (self._cupy.int64(milliseconds * 1_000_000),))
        for address, size in self._made:
            self._runtime.memsetAsync(address, 0xEE, size, self._stream.ptr)
        self._event.record()

    def matmul(self, seconds: float) -> float:
        import torch

        left = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
        right = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
        for _ in range(20):
            left @ right
        torch.cuda.synchronize()
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(50):
                left @ right
            torch.cuda.synchronize()
            done += 50
        return done / (time.perf_counter() - began)


def readable(handle: MemoryHandle) -> dict[str, object]:
    """Return the fields with the bytes as hex digits."""
    fields = asdict(handle)
    return {name: value.hex() if isinstance(value, bytes) else int(value) for name, value in fields.items()}


def main() -> None:
    """Answer until stdin ends."""
    engine = DeviceEngine()
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        if name not in {"allocate", "fill", "event", "spin", "matmul"}:
            raise SystemExit(f"{name!r} is not a request")
        answer = getattr(engine, name)(argument)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
