"""Where a chunk's bytes lie in a slot.

    slot  [ part 0 | part 1 | ... ]            each part starts on 64 bytes, the slot is a multiple of 4 KiB
    part  [ tensor 0: bpc pages | tensor 1: bpc pages | ... ]     no padding inside: these bytes are hashed

Owns arithmetic only. A group's tensors come from the engine, a chunk's slot from the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SLOT_UNIT_BYTES = 4096
"""Slots are multiples of this, and slot ids count it: one memory page, so that no two slots share one."""

PART_ALIGN_BYTES = 64
"""A cache line: two ranks that write neighbouring parts never write the same line."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One KV tensor of a rank. `page_bytes` = the bytes of ONE device block, without padding."""

    name: str
    page_bytes: int

    def __post_init__(self) -> None:
        if self.page_bytes <= 0:
            raise ValueError(f"page_bytes of tensor {self.name!r} must be positive, not {self.page_bytes}")


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """How one rank's share of a chunk of one KV-cache group is laid out."""

    tensors: tuple[TensorLayout, ...]
    blocks_per_chunk: int
    part_bytes: int = field(init=False)
    """One rank's share: the bytes that are hashed."""
    tensor_offsets: tuple[int, ...] = field(init=False)
    """Where each tensor's pages begin inside the part."""

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("a group needs at least one tensor")
        if self.blocks_per_chunk < 1:
            raise ValueError(f"blocks_per_chunk must be at least 1, not {self.blocks_per_chunk}")
        offsets = [0]
        for tensor in self.tensors:
            offsets.append(offsets[-1] + tensor.page_bytes * self.blocks_per_chunk)
        # Computed once: both are read for every chunk copied.
        object.__setattr__(self, "part_bytes", offsets.pop())
        object.__setattr__(self, "tensor_offsets", tuple(offsets))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def part_stride_bytes(part_bytes: int) -> int:
    """Return the distance between the starts of two neighbouring parts of a slot."""
    return _round_up(part_bytes, PART_ALIGN_BYTES)


def part_offset(part_bytes: int, part: int) -> int:
    """Return where `part` begins inside its slot."""
    return part * part_stride_bytes(part_bytes)


def slot_bytes(part_bytes: int, num_parts: int) -> int:
    """Return the size of a slot that holds `num_parts` parts."""
    return _round_up(num_parts * part_stride_bytes(part_bytes), SLOT_UNIT_BYTES)


def slot_offset(slot_id: int) -> int:
    """Return where the slot begins inside the pool's data area.

    A slot id IS this offset in units of 4 KiB, so ids stay unique whatever size class a slab belongs to.
    """
    return slot_id * SLOT_UNIT_BYTES
