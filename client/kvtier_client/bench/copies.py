"""Store and load of chunks through a mapped pool, against numpy copying the same bytes with the same strides.

The engine's tensors are 32 layers in one allocation of shape (layers, blocks, page). Plain and pool copies
take turns, so that both meet the same machine. The plain copy goes to private memory of the process and
checks nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from kvtier_client.bench.block_client import BlockClient, chunk_key
from kvtier_client.bench.figures import BenchFailed, Timing, timed_ms, timing
from kvtier_client.context import ReqContext
from kvtier_client.reports import LoadReportItem, StoreReportItem
from kvtier_ops.host import HostTensors, LoadOutcome, load_part, store_part
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy, plan_job
from kvtier_ops.pool import MappedPool

LAYERS = 32
FLOOR = "numpy copy of the same bytes"

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Device:
    """An engine's tensors, filled with random bytes, and one copy for each chunk of them."""

    layout: GroupLayout
    pages: Bytes
    """Shape (layers, blocks, page)."""
    tensors: HostTensors
    copies: tuple[ChunkCopy, ...]


def tensors_of(page_bytes: int) -> tuple[TensorLayout, ...]:
    """Return the layers of one chunk."""
    return tuple(TensorLayout(f"layer.{i}", page_bytes) for i in range(LAYERS))


def make_device(
    page_bytes: int,
    blocks_per_chunk: int,
    num_chunks: int,
    rng: np.random.Generator,
    *,
    scattered: bool = True,
) -> Device:
    """Make tensors of so many chunks. `scattered`: a chunk's blocks lie anywhere, else beside one another."""
    layout = GroupLayout(tensors_of(page_bytes), blocks_per_chunk)
    num_blocks = num_chunks * blocks_per_chunk
    pages = rng.integers(0, 256, (LAYERS, num_blocks, page_bytes), np.uint8)
    if scattered:
        block_ids = rng.permutation(num_blocks).tolist()
    else:
        firsts = rng.permutation(num_chunks) * blocks_per_chunk
        block_ids = (firsts[:, None] + np.arange(blocks_per_chunk)).ravel().tolist()
    copies = plan_job(block_ids, [num_blocks], [0], blocks_per_chunk)
    return Device(layout, pages, HostTensors([list(pages)]), copies)


@dataclass(frozen=True, slots=True)
class Case:
    """Chunks of a device, each with its slot of a pool and its place in private memory."""

    device: Device
    pool: MappedPool
    slot_ids: Sequence[int]
    generations: Sequence[int]

    def store(self, copy: ChunkCopy, *, checksum: bool) -> int:
        """Copy one chunk into its slot; returns its checksum, 0 without one."""
        i, device = copy.slot_index, self.device
        outcome = store_part(
            self.pool, self.slot_ids[i], self.generations[i], 0, device.layout, device.tensors, copy, checksum
        )
        if not outcome.ok:
            raise BenchFailed(f"a store failed: {outcome.reason}")
        return outcome.checksum

    def load(self, copy: ChunkCopy, *, checksum: bool) -> None:
        """Copy one chunk from its slot, and with `checksum` compare it with the one in the slot's record."""
        slot_id, device = self.slot_ids[copy.slot_index], self.device
        expected = self.pool.part_checksum(slot_id, 0) if checksum else None
        generation = self.generations[copy.slot_index]
        outcome = load_part(self.pool, slot_id, generation, 0, device.layout, device.tensors, copy, expected)
        if outcome is not LoadOutcome.OK:
            raise BenchFailed(f"a load failed: {outcome.value}")

    def plain(self, private: Bytes, copy: ChunkCopy, *, load: bool) -> None:
        """Copy the same bytes with the same strides; one call for each run of consecutive blocks.

        `private`: shape (chunks, part_bytes).
        """
        layout, pages = self.device.layout, self.device.pages
        bpc, page = layout.blocks_per_chunk, layout.tensors[0].page_bytes
        chunk = private[copy.slot_index].reshape(LAYERS, bpc, page)
        ids = copy.block_ids
        step = bpc if ids[-1] - ids[0] == bpc - 1 else 1
        for i in range(0, bpc, step):
            blocks, sub_blocks = pages[:, ids[i] : ids[i] + step], chunk[:, i : i + step]
            if load:
                blocks[:] = sub_blocks
            else:
                sub_blocks[:] = blocks


def measure(
    blocks: BlockClient, page_bytes: int, num_chunks: int, rounds: int, seed: int, called: Callable[[], None]
) -> list[Timing]:
    """Store and load chunks of one block in the slots that a daemon grants, with checksums off and on.

    A sample is one chunk. One round is not counted. `called` is called after each round.
    """
    device = make_device(page_bytes, 1, num_chunks, np.random.default_rng(seed))
    ctx = ReqContext("copy", None)
    keys = [chunk_key(number) for number in range(num_chunks)]
    grant = blocks.scheduler.prepare_store(ctx, keys)
    if len(grant.slot_ids) != num_chunks:
        raise BenchFailed(
            f"the daemon gave {len(grant.slot_ids)} of {num_chunks} slots ({grant.reason or 'no room'}); "
            "copy less: --bytes"
        )
    case = Case(device, blocks.pool, grant.slot_ids, grant.generations)
    private = np.ones((num_chunks, device.layout.part_bytes), np.uint8)
    rows = [_row(case, private, "store", checksum, rounds, called) for checksum in (False, True)]
    start = time.perf_counter()
    checksums = [case.store(copy, checksum=True) for copy in device.copies]
    seconds = time.perf_counter() - start
    num_bytes = num_chunks * device.layout.part_bytes
    blocks.worker.report_store(
        StoreReportItem(
            0, grant.slot_ids, grant.generations, keys, checksums, num_bytes=num_bytes, seconds=seconds
        )
    )
    blocks.flush()
    answer = blocks.scheduler.lookup(ctx, keys)
    if list(answer.slot_ids) != list(grant.slot_ids):
        raise BenchFailed(f"{len(answer.slot_ids)} of {num_chunks} chunks can be loaded; copy less: --bytes")
    lease_id = blocks.scheduler.new_lease_id()
    blocks.scheduler.start_load(answer.lease_id, lease_id, list(answer.slot_ids))
    start = time.perf_counter()
    rows += [_row(case, private, "load", checksum, rounds, called) for checksum in (False, True)]
    seconds = time.perf_counter() - start
    blocks.worker.report_load(LoadReportItem(lease_id, num_bytes=num_bytes, seconds=seconds))
    blocks.scheduler.finish(ctx.req_id)
    blocks.flush()
    return rows


def _row(
    case: Case, private: Bytes, direction: str, checksum: bool, rounds: int, called: Callable[[], None]
) -> Timing:
    is_load = direction == "load"
    through = case.load if is_load else case.store
    real_ms: list[float] = []
    plain_ms: list[float] = []
    for round_number in range(rounds + 1):
        # Pass after pass, not chunk after chunk: the second copy of a chunk would find it in the CPU's cache.
        plain = [timed_ms(partial(case.plain, private, copy, load=is_load)) for copy in case.device.copies]
        real = [timed_ms(partial(through, copy, checksum=checksum)) for copy in case.device.copies]
        if round_number:
            plain_ms += plain
            real_ms += real
        called()
    return timing(f"{direction}{' with checksum' if checksum else ''}", FLOOR, real_ms, plain_ms)
