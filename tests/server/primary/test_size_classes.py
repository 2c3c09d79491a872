"""How a pool is cut into slabs, and slabs into slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_server.policies.loader import make_policy
from kvtier_server.primary.size_classes import MAX_SLAB_BYTES, SlabMap, choose_slab_bytes

from ..core.slots_in_memory import SlotsInMemory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("pool_bytes", "slot_bytes", "expected"),
    [
        (64 * GIB, 2 * MIB, GIB),  # a 64th of the pool
        (16 * GIB, 2 * MIB, 256 * MIB),
        (1 * GIB, 2 * MIB, 32 * MIB),  # 16 slots, more than a 64th
        (512 * GIB, 2 * MIB, GIB),  # at most 1 GiB
        (64 * MIB, 8 * MIB, 16 * MIB),  # at most a quarter of the pool
        (64 * MIB, 48 * MIB, 48 * MIB),  # at least one slot
        (64 * GIB, 2 * GIB, 2 * GIB),  # even if that is more than 1 GiB
        (1 * GIB, 12 * KIB, GIB // 64 // (12 * KIB) * 12 * KIB),  # a whole number of slots
    ],
)
def test_a_slab_is_a_64th_of_the_pool_but_16_slots_and_at_most_a_gibibyte(
    pool_bytes: int, slot_bytes: int, expected: int
) -> None:
    assert choose_slab_bytes(pool_bytes, slot_bytes) == expected


@given(pool_units=st.integers(1, 1 << 24), slot_units=st.integers(1, 1 << 16))
def test_a_slab_holds_a_whole_number_of_slots_and_never_more_than_is_sensible(
    pool_units: int, slot_units: int
) -> None:
    pool_bytes, slot_bytes = pool_units * 4 * KIB, slot_units * 4 * KIB
    slab_bytes = choose_slab_bytes(pool_bytes, slot_bytes)
    assert slab_bytes >= slot_bytes
    assert slab_bytes % slot_bytes == 0
    assert slab_bytes <= max(MAX_SLAB_BYTES, slot_bytes)
    assert slab_bytes <= max(pool_bytes // 4, slot_bytes)


def new_map(num_units: int) -> SlabMap:
    slabs = SlabMap(num_units * 4096, SlotsInMemory(num_units), lambda capacity: make_policy("lru", capacity))
    slabs.backed_bytes = num_units * 4096
    return slabs


@given(num_units=st.integers(1, 300), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_slots_of_all_classes_are_disjoint_and_inside_the_pool(num_units: int, sizes: list[int]) -> None:
    slabs = new_map(num_units)
    classes = [slabs.size_class(size * 4096) for size in sizes]
    growing = [size_class for size_class in classes if size_class is not None]
    while growing:
        growing = [size_class for size_class in growing if slabs.grow(size_class)]
        slabs.check_integrity()
    units: set[int] = set()
    for size_class in slabs.classes.values():
        for slot_id in size_class.free:
            own = set(range(slot_id, slot_id + size_class.slot_bytes // 4096))
            assert own.isdisjoint(units)
            units |= own
            assert slabs.is_slot(slot_id)
    assert units <= set(range(num_units))
    assert sum(slabs.is_slot(unit) for unit in range(-1, num_units + 1)) == sum(
        len(size_class.free) for size_class in slabs.classes.values()
    )


@given(num_units=st.integers(1, 300), size=st.integers(1, 20))
def test_a_single_class_gets_every_slot_that_fits_into_its_slabs(num_units: int, size: int) -> None:
    slabs = new_map(num_units)
    size_class = slabs.size_class(size * 4096)
    assert (size_class is None) == (size > num_units)
    if size_class is None:
        return
    assert slabs.growable_slots(size_class) == num_units // size
    while slabs.grow(size_class):
        pass
    assert size_class.num_slots == num_units // size, "the last slab is short, not lost"


def test_slabs_are_given_out_in_address_order_as_they_are_backed() -> None:
    slabs = new_map(64)
    size_class = slabs.size_class(4096)
    assert size_class is not None
    slabs.backed_bytes = 0
    assert not slabs.grow(size_class)
    slabs.backed_bytes = 40 * 4096
    assert slabs.grow(size_class)
    assert slabs.grow(size_class)
    assert not slabs.grow(size_class), "the third slab ends behind what is backed"
    assert sorted(size_class.free) == list(range(32))


def test_a_refused_size_leaves_the_pool_to_those_that_fit() -> None:
    slabs = new_map(64)
    small = slabs.size_class(4096)
    assert slabs.size_class(65 * 4096) is None
    assert small is not None
    assert slabs.grow(small)


def test_a_larger_class_cuts_the_pool_anew_while_nobody_has_a_slab() -> None:
    slabs = new_map(64)
    slabs.size_class(4096)
    assert slabs.slab_bytes == 16 * 4096
    large = slabs.size_class(30 * 4096)
    assert slabs.slab_bytes == 30 * 4096
    assert large is not None
    assert slabs.grow(large)
    assert slabs.size_class(31 * 4096) is None, "now the slabs are what they are"


def test_the_division_an_earlier_daemon_wrote_down_is_taken_over() -> None:
    slabs = new_map(64)
    slabs.size_class(4096)  # as the earlier daemon did
    slabs = SlabMap(slabs.pool_bytes, slabs._table, slabs._make_policy)
    slabs.backed_bytes = slabs.pool_bytes
    slabs.restore(16 * 4096, [4096, 0, 2 * 4096])
    assert {size: sorted(c.slabs) for size, c in slabs.classes.items()} == {4096: [0], 8192: [2]}
    slabs.check_integrity()
    small = slabs.size_class(4096)
    assert small is not None
    assert small.free == [], "the slots are nobody's until their records were read"
    assert slabs.grow(small)
    assert sorted(small.slabs) == [0, 1]
