"""What a worker reports when a copy has ended.

Owns the values only; `flush.py` turns them into messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreReportItem:
    """One rank's stores that have ended. Columns: slots, their generations as granted, and keys.

    `part` is the rank, or 0 where ranks hold equal bytes. `checksums` has one xxh3-64 per slot (0 = not
    computed) or is empty. `failed` are the indexes of slots that were not wholly written.
    """

    part: int
    slot_ids: Sequence[int]
    generations: Sequence[int]
    keys: Sequence[bytes]
    checksums: Sequence[int] = ()
    failed: Sequence[int] = ()
    num_bytes: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        slots = len(self.slot_ids)
        assert len(self.generations) == slots, (len(self.generations), slots)
        assert len(self.keys) == slots, (len(self.keys), slots)
        assert len(self.checksums) in {0, slots}, (len(self.checksums), slots)
        assert all(0 <= index < slots for index in self.failed), (self.failed, slots)


@dataclass(frozen=True, slots=True)
class ChecksumMismatch:
    """A loaded slot whose bytes did not match its checksum; `checksum` is what the reader computed."""

    slot_id: int
    generation: int
    checksum: int


@dataclass(frozen=True, slots=True)
class LoadReportItem:
    """One rank's end of a load. `torn_slot_ids`: slots whose generation changed under the copy."""

    lease_id: int
    torn_slot_ids: Sequence[int] = ()
    mismatches: Sequence[ChecksumMismatch] = ()
    num_bytes: int = 0
    seconds: float = 0.0
