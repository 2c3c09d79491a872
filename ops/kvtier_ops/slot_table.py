"""The slot table: one record per slot in the mapped file, all that a warm restart needs.

    record, 512 bytes, at slot_id * 512 (a slot id counts 4 KiB units, so most records are never touched)
      0  generation u64          raised before the slot may be rewritten, never lowered
      8  recency u64             not covered by the crc
     16  crc32 u32 | state u32   written together, last, as one aligned 8-byte store
     24  owner u64
     32  space_id u32 | key_len u16 | num_parts u16
     40  slot_units u32 | zero to 64
     64  key, 128 bytes
    192  part checksums, 32 x u64
    448  zero

The crc covers the generation, the state, bytes 24..64, key_len bytes of the key and num_parts checksums. So a
raised generation un-verifies a PUBLISHED record before anything else is written. A record whose covered bytes
before the key are all zero, and its crc too, was never used: it reads as FREE, with the first generation.

Generations begin at a random number that each new file draws for itself, not at 0: a process that still acts
on slots of an earlier file in the same place must not meet the generations it knows.

Why single aligned stores suffice. Generation and crc|state are 8 bytes at multiples of 8 and are written by
one machine store each, which x86-64 and ARMv8 never tear. Against a kill of the writer: a killed process
leaves a prefix of its stores in program order, on any processor. Against readers on other cores: x86 keeps
the order of stores and of loads. ARM does not, but a writer of data learns its generation by an RPC that the
daemon sent after raising it (the socket's locks order the two), and a reader calls `fence` between its copy
and its second look at the generation.

Only the daemon writes records; every process that maps the pool may read them.
"""

from __future__ import annotations

import enum
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier_ops.faults import fault_point
from kvtier_ops.header import RECORD_BYTES
from kvtier_ops.layout import SLOT_UNIT_BYTES

MAX_PARTS = 32
MAX_KEY_BYTES = 128

_WORDS = RECORD_BYTES // 8
_RECENCY, _CRC_STATE, _OWNER, _SPACE, _UNITS, _KEY, _CHECKSUMS = 1, 2, 3, 4, 5, 8, 24
_COVERED_HEAD = struct.Struct("<QQQQQQQ")
"""The record's first 64 bytes as the crc sees them: without the recency, and with 0 for the crc itself."""
_COVERED_HEAD_BYTES = _COVERED_HEAD.size

_fence_lock = threading.Lock()

Words = npt.NDArray[np.uint64]


class SlotState(enum.IntEnum):
    """What a slot holds."""

    FREE = 0
    RESERVED = 1
    """`owner` may write it; nobody may read it."""
    PUBLISHED = 2
    QUARANTINED = 3
    """`owner` may still be writing it; neither readable nor reusable until the owner's lock is free."""


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """A slot record that verified. `key` and `checksums` are empty unless PUBLISHED."""

    slot_id: int
    generation: int
    state: SlotState
    owner: int
    space_id: int
    key: bytes
    checksums: tuple[int, ...]
    slot_bytes: int
    """0 where the record was never used."""
    recency: int


def fence() -> None:
    """Keep loads before this call before loads after it, on processors that would reorder them.

    Releasing a lock orders what came before, taking one orders what comes after; between the release of the
    first round and the taking of the second no load can cross. Free of contention: about 0.1 us.
    """
    with _fence_lock:
        pass
    with _fence_lock:
        pass


class SlotTable:
    """View of the slot table. `words` is its part of the mapping, uint64, 64 words a record.

    `first_generation`: what a slot has before its first use, from the file's header.

    Every method raises IndexError naming the slot id, with nothing changed, for one outside the pool. The
    daemon calls the writing methods from one thread.
    """

    def __init__(self, words: Words, first_generation: int = 0) -> None:
        self._words = words
        self._first_generation = first_generation
        self._scalars = words.data
        self._bytes = words.view(np.uint8).data
        self.num_units = len(words) // _WORDS

    def generation(self, slot_id: int) -> int:
        """Return the slot's generation with one aligned 8-byte load."""
        self._check(slot_id)
        generation: int = self._scalars[slot_id * _WORDS]
        return generation or self._first_generation

    def part_checksum(self, slot_id: int, part: int) -> int:
        """Return the recorded checksum of a part; 0 = not recorded. Does not verify the record."""
        self._check(slot_id)
        if not 0 <= part < MAX_PARTS:
            raise IndexError(f"part {part} is outside 0..{MAX_PARTS - 1}")
        if part >= self._scalars[slot_id * _WORDS + _SPACE] >> 48:
            return 0
        checksum: int = self._scalars[slot_id * _WORDS + _CHECKSUMS + part]
        return checksum

    def read(self, slot_id: int) -> SlotRecord | None:
        """Return the slot's record, or None if it does not verify.

        Reading a record whose page is not backed takes a page of memory; see Pool.back_records.
        """
        self._check(slot_id)
        raw = bytes(self._bytes[slot_id * RECORD_BYTES : (slot_id + 1) * RECORD_BYTES])
        generation, recency, crc_state, owner, space, units, word6, word7 = struct.unpack_from("<8Q", raw)
        if not (generation or crc_state or owner or space or units or word6 or word7):
            return SlotRecord(slot_id, self._first_generation, SlotState.FREE, 0, 0, b"", (), 0, recency)
        key_len, num_parts, state = space >> 32 & 0xFFFF, space >> 48, crc_state >> 32
        if key_len > MAX_KEY_BYTES or num_parts > MAX_PARTS or state > SlotState.QUARANTINED:
            return None
        head = _COVERED_HEAD.pack(generation, state << 32, owner, space, units, word6, word7)
        key = raw[_KEY * 8 : _KEY * 8 + key_len]
        checksums = raw[_CHECKSUMS * 8 : (_CHECKSUMS + num_parts) * 8]
        if crc_state & 0xFFFF_FFFF != zlib.crc32(head + key + checksums):
            return None
        return SlotRecord(
            slot_id,
            generation or self._first_generation,
            SlotState(state),
            owner,
            space & 0xFFFF_FFFF,
            key,
            struct.unpack(f"<{num_parts}Q", checksums),
            (units & 0xFFFF_FFFF) * SLOT_UNIT_BYTES,
            recency,
        )

    def reserve(self, slot_ids: Sequence[int], owner: int, slot_bytes: int) -> list[int]:
        """Give the slots to `owner` for writing: raises each generation, and returns the new ones.

        `slot_ids` must be distinct. Raising comes first, so that a reader who still holds the old generation
        fails whatever happens next.
        """
        if slot_bytes <= 0 or slot_bytes % SLOT_UNIT_BYTES:
            raise ValueError(f"slot_bytes {slot_bytes} is not a positive multiple of {SLOT_UNIT_BYTES}")
        at = self._positions(slot_ids)
        generations = self._raise_generations(at)
        units = np.full(len(at), slot_bytes // SLOT_UNIT_BYTES, np.uint64)
        self._write_heads(at, generations, SlotState.RESERVED, owner, units)
        raised: list[int] = generations.tolist()
        return raised

    def publish(self, slot_id: int, space_id: int, key: bytes, checksums: Sequence[int]) -> None:
        """Make the slot's bytes what `key` stands for; keeps the generation, clears the owner.

        One checksum per part, 0 where none was computed. Killed in the middle, the record does not verify.
        """
        self._check(slot_id)
        key_len, num_parts = len(key), len(checksums)
        if not 0 < key_len <= MAX_KEY_BYTES:
            raise ValueError(f"a key of {key_len} bytes is outside 1..{MAX_KEY_BYTES}")
        if not 0 < num_parts <= MAX_PARTS:
            raise ValueError(f"{num_parts} part checksums are outside 1..{MAX_PARTS}")
        at = slot_id * _WORDS
        words = self._scalars
        space = space_id | key_len << 32 | num_parts << 48
        packed = struct.pack(f"<{num_parts}Q", *checksums)
        units = words[at + _UNITS]
        head = _COVERED_HEAD.pack(words[at], SlotState.PUBLISHED << 32, 0, space, units, 0, 0)
        crc = zlib.crc32(head + key + packed)
        start = at * 8
        self._bytes[start + _KEY * 8 : start + _KEY * 8 + key_len] = key
        self._bytes[start + _CHECKSUMS * 8 : start + (_CHECKSUMS + num_parts) * 8] = packed
        words[at + _OWNER] = 0
        words[at + _SPACE] = space
        fault_point("slots.before_published")
        words[at + _CRC_STATE] = crc | SlotState.PUBLISHED << 32

    def free(self, slot_ids: Sequence[int]) -> None:
        """Un-publish the slots. Generations stay: for slots that nobody can be reading (see `retire`)."""
        at = self._positions(slot_ids)
        self._write_heads(at, self._words[at], SlotState.FREE, 0, self._words[at + _UNITS])

    def retire(self, slot_ids: Sequence[int]) -> None:
        """Un-publish the slots and raise their generations, so that late readers fail.

        For chunks that are evicted or dropped while their slot is not reused at once.
        """
        at = self._positions(slot_ids)
        self._write_heads(at, self._raise_generations(at), SlotState.FREE, 0, self._words[at + _UNITS])

    def quarantine(self, slot_ids: Sequence[int], owner: int) -> None:
        """Lock the slots away until `owner` can no longer write them; raises their generations."""
        at = self._positions(slot_ids)
        units = self._words[at + _UNITS]
        self._write_heads(at, self._raise_generations(at), SlotState.QUARANTINED, owner, units)

    def write_recency(self, slot_ids: Sequence[int], stamps: Sequence[int]) -> None:
        """Note when the slots were last used. Not covered by the crc: a lost stamp costs only order."""
        self._words[self._positions(slot_ids) + _RECENCY] = np.asarray(stamps, np.uint64)

    def pages(self, slot_ids: Sequence[int] | range, page_bytes: int) -> npt.NDArray[np.int64]:
        """Return, ascending, the offsets inside the table of the pages that hold these records."""
        offsets = self._positions(slot_ids) * 8
        return np.unique(offsets // page_bytes) * page_bytes

    def touch(self, offset: int) -> None:
        """Map the page at this offset of the table now, so that the first use does not fault."""
        self._scalars[offset // 8]

    def _raise_generations(self, at: npt.NDArray[np.int64]) -> Words:
        # The maximum also lifts a damaged record above everything that an earlier file granted.
        generations = np.maximum(self._words[at], np.uint64(self._first_generation)) + np.uint64(1)
        self._words[at] = generations
        return generations

    def _write_heads(
        self, at: npt.NDArray[np.int64], generations: Words, state: SlotState, owner: int, units: Words
    ) -> None:
        """Write records without key and checksums: everything else first, crc and state last."""
        heads = np.zeros((len(at), _COVERED_HEAD_BYTES // 8), np.uint64)
        heads[:, 0] = generations
        heads[:, 1] = state << 32
        heads[:, 2] = owner
        heads[:, 4] = units
        covered = heads.tobytes()
        crc32 = zlib.crc32
        crcs = [
            crc32(covered[start : start + _COVERED_HEAD_BYTES])
            for start in range(0, len(covered), _COVERED_HEAD_BYTES)
        ]
        words = self._words
        words[at + _OWNER] = owner
        words[at + _SPACE] = 0
        words[at + _UNITS] = units
        words[at + (_UNITS + 1)] = 0
        words[at + (_UNITS + 2)] = 0
        fault_point("slots.before_state")
        words[at + _CRC_STATE] = np.array(crcs, np.uint64) | np.uint64(state << 32)

    def _positions(self, slot_ids: Sequence[int] | range) -> npt.NDArray[np.int64]:
        ids = np.asarray(slot_ids, np.int64)
        if ids.size:
            self._check(int(ids.min()))
            self._check(int(ids.max()))
        return ids * _WORDS

    def _check(self, slot_id: int) -> None:
        if not 0 <= slot_id < self.num_units:
            raise IndexError(f"slot id {slot_id} is outside the pool's {self.num_units} units of 4 KiB")
