"""The first page of a pool file: what the file is and where its areas lie.

    0        header page
    4 KiB    slab table      one page of head, then 8 bytes for each of 65,536 slabs
    1 MiB    registry        two halves of 512 KiB
    2 MiB    slot table      512 bytes for each 4 KiB of data; sparse, only touched pages take memory
    ...      data area       on a multiple of 2 MiB

Owns the format's numbers. Reads and writes no other area.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from kvtier_ops.directory import PoolError
from kvtier_ops.layout import SLOT_UNIT_BYTES

POOL_FILE = "pool"
FORMAT_VERSION = 2
PAGE_BYTES = 4096
MAX_SLABS = 65_536
SLAB_ENTRY_BYTES = 8
SLAB_TABLE_OFFSET = PAGE_BYTES
SLAB_TABLE_BYTES = PAGE_BYTES + MAX_SLABS * SLAB_ENTRY_BYTES
REGISTRY_HALF_BYTES = 512 << 10
REGISTRY_OFFSET = 1 << 20
SLOT_TABLE_OFFSET = REGISTRY_OFFSET + 2 * REGISTRY_HALF_BYTES
RECORD_BYTES = 512
FIRST_GENERATION_BITS = 48
"""Enough that two files share a generation with a chance of one in millions even after a slot was granted a
million times, and little enough that 64 bits never run out."""
DATA_ALIGN_BYTES = 2 << 20
"""A huge page, so that slabs can be made of them."""

_MAGIC = b"KVTIERP1"
_HEADER = struct.Struct("<8sIIQQQQQQ")
_VERSION = struct.Struct("<I")
_VERSION_OFFSET = len(_MAGIC)
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size


class PoolFormatError(PoolError):
    """The file is not a pool of this format version, or its header is damaged."""


@dataclass(frozen=True, slots=True)
class PoolHeader:
    """What a pool file says about itself. All offsets follow from `data_bytes`."""

    pool_id: int
    """Random 64 bits, new with each new file: tells a kept file from a replaced one."""
    data_bytes: int
    first_generation: int
    """Random FIRST_GENERATION_BITS bits, new with each new file; its slots are granted under larger ones.
    So a job that was made for the file before this one finds no slot with a generation that it names."""

    @property
    def num_units(self) -> int:
        """The number of 4 KiB units of data, and of slot records."""
        return self.data_bytes // SLOT_UNIT_BYTES

    @property
    def slot_table_bytes(self) -> int:
        return self.num_units * RECORD_BYTES

    @property
    def data_offset(self) -> int:
        return _round_up(SLOT_TABLE_OFFSET + self.slot_table_bytes)

    @property
    def file_bytes(self) -> int:
        return _round_up(self.data_offset + self.data_bytes)

    def pack(self) -> bytes:
        body = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            RECORD_BYTES,
            self.pool_id,
            self.data_bytes,
            SLOT_TABLE_OFFSET,
            self.data_offset,
            self.file_bytes,
            self.first_generation,
        )
        return body + _CRC.pack(zlib.crc32(body))


def read_header(page: bytes, file_bytes: int) -> PoolHeader:
    """Parse the first page of a file of `file_bytes`. Raises PoolFormatError saying what is wrong."""
    body, crc = page[: _HEADER.size], page[_HEADER.size : HEADER_BYTES]
    if len(crc) < _CRC.size or not body.startswith(_MAGIC):
        raise PoolFormatError("it does not begin like a pool")
    # Before the CRC: another version may have it in another place.
    (version,) = _VERSION.unpack_from(body, _VERSION_OFFSET)
    if version != FORMAT_VERSION:
        raise PoolFormatError(f"it has format version {version}, this program needs {FORMAT_VERSION}")
    if _CRC.unpack(crc)[0] != zlib.crc32(body):
        raise PoolFormatError("its header is damaged (the CRC differs)")
    _, _, _, pool_id, data_bytes, _, _, _, first_generation = _HEADER.unpack(body)
    header = PoolHeader(pool_id, data_bytes, first_generation)
    if header.pack() != body + crc:
        raise PoolFormatError("its header has other offsets than this program uses")
    if header.file_bytes != file_bytes:
        raise PoolFormatError(f"it has {file_bytes} bytes, its header says {header.file_bytes}")
    return header


def _round_up(value: int) -> int:
    return -(-value // DATA_ALIGN_BYTES) * DATA_ALIGN_BYTES
