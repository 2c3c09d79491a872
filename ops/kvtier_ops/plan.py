"""From an engine's job (device block ids, group by group) to one copy per chunk.

Owns the arithmetic of jobs that start or end inside a chunk. Touches no memory and knows no slot ids: a copy
says the how-many-th slot of the job it uses, and the job's owner holds the list of slots in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PlanError(ValueError):
    """The job contradicts itself. The message begins with the field that is wrong; nothing was copied."""


@dataclass(frozen=True, slots=True)
class ChunkCopy:
    """The blocks of one chunk that a job copies: `block_ids[i]` <-> sub-block `first_block + i`."""

    group: int
    slot_index: int
    """Counts the slots of the whole job, in order, over all groups."""
    first_block: int
    block_ids: tuple[int, ...]
    """Empty: it is not known which blocks belong to this chunk, so none may be copied."""


def plan_job(
    block_ids: Sequence[int],
    group_sizes: Sequence[int],
    block_indices: Sequence[int],
    blocks_per_chunk: int,
    group_slots: Sequence[int] | None = None,
    ends_whole: bool = False,
) -> tuple[ChunkCopy, ...]:
    """Split a job into copies of one chunk each, in the order of the job's slots.

    `block_ids` are the device blocks, group after group; `group_sizes[g]` of them belong to group g;
    `block_indices[g]` is the place in the request of the group's first block. With 4 blocks a chunk, a group
    of 6 blocks at index 6 takes two slots:

        index       4  5  6  7 | 8  9 10 11
        copied            x  x | x  x  x  x

    A group without blocks takes no slot. Raises PlanError.

    An engine that leaves out blocks which are not in device memory says with `group_slots` how many slots
    each group takes, and with `ends_whole` that the last block of each group ends its last slot. Where the
    blocks of a group do not fill that many, some are missing in the middle and those behind them lie
    elsewhere than their order says: each chunk of that group gets a copy without blocks.
    """
    _check(block_ids, group_sizes, block_indices, blocks_per_chunk, group_slots)
    copies: list[ChunkCopy] = []
    position = 0
    for group, size in enumerate(group_sizes):
        group_end = position + size
        first_block = block_indices[group] % blocks_per_chunk
        if group_slots is not None and not _fills(
            first_block + size, group_slots[group], blocks_per_chunk, ends_whole
        ):
            copies += [ChunkCopy(group, len(copies) + i, 0, ()) for i in range(group_slots[group])]
            position = group_end
        while position < group_end:
            chunk_end = min(position + blocks_per_chunk - first_block, group_end)
            ids = tuple(block_ids[position:chunk_end])
            copies.append(ChunkCopy(group, len(copies), first_block, ids))
            position = chunk_end
            first_block = 0
    return tuple(copies)


def _fills(end_block: int, num_slots: int, blocks_per_chunk: int, ends_whole: bool) -> bool:
    """Tell whether blocks up to `end_block`, counted from the first slot's begin, take so many slots."""
    if ends_whole:
        return end_block == num_slots * blocks_per_chunk
    return -(-end_block // blocks_per_chunk) == num_slots


def _check(
    block_ids: Sequence[int],
    group_sizes: Sequence[int],
    block_indices: Sequence[int],
    blocks_per_chunk: int,
    group_slots: Sequence[int] | None,
) -> None:
    if blocks_per_chunk < 1:
        raise PlanError(f"blocks_per_chunk: must be at least 1, not {blocks_per_chunk}")
    if len(block_indices) != len(group_sizes):
        raise PlanError(
            f"block_indices: {len(block_indices)} entries for {len(group_sizes)} groups; give one per group"
        )
    if group_slots is not None and len(group_slots) != len(group_sizes):
        raise PlanError(
            f"group_slots: {len(group_slots)} entries for {len(group_sizes)} groups; give one per group"
        )
    named = (("group_sizes", group_sizes), ("block_indices", block_indices), ("block_ids", block_ids))
    for field, values in named:
        if len(values) > 0 and min(values) < 0:
            raise PlanError(f"{field}: {min(values)} is negative")
    if sum(group_sizes) != len(block_ids):
        raise PlanError(
            f"group_sizes: their sum is {sum(group_sizes)}, but there are {len(block_ids)} block_ids"
        )
