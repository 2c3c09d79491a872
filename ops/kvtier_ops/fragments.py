"""From the chunk copies of a job to the pieces of memory that are moved, and by which means.

Owns the checks that stand before every copy, the joining of adjacent rows, the pitched runs, and the choice
of means. Pure arithmetic on addresses: it touches no memory, so that the same plan can be looked at, run by a
plain loop in a test, and given to a device.

    copies of a job --plan_fragments--> fragments (device address, pool offset, bytes), joined where both
                                        sides are adjacent
                    --assign_means----> kernel | batch | pitched runs | plain
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier_ops.layout import GroupLayout
from kvtier_ops.plan import ChunkCopy

KERNEL_BELOW_BYTES = 32 << 10
"""Smaller fragments are moved by the kernel, others by the copy engines. NOT MEASURED yet: no GPU was to be
had. `make bench-gpu` prints what both means reach at each size; put the crossing here."""

KERNEL_PIECE_BYTES = 16 << 10
"""What a block of the kernel moves at a time: 256 threads, four vectors of 16 bytes. NOT MEASURED yet."""

MAX_PITCH_BYTES = (1 << 31) - 1
"""The largest distance of rows in cudaMemcpy2D (cudaDevAttrMaxPitch); larger ones are copied row by row."""

Int64s = npt.NDArray[np.int64]

DESCRIPTOR = np.dtype([("device", "<u8"), ("pool", "<u8"), ("nbytes", "<u8")])
"""What the kernel reads of a fragment: two addresses and a length; `Descriptor` in kernels.cu."""


class CopyRefused(ValueError):
    """The job would touch memory that it may not, or contradicts itself. Raised before any byte moved."""


class Direction(enum.Enum):
    """Which way a job's bytes go; the numbers are the protocol's."""

    STORE = 1
    """Device to pool."""
    LOAD = 2
    """Pool to device."""


@dataclass(frozen=True, slots=True)
class PlacedCopy:
    """A chunk copy of a plan, and where the rank's part of its slot begins in the pool's data area.

    That is `slot_offset(slot_id) + part_offset(layout.part_bytes, part)`.
    """

    copy: ChunkCopy
    part_start: int


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor's pages lie in the address space of the process that copies."""

    address: int
    stride_bytes: int
    num_blocks: int
    allocation: int = 0
    """Tells allocations apart: no copy may name two, even where they happen to be neighbours."""


@dataclass(frozen=True, slots=True)
class GroupPlaces:
    """The tensors of one group, in the order of its layout."""

    layout: GroupLayout
    tensors: tuple[TensorPlace, ...]

    def __post_init__(self) -> None:
        if len(self.tensors) != len(self.layout.tensors):
            raise ValueError(f"{len(self.tensors)} tensors, the layout names {len(self.layout.tensors)}")


@dataclass(frozen=True, slots=True)
class Fragments:
    """Pieces of memory that are one range on both sides. Arrays of shape (n,), int64, by pool offset."""

    device: Int64s
    """Addresses."""
    pool: Int64s
    """Offsets in the pool's data area."""
    nbytes: Int64s
    allocation: Int64s

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def total_bytes(self) -> int:
        return int(self.nbytes.sum())

    def take(self, which: npt.NDArray[np.bool_] | Int64s) -> Fragments:
        """Return some of them."""
        return Fragments(self.device[which], self.pool[which], self.nbytes[which], self.allocation[which])


@dataclass(frozen=True, slots=True)
class Run:
    """Fragments of one size, evenly spaced on both sides: one two-dimensional copy."""

    device: int
    pool: int
    width_bytes: int
    rows: int
    device_pitch: int
    pool_pitch: int


@dataclass(frozen=True, slots=True)
class Means:
    """What the device can do, and from which size on. A benchmark gives others."""

    kernel_below_bytes: int = KERNEL_BELOW_BYTES
    """0: no kernel."""
    batch: bool = False
    """One call for many plain copies (cudaMemcpyBatchAsync) instead of pitched runs: where each layer is an
    allocation of its own there are no runs across layers, and the search takes 45 ms per GiB of 16 KiB pages
    on one core, beside 3 ms for all else [m]."""
    max_pitch_bytes: int = MAX_PITCH_BYTES
    """0: no pitched runs."""


@dataclass(frozen=True, slots=True)
class Work:
    """The fragments of a job by the means that moves them; each fragment is in exactly one."""

    kernel: Fragments
    batch: Fragments
    pitched: tuple[Run, ...]
    plain: Fragments

    @property
    def total_bytes(self) -> int:
        pitched = sum(run.width_bytes * run.rows for run in self.pitched)
        return self.kernel.total_bytes + self.batch.total_bytes + self.plain.total_bytes + pitched


def plan_fragments(
    groups: Sequence[GroupPlaces],
    copies: Sequence[PlacedCopy],
    direction: Direction,
    pool_bytes: int,
    boundaries: Sequence[int] = (),
) -> Fragments:
    """Check a whole job and return its fragments; a copy without blocks has none.

    No fragment crosses one of the `boundaries`, ascending pool offsets: memory that was registered with the
    driver in pieces may be named by one piece only in one copy. Raises CopyRefused if a block, sub-block,
    slot or part is outside what is there, or if two copies write the same byte.
    """
    by_group: dict[int, list[PlacedCopy]] = {}
    for placed in copies:
        check_copy(groups, placed, pool_bytes)
        if placed.copy.block_ids:
            by_group.setdefault(placed.copy.group, []).append(placed)
    if not by_group:
        empty = np.empty(0, np.int64)
        return Fragments(empty, empty, empty, empty)
    rows = _concatenate([_rows(groups[group], placed) for group, placed in by_group.items()])
    rows = rows.take(np.argsort(rows.pool, kind="stable"))
    _check_written_once(rows, direction)
    return _split(_join(rows), boundaries)


def check_copy(groups: Sequence[GroupPlaces], placed: PlacedCopy, pool_bytes: int) -> None:
    """Raise CopyRefused unless the copy stays inside its tensors, its chunk and the pool."""
    copy = placed.copy
    if not 0 <= copy.group < len(groups):
        raise CopyRefused(f"group: {copy.group} is not one of the {len(groups)} groups of this memory")
    layout = groups[copy.group].layout
    if not 0 <= placed.part_start <= pool_bytes - layout.part_bytes:
        raise CopyRefused(
            f"part_start: {layout.part_bytes} bytes at offset {placed.part_start} leave the pool of "
            f"{pool_bytes} bytes"
        )
    if not copy.block_ids:
        return
    if copy.first_block < 0 or copy.first_block + len(copy.block_ids) > layout.blocks_per_chunk:
        raise CopyRefused(
            f"first_block: sub-blocks {copy.first_block} to {copy.first_block + len(copy.block_ids) - 1} are "
            f"outside a chunk of {layout.blocks_per_chunk} blocks"
        )
    lowest, highest = min(copy.block_ids), max(copy.block_ids)
    for tensor, named in zip(groups[copy.group].tensors, layout.tensors, strict=True):
        if lowest < 0 or highest >= tensor.num_blocks:
            block = lowest if lowest < 0 else highest
            raise CopyRefused(
                f"block_ids: block {block} of group {copy.group} is outside tensor {named.name!r}, "
                f"which has {tensor.num_blocks} blocks"
            )


def assign_means(
    fragments: Fragments, means: Means, pinned_bytes: int, boundaries: Sequence[int] = ()
) -> Work:
    """Say for each fragment what moves it. `pinned_bytes`: the front of the pool that the driver knows.

    What lies behind that is copied plainly: the driver stages it, and a kernel cannot reach it.
    `boundaries` are those of `plan_fragments`; no run crosses one either.
    """
    pinned = fragments.pool + fragments.nbytes <= pinned_bytes
    small = pinned & (fragments.nbytes < means.kernel_below_bytes)
    large = fragments.take(pinned & ~small)
    kernel, plain = fragments.take(small), fragments.take(~pinned)
    nothing = large.take(np.zeros(len(large), np.bool_))
    if means.batch:
        return Work(kernel, large, (), plain)
    if means.max_pitch_bytes == 0:
        return Work(kernel, nothing, (), _concatenate((large, plain)))
    runs, single = _find_runs(large, means.max_pitch_bytes, boundaries)
    return Work(kernel, nothing, runs, _concatenate((single, plain)))


def kernel_descriptors(fragments: Fragments, pool_address: int) -> npt.NDArray[np.void]:
    """Return what the kernel is given, shape (n,), dtype DESCRIPTOR."""
    descriptors = np.empty(len(fragments), DESCRIPTOR)
    descriptors["device"] = fragments.device
    descriptors["pool"] = fragments.pool + pool_address
    descriptors["nbytes"] = fragments.nbytes
    return descriptors


def pieces_per_row(fragments: Fragments) -> int:
    """Return into how many pieces the kernel divides each row: as many as the longest needs."""
    return -(-int(fragments.nbytes.max()) // KERNEL_PIECE_BYTES)


def _rows(group: GroupPlaces, copies: Sequence[PlacedCopy]) -> Fragments:
    """Return every page by itself, tensor after tensor."""
    layout = group.layout
    counts = [len(placed.copy.block_ids) for placed in copies]
    blocks = np.array([block for placed in copies for block in placed.copy.block_ids], np.int64)
    sub_blocks: Int64s = np.concatenate(
        [
            np.arange(placed.copy.first_block, placed.copy.first_block + count, dtype=np.int64)
            for placed, count in zip(copies, counts, strict=True)
        ]
    )
    parts = np.repeat(np.array([placed.part_start for placed in copies], np.int64), counts)
    addresses = np.array([tensor.address for tensor in group.tensors], np.int64)
    strides = np.array([tensor.stride_bytes for tensor in group.tensors], np.int64)
    pages = np.array([tensor.page_bytes for tensor in layout.tensors], np.int64)
    offsets = np.array(layout.tensor_offsets, np.int64)
    device = addresses[:, None] + blocks * strides[:, None]
    pool = offsets[:, None] + parts + sub_blocks * pages[:, None]
    allocations = np.array([tensor.allocation for tensor in group.tensors], np.int64)
    return Fragments(
        device.ravel(), pool.ravel(), np.repeat(pages, len(blocks)), np.repeat(allocations, len(blocks))
    )


def _check_written_once(rows: Fragments, direction: Direction) -> None:
    """Raise CopyRefused if two rows write the same byte: nothing says which of them would win."""
    starts = rows.pool if direction is Direction.STORE else rows.device
    order = np.argsort(starts, kind="stable")
    starts, nbytes = starts[order], rows.nbytes[order]
    if (starts[1:] < starts[:-1] + nbytes[:-1]).any():
        what = "slot" if direction is Direction.STORE else "device block"
        raise CopyRefused(f"block_ids: two copies of the job write the same bytes of a {what}")


def _join(rows: Fragments) -> Fragments:
    """Join rows that are adjacent on both sides, in the order of their pool offsets."""
    pool_ends, device_ends = rows.pool[:-1] + rows.nbytes[:-1], rows.device[:-1] + rows.nbytes[:-1]
    begins = np.ones(len(rows), np.bool_)
    begins[1:] = (rows.pool[1:] != pool_ends) | (rows.device[1:] != device_ends)
    begins[1:] |= rows.allocation[1:] != rows.allocation[:-1]
    firsts = np.flatnonzero(begins)
    nbytes = np.add.reduceat(rows.nbytes, firsts)
    return Fragments(rows.device[firsts], rows.pool[firsts], nbytes, rows.allocation[firsts])


def _split(fragments: Fragments, boundaries: Sequence[int]) -> Fragments:
    """Cut the fragments that cross a boundary."""
    for boundary in boundaries:
        head = boundary - fragments.pool
        crossing = np.flatnonzero((head > 0) & (head < fragments.nbytes))
        if not len(crossing):
            continue
        tails = fragments.take(crossing)
        cut = head[crossing]
        tails = Fragments(tails.device + cut, tails.pool + cut, tails.nbytes - cut, tails.allocation)
        nbytes = fragments.nbytes.copy()
        nbytes[crossing] = cut
        heads = Fragments(fragments.device, fragments.pool, nbytes, fragments.allocation)
        both = _concatenate((heads, tails))
        fragments = both.take(np.argsort(both.pool, kind="stable"))
    return fragments


def _find_runs(
    fragments: Fragments, max_pitch_bytes: int, boundaries: Sequence[int]
) -> tuple[tuple[Run, ...], Fragments]:
    """Return the runs of at least two rows, and the fragments that are in none."""
    runs: list[Run] = []
    single: list[int] = []
    for first, rows, device_pitch, pool_pitch in _progressions(fragments, boundaries):
        width = int(fragments.nbytes[first])
        fits = min(device_pitch, pool_pitch) >= width and max(device_pitch, pool_pitch) <= max_pitch_bytes
        if rows > 1 and fits:
            device, pool = int(fragments.device[first]), int(fragments.pool[first])
            runs.append(Run(device, pool, width, rows, device_pitch, pool_pitch))
        else:
            single += range(first, first + rows)
    return tuple(runs), fragments.take(np.array(single, np.int64))


def _progressions(fragments: Fragments, boundaries: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Split into (first, how many, device pitch, pool pitch): equal sizes, equal distances on both sides.

    The loop runs once per progression, not once per fragment.
    """
    total = len(fragments)
    device_steps, pool_steps = np.diff(fragments.device), np.diff(fragments.pool)
    piece = np.searchsorted(np.array(boundaries, np.int64), fragments.pool, side="right")
    alike = fragments.nbytes[1:] == fragments.nbytes[:-1]
    alike &= fragments.allocation[1:] == fragments.allocation[:-1]
    alike &= piece[1:] == piece[:-1]
    changes = (np.diff(device_steps) != 0) | (np.diff(pool_steps) != 0) | ~(alike[1:] & alike[:-1])
    # changes[i]: fragment i + 2 does not go on as i and i + 1 began.
    ends = (np.flatnonzero(changes) + 2).tolist()
    place, first = 0, 0
    while first < total:
        if first + 1 == total or not alike[first]:
            yield first, 1, 0, 0
            first += 1
            continue
        while place < len(ends) and ends[place] < first + 2:
            place += 1
        end = ends[place] if place < len(ends) else total
        yield first, end - first, int(device_steps[first]), int(pool_steps[first])
        first = end


def _concatenate(parts: Sequence[Fragments]) -> Fragments:
    return Fragments(
        np.concatenate([part.device for part in parts]),
        np.concatenate([part.pool for part in parts]),
        np.concatenate([part.nbytes for part in parts]),
        np.concatenate([part.allocation for part in parts]),
    )
