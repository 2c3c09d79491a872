from __future__ import annotations

import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtier_ops.pool import MAX_KEY_BYTES, MAX_PARTS, RECORD_BYTES, Pool, SlotState
from kvtier_ops.slot_table import SlotRecord, SlotTable, fence

from .conftest import MIB, StartChild

NUM_SLOTS = 6
slot_ids = st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=NUM_SLOTS, unique=True)
u64 = st.integers(0, 2**64 - 1)


def new_table(first_generation: int = 0) -> tuple[SlotTable, bytearray]:
    memory = bytearray(NUM_SLOTS * RECORD_BYTES)
    return SlotTable(np.frombuffer(memory, np.uint64), first_generation), memory


@dataclass(frozen=True)
class Model:
    """What a slot record must read as."""

    generation: int
    state: SlotState = SlotState.FREE
    owner: int = 0
    space_id: int = 0
    key: bytes = b""
    checksums: tuple[int, ...] = ()
    slot_bytes: int = 0
    recency: int = 0


class SlotTableAgainstModel(RuleBasedStateMachine):
    """Any order of writes reads back as a plain dict would, and generations only rise."""

    @initialize(first_generation=st.integers(0, 2**48 - 1))
    def begin(self, first_generation: int) -> None:
        self.table, _ = new_table(first_generation)
        self.model = {slot: Model(first_generation) for slot in range(NUM_SLOTS)}

    @rule(slots=slot_ids, owner=u64, units=st.integers(1, 2**32 - 1))
    def reserve(self, slots: list[int], owner: int, units: int) -> None:
        generations = self.table.reserve(slots, owner, units * 4096)
        for slot, generation in zip(slots, generations, strict=True):
            was = self.model[slot]
            assert generation == was.generation + 1
            self.model[slot] = Model(
                generation, SlotState.RESERVED, owner, slot_bytes=units * 4096, recency=was.recency
            )

    @rule(
        slot=st.integers(0, NUM_SLOTS - 1),
        space_id=st.integers(0, 2**32 - 1),
        key=st.binary(min_size=1, max_size=MAX_KEY_BYTES),
        checksums=st.lists(u64, min_size=1, max_size=MAX_PARTS),
    )
    def publish(self, slot: int, space_id: int, key: bytes, checksums: list[int]) -> None:
        if self.model[slot].state is not SlotState.RESERVED:
            return
        self.table.publish(slot, space_id, key, checksums)
        self.model[slot] = replace(
            self.model[slot],
            state=SlotState.PUBLISHED,
            owner=0,
            space_id=space_id,
            key=key,
            checksums=tuple(checksums),
        )

    @rule(slots=slot_ids)
    def free(self, slots: list[int]) -> None:
        self.table.free(slots)
        self._end(slots, SlotState.FREE, 0, raised=0)

    @rule(slots=slot_ids)
    def retire(self, slots: list[int]) -> None:
        self.table.retire(slots)
        self._end(slots, SlotState.FREE, 0, raised=1)

    @rule(slots=slot_ids, owner=u64)
    def quarantine(self, slots: list[int], owner: int) -> None:
        self.table.quarantine(slots, owner)
        self._end(slots, SlotState.QUARANTINED, owner, raised=1)

    @rule(slots=slot_ids, stamp=st.integers(0, 2**60))
    def write_recency(self, slots: list[int], stamp: int) -> None:
        self.table.write_recency(slots, [stamp + i for i in range(len(slots))])
        for i, slot in enumerate(slots):
            self.model[slot] = replace(self.model[slot], recency=stamp + i)

    def _end(self, slots: list[int], state: SlotState, owner: int, raised: int) -> None:
        for slot in slots:
            was = self.model[slot]
            self.model[slot] = Model(
                was.generation + raised, state, owner, slot_bytes=was.slot_bytes, recency=was.recency
            )

    @invariant()
    def every_record_reads_as_the_model(self) -> None:
        for slot, want in self.model.items():
            assert self.table.generation(slot) == want.generation
            got = self.table.read(slot)
            assert got is not None
            assert got == SlotRecord(slot_id=slot, **vars(want))
            for part in range(MAX_PARTS):
                expected = want.checksums[part] if part < len(want.checksums) else 0
                assert self.table.part_checksum(slot, part) == expected


TestSlotTableAgainstModel = SlotTableAgainstModel.TestCase
TestSlotTableAgainstModel.settings = settings(max_examples=60, stateful_step_count=25)


def published() -> tuple[SlotTable, bytearray]:
    table, memory = new_table()
    table.reserve([1], 1, 4096)
    table.publish(1, 7, b"a key of some length", [1, 2, 3])
    return table, memory


@given(st.integers(0, RECORD_BYTES - 1), st.integers(0, 7))
def test_a_flipped_bit_is_never_read_as_another_record(byte: int, bit: int) -> None:
    table, memory = published()
    before = table.read(1)
    memory[RECORD_BYTES + byte] ^= 1 << bit
    after = table.read(1)
    assert before is not None
    assert after is None or replace(after, recency=0) == before


@given(st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES))
def test_a_record_of_garbage_does_not_verify(garbage: bytes) -> None:
    table, memory = new_table()
    memory[:RECORD_BYTES] = garbage
    record = table.read(0)
    assert record is None or not any(garbage[:8] + garbage[16:64])


def test_a_raised_generation_alone_unverifies_a_published_record() -> None:
    table, memory = published()
    memory[RECORD_BYTES] += 1
    assert table.read(1) is None


def test_a_record_torn_in_mid_publish_does_not_verify() -> None:
    table, memory = new_table()
    table.reserve([1], 1, 4096)
    reserved = bytes(memory)
    table.publish(1, 7, b"a key", [5])
    done = bytes(memory)
    state_word = slice(RECORD_BYTES + 16, RECORD_BYTES + 24)
    memory[:] = done
    memory[state_word] = reserved[state_word]
    assert table.read(1) is None


def test_a_record_that_did_not_verify_can_be_reserved_with_a_raised_generation() -> None:
    table, memory = published()
    memory[RECORD_BYTES + 100] ^= 1
    memory[RECORD_BYTES + 70] ^= 1
    assert table.read(1) is None
    assert table.reserve([1], 4, 8192) == [2]
    record = table.read(1)
    assert record is not None
    assert (record.state, record.owner, record.key) == (SlotState.RESERVED, 4, b"")


@pytest.mark.parametrize("slots", [[NUM_SLOTS], [0, -1], [0, NUM_SLOTS]])
def test_a_slot_outside_the_table_is_refused_and_nothing_changes(slots: list[int]) -> None:
    table, memory = published()
    before = bytes(memory)
    bad = next(slot for slot in slots if not 0 <= slot < NUM_SLOTS)
    for write in (
        lambda: table.reserve(slots, 1, 4096),
        lambda: table.free(slots),
        lambda: table.retire(slots),
        lambda: table.quarantine(slots, 1),
        lambda: table.write_recency(slots, [1] * len(slots)),
        lambda: table.publish(bad, 1, b"k", [1]),
        lambda: table.generation(bad),
        lambda: table.read(bad),
        lambda: table.part_checksum(bad, 0),
    ):
        with pytest.raises(IndexError, match=f"slot id {bad} "):
            write()
    assert bytes(memory) == before


def test_what_a_record_cannot_hold_is_refused() -> None:
    table, _ = published()
    with pytest.raises(ValueError, match="129 bytes"):
        table.publish(1, 1, b"k" * 129, [1])
    with pytest.raises(ValueError, match="0 bytes"):
        table.publish(1, 1, b"", [1])
    with pytest.raises(ValueError, match="33 part checksums"):
        table.publish(1, 1, b"k", [1] * 33)
    with pytest.raises(ValueError, match="slot_bytes 100"):
        table.reserve([1], 1, 100)
    with pytest.raises(IndexError, match="part 32"):
        table.part_checksum(1, 32)


def test_empty_batches_change_nothing() -> None:
    table, memory = published()
    before = bytes(memory)
    assert table.reserve([], 1, 4096) == []
    table.free([])
    table.retire([])
    table.quarantine([], 1)
    table.write_recency([], [])
    fence()
    assert bytes(memory) == before


@pytest.mark.parametrize("round_number", range(4))
def test_a_daemon_killed_while_it_writes_leaves_only_true_records(
    pool_directory: Path, start_child: StartChild, round_number: int
) -> None:
    """The child publishes each slot under a key that names slot and generation, and reports generations."""
    daemon = start_child(
        """
import sys
from pathlib import Path
from kvtier_ops.pool import Pool
pool = Pool.create(Path(sys.argv[1]), 1 << 20)
pool.back_records(range(65))
slots = list(range(64))
step = 0
while True:
    step += 1
    generations = pool.slots.reserve(slots, step, 4096)
    for slot, generation in zip(slots, generations):
        pool.slots.publish(slot, step, f"{slot}-{generation}".encode(), [slot, generation])
    print(generations[0] - pool.generation(64), flush=True)
    pool.slots.retire(slots[::2])
    pool.slots.free(slots[1::4])
""",
        pool_directory,
    )
    assert daemon.stdout is not None
    reported = 0
    for _ in range(random.Random(round_number).randrange(20, 400)):
        reported = int(daemon.stdout.readline())
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    pool = Pool.create(pool_directory, MIB)
    assert pool.kept
    first = pool.generation(64)
    for slot in range(64):
        assert pool.generation(slot) - first >= (reported if slot % 2 == 0 else reported // 2)
        record = pool.slots.read(slot)
        if record is not None and record.state is SlotState.PUBLISHED:
            assert record.key == f"{slot}-{record.generation}".encode()
            assert record.checksums == (slot, record.generation)
    pool.close()
