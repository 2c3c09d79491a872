"""A pool in memory: the slot table's second implementation, with bytes, locks and a clock to go with it.

`SlotsInMemory` keeps every promise of the `SlotTable` protocol, refuses moves between states that make no
sense, and holds the slots' bytes, so that a test can ask whether a reader got what a writer wrote. One cell
of 8 bytes stands for each 4 KiB unit of the pool: slots of different classes overlap as they really do.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import xxhash

from kvtier_ops.layout import SLOT_UNIT_BYTES

CELL_BYTES = 8
SECOND_NS = 1_000_000_000


class State(Enum):
    FREE = "free"
    RESERVED = "reserved"
    PUBLISHED = "published"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class Record:
    """What the table says about one slot."""

    generation: int = 0
    state: State = State.FREE
    owner: int = 0
    space_id: int = 0
    key: bytes = b""
    checksums: tuple[int, ...] = ()
    slot_bytes: int = 0
    recency: int = 0


class SlotsInMemory:
    """`kvtier_server.primary.size_classes.SlotTable`, and the bytes of the slots."""

    def __init__(self, num_units: int) -> None:
        self.records: dict[int, Record] = {}
        self.cells = bytearray(num_units * CELL_BYTES)
        self.slab_bytes = 0
        self.slot_bytes_of_slab: list[int] = []
        self.is_full = False
        """The file system is full: no more records can be backed."""

    def record(self, slot_id: int) -> Record:
        return self.records.setdefault(slot_id, Record())

    def reserve(self, slot_ids: Sequence[int], owner: int, slot_bytes: int) -> list[int]:
        assert len(set(slot_ids)) == len(slot_ids), "a slot was granted twice"
        generations = []
        for slot_id in slot_ids:
            # PUBLISHED: an evicted chunk's record stays until its slot is granted again.
            record = self._change(slot_id, State.RESERVED, State.FREE, State.PUBLISHED)
            record.generation += 1
            record.owner, record.slot_bytes = owner, slot_bytes
            record.key, record.checksums = b"", ()
            generations.append(record.generation)
        return generations

    def publish(self, slot_id: int, space_id: int, key: bytes, checksums: Sequence[int]) -> None:
        assert 0 < len(key) <= 128, f"a key of {len(key)} bytes"
        record = self._change(slot_id, State.PUBLISHED, State.RESERVED)
        record.owner, record.space_id, record.key = 0, space_id, key
        record.checksums = tuple(checksums)

    def free(self, slot_ids: Sequence[int]) -> None:
        for slot_id in slot_ids:
            self._change(slot_id, State.FREE, State.RESERVED, State.QUARANTINED).owner = 0

    def retire(self, slot_ids: Sequence[int]) -> None:
        for slot_id in slot_ids:
            self._change(slot_id, State.FREE, *State).generation += 1

    def quarantine(self, slot_ids: Sequence[int], owner: int) -> None:
        for slot_id in slot_ids:
            # QUARANTINED again: by the next daemon, which knows only that somebody may be writing.
            record = self._change(
                slot_id, State.QUARANTINED, State.RESERVED, State.PUBLISHED, State.QUARANTINED
            )
            record.generation += 1
            record.owner = owner

    def checksums(self, slot_id: int, num_parts: int) -> tuple[int, ...]:
        found = self.record(slot_id).checksums
        assert len(found) == num_parts, f"{num_parts} parts asked for, {len(found)} recorded"
        return found

    def write_recency(self, slot_ids: Sequence[int], stamps: Sequence[int]) -> None:
        for slot_id, stamp in zip(slot_ids, stamps, strict=True):
            self.record(slot_id).recency = stamp

    def generation(self, slot_id: int) -> int:
        return self.record(slot_id).generation

    def configure_slabs(self, slab_bytes: int, num_slabs: int) -> None:
        self.slab_bytes = slab_bytes
        self.slot_bytes_of_slab = [0] * num_slabs

    def assign_slab(self, slab: int, slot_bytes: int, slot_ids: Sequence[int]) -> None:
        if slot_bytes and self.is_full:
            raise OSError(errno.ENOSPC, "no space left for the records of a slab")
        first = slab * self.slab_bytes // SLOT_UNIT_BYTES
        inside = range(first, first + self.slab_bytes // SLOT_UNIT_BYTES)
        busy = [slot for slot in inside if slot in self.records and self.record(slot).state is not State.FREE]
        assert not busy, f"slab {slab} changes hands with slots in use: {busy}"
        self.slot_bytes_of_slab[slab] = slot_bytes

    def _change(self, slot_id: int, to: State, *allowed: State) -> Record:
        record = self.record(slot_id)
        assert record.state in allowed, f"slot {slot_id} goes from {record.state} to {to}"
        record.state = to
        return record

    def write(self, unit: int, cells: bytes) -> None:
        """Copy `cells` to the pool from this unit on, whoever may be there by now."""
        self.cells[unit * CELL_BYTES : unit * CELL_BYTES + len(cells)] = cells

    def read(self, unit: int, num_units: int) -> bytes:
        return bytes(self.cells[unit * CELL_BYTES : (unit + num_units) * CELL_BYTES])

    def checksum(self, unit: int, num_units: int) -> int:
        return checksum(self.read(unit, num_units))


def checksum(cells: bytes) -> int:
    return xxhash.xxh3_64_intdigest(cells)


class FakeLocks:
    """Which lock files are held. A name nobody took is free."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.followed: set[str] = set()
        """What costs the daemon a descriptor each."""

    def take(self, name: str) -> str:
        self.held.add(name)
        return name

    def free(self, name: str) -> None:
        self.held.discard(name)

    def hold(self, name: str) -> bool:
        if self.is_free(name):
            return False
        self.followed.add(name)
        return True

    def is_free(self, name: str) -> bool:
        return name not in self.held

    def let_go(self, name: str) -> None:
        self.followed.discard(name)


class FakeClock:
    """Nanoseconds of a boot clock; moves when it is told to."""

    def __init__(self, now_ns: int = 3_600 * SECOND_NS) -> None:
        self.now_ns = now_ns

    def advance(self, seconds: float) -> int:
        self.now_ns += int(seconds * SECOND_NS)
        return self.now_ns
