"""Which size class each slab of the pool belongs to, in the mapped file, so that it outlives the daemon.

    head    u64 slab_bytes | u32 num_slabs | u32 crc
    entry   u32 slot_units | u32 crc         one aligned 8-byte store; all zero = the slab is free

Written by the daemon only. Owns no decision about slabs.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from kvtier_ops.header import MAX_SLABS, PAGE_BYTES
from kvtier_ops.layout import SLOT_UNIT_BYTES

_HEAD = struct.Struct("<QI")
_ENTRY = struct.Struct("<QII")


class SlabTable:
    """View of the slab table. `area` is its part of the mapping, uint8."""

    def __init__(self, area: npt.NDArray[np.uint8]) -> None:
        self._head = area[:16].view(np.uint64).data
        self._entries = area[PAGE_BYTES:].view(np.uint64)

    def configure(self, slab_bytes: int, num_slabs: int) -> None:
        """Divide the pool into `num_slabs` slabs of `slab_bytes` (the last may be short), all free.

        Killed in the middle, the table reads as not configured.
        """
        if not 0 <= num_slabs <= MAX_SLABS:
            raise ValueError(f"num_slabs {num_slabs} is outside 0..{MAX_SLABS}")
        if slab_bytes <= 0 or slab_bytes % SLOT_UNIT_BYTES:
            raise ValueError(f"slab_bytes {slab_bytes} is not a positive multiple of {SLOT_UNIT_BYTES}")
        self._head[0] = 0
        self._head[1] = 0
        self._entries[:] = 0
        self._head[0] = slab_bytes
        self._head[1] = num_slabs | zlib.crc32(_HEAD.pack(slab_bytes, num_slabs)) << 32

    def assign(self, slab: int, slot_bytes: int) -> None:
        """Note that `slab` now holds slots of `slot_bytes`; 0 = it is free."""
        slab_bytes, num_slabs = self._read_head()
        if not 0 <= slab < num_slabs:
            raise ValueError(f"slab {slab} is outside the {num_slabs} configured slabs")
        if slot_bytes < 0 or slot_bytes % SLOT_UNIT_BYTES:
            raise ValueError(f"slot_bytes {slot_bytes} is not a multiple of {SLOT_UNIT_BYTES}")
        self._entries[slab] = _entry(slab_bytes, slab, slot_bytes // SLOT_UNIT_BYTES)

    def read(self) -> tuple[int, list[int | None]]:
        """Return slab_bytes (0 = not set) and each slab's slot_bytes: 0 = free, None = does not verify."""
        slab_bytes, num_slabs = self._read_head()
        sizes: list[int | None] = []
        for slab, entry in enumerate(self._entries[:num_slabs].tolist()):
            slot_units = entry & 0xFFFF_FFFF
            verifies = entry == _entry(slab_bytes, slab, slot_units)
            sizes.append(slot_units * SLOT_UNIT_BYTES if verifies else None)
        return slab_bytes, sizes

    def _read_head(self) -> tuple[int, int]:
        slab_bytes, word = self._head[0], self._head[1]
        num_slabs = word & 0xFFFF_FFFF
        if num_slabs > MAX_SLABS or word >> 32 != zlib.crc32(_HEAD.pack(slab_bytes, num_slabs)):
            return 0, 0
        return slab_bytes, num_slabs


def _entry(slab_bytes: int, slab: int, slot_units: int) -> int:
    # slab_bytes is hashed with it, so that an entry of an earlier division cannot verify in a later one.
    if not slot_units:
        return 0
    return slot_units | zlib.crc32(_ENTRY.pack(slab_bytes, slab, slot_units)) << 32
