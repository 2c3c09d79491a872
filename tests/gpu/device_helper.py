"""A copy helper's process on a GPU: copies between a shared file and opened device memory, on and on.

    python device_helper.py POOL_FILE LOCK_FILE DIRECTION HANDLE...

Prints one line of JSON for each job that ended. Holds the lock file's lock as long as it lives.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import sys

import numpy as np

from kvtier_ops.copy_engine import CopyEngineBroken, CopyJob
from kvtier_ops.cuda import CudaCopyEngine
from kvtier_ops.fragments import Direction, PlacedCopy
from kvtier_ops.ipc import MemoryHandle, MemoryKind
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy

PAGE_BYTES = 64 << 10


def read_handle(fields: dict[str, object]) -> MemoryHandle:
    """Return what `readable` of device_engine.py wrote."""
    values = {k: bytes.fromhex(v) if isinstance(v, str) else v for k, v in fields.items() if k != "kind"}
    return MemoryHandle(kind=MemoryKind.CUDA_IPC, **values)  # type: ignore[arg-type]


def as_blocks(handle: MemoryHandle, page_bytes: int) -> MemoryHandle:
    """Return the whole allocation as blocks of one page."""
    return MemoryHandle(
        handle.kind,
        handle.device_uuid,
        handle.handle,
        handle.allocation_bytes,
        handle.offset_bytes,
        handle.size_bytes,
        page_bytes,
        handle.size_bytes // page_bytes,
    )


def main(pool_file: str, lock_file: str, direction: str, handle_text: str) -> None:
    """Copy until killed, or until the engine is broken."""
    lock = os.open(lock_file, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    fd = os.open(pool_file, os.O_RDWR)
    pool = np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), np.uint8)
    handle = as_blocks(read_handle(json.loads(handle_text)), PAGE_BYTES)
    engine = CudaCopyEngine(pool, handle.device_uuid)
    assert engine.pinned.wait(60), engine.pinned.error
    num_blocks = min(handle.num_blocks, pool.size // PAGE_BYTES)
    layout = GroupLayout((TensorLayout("layer.0", PAGE_BYTES),), 1)
    engine.open_memory(1, [[handle]], [layout])
    # Last block first, so that a job is many copies and not one.
    copies = tuple(
        PlacedCopy(ChunkCopy(0, i, 0, (i,)), (num_blocks - 1 - i) * PAGE_BYTES) for i in range(num_blocks)
    )
    job_id, under_way = 0, 0
    while True:
        try:
            while under_way < 4:
                engine.submit(CopyJob(job_id, Direction[direction], 1, copies))
                job_id, under_way = job_id + 1, under_way + 1
        except CopyEngineBroken as broken:
            write({"broken": str(broken)})
            return
        for result in engine.wait(30):
            under_way -= 1
            write({"job": result.job_id, "ok": result.ok, "message": result.message})


def write(line: dict[str, object]) -> None:
    """Print a line of JSON at once."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
