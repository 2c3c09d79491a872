"""One chunk as a file, or an object, that describes itself: what is where in it, and how it is verified.

    0       header, 4,096 bytes so that the payload starts on a block
              magic, version, sizes, epoch, namespace, tenant, geometry, key, part checksums
              the last 8 bytes are the xxh3-64 of the others
    4096    payload: the bytes of the chunk's group, as they lie in the slot
            in a file: zeros up to a multiple of 4,096 bytes
The header has the xxh3-64 of payload and zeros together: no bit of the file is without a checksum.

Owns the format. Does no I/O. A file whose header is whole but names another chunk is that other chunk's: it
was moved, and is no error of the medium.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from kvtier_ops.checksum import part_checksum
from kvtier_ops.layout import part_offset
from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import TierChunk

MAGIC = b"KVTCHNK\x01"
VERSION = 1
HEADER_BYTES = 4096
BLOCK_BYTES = 4096
"""What O_DIRECT asks of offsets, lengths and addresses; no disk in use has larger blocks."""

MAX_PARTS = 32
MAX_KEY_BYTES = 128
MAX_TENANT_BYTES = 64
MAX_NAMESPACE_BYTES = 128
GEOMETRY_BYTES = 16

_FIXED = struct.Struct("<8sIIQQQQIHHHH16s")
"""magic, version, parts, payload bytes, payload checksum, epoch, part bytes, flags, lengths of namespace,
tenant, key and 0, geometry."""
_CHECKSUM = struct.Struct("<Q")


class BrokenHeader(Exception):
    """The checksum of a header does not hold: nothing in it can be believed."""


class OtherFormat(Exception):
    """A whole header, of a format that this version does not know."""


class Header(NamedTuple):
    """What a header says."""

    space: SpaceName
    key: bytes
    geometry: bytes
    num_bytes: int
    part_bytes: int
    checksums: tuple[int, ...]
    payload_checksum: int

    def describes(self, chunk: TierChunk) -> bool:
        """Tell whether the file is this chunk, in this layout."""
        return (self.space, self.key, self.geometry) == (chunk.space, chunk.key, chunk.geometry) and (
            self.num_bytes,
            self.part_bytes,
            len(self.checksums),
        ) == (chunk.num_bytes, chunk.part_bytes, chunk.num_parts)


def padded_bytes(num_bytes: int) -> int:
    """Bytes of the payload with the zeros behind it."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def file_bytes(num_bytes: int) -> int:
    """Bytes of the file of a chunk of `num_bytes`."""
    return HEADER_BYTES + padded_bytes(num_bytes)


def payload_checksum(whole_blocks: memoryview, last_block: memoryview) -> int:
    """Hash the payload with the zeros behind it: whole blocks, then the last one if it is not whole."""
    digest = xxhash.xxh3_64(whole_blocks)
    digest.update(last_block)
    return digest.intdigest()


def part_checksums(data: memoryview, chunk: TierChunk) -> tuple[int, ...]:
    """Hash every part of a chunk whose bytes are `data`."""
    starts = [part_offset(chunk.part_bytes, part) for part in range(chunk.num_parts)]
    return tuple([part_checksum(data[start : start + chunk.part_bytes]) for start in starts])


def checksums_to_store(data: memoryview, chunk: TierChunk) -> tuple[int, ...] | None:
    """Hash every part of a chunk that is to be stored; None if one is not what was recorded of it."""
    found = part_checksums(data, chunk)
    recorded = chunk.checksums or (0,) * chunk.num_parts
    is_wrong = any(was not in (0, now) for was, now in zip(recorded, found, strict=True))
    return None if is_wrong else found


def write_header(target: memoryview, chunk: TierChunk, checksums: tuple[int, ...], payload: int) -> None:
    """Fill a header. `payload`: checksum of payload and zeros; `checksums`: of the parts, none of them 0."""
    namespace, tenant = chunk.space.namespace.encode(), chunk.space.tenant.encode()
    assert len(target) == HEADER_BYTES, len(target)
    assert len(checksums) == chunk.num_parts <= MAX_PARTS, (checksums, chunk.num_parts)
    assert len(namespace) <= MAX_NAMESPACE_BYTES, f"namespace of {len(namespace)} bytes"
    assert len(tenant) <= MAX_TENANT_BYTES, f"tenant of {len(tenant)} bytes"
    assert len(chunk.key) <= MAX_KEY_BYTES, f"key of {len(chunk.key)} bytes"
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        chunk.num_parts,
        chunk.num_bytes,
        payload,
        chunk.space.epoch,
        chunk.part_bytes,
        0,
        len(namespace),
        len(tenant),
        len(chunk.key),
        0,
        chunk.geometry,
    )
    body = fixed + struct.pack(f"<{chunk.num_parts}Q", *checksums) + namespace + tenant + chunk.key
    target[: len(body)] = body
    target[len(body) : -_CHECKSUM.size] = bytes(HEADER_BYTES - len(body) - _CHECKSUM.size)
    _CHECKSUM.pack_into(
        target, HEADER_BYTES - _CHECKSUM.size, xxhash.xxh3_64_intdigest(target[: -_CHECKSUM.size])
    )


def read_header(header: memoryview) -> Header:
    """Read a header. Raises BrokenHeader, OtherFormat."""
    if len(header) != HEADER_BYTES:
        raise BrokenHeader
    (recorded,) = _CHECKSUM.unpack_from(header, HEADER_BYTES - _CHECKSUM.size)
    if recorded != xxhash.xxh3_64_intdigest(header[: -_CHECKSUM.size]):
        raise BrokenHeader
    magic, version, num_parts, num_bytes, payload, epoch, part_bytes, _, *lengths, geometry = (
        _FIXED.unpack_from(header, 0)
    )
    if magic != MAGIC or version != VERSION:
        raise OtherFormat
    checksums = struct.unpack_from(f"<{num_parts}Q", header, _FIXED.size)
    start = _FIXED.size + _CHECKSUM.size * num_parts
    names = []
    for length in lengths[:3]:
        names.append(bytes(header[start : start + length]))
        start += length
    space = SpaceName(names[0].decode(), names[1].decode(), epoch)
    return Header(space, names[2], geometry, num_bytes, part_bytes, checksums, payload)
