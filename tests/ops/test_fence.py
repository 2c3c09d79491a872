from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from kvtier_ops.checksum import part_checksum
from kvtier_ops.faults import arm
from kvtier_ops.host import HostTensors, LoadOutcome, StoreOutcome, load_part, store_part
from kvtier_ops.layout import GroupLayout, TensorLayout, part_offset, slot_bytes
from kvtier_ops.plan import ChunkCopy
from kvtier_ops.pool import Pool
from kvtier_ops.slot_table import SlotState

from .conftest import StartChild

LAYOUT = GroupLayout((TensorLayout("layer.0", 3000), TensorLayout("layer.1", 3000)), 2)
SLOT_BYTES = slot_bytes(LAYOUT.part_bytes, 2)
SLOT = 8
WHOLE = ChunkCopy(0, 0, 0, (2, 0))


def device(value: int) -> tuple[np.ndarray, HostTensors]:
    memory = np.full((2, 4, 3000), value, np.uint8)
    return memory, HostTensors([list(memory)])


def publish(pool: Pool, value: int = 1) -> int:
    """Store and publish a chunk whose every byte is `value`; returns the slot's generation."""
    (generation,) = pool.slots.reserve([SLOT], owner=9, slot_bytes=SLOT_BYTES)
    checksums = []
    for part in range(2):
        outcome = store_part(pool, SLOT, generation, part, LAYOUT, device(value)[1], WHOLE, checksum=True)
        assert outcome.ok
        checksums.append(outcome.checksum)
    pool.slots.publish(SLOT, 1, b"key00", checksums)
    return generation


def load(pool: Pool, generation: int, *, verify: bool, part: int = 0) -> LoadOutcome:
    expected = pool.part_checksum(SLOT, part) if verify else None
    return load_part(pool, SLOT, generation, part, LAYOUT, device(0)[1], WHOLE, expected)


def overwrite(pool: Pool) -> None:
    """What the daemon and another engine do: give the slot to somebody, who writes it."""
    pool.slots.reserve([SLOT], owner=10, slot_bytes=SLOT_BYTES)
    pool.slot_view(SLOT, SLOT_BYTES)[:] = 99


def test_what_was_stored_is_loaded_into_other_blocks(pool: Pool) -> None:
    memory, tensors = device(0)
    rng = np.random.default_rng(1)
    memory[:] = rng.integers(0, 256, memory.shape, np.uint8)
    (generation,) = pool.slots.reserve([SLOT], 9, SLOT_BYTES)
    stored = store_part(pool, SLOT, generation, 1, LAYOUT, tensors, ChunkCopy(0, 0, 0, (3, 1)), checksum=True)
    target, target_tensors = device(0)
    loaded = load_part(
        pool, SLOT, generation, 1, LAYOUT, target_tensors, ChunkCopy(0, 0, 0, (0, 2)), stored.checksum
    )
    assert loaded is LoadOutcome.OK
    assert np.array_equal(target[:, [0, 2]], memory[:, [3, 1]])


@pytest.mark.parametrize("verify", [True, False])
def test_a_slot_rewritten_before_the_load_is_torn(pool: Pool, verify: bool) -> None:
    generation = publish(pool)
    overwrite(pool)
    assert load(pool, generation, verify=verify) is LoadOutcome.TORN


@pytest.mark.parametrize("point", ["load.before_copy", "load.after_copy"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_slot_rewritten_between_the_two_checks_is_torn(pool: Pool, point: str, verify: bool) -> None:
    generation = publish(pool)
    arm(point, lambda: overwrite(pool))
    assert load(pool, generation, verify=verify) is LoadOutcome.TORN


@pytest.mark.parametrize("end", ["retire", "quarantine"])
def test_a_chunk_dropped_during_a_load_is_torn_though_its_bytes_are_still_there(pool: Pool, end: str) -> None:
    generation = publish(pool)
    arm(
        "load.after_copy",
        lambda: pool.slots.retire([SLOT]) if end == "retire" else pool.slots.quarantine([SLOT], 9),
    )
    assert load(pool, generation, verify=True) is LoadOutcome.TORN


def test_a_reader_stopped_in_mid_load_finds_its_load_torn_with_verify_off(
    pool: Pool, start_child: StartChild
) -> None:
    generation = publish(pool)
    reader = start_child(
        """
import sys
from pathlib import Path
import numpy as np
from kvtier_ops.host import HostTensors, load_part
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy
from kvtier_ops.pool import MappedPool
pool = MappedPool.open(Path(sys.argv[1]), int(sys.argv[2]))
layout = GroupLayout((TensorLayout("layer.0", 3000), TensorLayout("layer.1", 3000)), 2)
tensors = HostTensors([list(np.zeros((2, 4, 3000), np.uint8))])
print(load_part(pool, 8, int(sys.argv[3]), 0, layout, tensors, ChunkCopy(0, 0, 0, (2, 0)), None).name)
""",
        pool.path,
        pool.pool_id,
        generation,
        KVTIER_FAULTS="load.before_copy=stop",
    )
    _, status = os.waitpid(reader.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    overwrite(pool)
    reader.send_signal(signal.SIGCONT)
    assert reader.communicate(timeout=60)[0].strip() == "TORN"


def test_a_flipped_byte_is_a_mismatch(pool: Pool) -> None:
    generation = publish(pool)
    pool.slot_view(SLOT, SLOT_BYTES)[part_offset(LAYOUT.part_bytes, 1) + LAYOUT.part_bytes - 1] ^= 1
    assert load(pool, generation, verify=True, part=0) is LoadOutcome.OK
    assert load(pool, generation, verify=True, part=1) is LoadOutcome.MISMATCH
    assert load(pool, generation, verify=False, part=1) is LoadOutcome.OK


def test_a_verifying_load_hashes_the_whole_part_even_if_it_copies_some_of_it(pool: Pool) -> None:
    generation = publish(pool)
    pool.slot_view(SLOT, SLOT_BYTES)[0] ^= 1
    second_block_only = ChunkCopy(0, 0, 1, (3,))
    expected = pool.part_checksum(SLOT, 0)
    loaded = load_part(pool, SLOT, generation, 0, LAYOUT, device(0)[1], second_block_only, expected)
    assert loaded is LoadOutcome.MISMATCH


def test_a_generation_change_wins_over_a_mismatch(pool: Pool) -> None:
    generation = publish(pool)
    pool.slot_view(SLOT, SLOT_BYTES)[:] = 5
    arm("load.after_copy", lambda: pool.slots.retire([SLOT]))
    assert load(pool, generation, verify=True) is LoadOutcome.TORN


def test_a_checksum_that_was_not_recorded_is_not_verified(pool: Pool) -> None:
    (generation,) = pool.slots.reserve([SLOT], 9, SLOT_BYTES)
    pool.slots.publish(SLOT, 1, b"key00", [0, 0])
    assert load(pool, generation, verify=True) is LoadOutcome.OK


def test_no_bytes_have_the_checksum_that_means_not_recorded() -> None:
    assert part_checksum(np.zeros(0, np.uint8)) != 0
    assert part_checksum(memoryview(b"abc")) == part_checksum(np.frombuffer(b"abc", np.uint8))


def test_a_store_into_a_slot_given_away_leaves_it_untouched(pool: Pool) -> None:
    (generation,) = pool.slots.reserve([SLOT], 9, SLOT_BYTES)
    overwrite(pool)
    outcome = store_part(pool, SLOT, generation, 0, LAYOUT, device(1)[1], WHOLE, checksum=True)
    assert outcome == StoreOutcome(
        False, 0, f"slot {SLOT} was given away before the copy: generation {generation + 1}, not {generation}"
    )
    assert (pool.slot_view(SLOT, SLOT_BYTES) == 99).all()


def test_a_store_whose_slot_is_given_away_during_the_copy_fails(pool: Pool) -> None:
    (generation,) = pool.slots.reserve([SLOT], 9, SLOT_BYTES)
    arm("store.after_copy", lambda: pool.slots.quarantine([SLOT], 9))
    outcome = store_part(pool, SLOT, generation, 0, LAYOUT, device(1)[1], WHOLE, checksum=False)
    assert not outcome.ok
    assert "during the copy" in outcome.reason


@pytest.mark.parametrize("point", ["store.before_copy", "store.after_copy"])
def test_a_writer_killed_in_mid_store_leaves_a_reserved_slot_that_names_it(
    pool: Pool, start_child: StartChild, point: str
) -> None:
    (generation,) = pool.slots.reserve([SLOT], 77, SLOT_BYTES)
    writer = start_child(
        """
import sys
from pathlib import Path
import numpy as np
from kvtier_ops.host import HostTensors, store_part
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy
from kvtier_ops.pool import MappedPool
pool = MappedPool.open(Path(sys.argv[1]), int(sys.argv[2]))
layout = GroupLayout((TensorLayout("layer.0", 3000), TensorLayout("layer.1", 3000)), 2)
tensors = HostTensors([list(np.zeros((2, 4, 3000), np.uint8))])
store_part(pool, 8, int(sys.argv[3]), 0, layout, tensors, ChunkCopy(0, 0, 0, (2, 0)), True)
""",
        pool.path,
        pool.pool_id,
        generation,
        KVTIER_FAULTS=f"{point}=kill",
    )
    assert writer.wait(timeout=60) == -signal.SIGKILL
    record = pool.slots.read(SLOT)
    assert record is not None
    assert (record.state, record.owner) == (SlotState.RESERVED, 77)


def test_a_copy_that_outlives_close_finishes_on_valid_memory(pool_directory: Path) -> None:
    pool = Pool.create(pool_directory, 1 << 20)
    pool.back(0, 1 << 20)
    view = pool.slot_view(0, 4096)
    pool.close()
    view[:] = 3
    assert view.sum() == 3 * 4096
