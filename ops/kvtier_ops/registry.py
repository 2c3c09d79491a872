"""One blob of the daemon's that must outlive it: the namespace registry, kept in two halves.

    half    u64 sequence | u32 length | u32 crc | payload

A write goes to the half that is not the newest, so a kill in the middle leaves the other one valid. Owns no
meaning: the payload is the daemon's.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from kvtier_ops.header import REGISTRY_HALF_BYTES

_HEAD = struct.Struct("<QI")
_HEAD_BYTES = 16

MAX_PAYLOAD_BYTES = REGISTRY_HALF_BYTES - _HEAD_BYTES


class Registry:
    """View of the registry. `area` is its part of the mapping, uint8."""

    def __init__(self, area: npt.NDArray[np.uint8]) -> None:
        self._halves = (area[:REGISTRY_HALF_BYTES].data, area[REGISTRY_HALF_BYTES:].data)

    def write(self, payload: bytes) -> None:
        """Replace the blob. Raises ValueError, with nothing changed, if it is over MAX_PAYLOAD_BYTES."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a registry of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
        sequences = [_sequence(half) for half in self._halves]
        older = self._halves[sequences.index(min(sequences))]
        head = _HEAD.pack(max(sequences) + 1, len(payload))
        older[_HEAD_BYTES : _HEAD_BYTES + len(payload)] = payload
        older[:_HEAD_BYTES] = head + zlib.crc32(payload, zlib.crc32(head)).to_bytes(4, "little")

    def read(self) -> bytes | None:
        """Return the newest blob that verifies; None if there is none."""
        newest = max(self._halves, key=_sequence)
        if not _sequence(newest):
            return None
        _, length = _HEAD.unpack_from(newest)
        return bytes(newest[_HEAD_BYTES : _HEAD_BYTES + length])


def _sequence(half: memoryview) -> int:
    """Return the half's sequence number, 0 if it does not verify."""
    head = bytes(half[: _HEAD.size])
    sequence, length = _HEAD.unpack(head)
    crc = int.from_bytes(half[_HEAD.size : _HEAD_BYTES], "little")
    if length > MAX_PAYLOAD_BYTES:
        return 0
    payload = half[_HEAD_BYTES : _HEAD_BYTES + length]
    return int(sequence) if crc == zlib.crc32(payload, zlib.crc32(head)) else 0
