"""Random memory and jobs for the tests of copies, and the slow reference that they are compared with."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier_ops.fragments import (
    KERNEL_PIECE_BYTES,
    Direction,
    Fragments,
    GroupPlaces,
    PlacedCopy,
    TensorPlace,
    Work,
    kernel_descriptors,
    pieces_per_row,
)
from kvtier_ops.layout import GroupLayout, TensorLayout, part_offset, slot_bytes
from kvtier_ops.plan import plan_job

SLOT_BYTES = 64 << 10
"""Room for any chunk of the random memory, all parts."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the random memory: where its pages lie in one of the allocations."""

    allocation: int
    offset: int
    stride: int
    num_blocks: int
    page: int

    @property
    def size(self) -> int:
        return (self.num_blocks - 1) * self.stride + self.page


@dataclass(frozen=True, slots=True)
class RandomMemory:
    """The tensors of one rank, and how they lie in a chunk."""

    allocation_bytes: tuple[int, ...]
    groups: tuple[tuple[Tensor, ...], ...]
    layouts: tuple[GroupLayout, ...]
    num_parts: int

    def places(self, addresses: Sequence[int]) -> list[GroupPlaces]:
        return [
            GroupPlaces(
                layout,
                tuple(
                    TensorPlace(addresses[t.allocation] + t.offset, t.stride, t.num_blocks, t.allocation)
                    for t in tensors
                ),
            )
            for tensors, layout in zip(self.groups, self.layouts, strict=True)
        ]


def random_memory(rng: random.Random) -> RandomMemory:
    """Lay groups out as engines do: tensors on their own, layer by layer, or a block's layers together."""
    blocks_per_chunk = rng.randint(1, 5)
    sizes: list[int] = []
    groups, layouts = [], []
    for group in range(rng.randint(1, 3)):
        unit = rng.choice([1, 4, 8, 16, 64])
        pages = [unit * rng.randint(1, 9) for _ in range(rng.randint(1, 5))]
        if rng.random() < 0.5:
            pages = [pages[0]] * len(pages)
        num_blocks, padding = rng.randint(6, 24), unit * rng.choice([0, 0, 0, 1, 3])
        groups.append(_place(rng.choice(["layers", "blocks", "separate"]), pages, num_blocks, padding, sizes))
        layouts.append(
            GroupLayout(
                tuple(TensorLayout(f"{group}.{i}", page) for i, page in enumerate(pages)), blocks_per_chunk
            )
        )
    return RandomMemory(tuple(sizes), tuple(groups), tuple(layouts), rng.randint(1, 3))


def _place(how: str, pages: list[int], num_blocks: int, padding: int, sizes: list[int]) -> tuple[Tensor, ...]:
    """Append what is needed to the sizes of the allocations."""
    widest, start = max(pages) + padding, 64 * (len(pages) % 2)
    if how == "separate":
        tensors = []
        for page in pages:
            tensors.append(Tensor(len(sizes), start, page + padding, num_blocks, page))
            sizes.append(start + num_blocks * (page + padding))
        return tuple(tensors)
    allocation = len(sizes)
    sizes.append(start + num_blocks * widest * len(pages))
    if how == "layers":
        return tuple(
            Tensor(allocation, start + i * num_blocks * widest, widest, num_blocks, page)
            for i, page in enumerate(pages)
        )
    return tuple(
        Tensor(allocation, start + i * widest, widest * len(pages), num_blocks, page)
        for i, page in enumerate(pages)
    )


def random_copies(rng: random.Random, memory: RandomMemory, pool_bytes: int) -> list[PlacedCopy]:
    """Plan a job over all groups that may start and end inside a chunk, into slots of their own."""
    bpc = memory.layouts[0].blocks_per_chunk
    block_ids: list[int] = []
    group_sizes, block_indices = [], []
    for tensors in memory.groups:
        num_blocks = tensors[0].num_blocks
        size = rng.randint(0, min(num_blocks, 4 * bpc))
        if rng.random() < 0.4:
            first = rng.randint(0, num_blocks - size)
            block_ids += range(first, first + size)
        else:
            block_ids += rng.sample(range(num_blocks), size)
        group_sizes.append(size)
        block_indices.append(rng.randint(0, 9))
    part = rng.randrange(memory.num_parts)
    placed, starts = [], list(range(0, pool_bytes, SLOT_BYTES))
    rng.shuffle(starts)
    for copy in plan_job(block_ids, group_sizes, block_indices, bpc):
        layout = memory.layouts[copy.group]
        assert slot_bytes(layout.part_bytes, memory.num_parts) <= SLOT_BYTES
        placed.append(PlacedCopy(copy, starts.pop() + part_offset(layout.part_bytes, part)))
    return placed


def copy_slowly(
    memory: RandomMemory,
    allocations: Sequence[Bytes],
    pool: Bytes,
    copies: Sequence[PlacedCopy],
    direction: Direction,
) -> None:
    """Copy page by page, as the words of the layout say it."""
    for placed in copies:
        copy = placed.copy
        layout = memory.layouts[copy.group]
        for i, block in enumerate(copy.block_ids):
            for number, tensor in enumerate(memory.groups[copy.group]):
                device = tensor.offset + block * tensor.stride
                start = (
                    placed.part_start + layout.tensor_offsets[number] + (copy.first_block + i) * tensor.page
                )
                page = allocations[tensor.allocation][device : device + tensor.page]
                in_pool = pool[start : start + tensor.page]
                if direction is Direction.STORE:
                    in_pool[:] = page
                else:
                    page[:] = in_pool


def run_work(work: Work, pool: Bytes, direction: Direction) -> None:
    """Do with a loop and memmove what the device is asked to do."""
    base = pool.ctypes.data

    def move(device: int, in_pool: int, nbytes: int) -> None:
        if direction is Direction.STORE:
            ctypes.memmove(in_pool, device, nbytes)
        else:
            ctypes.memmove(device, in_pool, nbytes)

    for fragments in (work.batch, work.plain):
        for row in range(len(fragments)):
            move(int(fragments.device[row]), base + int(fragments.pool[row]), int(fragments.nbytes[row]))
    for run in work.pitched:
        for row in range(run.rows):
            move(run.device + row * run.device_pitch, base + run.pool + row * run.pool_pitch, run.width_bytes)
    if len(work.kernel):
        run_kernel(work.kernel, base, move)


def run_kernel(fragments: Fragments, base: int, move: Callable[[int, int, int], None]) -> None:
    """Walk the descriptors as kernels.cu does: 7 blocks over (row, piece), the widest vectors that fit."""
    rows, per_row, blocks = kernel_descriptors(fragments, base), pieces_per_row(fragments), 7
    for block in range(blocks):
        for item in range(block, len(rows) * per_row, blocks):
            device, in_pool, nbytes = (int(value) for value in rows[item // per_row])
            begin = item % per_row * KERNEL_PIECE_BYTES
            if begin >= nbytes:
                continue
            piece = min(KERNEL_PIECE_BYTES, nbytes - begin)
            bits = (device + begin) | (in_pool + begin) | piece
            vector = next(size for size in (16, 8, 4, 1) if bits % size == 0)
            count = piece // vector
            move(device + begin, in_pool + begin, count * vector)
