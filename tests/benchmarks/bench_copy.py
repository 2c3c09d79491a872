"""Store and load through a real pool, against numpy copying the same bytes with the same strides.

    python -m tests.benchmarks.bench_copy [--json FILE]

32 layers in one allocation of shape (layers, blocks, page), 2 MiB chunks, 1 GiB a pass, scattered device
blocks (`kvtier_client.bench.copies`, as in `kvtier bench copy`). Plain and pool passes take turns, so that
both meet the same machine; the ratio is plain time / pool time, of medians. The plain copy goes to private
memory of the process and checks nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvtier_client.bench.copies import LAYERS, Bytes, Case, make_device
from kvtier_ops.layout import SLOT_UNIT_BYTES, slot_bytes
from kvtier_ops.plan import ChunkCopy
from kvtier_ops.pool import Pool, default_pool_directory

TOTAL_BYTES = 1 << 30
SHAPES = ((64 << 10, 1, "scattered"), (16 << 10, 4, "scattered"), (16 << 10, 4, "consecutive"))
"""(page bytes, blocks per chunk, how a chunk's block ids lie): every chunk is 2 MiB."""


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


def make_case(pool: Pool, page_bytes: int, bpc: int, order: str) -> Case:
    """Reserve the slots and fill the device with random bytes."""
    size = slot_bytes(LAYERS * page_bytes * bpc, 1)
    num_chunks = TOTAL_BYTES // size
    rng = np.random.default_rng(0)
    device = make_device(page_bytes, bpc, num_chunks, rng, scattered=order == "scattered")
    slot_ids = (rng.permutation(num_chunks) * (size // SLOT_UNIT_BYTES)).tolist()
    pool.back_records(slot_ids)
    return Case(device, pool, slot_ids, pool.slots.reserve(slot_ids, 1, size))


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
        private = np.ones((len(case.device.copies), case.device.layout.part_bytes), np.uint8)
        for copy in case.device.copies:
            checksum = case.store(copy, checksum=True)
            pool.slots.publish(case.slot_ids[copy.slot_index], 1, b"chunk", [checksum])
            case.plain(private, copy, load=False)
        for load in (False, True):
            for verified in (False, True):
                through = case.load if load else case.store

                def plain(load: bool = load, case: Case = case, private: Bytes = private) -> None:
                    for copy in case.device.copies:
                        case.plain(private, copy, load=load)

                def pooled(
                    checksum: bool = verified,
                    through: Callable[..., object] = through,
                    copies: tuple[ChunkCopy, ...] = case.device.copies,
                ) -> None:
                    for copy in copies:
                        through(copy, checksum=checksum)

                plain_s, pool_s = measure(plain, pooled, rounds)
                direction = "load" if load else "store"
                rows.append(
                    Row(
                        page_bytes >> 10,
                        bpc,
                        order,
                        direction,
                        verified,
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
