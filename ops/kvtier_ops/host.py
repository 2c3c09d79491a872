"""Copies between the device blocks of a CPU-addressable engine and the pool, with numpy.

`copy_out` and `copy_in` move bytes; `store_part` and `load_part` are the same behind the generation fence, as
workers use them. Owns no thread and no list of jobs.

A chunk is copied with as few numpy calls as its addresses allow, because each call that returns competes
for the GIL with the engine's own Python code: neighbouring tensors that are evenly spaced in memory (one
allocation of shape (layers, blocks, page)) are one strided array, and block ids in arithmetic progression are
one slice of it. So a chunk of one block, or of consecutive blocks, is one call for all layers. Each call
releases the GIL.

Tried on 2 cores, 32 layers, 1 GiB through /dev/shm, GiB/s of a store, memcpy of everything at once 20:

                                                        64 KiB pages   4 scattered 16 KiB pages a chunk
    one strided call per run of blocks (as here)           18.2             9 to 12
    one call per row                                       15.1             8
    the same with pages seen as uint64 or complex128       17.5             9 to 11
    np.take(..., out=), for stores only                                     9 to 11
    fancy index and its temporary                                           9
    pages seen as one void item each                       17.5             keeps the GIL: not used
    process_vm_writev or pwritev of many rows at once       4 to 6          the kernel copies page by page
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from kvtier_ops.checksum import NOT_RECORDED, part_checksum
from kvtier_ops.faults import fault_point
from kvtier_ops.layout import GroupLayout, part_offset
from kvtier_ops.plan import ChunkCopy
from kvtier_ops.pool import MappedPool
from kvtier_ops.slot_table import fence

Bytes = npt.NDArray[np.uint8]


class BlockOutOfRange(IndexError):
    """A copy names a device block that a tensor does not have. Raised before any byte moved."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """Evenly spaced tensors of one page size, seen as one array."""

    pages: Bytes
    """Shape (tensors, num_blocks, page_bytes)."""
    part_start: int
    part_end: int


@dataclass(frozen=True, slots=True)
class _Binding:
    layout: GroupLayout
    stacks: tuple[_Stack, ...]


class BlockTensors(Protocol):
    """The device blocks of one rank, as a worker's copy threads move them: `HostTensors`, or an engine's own
    class for memory that numpy does not reach.
    """

    def bind(self, group: int, layout: GroupLayout) -> object:
        """Check the tensors of a group against its layout. Raises ValueError."""
        ...

    def mark(self) -> object:
        """Note what the engine's compute was given so far. On the engine's thread, when a job is
        submitted.
        """
        ...

    def follow(self, mark: object) -> None:
        """Have the copies that this thread makes next come after what `mark` noted."""
        ...

    def copy_out(self, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes) -> None:
        """Copy the blocks of one chunk into its part, shape (part_bytes,); return with the last byte there.

        Bytes of sub-blocks that the copy does not name are left alone. Raises BlockOutOfRange or ValueError
        before any byte moved.
        """
        ...

    def copy_in(self, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes) -> None:
        """Copy the blocks of one chunk from its part; else as `copy_out`."""
        ...

    def use_pool(self, pool: MappedPool | None, *, pin: bool) -> None:
        """Hear which pool is copied with from now on, before an earlier one is unmapped; None = none.

        `pin`: the worker's threads copy, so that it is worth making the pool known to the device.
        """
        ...


class HostTensors:
    """The KV tensors of one rank, registered once: per group, in the order of the group's layout.

    Each is uint8, shape (num_blocks, row_bytes), row_bytes at least the layout's page_bytes. Rows may lie
    apart (strides[0] > row_bytes), bytes of a row may not. Keeps the arrays alive. Raises ValueError.
    """

    def __init__(self, groups: Sequence[Sequence[Bytes]]) -> None:
        self._groups = tuple(tuple(tensors) for tensors in groups)
        for group, tensors in enumerate(self._groups):
            for index, tensor in enumerate(tensors):
                _check_tensor(tensor, f"tensor {index} of group {group}")
        self._bindings: list[_Binding | None] = [None] * len(self._groups)

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    def bind(self, group: int, layout: GroupLayout) -> tuple[_Stack, ...]:
        """Return the group's tensors as few strided arrays; checks and builds them on first use.

        Raises ValueError if the tensors do not have this layout.
        """
        binding = self._bindings[group]
        if binding is None or (binding.layout is not layout and binding.layout != layout):
            binding = _Binding(layout, _build_stacks(self._groups[group], group, layout))
            self._bindings[group] = binding
        return binding.stacks

    def mark(self) -> None:
        """Nothing to note: what the CPU has returned from is done."""

    def follow(self, mark: object) -> None:
        """Nothing to wait for."""

    def copy_out(self, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes) -> None:
        copy_out(self, layout, copy, part_view)

    def copy_in(self, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes) -> None:
        copy_in(self, layout, copy, part_view)

    def use_pool(self, pool: MappedPool | None, *, pin: bool) -> None:
        """Every mapped pool will do as it is."""

    def check_blocks(self, layout: GroupLayout, copy: ChunkCopy) -> None:
        """Raise BlockOutOfRange unless every tensor of the group has every block of the copy."""
        lowest, highest = min(copy.block_ids), max(copy.block_ids)
        for tensor, tensor_layout in zip(self._groups[copy.group], layout.tensors, strict=True):
            if lowest < 0 or highest >= len(tensor):
                block = lowest if lowest < 0 else highest
                raise BlockOutOfRange(
                    f"block {block} of group {copy.group} is outside tensor {tensor_layout.name!r}, "
                    f"which has {len(tensor)} rows"
                )


def copy_out(tensors: HostTensors, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes) -> None:
    """Copy the blocks of one chunk from the device into its part, shape (part_bytes,).

    Bytes of sub-blocks that the copy does not name are left alone. Raises BlockOutOfRange or ValueError
    before any byte moved.
    """
    for blocks, sub_blocks in _pairs(tensors, layout, copy, part_view):
        np.copyto(sub_blocks, blocks)


def copy_in(tensors: HostTensors, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes) -> None:
    """Copy the blocks of one chunk from its part to the device; else as `copy_out`."""
    for blocks, sub_blocks in _pairs(tensors, layout, copy, part_view):
        np.copyto(blocks, sub_blocks)


@dataclass(frozen=True, slots=True)
class StoreOutcome:
    """How a part's store ended. `checksum` is 0 where none was asked for; `reason` is empty where ok."""

    ok: bool
    checksum: int
    reason: str


class LoadOutcome(enum.Enum):
    """How a part's load ended. After anything but OK the device blocks hold bytes that mean nothing."""

    OK = "ok"
    TORN = "torn"
    """The slot was given away before or during the copy."""
    MISMATCH = "mismatch"
    """The slot is still ours, but its bytes are not the ones that were stored."""


def store_part(
    pool: MappedPool,
    slot_id: int,
    generation: int,
    part: int,
    layout: GroupLayout,
    tensors: BlockTensors,
    copy: ChunkCopy,
    checksum: bool,
) -> StoreOutcome:
    """Copy one chunk's blocks into this rank's part of a slot, if the slot still has `generation`.

    A generation that differs before the copy leaves the slot untouched; one that differs after it is a
    failed store too. The checksum covers the whole part, also where the copy fills some of it.
    """
    current = pool.generation(slot_id)
    if current != generation:
        return _store_failed(slot_id, generation, current, "before")
    view = pool.part_view(slot_id, part_offset(layout.part_bytes, part), layout.part_bytes)
    fault_point("store.before_copy")
    tensors.copy_out(layout, copy, view)
    digest = part_checksum(view) if checksum else NOT_RECORDED
    fault_point("store.after_copy")
    fence()
    current = pool.generation(slot_id)
    if current != generation:
        return _store_failed(slot_id, generation, current, "during")
    return StoreOutcome(True, digest, "")


def load_part(
    pool: MappedPool,
    slot_id: int,
    generation: int,
    part: int,
    layout: GroupLayout,
    tensors: BlockTensors,
    copy: ChunkCopy,
    expected_checksum: int | None,
) -> LoadOutcome:
    """Copy one chunk's blocks from this rank's part of a slot to the device, and say whether they count.

    `expected_checksum` is the part's in the slot record (`pool.part_checksum`); None or 0 = do not verify.
    The hash covers the whole part in the slot. A generation that changed wins over a mismatch.
    """
    if pool.generation(slot_id) != generation:
        return LoadOutcome.TORN
    view = pool.part_view(slot_id, part_offset(layout.part_bytes, part), layout.part_bytes)
    fault_point("load.before_copy")
    tensors.copy_in(layout, copy, view)
    differs = bool(expected_checksum) and part_checksum(view) != expected_checksum
    fault_point("load.after_copy")
    fence()
    if pool.generation(slot_id) != generation:
        return LoadOutcome.TORN
    return LoadOutcome.MISMATCH if differs else LoadOutcome.OK


def _store_failed(slot_id: int, generation: int, current: int, when: str) -> StoreOutcome:
    reason = f"slot {slot_id} was given away {when} the copy: generation {current}, not {generation}"
    return StoreOutcome(False, NOT_RECORDED, reason)


def _pairs(
    tensors: HostTensors, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes
) -> Iterator[tuple[Bytes, Bytes]]:
    """Yield (device blocks, their place in the part), both shape (tensors, blocks, page_bytes)."""
    block_ids, first_block = copy.block_ids, copy.first_block
    if not block_ids:
        return
    stacks = tensors.bind(copy.group, layout)
    if first_block < 0 or first_block + len(block_ids) > layout.blocks_per_chunk:
        raise ValueError(
            f"sub-blocks {first_block} to {first_block + len(block_ids) - 1} are outside a chunk of "
            f"{layout.blocks_per_chunk} blocks"
        )
    if part_view.shape != (layout.part_bytes,):
        raise ValueError(f"the part has shape {part_view.shape}, its layout needs ({layout.part_bytes},)")
    tensors.check_blocks(layout, copy)
    runs = tuple(_runs(block_ids))
    for stack in stacks:
        count, _, page_bytes = stack.pages.shape
        part = part_view[stack.part_start : stack.part_end]
        part = part.reshape(count, layout.blocks_per_chunk, page_bytes)
        for index, length, rows in runs:
            start = first_block + index
            yield stack.pages[:, rows], part[:, start : start + length]


def _runs(block_ids: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
    """Split block ids into arithmetic progressions: (index of the first, how many, rows as a slice).

    Consecutive ids are the common case; any two different ids are a progression too, so scattered blocks
    need half as many copies as there are blocks.
    """
    index, total = 0, len(block_ids)
    while index < total:
        first, end, step = block_ids[index], index + 1, 1
        if end < total and block_ids[end] != first:
            step = block_ids[end] - first
            while end < total and block_ids[end] - block_ids[end - 1] == step:
                end += 1
        stop = first + (end - index) * step
        # A downward slice that reaches row 0 has no number for its end.
        yield index, end - index, slice(first, stop if stop >= 0 else None, step)
        index = end


def _check_tensor(tensor: Bytes, name: str) -> None:
    if tensor.dtype != np.uint8 or tensor.ndim != 2:
        raise ValueError(f"{name} is {tensor.dtype} of {tensor.ndim} dimensions; uint8 of 2 is needed")
    if tensor.shape[1] > 1 and tensor.strides[1] != 1:
        raise ValueError(f"the bytes of a row of {name} are {tensor.strides[1]} apart; only 1 can be copied")


def _build_stacks(tensors: Sequence[Bytes], group: int, layout: GroupLayout) -> tuple[_Stack, ...]:
    if len(tensors) != len(layout.tensors):
        raise ValueError(f"group {group} has {len(tensors)} tensors, its layout names {len(layout.tensors)}")
    for tensor, expected in zip(tensors, layout.tensors, strict=True):
        if tensor.shape[1] < expected.page_bytes:
            raise ValueError(
                f"tensor {expected.name!r} of group {group} has rows of {tensor.shape[1]} bytes, "
                f"its layout needs {expected.page_bytes}"
            )
    stacks: list[_Stack] = []
    first = 0
    while first < len(tensors):
        count, spacing = _evenly_spaced(tensors, layout, first)
        base, page_bytes = tensors[first], layout.tensors[first].page_bytes
        pages = as_strided(base, (count, len(base), page_bytes), (spacing, base.strides[0], 1))
        start = layout.tensor_offsets[first]
        stacks.append(_Stack(pages, start, start + count * layout.blocks_per_chunk * page_bytes))
        first += count
    return tuple(stacks)


def _evenly_spaced(tensors: Sequence[Bytes], layout: GroupLayout, first: int) -> tuple[int, int]:
    """Return how many tensors from `first` on one strided array can cover, and their spacing in bytes."""

    def form(index: int) -> tuple[int, int, int]:
        tensor = tensors[index]
        return len(tensor), tensor.strides[0], layout.tensors[index].page_bytes

    end, spacing = first + 1, 0
    while end < len(tensors) and form(end) == form(first):
        distance = tensors[end].ctypes.data - tensors[end - 1].ctypes.data
        if end > first + 1 and distance != spacing:
            break
        spacing = distance
        end += 1
    return end - first, spacing
