"""The two questions that the design answers with the worst case, asked of a real GPU.

    python -m tests.gpu.experiments

1. Does SIGKILL of an engine in mid-copy poison the context of the helper that has its memory open?
2. Does a helper's DMA go on after its process is gone (its lock is free)?

Prints what was seen, a line of JSON each. NOT RUN ON A GPU yet.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tests.gpu.device_engine import readable
from tests.gpu.processes import HERE, engine_process, start, why_no_gpu

MEMORY_BYTES = 1 << 30
WATCHED_S = 2.0
HELPER = str(HERE / "device_helper.py")
PROBE_BYTES = 1 << 20
"""Distance of the places that are watched."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Poisoned:
    """What became of the helper after its engine was killed."""

    direction: str
    jobs_ok_after: int
    """Jobs that ended well after the kill, of 50."""
    jobs_failed_after: int
    broken: str
    """Why the helper's context was lost; empty if it was not."""


@dataclass(frozen=True, slots=True)
class LateWrites:
    """What a killed helper's device still wrote."""

    rounds: int
    rounds_with_late_writes: int
    last_write_ms: float
    """The latest, counted from when its lock was free."""


@contextmanager
def shared_pool() -> Iterator[tuple[Path, Path, Bytes]]:
    """A file of MEMORY_BYTES in shared memory, a lock file, and the mapping."""
    with tempfile.TemporaryDirectory(prefix="kvtier-run-", dir="/dev/shm") as directory:
        pool, lock = Path(directory) / "pool", Path(directory) / "lock"
        lock.touch()
        fd = os.open(pool, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(fd, 0, MEMORY_BYTES)
            yield pool, lock, np.frombuffer(mmap.mmap(fd, MEMORY_BYTES), np.uint8)
        finally:
            os.close(fd)


def kill_engine_in_mid_copy(direction: str) -> Poisoned:
    """Kill the engine while the helper copies, and let the helper go on with 50 jobs."""
    with shared_pool() as (pool, lock, _), engine_process() as engine:
        (handle,) = engine.allocate(MEMORY_BYTES)
        helper = start(HELPER, str(pool), str(lock), direction, json.dumps(readable(handle)))
        try:
            assert helper.stdout is not None
            for _ in range(3):
                assert json.loads(helper.stdout.readline())["ok"]
            engine.kill()
            good = failed = 0
            while good + failed < 50 and (line := helper.stdout.readline()):
                seen = json.loads(line)
                if "broken" in seen:
                    return Poisoned(direction, good, failed, seen["broken"])
                good, failed = good + seen["ok"], failed + (not seen["ok"])
            ended = helper.poll()
            broken = "" if good + failed == 50 else f"the helper's process ended with status {ended}"
            return Poisoned(direction, good, failed, broken)
        finally:
            helper.kill()
            helper.communicate()


def kill_helper_in_mid_copy(rounds: int = 10) -> LateWrites:
    """Kill the helper while it stores 0xAB into the pool, wait for its lock, and look for bytes that arrive.

    Every MiB of the pool is set to 0 as soon as the lock is free, and then watched.
    """
    late, last_ms = 0, 0.0
    with shared_pool() as (pool, lock, memory), engine_process() as engine:
        (handle,) = engine.allocate(MEMORY_BYTES)
        engine.ask("fill", 0xAB)
        probes = memory[::PROBE_BYTES]
        for _ in range(rounds):
            helper = start(HELPER, str(pool), str(lock), "STORE", json.dumps(readable(handle)))
            assert helper.stdout is not None
            for _ in range(3):
                assert json.loads(helper.stdout.readline())["ok"]
            helper.kill()
            fd = os.open(lock, os.O_RDWR)
            fcntl.flock(fd, fcntl.LOCK_EX)
            probes[:] = 0
            freed = time.monotonic()
            round_ms = 0.0
            while (now := time.monotonic()) - freed < WATCHED_S:
                if probes.any():
                    probes[:] = 0
                    round_ms = (now - freed) * 1000
            os.close(fd)
            helper.communicate()
            late, last_ms = late + (round_ms > 0), max(last_ms, round_ms)
    return LateWrites(rounds, late, last_ms)


def main() -> None:
    """Run both and print what was seen."""
    reason = why_no_gpu()
    if reason:
        sys.exit(reason)
    for direction in ("STORE", "LOAD"):
        sys.stdout.write(json.dumps(asdict(kill_engine_in_mid_copy(direction))) + "\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps(asdict(kill_helper_in_mid_copy())) + "\n")


if __name__ == "__main__":
    main()
