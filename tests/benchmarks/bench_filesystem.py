"""Store and load of the filesystem tier, against threads that write and read files and do nothing else.

Both move 4 MiB chunks with as many threads, of the same lengths (a header's block and the chunk), with the
same flags (O_DIRECT where the file system has it), between one pool's memory and one directory's file
system. The plain loop has no checksums, no temporary names, no index. They take turns within one run, each
round into new files; the ratio is of the medians.

    python -m tests.benchmarks.bench_filesystem [--directory DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from threading import Event

from kvtier_ops.checksum import part_checksum
from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.namespace import SpaceName
from kvtier_server.core.lower_tiers import MAX_JOB_BYTES
from kvtier_server.secondary.base import JobKind, OffloadingSpec, Outcome, TierChunk, TierJob
from kvtier_server.secondary.chunk_file import HEADER_BYTES
from kvtier_server.secondary.filesystem.tier import FilesystemParameters, FilesystemTier

CHUNK_BYTES = 4 << 20
NUM_CHUNKS = 64
POOL_BYTES = NUM_CHUNKS * CHUNK_BYTES
LIMIT = 0.7
"""At least this share of the plain loop's speed."""

SPACE = SpaceName("n" * 64, "tenant", 1)
WAIT_S = 120.0
HEAD = "{:8}{:>9}{:>9}{:>12}{:>12}{:>8}{:>8}"
ROW = "{:8}{:>9}{:>9}{:>12.0f}{:>12.0f}{:>7.2f}x{:>7.1f}x"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Speeds in MiB/s, of the median round."""

    direction: str
    threads: int
    direct: bool
    plain_mib_s: float
    tier_mib_s: float
    ratio: float
    """Speed as a share of the plain loop's."""
    limit: float = LIMIT


class TierSide:
    """A filesystem tier that is given jobs as the core gives them."""

    def __init__(self, directory: Path, pool: mmap.mmap, pool_file: str) -> None:
        self._finished = Event()
        self.parameters = FilesystemParameters.model_validate(
            {
                "root": str(directory / "root"),
                "capacity": 1 << 40,
                "reserve_free": 0,
                "state_directory": str(directory / "state"),
                "deadline": "120s",
                "max_waiting": POOL_BYTES,
            }
        )
        self.tier = FilesystemTier(
            OffloadingSpec(POOL_BYTES, SLOT_UNIT_BYTES, 128, pool_file),
            memoryview(pool),
            "filesystem",
            self._finished.set,
            self.parameters,
        )
        self._job_ids = count(1)
        view = memoryview(pool)
        self._checksums = [part_checksum(view[offset : offset + CHUNK_BYTES]) for offset in _offsets()]

    def store(self, round_number: int) -> None:
        """Store the whole pool under new keys."""
        self._run(JobKind.STORE, round_number)

    def load(self, round_number: int) -> None:
        """Load what a round has stored into the slots that it came from."""
        self._run(JobKind.LOAD, round_number)

    def _run(self, kind: JobKind, round_number: int) -> None:
        per_job = MAX_JOB_BYTES // CHUNK_BYTES
        submit = self.tier.submit_store if kind is JobKind.STORE else self.tier.submit_load
        left = 0
        for first in range(0, NUM_CHUNKS, per_job):
            chunks = tuple(
                TierChunk(
                    SPACE,
                    round_number.to_bytes(4, "big") + index.to_bytes(32, "big"),
                    bytes(16),
                    CHUNK_BYTES,
                    1,
                    index * CHUNK_BYTES,
                    (self._checksums[index],) if kind is JobKind.STORE else (),
                )
                for index in range(first, first + per_job)
            )
            assert submit(TierJob(next(self._job_ids), kind, chunks)), "the tier refused a job"
            left += 1
        while left:
            assert self._finished.wait(WAIT_S), f"{left} jobs did not end"
            self._finished.clear()
            for result in self.tier.get_finished():
                assert set(result.outcomes) == {Outcome.DONE}, result.outcomes
                left -= 1

    def close(self) -> None:
        """End the tier's threads."""
        assert self.tier.shutdown(WAIT_S), "an I/O hangs"


class PlainSide:
    """Threads that write and read the same bytes."""

    def __init__(self, directory: Path, pool: mmap.mmap, direct: bool) -> None:
        self._directory = directory / "plain"
        self._directory.mkdir()
        self._pool = memoryview(pool)
        self._flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        self._headers = mmap.mmap(-1, NUM_CHUNKS * HEADER_BYTES)

    def store(self, round_number: int, threads: int) -> None:
        """Write the whole pool into new files."""
        with ThreadPoolExecutor(threads) as workers:
            assert all(workers.map(self._write, self._names(round_number), range(NUM_CHUNKS)))

    def load(self, round_number: int, threads: int) -> None:
        """Read what a round has written."""
        with ThreadPoolExecutor(threads) as workers:
            assert all(workers.map(self._read, self._names(round_number), range(NUM_CHUNKS)))

    def _names(self, round_number: int) -> list[Path]:
        return [self._directory / f"{round_number}-{index}" for index in range(NUM_CHUNKS)]

    def _buffers(self, index: int) -> list[memoryview]:
        header = memoryview(self._headers)[index * HEADER_BYTES : (index + 1) * HEADER_BYTES]
        return [header, self._pool[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]]

    def _write(self, name: Path, index: int) -> bool:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._flags, 0o600)
        try:
            return os.pwritev(fd, self._buffers(index), 0) == HEADER_BYTES + CHUNK_BYTES
        finally:
            os.close(fd)

    def _read(self, name: Path, index: int) -> bool:
        fd = os.open(name, os.O_RDONLY | self._flags)
        try:
            return os.preadv(fd, self._buffers(index), 0) == HEADER_BYTES + CHUNK_BYTES
        finally:
            os.close(fd)


def has_direct(directory: Path) -> bool:
    """Tell whether files there can be opened with O_DIRECT."""
    probe = directory / "direct"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def file_system(directory: Path) -> str:
    """Name the type of the file system that a directory is on."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    path = str(directory.resolve())
    on = [mount for mount in mounts if path == mount[1] or path.startswith(mount[1].rstrip("/") + "/")]
    return max(on, key=lambda mount: len(mount[1]))[2]


def measure(sides: Sequence[Callable[[int], None]], rounds: int) -> list[list[float]]:
    """Seconds of each function in each round, after one unmeasured; they take turns, also at being first."""
    seconds: list[list[float]] = [[] for _ in sides]
    order = list(range(len(sides)))
    for round_number in range(rounds + 1):
        for side in order:
            start = time.perf_counter()
            sides[side](round_number)
            if round_number:
                seconds[side].append(time.perf_counter() - start)
        order.reverse()
    return seconds


def run(directory: Path, rounds: int) -> list[Row]:
    """Measure both directions."""
    direct = has_direct(directory)
    pool_fd = os.memfd_create("pool", os.MFD_CLOEXEC)
    os.ftruncate(pool_fd, POOL_BYTES)
    pool = mmap.mmap(pool_fd, POOL_BYTES)
    for offset in _offsets():
        pool[offset : offset + CHUNK_BYTES] = random.Random(offset).randbytes(CHUNK_BYTES)
    tier, plain = TierSide(directory, pool, f"/proc/self/fd/{pool_fd}"), PlainSide(directory, pool, direct)
    writers, readers = tier.parameters.writers, tier.parameters.readers
    rows = []
    try:
        for direction, threads, sides in (
            ("store", writers, (lambda n: plain.store(n, writers), tier.store)),
            ("load", readers, (lambda n: plain.load(n, readers), tier.load)),
        ):
            plain_s, tier_s = map(statistics.median, measure(sides, rounds))
            mib = POOL_BYTES / (1 << 20)
            rows.append(Row(direction, threads, direct, mib / plain_s, mib / tier_s, plain_s / tier_s))
    finally:
        tier.close()
    return rows


def _offsets() -> range:
    return range(0, POOL_BYTES, CHUNK_BYTES)


@contextmanager
def _working_directory(parent: Path | None) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kvtier-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--directory", type=Path, help="where the files go (default: the temporary directory)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured passes of each kind (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    with _working_directory(args.directory) as directory:
        rows = run(directory, args.rounds)
        print(f"filesystem tier, {NUM_CHUNKS} chunks of 4 MiB a round, on {file_system(directory)}")
    print(HEAD.format("", "threads", "direct", "plain MiB/s", "tier MiB/s", "ratio", "limit"))
    for row in rows:
        direct = "yes" if row.direct else "no"
        print(
            ROW.format(
                row.direction, row.threads, direct, row.plain_mib_s, row.tier_mib_s, row.ratio, row.limit
            )
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
