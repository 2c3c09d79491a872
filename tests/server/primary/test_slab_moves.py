"""Slabs of many chunks change hands in slices, while both classes go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvtier_ops.namespace import SpaceName
from kvtier_server.policies.loader import make_policy
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.primary.size_classes import SizeClass
from kvtier_server.primary.tier import SLICE_ITEMS, PrimaryTier

from ..core.slots_in_memory import SlotsInMemory

LARGE_UNITS = 256
SLAB_UNITS = 16 * LARGE_UNITS
NUM_SLABS = 4


class Tier:
    """A pool of 4 slabs, all full of one-unit chunks; another class wants room."""

    def __init__(self) -> None:
        units = NUM_SLABS * SLAB_UNITS
        self.removed: Counter[str] = Counter()
        self.table = SlotsInMemory(units)
        self.tier = PrimaryTier(
            units * 4096, self.table, lambda capacity: make_policy("lru", capacity), self._note
        )
        self.tier.slabs.backed_bytes = units * 4096
        self.large = self._size_class(LARGE_UNITS)
        self.small = self._size_class(1)
        self.small.live_engines = self.large.live_engines = 1
        self.space = self.tier.spaces.get_or_add(SpaceName("ns", "", 0))
        self._serial = 0
        while self.small.num_published < units:
            self.publish(self.reserve_small(SLAB_UNITS))

    def _size_class(self, units: int) -> SizeClass:
        size_class = self.tier.slabs.size_class(units * 4096)
        assert size_class is not None
        return size_class

    def _note(self, space: KeySpace, keys: Sequence[bytes], reason: str) -> None:
        self.removed[reason] += len(keys)

    def reserve_small(self, count: int) -> list[int]:
        return self.tier.reserve(self.small, count, 1).slot_ids

    def reserve_large(self) -> list[int]:
        return self.tier.reserve(self.large, 1, 2).slot_ids

    def publish(self, slot_ids: Sequence[int]) -> None:
        for slot_id in slot_ids:
            self._serial += 1
            key, stamp = b"key%08d" % self._serial, self.tier.issue_stamps(1)
            self.tier.publish(self.space, key, slot_id, 1, self.small, [0], stamp, None)

    def settle(self) -> None:
        """Do all slices."""
        while self.tier.is_draining:
            self.tier.drain_slice(SLICE_ITEMS)
        self.tier.check_integrity()

    def leaving(self) -> list[Chunk]:
        """Chunks that are in the slab on the move."""
        return [chunk for chunk in self.tier.by_slot.values() if chunk.slab.is_leaving]


def test_a_large_slab_arrives_although_its_class_goes_on_storing_and_no_chunk_goes_for_nothing() -> None:
    tier = Tier()
    being_written: list[int] = []
    for step in range(20):
        if tier.reserve_large():
            break
        tier.publish(being_written)
        being_written = tier.reserve_small(1)
        assert being_written or step < 3, "the giver finds room elsewhere"
        assert not any(tier.tier.slabs.slab_of(slot_id).is_leaving for slot_id in being_written)
        tier.tier.drain_slice(SLICE_ITEMS)
        tier.tier.check_integrity()
    else:
        raise AssertionError("20 slices were not enough for a slab of two")
    assert tier.removed["slab_move"] <= SLAB_UNITS
    assert len(tier.large.slabs) == 1


def test_one_slice_looks_at_and_drops_a_bounded_part_and_one_slab_is_taken_at_a_time() -> None:
    tier = Tier()
    for _ in range(3):
        assert tier.reserve_large() == []
        assert tier.removed["slab_move"] <= SLICE_ITEMS, "nothing more goes until the loop comes round"
    while tier.tier.is_draining:
        before = tier.removed["slab_move"]
        tier.tier.drain_slice(100)
        assert tier.removed["slab_move"] - before <= 100
    tier.tier.check_integrity()
    assert tier.removed["slab_move"] == SLAB_UNITS
    assert len(tier.reserve_large()) == 1


def test_a_slab_waits_for_chunks_that_were_pinned_after_it_was_chosen() -> None:
    tier = Tier()
    tier.reserve_large()
    while not tier.leaving():
        tier.tier.drain_slice(1)
    pinned = [chunk for chunk in tier.leaving() if not chunk.dropped][-3:]
    tier.tier.pin(pinned)
    tier.settle()
    assert [chunk.dropped for chunk in pinned] == [True] * 3
    assert tier.leaving() == pinned
    assert not tier.tier.is_draining, "there is nothing to do but wait"
    assert tier.reserve_large() == []
    assert tier.removed["slab_move"] == SLAB_UNITS, "no second slab is emptied meanwhile"
    tier.tier.unpin(pinned)
    tier.settle()
    assert len(tier.reserve_large()) == 1


def test_a_slab_with_a_corrupt_chunk_stays_and_its_slots_are_handed_out_again() -> None:
    tier = Tier()
    tier.reserve_large()
    while not tier.leaving():
        tier.tier.drain_slice(1)
    corrupt = next(chunk for chunk in tier.leaving() if not chunk.dropped)
    dropped = tier.removed["slab_move"]
    tier.tier.condemn(corrupt, 0)
    tier.settle()
    assert not tier.leaving()
    assert len(tier.small.slabs) == NUM_SLABS
    assert len(tier.reserve_small(dropped)) == dropped
    assert tier.removed["evict"] == 0, "what the move had emptied is used first"
    tier.reserve_large()
    tier.settle()
    assert corrupt.slab.index in tier.small.slabs, "another slab is taken"
    assert len(tier.reserve_large()) == 1


def test_a_slab_stays_when_the_class_that_wanted_it_is_gone() -> None:
    tier = Tier()
    tier.reserve_large()
    while not tier.leaving():
        tier.tier.drain_slice(1)
    tier.tier.slabs.forget_unused({tier.small})
    tier.settle()
    assert not tier.leaving()
    assert len(tier.small.slabs) == NUM_SLABS
    assert len(tier.reserve_small(SLAB_UNITS)) == SLAB_UNITS
