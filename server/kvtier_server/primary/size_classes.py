"""Size classes and slabs: how the pool's bytes are divided into slots.

Owns which slab belongs to which class and which slots are free. A slot id is the slot's offset in the pool
in 4 KiB units, so it stays unique when a slab changes its class. Slabs are taken on demand, so a class that
is alone gets every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_server.policies.base import CachePolicy

SLABS_PER_POOL = 64
"""A slab is a 64th of the pool where that holds enough slots."""

MIN_SLOTS_PER_SLAB = 16
"""Fewer slots than this and moving a slab would empty a class in one go."""

MAX_SLAB_BYTES = 1 << 30
"""Draining more than this in one piece would throw away too much at once."""


class SlotTable(Protocol):
    """The pool's persistent records, as the primary tier needs them. Real: `kvtier_ops.pool`."""

    def reserve(self, slot_ids: Sequence[int], owner: int, slot_bytes: int) -> list[int]:
        """Raise each generation, then mark RESERVED. Returns the new generations."""

    def publish(self, slot_id: int, space_id: int, key: bytes, checksums: Sequence[int]) -> None:
        """Mark PUBLISHED under `key`."""

    def free(self, slot_ids: Sequence[int]) -> None:
        """Mark FREE; the generation stays."""

    def retire(self, slot_ids: Sequence[int]) -> None:
        """Raise each generation, then mark FREE: late readers fail."""

    def quarantine(self, slot_ids: Sequence[int], owner: int) -> None:
        """Raise each generation, then mark QUARANTINED."""

    def generation(self, slot_id: int) -> int:
        """Current generation."""

    def checksums(self, slot_id: int, num_parts: int) -> tuple[int, ...]:
        """Checksums that a chunk was published with, one per part; 0 = none was recorded."""

    def write_recency(self, slot_ids: Sequence[int], stamps: Sequence[int]) -> None:
        """Note when slots were last used, for a later daemon."""

    def configure_slabs(self, slab_bytes: int, num_slabs: int) -> None:
        """Write down the division of the pool."""

    def assign_slab(self, slab: int, slot_bytes: int, slot_ids: Sequence[int]) -> None:
        """Write down the slab's class (0 = none) and back the records of its slots.

        Raises OSError when the file system is full: nothing was assigned.
        """


class SizeClass:
    """Slots of one size: free ones, and the policy that orders the evictable chunks in the others.

    `num_free` counts the slots that can be handed out; those of a slab that leaves are not among them.
    `next_review`: the stamp from which on the class looks again for a slab of another one to take.
    """

    __slots__ = (
        "_open",
        "live_engines",
        "next_review",
        "num_free",
        "num_published",
        "num_quarantined",
        "num_reserved",
        "policy",
        "slabs",
        "slot_bytes",
    )

    def __init__(self, slot_bytes: int, policy: CachePolicy) -> None:
        self.slot_bytes = slot_bytes
        self.policy = policy
        self.slabs: dict[int, Slab] = {}
        self.live_engines = 0
        self.next_review = 0
        self.num_free = 0
        self.num_reserved = 0
        self.num_published = 0
        self.num_quarantined = 0
        self._open: dict[int, Slab] = {}
        """Slabs with a free slot that can be handed out, by index."""

    @property
    def num_slots(self) -> int:
        """Slots of all its slabs, whatever their state."""
        return sum(slab.num_slots for slab in self.slabs.values())

    @property
    def free(self) -> list[int]:
        """All free slots, also those of slabs that leave. O(slots): for checks."""
        return [slot_id for slab in self.slabs.values() for slot_id in slab.free]

    def take_free(self, count: int) -> list[int]:
        """Take up to `count` free slots, out of as few slabs as possible."""
        taken: list[int] = []
        while len(taken) < count and self._open:
            index, slab = self._open.popitem()
            piece = slab.free[: len(taken) - count - 1 : -1]
            del slab.free[-len(piece) :]
            taken += piece
            if slab.free:
                self._open[index] = slab
        self.num_free -= len(taken)
        return taken

    def open(self, slab: Slab) -> None:
        """Let the slab's free slots be handed out."""
        if slab.free:
            self._open[slab.index] = slab
        self.num_free += len(slab.free)

    def close(self, slab: Slab) -> None:
        """Keep the slab's free slots from being handed out."""
        self._open.pop(slab.index, None)
        self.num_free -= len(slab.free)

    def add_free(self, slab: Slab, slot_id: int) -> None:
        """Put a free slot back; one of a slab that leaves is not handed out again."""
        if not slab.is_leaving:
            if not slab.free:
                self._open[slab.index] = slab
            self.num_free += 1
        slab.free.append(slot_id)

    def check_integrity(self) -> None:
        """Assert that every free slot is found where it is. O(slots)."""
        open_slabs = [slab for slab in self.slabs.values() if slab.free and not slab.is_leaving]
        assert set(self._open.values()) == set(open_slabs), "a slab with free slots is not found"
        assert self.num_free == sum(len(slab.free) for slab in open_slabs), self.num_free
        for slab in self.slabs.values():
            assert set(slab.free) <= set(slab.slot_ids), f"a free slot outside slab {slab.index}"


class Slab:
    """A run of the pool that is divided into equal slots.

    Of its slots, `free` are listed and `num_chunks` hold a chunk; the others are reserved or quarantined.
    `is_leaving`: on its way to another class, so none of its slots is handed out any more.
    """

    __slots__ = (
        "first_unit",
        "free",
        "index",
        "is_leaving",
        "num_chunks",
        "num_slots",
        "num_units",
        "slot_units",
    )

    def __init__(self, index: int, first_unit: int, num_units: int) -> None:
        self.index = index
        self.first_unit = first_unit
        self.num_units = num_units
        self.slot_units = 0
        self.num_slots = 0
        self.num_chunks = 0
        self.free: list[int] = []
        self.is_leaving = False

    @property
    def can_be_emptied(self) -> bool:
        """Whether nothing in it is reserved or quarantined."""
        return self.num_chunks + len(self.free) == self.num_slots

    @property
    def slot_ids(self) -> range:
        """Its slots in address order; empty while it belongs to no class."""
        if not self.slot_units:
            return range(0)
        return range(self.first_unit, self.first_unit + self.num_slots * self.slot_units, self.slot_units)


def choose_slab_bytes(pool_bytes: int, slot_bytes: int) -> int:
    """Slab size for a pool whose largest slots have `slot_bytes`: a whole number of them.

    clamp(pool / 64, 16 slots, 1 GiB), but at most a quarter of the pool, so that small pools still have
    slabs for several classes; at least one slot.
    """
    wanted = max(pool_bytes // SLABS_PER_POOL, MIN_SLOTS_PER_SLAB * slot_bytes)
    wanted = min(wanted, MAX_SLAB_BYTES, max(pool_bytes // 4, slot_bytes))
    return max(wanted // slot_bytes, 1) * slot_bytes


class SlabMap:
    """Which slab belongs to which class. Slabs become usable as the pool is backed, in address order."""

    def __init__(self, pool_bytes: int, table: SlotTable, make_policy: Callable[[int], CachePolicy]) -> None:
        self.pool_bytes = pool_bytes
        self.backed_bytes = 0
        self.slab_bytes = 0
        self.classes: dict[int, SizeClass] = {}
        self._table = table
        self._make_policy = make_policy
        self._slabs: list[Slab] = []
        self._unassigned: list[Slab] = []

    def size_class(self, slot_bytes: int) -> SizeClass | None:
        """Return the class of `slot_bytes`; None if such a slot does not fit into a slab of this pool.

        The first class decides the slabs' size; while no slab is assigned, a later one may decide anew.
        """
        known = self.classes.get(slot_bytes)
        if known is not None:
            return known
        if slot_bytes > self.pool_bytes:
            return None
        if not any(size_class.slabs for size_class in self.classes.values()):
            self._divide(max([slot_bytes, *self.classes]))
        if slot_bytes > self.slab_bytes:
            return None
        created = SizeClass(slot_bytes, self._make_policy(0))
        self.classes[slot_bytes] = created
        return created

    def forget_unused(self, used: set[SizeClass]) -> None:
        """Forget classes that have no slab and are not among `used`."""
        for slot_bytes, size_class in list(self.classes.items()):
            if not size_class.slabs and size_class not in used:
                del self.classes[slot_bytes]

    def _divide(self, slot_bytes: int) -> None:
        """Cut the empty pool into slabs for slots of up to `slot_bytes`."""
        self._slabs = []
        self.slab_bytes = choose_slab_bytes(self.pool_bytes, slot_bytes)
        slab_units = self.slab_bytes // SLOT_UNIT_BYTES
        pool_units = self.pool_bytes // SLOT_UNIT_BYTES
        for index, first in enumerate(range(0, pool_units, slab_units)):
            self._slabs.append(Slab(index, first, min(slab_units, pool_units - first)))
        self._unassigned = self._slabs[::-1]  # taken from the end: address order
        self._table.configure_slabs(self.slab_bytes, len(self._slabs))

    def restore(self, slab_bytes: int, slot_bytes_by_slab: Sequence[int | None]) -> None:
        """Take over the division an earlier daemon wrote down; its slots are none's yet: not free."""
        self.slab_bytes = slab_bytes
        slab_units = slab_bytes // SLOT_UNIT_BYTES
        pool_units = self.pool_bytes // SLOT_UNIT_BYTES
        firsts = range(0, pool_units, slab_units)
        self._slabs = [Slab(i, first, min(slab_units, pool_units - first)) for i, first in enumerate(firsts)]
        self._unassigned = []
        for slab in reversed(self._slabs):
            slot_bytes = slot_bytes_by_slab[slab.index] if slab.index < len(slot_bytes_by_slab) else None
            if not slot_bytes or slot_bytes > slab_bytes or slot_bytes % SLOT_UNIT_BYTES:
                self._unassigned.append(slab)
                continue
            size_class = self.classes.get(slot_bytes)
            if size_class is None:
                size_class = self.classes[slot_bytes] = SizeClass(slot_bytes, self._make_policy(0))
            self._join(slab, size_class)

    def slab_of(self, slot_id: int) -> Slab:
        """Slab that contains the slot."""
        return self._slabs[slot_id * SLOT_UNIT_BYTES // self.slab_bytes]

    def is_slot(self, slot_id: int) -> bool:
        """Whether this number names a slot of a slab that belongs to a class."""
        inside = 0 <= slot_id < self.pool_bytes // SLOT_UNIT_BYTES
        return inside and bool(self._slabs) and slot_id in self.slab_of(slot_id).slot_ids

    def grow(self, size_class: SizeClass) -> bool:
        """Give the class one more slab that is backed and nobody's. False if there is none."""
        for position in range(len(self._unassigned) - 1, -1, -1):
            slab = self._unassigned[position]
            if (slab.first_unit + slab.num_units) * SLOT_UNIT_BYTES > self.backed_bytes:
                return False  # the list is in address order, and so is backing
            if slab.num_units * SLOT_UNIT_BYTES < size_class.slot_bytes:
                continue  # the short last slab is too short for this class
            del self._unassigned[position]
            slots = self._join(slab, size_class)
            try:
                self._table.assign_slab(slab.index, size_class.slot_bytes, slots)
            except OSError:
                self._leave(slab, size_class)
                self._unassigned.insert(position, slab)
                return False
            slab.free = list(reversed(slots))  # taken from the end: address order
            size_class.open(slab)
            return True
        return False

    def add_free(self, size_class: SizeClass, slot_ids: Iterable[int]) -> None:
        """Put slots of one class back among the free ones."""
        slabs, slab_units = self._slabs, self.slab_bytes // SLOT_UNIT_BYTES
        for slot_id in slot_ids:
            size_class.add_free(slabs[slot_id // slab_units], slot_id)

    def begin_leaving(self, slab: Slab, size_class: SizeClass) -> None:
        """Hand out no slot of this slab any more."""
        size_class.close(slab)
        slab.is_leaving = True

    def stay(self, slab: Slab, size_class: SizeClass) -> None:
        """Take `begin_leaving` back."""
        slab.is_leaving = False
        size_class.open(slab)

    def release(self, slab: Slab, size_class: SizeClass) -> None:
        """Take an emptied slab that leaves away from its class."""
        assert slab.is_leaving, f"slab {slab.index} may have been handed out from"
        assert len(slab.free) == slab.num_slots, f"slab {slab.index} is not empty"
        self._leave(slab, size_class)
        self._table.assign_slab(slab.index, 0, ())
        self._unassigned.append(slab)
        self._unassigned.sort(key=lambda unassigned: -unassigned.index)

    def _join(self, slab: Slab, size_class: SizeClass) -> range:
        slab.slot_units = size_class.slot_bytes // SLOT_UNIT_BYTES
        slab.num_slots = slab.num_units // slab.slot_units
        size_class.slabs[slab.index] = slab
        size_class.policy.set_capacity(size_class.num_slots)
        return slab.slot_ids

    def _leave(self, slab: Slab, size_class: SizeClass) -> None:
        del size_class.slabs[slab.index]
        slab.slot_units = slab.num_slots = 0
        slab.free = []
        slab.is_leaving = False
        size_class.policy.set_capacity(size_class.num_slots)

    def growable_slots(self, size_class: SizeClass) -> int:
        """Slots the class could still take from backed slabs that are nobody's."""
        units = size_class.slot_bytes // SLOT_UNIT_BYTES
        return sum(
            slab.num_units // units
            for slab in self._unassigned
            if (slab.first_unit + slab.num_units) * SLOT_UNIT_BYTES <= self.backed_bytes
        )

    def check_integrity(self) -> None:
        """Assert that each slab belongs to one class or to none. O(slabs)."""
        owners = [slab.index for size_class in self.classes.values() for slab in size_class.slabs.values()]
        assert sorted(owners + [slab.index for slab in self._unassigned]) == [
            slab.index for slab in self._slabs
        ]
        for size_class in self.classes.values():
            size_class.check_integrity()
