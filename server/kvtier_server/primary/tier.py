"""The pool as a tier: which key is in which slot, what is pinned, what goes when room is needed.

Owns chunks, slots and the policies of the size classes, and keeps index, slot table and eviction order in
step. Does not own leases, instances or copies: a pin here is a number.

Pins and uses are counted at once, but a policy learns of them in batches (`settle`), always before it is
asked for a victim: that keeps its work off the path of a Lookup, and a chunk pinned and unpinned in between
costs it nothing.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_server.policies.base import CachePolicy, ChunkId
from kvtier_server.primary.index import Chunk, KeySpace, KeySpaces
from kvtier_server.primary.size_classes import SizeClass, Slab, SlabMap, SlotTable

SLICE_ITEMS = 2_048
"""Items of one slice of a long operation: keeps the owning thread free within about 2 ms."""

SLAB_REVIEW_USES = 4_096
"""Uses of chunks after which a class that found no slab to take from another looks again: at most every
chunk of the others is looked at."""

RemovedListener = Callable[[KeySpace, Sequence[bytes], str], None]


@dataclass(frozen=True, slots=True)
class Reserved:
    """Slots granted, their generations, and the chunks evicted for them."""

    slot_ids: list[int]
    generations: list[int]
    evicted: list[Chunk]


class PrimaryTier:
    """All chunks in the pool. One thread."""

    def __init__(
        self,
        pool_bytes: int,
        table: SlotTable,
        make_policy: Callable[[int], CachePolicy],
        on_removed: RemovedListener,
    ) -> None:
        self.spaces = KeySpaces()
        self.slabs = SlabMap(pool_bytes, table, make_policy)
        self.by_slot: dict[int, Chunk] = {}
        self._table = table
        self._on_removed = on_removed
        self._stamp = 0
        self._unsettled: deque[Sequence[Chunk]] = deque()
        self.num_unsettled = 0
        """Uses and pins that the policies have not been told of; about what `settle` has to do."""
        self._uses: deque[tuple[object, Sequence[Chunk | None], Sequence[int]]] = deque()
        self._draining: list[tuple[Slab, SizeClass, SizeClass]] = []
        self._unwritten: dict[int, int] = {}

    def issue_stamps(self, count: int) -> int:
        """Take `count` stamps; returns the first. Larger = used later."""
        first = self._stamp
        self._stamp += count
        return first

    def use(self, user: object, chunks: Sequence[Chunk | None], stamps: Sequence[int]) -> None:
        """Note that `user` used these chunks, at most once per chunk and user; None is passed over."""
        self._uses.append((user, chunks, stamps))
        self.num_unsettled += len(chunks)

    def pin(self, chunks: Sequence[Chunk]) -> None:
        """Count one more lease on each chunk."""
        for chunk in chunks:
            chunk.pins += 1
        self._unsettled.append(chunks)
        self.num_unsettled += len(chunks)

    def unpin(self, chunks: Sequence[Chunk]) -> None:
        """Count one lease less on each chunk; a dropped chunk's slot is freed with its last pin."""
        for chunk in chunks:
            chunk.pins -= 1
            if chunk.dropped and not chunk.pins:
                self._free_dropped(chunk)
        self._unsettled.append(chunks)
        self.num_unsettled += len(chunks)

    def keep_for(self, user: object, chunks: Sequence[Chunk]) -> None:
        """Let no `reserve` that is protected for `user` evict these chunks. No use is counted."""
        self.settle()  # or an earlier use by another, settled later, would take them over
        for chunk in chunks:
            chunk.user = user

    def settle(self, max_items: int | None = None) -> int:
        """Bring every policy in step with uses and pins; stop after about `max_items`.

        Returns how many items were left to do. Batches are taken whole: one call's keys at most.
        """
        left = sys.maxsize if max_items is None else max_items
        while self._uses and left > 0:
            user, chunks, stamps = self._uses.popleft()
            self._settle_uses(user, chunks, stamps)
            self.num_unsettled -= len(chunks)
            left -= len(chunks)
        while self._unsettled and left > 0:
            unsettled = self._unsettled.popleft()
            self._settle_pins(unsettled)
            self.num_unsettled -= len(unsettled)
            left -= len(unsettled)
        return left

    def _settle_uses(self, user: object, chunks: Sequence[Chunk | None], stamps: Sequence[int]) -> None:
        # One dict per class, and by id: a client may name a key twice.
        per_class: dict[SizeClass, dict[ChunkId, int]] = {}
        last_class, used = None, {}
        unwritten = self._unwritten
        for chunk, stamp in zip(chunks, stamps, strict=True):
            if chunk is None or chunk.dropped:
                continue
            if chunk.size_class is not last_class:
                last_class = chunk.size_class
                used = per_class.setdefault(last_class, {})
            chunk.user = user
            if stamp > chunk.stamp:  # noqa: PLR1730 a call of max() doubles the cost of this loop
                chunk.stamp = stamp
            used[chunk.id] = stamp
            unwritten[chunk.slot_id] = chunk.stamp
        for size_class, stamp_of in per_class.items():
            size_class.policy.touch(list(stamp_of), list(stamp_of.values()))

    def _settle_pins(self, chunks: Sequence[Chunk]) -> None:
        changed: dict[SizeClass, tuple[list[ChunkId], list[ChunkId]]] = {}
        last_class = None
        to_pin: list[ChunkId] = []
        to_unpin: list[ChunkId] = []
        for chunk in chunks:
            if chunk.ordered == (not chunk.pins) or chunk.dropped:
                continue
            if chunk.size_class is not last_class:
                last_class = chunk.size_class
                to_pin, to_unpin = changed.setdefault(last_class, ([], []))
            chunk.ordered = not chunk.pins
            (to_unpin if chunk.ordered else to_pin).append(chunk.id)
        for size_class, (pinned, unpinned) in changed.items():
            if pinned:
                size_class.policy.pin(pinned)
            if unpinned:
                size_class.policy.unpin(unpinned)

    def write_recency(self, max_items: int) -> None:
        """Write down uses since the last call: what a later daemon knows of the order of eviction."""
        if len(self._unwritten) <= max_items:
            slots, self._unwritten = self._unwritten, {}
        else:
            slots = dict(islice(self._unwritten.items(), max_items))
            for slot_id in slots:
                del self._unwritten[slot_id]
        if slots:
            self._table.write_recency(list(slots), list(slots.values()))

    @property
    def has_unsettled(self) -> bool:
        """Whether `settle` has work."""
        return bool(self._uses or self._unsettled)

    def reserve(
        self,
        size_class: SizeClass,
        count: int,
        owner: int,
        incoming: Callable[[], Sequence[ChunkId]] | None = None,
        protected: object | None = None,
    ) -> Reserved:
        """Reserve up to `count` slots, evicting what is coldest but nothing `protected` used last.

        `incoming` names the keys about to be stored, for policies that learn from them. Fewer slots than
        asked means the rest is pinned, protected or not there. Never waits.
        """
        self.settle()
        if incoming is not None and type(size_class.policy).incoming is not CachePolicy.incoming:
            size_class.policy.incoming(incoming())
        while len(size_class.free) < count and self.slabs.grow(size_class):
            pass
        evicted: list[Chunk] = []
        if len(size_class.free) < count:
            evicted += self._review_slabs(size_class, protected)
        if len(size_class.free) < count:
            evicted += self._evict(size_class, count - len(size_class.free), protected)
        granted = min(count, len(size_class.free))
        if not granted:
            return Reserved([], [], evicted)
        slot_ids = size_class.free[: -granted - 1 : -1]
        del size_class.free[-granted:]
        size_class.num_reserved += granted
        generations = self._table.reserve(slot_ids, owner, size_class.slot_bytes)
        return Reserved(slot_ids, generations, evicted)

    def publish(
        self,
        space: KeySpace,
        key: bytes,
        slot_id: int,
        generation: int,
        size_class: SizeClass,
        checksums: Sequence[int],
        stamp: int,
        user: object | None,
    ) -> Chunk:
        """Turn a reserved slot into a resident chunk. The key must not be resident."""
        assert key not in space.chunks, f"slot {slot_id}: its key is resident already"
        chunk = Chunk(space, key, slot_id, generation, size_class, stamp)
        chunk.user = user
        self._table.publish(slot_id, space.id, key, checksums)
        space.chunks[key] = chunk
        self.by_slot[slot_id] = chunk
        size_class.num_reserved -= 1
        size_class.num_published += 1
        size_class.policy.insert(chunk.id, stamp)
        self._unwritten[slot_id] = stamp
        return chunk

    def adopt(self, space: KeySpace, key: bytes, slot_id: int, generation: int, slot_bytes: int) -> None:
        """File a chunk that an earlier daemon published; used after those that were adopted before."""
        size_class = self.slabs.classes[slot_bytes]
        chunk = Chunk(space, key, slot_id, generation, size_class, self.issue_stamps(1))
        space.chunks[key] = chunk
        self.by_slot[slot_id] = chunk
        size_class.num_published += 1
        size_class.policy.insert(chunk.id, chunk.stamp)
        self._unwritten[slot_id] = chunk.stamp

    def adopt_free(self, slots: Sequence[tuple[int, int]]) -> None:
        """Take (slot id, slot bytes) of an earlier daemon as free. Late readers of what was there fail."""
        per_class: dict[int, list[int]] = {}
        for slot_id, slot_bytes in slots:
            per_class.setdefault(slot_bytes, []).append(slot_id)
        for slot_bytes, slot_ids in per_class.items():
            self._table.retire(slot_ids)
            self.slabs.classes[slot_bytes].free.extend(sorted(slot_ids, reverse=True))

    def adopt_quarantined(self, size_class: SizeClass, slot_ids: Sequence[int]) -> None:
        """Set slots of an earlier daemon aside that somebody may still be writing."""
        self._table.quarantine(slot_ids, 0)
        size_class.num_quarantined += len(slot_ids)

    def free_reserved(self, size_class: SizeClass, slot_ids: Sequence[int]) -> None:
        """Give reserved slots back that nobody can still be writing."""
        self._table.free(slot_ids)
        size_class.num_reserved -= len(slot_ids)
        size_class.free.extend(slot_ids)

    def quarantine_reserved(self, size_class: SizeClass, slot_ids: Sequence[int], owner: int) -> None:
        """Set reserved slots aside that somebody may still be writing."""
        self._table.quarantine(slot_ids, owner)
        size_class.num_reserved -= len(slot_ids)
        size_class.num_quarantined += len(slot_ids)

    def end_quarantine(self, size_class: SizeClass, slot_ids: Sequence[int]) -> None:
        """Give quarantined slots back: their writers are gone."""
        self._table.free(slot_ids)
        size_class.num_quarantined -= len(slot_ids)
        size_class.free.extend(slot_ids)

    def generation(self, slot_id: int) -> int | None:
        """Current generation of a slot id, or None for a number that is no slot's.

        The table is not asked for others: their records may have no memory yet.
        """
        is_slot = self.slabs.is_slot(slot_id)
        return self._table.generation(slot_id) if is_slot else None

    def _evict(self, size_class: SizeClass, count: int, protected: object | None) -> list[Chunk]:
        """Free up to `count` slots of the class for `reserve`, which takes every one of them."""
        if protected is None:
            victims = size_class.policy.evict(count)
        else:
            of = self.spaces.of

            def may_evict(chunk_id: ChunkId) -> bool:
                space, key = of(chunk_id)
                return space.chunks[key].user is not protected

            victims = size_class.policy.evict(count, may_evict)
        evicted = []
        for chunk_id in victims:
            space, key = self.spaces.of(chunk_id)
            chunk = space.chunks.pop(key)
            chunk.dropped = True
            del self.by_slot[chunk.slot_id]
            evicted.append(chunk)
        # Their records stay until `reserve` raises the generations, before anybody gets the slots.
        size_class.num_published -= len(evicted)
        size_class.free.extend(chunk.slot_id for chunk in reversed(evicted))
        self._tell_removed(evicted, "evict")
        return evicted

    def drop(self, chunks: Iterable[Chunk], reason: str) -> list[Chunk]:
        """Remove resident chunks for another reason than room; returns those that were.

        Pinned ones keep their slot meanwhile.
        """
        dropped = []
        for chunk in chunks:
            if chunk.dropped:
                continue
            del chunk.space.chunks[chunk.key]
            chunk.size_class.policy.remove(chunk.id)
            chunk.dropped = True
            dropped.append(chunk)
            if not chunk.pins:
                self._free_dropped(chunk)
        self._tell_removed(dropped, reason)
        return dropped

    def _free_dropped(self, chunk: Chunk) -> None:
        del self.by_slot[chunk.slot_id]
        self._table.retire([chunk.slot_id])
        chunk.size_class.num_published -= 1
        chunk.size_class.free.append(chunk.slot_id)

    def condemn(self, chunk: Chunk, owner: int) -> None:
        """Take a corrupt chunk out for good: its slot is quarantined, and readers of it fail."""
        if chunk.dropped:
            return
        del chunk.space.chunks[chunk.key], self.by_slot[chunk.slot_id]
        chunk.size_class.policy.remove(chunk.id)
        self._table.quarantine([chunk.slot_id], owner)
        chunk.size_class.num_published -= 1
        chunk.size_class.num_quarantined += 1
        # Leases may still count pins on it; with `dropped` set and the slot no longer its own, their end
        # must not free the slot: a pin that can never reach zero.
        chunk.dropped = True
        chunk.pins += 1
        self._tell_removed([chunk], "corrupt")

    def _tell_removed(self, chunks: Sequence[Chunk], reason: str) -> None:
        per_space: dict[KeySpace, list[bytes]] = {}
        for chunk in chunks:
            per_space.setdefault(chunk.space, []).append(chunk.key)
        for space, keys in per_space.items():
            self._on_removed(space, keys, reason)

    def _review_slabs(self, size_class: SizeClass, protected: object | None) -> list[Chunk]:
        """Take a slab from another class if its chunks are all colder than this class's coldest.

        Without any slab of its own the class takes the coldest one whatever its age; with one, it does not
        look again for SLAB_REVIEW_USES uses after it found none. Returns the chunks that went at once.
        """
        if len(self.slabs.classes) < 2 or any(taker is size_class for _, _, taker in self._draining):
            return []
        bound = sys.maxsize
        if size_class.slabs:
            if self._stamp < size_class.next_review:
                return []
            own = size_class.policy.coldest_stamp()
            bound = self._stamp if own is None else own
        taken = {slab.index for slab, _, _ in self._draining}
        coldest: tuple[Slab, SizeClass] | None = None
        for foreign in self.slabs.classes.values():
            slabs = [slab for slab in foreign.slabs.values() if slab.index not in taken]
            if foreign is size_class or (foreign.live_engines and len(slabs) < 2):
                continue
            for slab in slabs:
                if slab.num_units * SLOT_UNIT_BYTES < size_class.slot_bytes:
                    continue
                youngest = self._youngest(slab, foreign, bound, protected)
                if youngest is not None:
                    coldest, bound = (slab, foreign), youngest
        if coldest is None:
            size_class.next_review = self._stamp + SLAB_REVIEW_USES
            return []
        self._draining.append((*coldest, size_class))
        return self.drain_slice(SLICE_ITEMS)

    def _youngest(
        self, slab: Slab, owner: SizeClass, bound: int = sys.maxsize, protected: object | None = None
    ) -> int | None:
        """Stamp of the slab's youngest chunk, -1 if it is empty.

        None if that is not below `bound`, or if a slot of the slab cannot be emptied.
        """
        free = 0
        youngest = -1
        for slot_id in slab.slot_ids:
            chunk = self.by_slot.get(slot_id)
            if chunk is None:
                free += 1
            elif chunk.pins or chunk.stamp >= bound or (protected is not None and chunk.user is protected):
                return None
            elif chunk.stamp > youngest:
                youngest = chunk.stamp
        if free:
            slots = set(slab.slot_ids)
            if sum(slot in slots for slot in owner.free) < free:
                return None  # the others are reserved or quarantined
        return youngest

    @property
    def is_draining(self) -> bool:
        """Whether a slab is on its way to another class."""
        return bool(self._draining)

    def drain_slice(self, max_items: int) -> list[Chunk]:
        """Empty slabs that change hands, at most `max_items` chunks; hand over those that are empty.

        A slab of which a chunk was pinned or a slot reserved meanwhile stays where it is. Returns the
        chunks that went.
        """
        self.settle()
        left = max_items
        gone: list[Chunk] = []
        for entry in list(self._draining):
            slab, giver, taker = entry
            if self._youngest(slab, giver) is None:
                self._draining.remove(entry)
                continue
            chunks = [self.by_slot[slot] for slot in slab.slot_ids if slot in self.by_slot][:left]
            left -= len(chunks)
            gone += self.drop(chunks, "slab_move")
            if not any(slot in self.by_slot for slot in slab.slot_ids):
                self._draining.remove(entry)
                self.slabs.release(slab, giver)
                self.slabs.grow(taker)
            if left <= 0:
                break
        return gone

    def check_integrity(self) -> None:
        """Assert that slots, states, pins and eviction order add up. O(chunks); for tests and doctor."""
        self.settle()
        self.slabs.check_integrity()
        filed = [chunk for space in self.spaces for chunk in space.chunks.values()]
        assert all(self.by_slot[chunk.slot_id] is chunk for chunk in filed)
        resident = {chunk for chunk in self.by_slot.values() if not chunk.dropped}
        assert resident == set(filed), "a slot holds a chunk that no space files"
        for size_class in self.slabs.classes.values():
            policy = size_class.policy
            policy.check_integrity()
            own = [chunk for chunk in self.by_slot.values() if chunk.size_class is size_class]
            assert len(own) == size_class.num_published, (len(own), size_class.num_published)
            held = size_class.num_reserved + size_class.num_published + size_class.num_quarantined
            assert len(size_class.free) + held == size_class.num_slots, (held, size_class.num_slots)
            assert len(set(size_class.free)) == len(size_class.free), "a slot is free twice"
            assert not set(size_class.free) & self.by_slot.keys(), "a free slot holds a chunk"
            evictable = [chunk for chunk in own if not chunk.dropped and not chunk.pins]
            assert len(policy) == len(evictable), (len(policy), len(evictable))
            assert all(chunk.id in policy for chunk in evictable)
            assert policy.num_pinned == sum(1 for chunk in own if not chunk.dropped and chunk.pins)
