"""The names of chunks in Mooncake's store: 64 letters, digits and dashes, for any key.

    kvtier1-<space>-<chunk>
             16 hex  39 hex: of namespace, tenant, epoch, key, geometry and sizes together

Two chunks that differ in anything have two names, as far as 156 bits of a digest tell them apart; the header
of the object tells the rest. All chunks of a space begin alike, so that operators can find them.
"""

from __future__ import annotations

import hashlib
import secrets
import struct

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import TierChunk
from kvtier_server.secondary.mooncake.wire import NAME_BYTES

PREFIX = "kvtier1"
"""Its number is raised with the format of objects: other formats have other names."""

_SPACE_DIGITS = 16
_CHUNK_DIGITS = NAME_BYTES - len(PREFIX) - _SPACE_DIGITS - 2


def object_name(chunk: TierChunk) -> str:
    """Name a chunk's object."""
    return f"{space_prefix(chunk.space)}{_digest(_fields_of(chunk), _CHUNK_DIGITS)}"


def space_prefix(space: SpaceName) -> str:
    """Return what the names of all chunks of a space begin with."""
    return f"{PREFIX}-{_digest(_fields_of_space(space), _SPACE_DIGITS)}-"


def beat_name() -> str:
    """Name an object that is never stored: asking for it asks the master."""
    return f"{PREFIX}-".ljust(NAME_BYTES, "0")


def trial_name() -> str:
    """Name an object that is stored, read and removed at once, to see whether that works. Never twice."""
    return f"{PREFIX}-{secrets.token_hex(NAME_BYTES // 2)}"[:NAME_BYTES]


def _fields_of(chunk: TierChunk) -> list[bytes]:
    sizes = struct.pack("<QQQ", chunk.part_bytes, chunk.num_parts, chunk.num_bytes)
    return [*_fields_of_space(chunk.space), chunk.key, chunk.geometry, sizes]


def _fields_of_space(space: SpaceName) -> list[bytes]:
    return [space.namespace.encode(), space.tenant.encode(), struct.pack("<Q", space.epoch)]


def _digest(fields: list[bytes], num_digits: int) -> str:
    """Hash fields with their lengths: no two lists run together."""
    digest = hashlib.blake2b(digest_size=32)
    for each in fields:
        digest.update(struct.pack("<Q", len(each)))
        digest.update(each)
    return digest.hexdigest()[:num_digits]
