"""Store and load through a real pool, against numpy copying the same bytes with the same strides.

    python -m tests.benchmarks.bench_copy [--json FILE]

32 layers in one allocation of shape (layers, blocks, page), 2 MiB chunks, 1 GiB a pass, scattered device
blocks. Plain and pool passes take turns, so that both meet the same machine; the ratio is plain time / pool
time, of medians. The plain copy goes to private memory of the process and checks nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ops"))

from kvtier_ops.host import HostTensors, LoadOutcome, load_part, store_part
from kvtier_ops.layout import SLOT_UNIT_BYTES, GroupLayout, TensorLayout, slot_bytes
from kvtier_ops.plan import ChunkCopy, plan_job
from kvtier_ops.pool import Pool, default_pool_directory

LAYERS = 32
TOTAL_BYTES = 1 << 30
SHAPES = ((64 << 10, 1, "scattered"), (16 << 10, 4, "scattered"), (16 << 10, 4, "consecutive"))
"""(page bytes, blocks per chunk, how a chunk's block ids lie): every chunk is 2 MiB."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    page_kib: int
    blocks_per_chunk: int
    block_ids: str
    direction: str
    checksum: bool
    plain_gib_s: float
    pool_gib_s: float
    ratio: float
    """Pool speed as a share of the plain copy's."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of chunks, stored in the pool and beside it."""

    layout: GroupLayout
    device: Bytes
    tensors: HostTensors
    copies: tuple[ChunkCopy, ...]
    slot_ids: list[int]
    generations: list[int]

    def store(self, pool: Pool, *, checksum: bool) -> list[int]:
        checksums = []
        for copy in self.copies:
            i = copy.slot_index
            slot_id, generation = self.slot_ids[i], self.generations[i]
            outcome = store_part(pool, slot_id, generation, 0, self.layout, self.tensors, copy, checksum)
            assert outcome.ok, outcome.reason
            checksums.append(outcome.checksum)
        return checksums

    def load(self, pool: Pool, *, checksum: bool) -> None:
        for copy in self.copies:
            i = copy.slot_index
            slot_id, generation = self.slot_ids[i], self.generations[i]
            expected = pool.part_checksum(slot_id, 0) if checksum else None
            outcome = load_part(pool, slot_id, generation, 0, self.layout, self.tensors, copy, expected)
            assert outcome is LoadOutcome.OK, outcome

    def plain(self, private: Bytes, *, load: bool) -> None:
        """Copy the same bytes with the same strides; one call for each run of consecutive blocks."""
        bpc, page = self.layout.blocks_per_chunk, self.layout.tensors[0].page_bytes
        for copy in self.copies:
            chunk = private[copy.slot_index].reshape(LAYERS, bpc, page)
            ids = copy.block_ids
            step = bpc if ids[-1] - ids[0] == bpc - 1 else 1
            for i in range(0, bpc, step):
                blocks, sub_blocks = self.device[:, ids[i] : ids[i] + step], chunk[:, i : i + step]
                if load:
                    blocks[:] = sub_blocks
                else:
                    sub_blocks[:] = blocks


def make_case(pool: Pool, page_bytes: int, bpc: int, order: str) -> Case:
    """Reserve the slots and fill the device with random bytes."""
    layout = GroupLayout(tuple(TensorLayout(f"layer.{i}", page_bytes) for i in range(LAYERS)), bpc)
    size = slot_bytes(layout.part_bytes, 1)
    num_chunks = TOTAL_BYTES // size
    num_blocks = num_chunks * bpc
    rng = np.random.default_rng(0)
    device = rng.integers(0, 256, (LAYERS, num_blocks, page_bytes), np.uint8)
    if order == "scattered":
        block_ids = rng.permutation(num_blocks).tolist()
    else:
        firsts = rng.permutation(num_chunks) * bpc
        block_ids = (firsts[:, None] + np.arange(bpc)).ravel().tolist()
    slot_ids = (rng.permutation(num_chunks) * (size // SLOT_UNIT_BYTES)).tolist()
    pool.back_records(slot_ids)
    generations = pool.slots.reserve(slot_ids, 1, size)
    copies = plan_job(block_ids, [num_blocks], [0], bpc)
    return Case(layout, device, HostTensors([list(device)]), copies, slot_ids, generations)


def measure(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median seconds of two functions that take turns, after one round unmeasured."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(rounds + 1):
        for function, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if round_number:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def run(pool: Pool, rounds: int) -> list[Row]:
    """Measure every shape in both directions, with checksums off and on."""
    gib = TOTAL_BYTES / (1 << 30)
    rows = []
    for page_bytes, bpc, order in SHAPES:
        case = make_case(pool, page_bytes, bpc, order)
        private = np.ones((len(case.copies), case.layout.part_bytes), np.uint8)
        for slot_id, checksum in zip(case.slot_ids, case.store(pool, checksum=True), strict=True):
            pool.slots.publish(slot_id, 1, b"chunk", [checksum])
        case.plain(private, load=False)
        for load in (False, True):
            for checksum in (False, True):
                through_pool = case.load if load else case.store

                def plain(load: bool = load, case: Case = case, private: Bytes = private) -> None:
                    case.plain(private, load=load)

                def pooled(checksum: bool = checksum, through: Callable[..., object] = through_pool) -> None:
                    through(pool, checksum=checksum)

                plain_s, pool_s = measure(plain, pooled, rounds)
                direction = "load" if load else "store"
                rows.append(
                    Row(
                        page_bytes >> 10,
                        bpc,
                        order,
                        direction,
                        checksum,
                        round(gib / plain_s, 2),
                        round(gib / pool_s, 2),
                        round(plain_s / pool_s, 3),
                    )
                )
    return rows


def print_table(rows: list[Row]) -> None:
    """Print the rows for people."""
    print("page   blocks/chunk  block ids    direction  checksum  plain GiB/s  pool GiB/s  ratio")
    for row in rows:
        print(
            f"{row.page_kib:>3} KiB  {row.blocks_per_chunk:>11}  {row.block_ids:<11}  {row.direction:<9}  "
            f"{'on' if row.checksum else 'off':<8}  {row.plain_gib_s:>11.2f}  {row.pool_gib_s:>10.2f}  "
            f"{row.ratio:>5.2f}"
        )


def main() -> None:
    """Make a pool in shared memory, measure, and remove it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=5, help="measured passes of each kind (default 5)")
    options = parser.parse_args()
    pool = Pool.create(default_pool_directory(f"bench-{os.getpid()}"), TOTAL_BYTES, fresh=True)
    try:
        pool.back(0, pool.data_bytes)
        rows = run(pool, options.rounds)
    finally:
        pool.remove()
    print_table(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
