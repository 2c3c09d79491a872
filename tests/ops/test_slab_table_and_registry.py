from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_ops.header import MAX_SLABS, REGISTRY_HALF_BYTES, SLAB_TABLE_BYTES
from kvtier_ops.pool import Pool
from kvtier_ops.registry import MAX_PAYLOAD_BYTES, Registry
from kvtier_ops.slab_table import SlabTable


def new_slabs() -> tuple[SlabTable, bytearray]:
    memory = bytearray(SLAB_TABLE_BYTES)
    return SlabTable(np.frombuffer(memory, np.uint8)), memory


def new_registry() -> tuple[Registry, bytearray]:
    memory = bytearray(2 * REGISTRY_HALF_BYTES)
    return Registry(np.frombuffer(memory, np.uint8)), memory


def test_a_new_pool_has_no_slabs_and_no_registry(pool: Pool) -> None:
    assert pool.slabs.read() == (0, [])
    assert pool.registry.read() is None


def test_slabs_read_back_as_assigned() -> None:
    slabs, _ = new_slabs()
    slabs.configure(1 << 20, 3)
    slabs.assign(0, 8192)
    slabs.assign(2, 4096)
    slabs.assign(0, 0)
    assert slabs.read() == (1 << 20, [0, 0, 4096])


def test_there_is_room_for_the_promised_number_of_slabs() -> None:
    slabs, _ = new_slabs()
    slabs.configure(4096, MAX_SLABS)
    slabs.assign(MAX_SLABS - 1, 4096)
    assert slabs.read() == (4096, [0] * (MAX_SLABS - 1) + [4096])


def test_a_new_division_forgets_the_old_one() -> None:
    slabs, memory = new_slabs()
    slabs.configure(8192, 2)
    slabs.assign(1, 8192)
    entries = bytes(memory[4096:])
    slabs.configure(4096, 2)
    assert slabs.read() == (4096, [0, 0])
    memory[4096:] = entries  # as if the kernel had lost the clearing of the entries
    assert slabs.read() == (4096, [0, None])


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_damaged_slab_entry_reads_as_unknown(byte: int, bit: int) -> None:
    slabs, memory = new_slabs()
    slabs.configure(4096, 2)
    slabs.assign(1, 4096)
    memory[4096 + 8 + byte] ^= 1 << bit
    assert slabs.read() == (4096, [0, None])


@given(st.binary(min_size=16, max_size=16))
def test_a_damaged_slab_head_reads_as_not_configured(garbage: bytes) -> None:
    slabs, memory = new_slabs()
    memory[:16] = garbage
    assert slabs.read() == (0, [])


def test_slabs_outside_the_table_are_refused() -> None:
    slabs, _ = new_slabs()
    with pytest.raises(ValueError, match="num_slabs 65537"):
        slabs.configure(4096, MAX_SLABS + 1)
    with pytest.raises(ValueError, match="slab_bytes 100"):
        slabs.configure(100, 1)
    slabs.configure(4096, 1)
    with pytest.raises(ValueError, match="slab 1 "):
        slabs.assign(1, 4096)
    with pytest.raises(ValueError, match="slot_bytes 5"):
        slabs.assign(0, 5)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=6))
def test_the_registry_reads_what_was_written_last(payloads: list[bytes]) -> None:
    registry, _ = new_registry()
    for payload in payloads:
        registry.write(payload)
        assert registry.read() == payload


@given(st.integers(0, 16 + 6), st.integers(0, 7), st.integers(1, 4))
def test_a_damaged_newest_half_leaves_the_one_before(byte: int, bit: int, writes: int) -> None:
    registry, memory = new_registry()
    for number in range(writes + 1):
        registry.write(b"blob %02d" % number)
    newest_half = writes % 2
    memory[newest_half * REGISTRY_HALF_BYTES + byte] ^= 1 << bit
    assert registry.read() == b"blob %02d" % (writes - 1)
    registry.write(b"after")
    assert registry.read() == b"after"


def test_the_largest_registry_fits_and_a_larger_one_changes_nothing() -> None:
    registry, _ = new_registry()
    registry.write(b"x" * MAX_PAYLOAD_BYTES)
    with pytest.raises(ValueError, match="over the limit"):
        registry.write(b"x" * (MAX_PAYLOAD_BYTES + 1))
    assert registry.read() == b"x" * MAX_PAYLOAD_BYTES
