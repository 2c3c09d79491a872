"""The pool as a tier: which key is in which slot, what is pinned, what goes when room is needed.

Owns chunks, slots and the policies of the size classes, and keeps index, slot table and eviction order in
step. Does not own leases, instances or copies: a pin here is a number.

Pins and uses are counted at once, but a policy learns of them in batches (`settle`), always before it is
asked for a victim: that keeps its work off the path of a Lookup, and a chunk pinned and unpinned in between
costs it nothing.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from kvtier_server.policies.base import CachePolicy, ChunkId
from kvtier_server.primary.index import Chunk, KeySpace, KeySpaces
from kvtier_server.primary.size_classes import SizeClass, SlabMap, SlotTable
from kvtier_server.primary.slab_moves import SlabMoves

SLICE_ITEMS = 2_048
"""Items of one slice of a long operation: keeps the owning thread free within about 2 ms."""

EXCUSED_CHUNKS, EXCUSED_PER_VICTIM = 64, 4
"""Chunks without a copy below that one eviction passes over before it takes the coldest whatever they are."""

EXCUSED_OWN = SLICE_ITEMS
"""Chunks of the request that needs the room which one eviction passes over, at 1 us each."""

BATCH_ITEMS = 3
"""What a batch costs besides its items, in items: many leases of one chunk each are work too."""

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
        self._moves = SlabMoves(self.slabs, self.by_slot, self.drop)
        self._unwritten: dict[int, int] = {}
        self.prefers_below = False
        """Whether chunks that a lower tier holds go first (`Chunk.below`)."""

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
                if self.by_slot.get(chunk.slot_id) is chunk:
                    self._free_dropped([chunk])
                else:
                    self.end_quarantine(chunk.size_class, [chunk.slot_id])
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
            left -= len(chunks) + BATCH_ITEMS
        while self._unsettled and left > 0:
            unsettled = self._unsettled.popleft()
            self._settle_pins(unsettled)
            self.num_unsettled -= len(unsettled)
            left -= len(unsettled) + BATCH_ITEMS
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
        asked means the rest is pinned, protected, in a slab that leaves or not there. Never waits.
        """
        self.settle()
        if incoming is not None and type(size_class.policy).incoming is not CachePolicy.incoming:
            size_class.policy.incoming(incoming())
        while size_class.num_free < count and self.slabs.grow(size_class):
            pass
        evicted: list[Chunk] = []
        if size_class.num_free < count:
            evicted += self._moves.begin(size_class, self._stamp, protected, SLICE_ITEMS)
        slot_ids = size_class.take_free(count)
        if len(slot_ids) < count:
            slot_ids += self._evict(size_class, count - len(slot_ids), protected, evicted)
        if not slot_ids:
            return Reserved([], [], evicted)
        size_class.num_reserved += len(slot_ids)
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
        chunk = Chunk(space, key, slot_id, generation, size_class, self.slabs.slab_of(slot_id), stamp)
        chunk.slab.num_chunks += 1
        chunk.user = user
        self._table.publish(slot_id, space.id, key, checksums)
        space.chunks[key] = chunk
        space.used_bytes += size_class.slot_bytes
        self.by_slot[slot_id] = chunk
        size_class.num_reserved -= 1
        size_class.num_published += 1
        size_class.policy.insert(chunk.id, stamp)
        self._unwritten[slot_id] = stamp
        return chunk

    def adopt(self, space: KeySpace, key: bytes, slot_id: int, generation: int, slot_bytes: int) -> None:
        """File a chunk that an earlier daemon published; used after those that were adopted before."""
        size_class = self.slabs.classes[slot_bytes]
        slab = self.slabs.slab_of(slot_id)
        chunk = Chunk(space, key, slot_id, generation, size_class, slab, self.issue_stamps(1))
        slab.num_chunks += 1
        space.chunks[key] = chunk
        space.used_bytes += slot_bytes
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
            self.slabs.add_free(self.slabs.classes[slot_bytes], sorted(slot_ids, reverse=True))

    def adopt_quarantined(self, size_class: SizeClass, slot_ids: Sequence[int]) -> None:
        """Set slots of an earlier daemon aside that somebody may still be writing."""
        self._table.quarantine(slot_ids, 0)
        size_class.num_quarantined += len(slot_ids)

    def free_reserved(self, size_class: SizeClass, slot_ids: Sequence[int]) -> None:
        """Give reserved slots back that nobody can still be writing."""
        self._table.free(slot_ids)
        size_class.num_reserved -= len(slot_ids)
        self.slabs.add_free(size_class, slot_ids)

    def quarantine_reserved(self, size_class: SizeClass, slot_ids: Sequence[int], owner: int) -> None:
        """Set reserved slots aside that somebody may still be writing."""
        self._table.quarantine(slot_ids, owner)
        size_class.num_reserved -= len(slot_ids)
        size_class.num_quarantined += len(slot_ids)

    def end_quarantine(self, size_class: SizeClass, slot_ids: Sequence[int]) -> None:
        """Give quarantined slots back: their writers are gone."""
        self._table.free(slot_ids)
        size_class.num_quarantined -= len(slot_ids)
        self.slabs.add_free(size_class, slot_ids)

    def chunk(self, chunk_id: ChunkId) -> Chunk:
        """Return a resident chunk. Raises KeyError if there is none."""
        space, key = self.spaces.of(chunk_id)
        return space.chunks[key]

    def checksums(self, slot_id: int, num_parts: int) -> tuple[int, ...]:
        """Part checksums of a resident chunk; 0 = none was recorded."""
        return self._table.checksums(slot_id, num_parts)

    def generation(self, slot_id: int) -> int | None:
        """Current generation of a slot id, or None for a number that is no slot's.

        The table is not asked for others: their records may have no memory yet.
        """
        is_slot = self.slabs.is_slot(slot_id)
        return self._table.generation(slot_id) if is_slot else None

    def _evict(
        self, size_class: SizeClass, count: int, protected: object | None, evicted: list[Chunk]
    ) -> list[int]:
        """Evict for `reserve`, which takes every slot returned, at most `count`; extends `evicted`.

        The slots of a slab that leaves are not returned: then more is evicted, within the time of a slice.
        """
        slot_ids: list[int] = []
        left = count + SLICE_ITEMS
        while len(slot_ids) < count and left > 0:
            chunks = self._take_victims(size_class, min(count - len(slot_ids), left), protected)
            if not chunks:
                break
            left -= len(chunks)
            evicted += chunks
            leaving = [chunk.slot_id for chunk in chunks if chunk.slab.is_leaving]
            # Records of the others stay until `reserve` raises the generations, before anybody gets them.
            slot_ids += [chunk.slot_id for chunk in chunks if not chunk.slab.is_leaving]
            if leaving:
                self._table.retire(leaving)
                self.slabs.add_free(size_class, leaving)
        return slot_ids

    def evict(self, size_class: SizeClass, count: int, reason: str) -> list[Chunk]:
        """Evict up to `count` chunks, the coldest, though nobody needs their room; their slots are free then.

        Fewer means that the others are pinned. Readers that come late fail: the generations are raised.
        """
        self.settle()
        chunks = self._take_victims(size_class, count, None, reason)
        if chunks:
            slot_ids = [chunk.slot_id for chunk in chunks]
            self._table.retire(slot_ids)
            self.slabs.add_free(size_class, slot_ids)
        return chunks

    def _take_victims(
        self, size_class: SizeClass, count: int, protected: object | None, reason: str = "evict"
    ) -> list[Chunk]:
        """Take the coldest chunks out of index and policy; their slots are the caller's.

        With `prefers_below` some of the coldest are spared that no lower tier holds: they would be lost.
        Where very many of the coldest are `protected`'s own, it gets nothing: what a request that never ends
        has stored must not be walked over with each call.
        """
        of = self.spaces.of
        spared = EXCUSED_CHUNKS + EXCUSED_PER_VICTIM * count if self.prefers_below else 0
        own = 0

        def may_evict(chunk_id: ChunkId) -> bool | None:
            nonlocal spared, own
            space, key = of(chunk_id)
            chunk = space.chunks[key]
            if protected is not None and chunk.user is protected:
                own += 1
                return False if own < EXCUSED_OWN else None
            if chunk.below or spared <= 0:
                return True
            spared -= 1
            return False

        victims = size_class.policy.evict(count, may_evict if spared or protected is not None else None)
        if self.prefers_below and len(victims) < count:
            spared = own = 0
            victims += size_class.policy.evict(count - len(victims), may_evict)
        chunks = []
        for chunk_id in victims:
            space, key = self.spaces.of(chunk_id)
            chunk = space.chunks.pop(key)
            space.used_bytes -= size_class.slot_bytes
            chunk.dropped = True
            chunk.slab.num_chunks -= 1
            del self.by_slot[chunk.slot_id]
            chunks.append(chunk)
        size_class.num_published -= len(chunks)
        self._tell_removed(chunks, reason)
        return chunks

    def drop(self, chunks: Iterable[Chunk], reason: str) -> list[Chunk]:
        """Remove resident chunks for another reason than room; returns those that were.

        Pinned ones keep their slot meanwhile.
        """
        dropped = []
        for chunk in chunks:
            if chunk.dropped:
                continue
            del chunk.space.chunks[chunk.key]
            chunk.space.used_bytes -= chunk.size_class.slot_bytes
            chunk.size_class.policy.remove(chunk.id)
            chunk.dropped = True
            dropped.append(chunk)
        self._free_dropped([chunk for chunk in dropped if not chunk.pins])
        self._tell_removed(dropped, reason)
        return dropped

    def _free_dropped(self, chunks: Sequence[Chunk]) -> None:
        # One call of the table for all: each costs as much as a hundred slots.
        self._table.retire([chunk.slot_id for chunk in chunks])
        for chunk in chunks:
            del self.by_slot[chunk.slot_id]
            chunk.slab.num_chunks -= 1
            chunk.size_class.num_published -= 1
            chunk.size_class.add_free(chunk.slab, chunk.slot_id)

    def condemn(self, chunk: Chunk, owner: int) -> bool:
        """Take a corrupt chunk out: its slot is quarantined, and readers of it fail. False if it is out.

        The quarantine is one pin more: it ends with the last, when the caller unpins the chunk.
        """
        if chunk.dropped:
            return False
        del chunk.space.chunks[chunk.key], self.by_slot[chunk.slot_id]
        chunk.space.used_bytes -= chunk.size_class.slot_bytes
        chunk.size_class.policy.remove(chunk.id)
        self._table.quarantine([chunk.slot_id], owner)
        chunk.slab.num_chunks -= 1
        chunk.size_class.num_published -= 1
        chunk.size_class.num_quarantined += 1
        # Leases may still count pins on it: without one of its own their end would free the slot.
        chunk.dropped = True
        chunk.pins += 1
        self._tell_removed([chunk], "corrupt")
        return True

    def _tell_removed(self, chunks: Sequence[Chunk], reason: str) -> None:
        per_space: dict[KeySpace, list[bytes]] = {}
        for chunk in chunks:
            per_space.setdefault(chunk.space, []).append(chunk.key)
        for space, keys in per_space.items():
            self._on_removed(space, keys, reason)

    @property
    def is_draining(self) -> bool:
        """Whether `drain_slice` has work."""
        return self._moves.is_busy

    def drain_slice(self, max_items: int) -> list[Chunk]:
        """Go on with slabs that change hands, at most `max_items` chunks. Returns the chunks that went."""
        self.settle()
        return self._moves.go_on(max_items)

    def check_integrity(self) -> None:
        """Assert that slots, states, pins and eviction order add up. O(chunks); for tests and doctor."""
        self.settle()
        self.slabs.check_integrity()
        self._moves.check_integrity()
        filed = [chunk for space in self.spaces for chunk in space.chunks.values()]
        assert all(self.by_slot[chunk.slot_id] is chunk for chunk in filed)
        resident = {chunk for chunk in self.by_slot.values() if not chunk.dropped}
        assert resident == set(filed), "a slot holds a chunk that no space files"
        for space in self.spaces:
            slot_bytes = sum(chunk.size_class.slot_bytes for chunk in space.chunks.values())
            assert space.used_bytes == slot_bytes, (space.name, space.used_bytes, slot_bytes)
        for size_class in self.slabs.classes.values():
            policy = size_class.policy
            policy.check_integrity()
            own = [chunk for chunk in self.by_slot.values() if chunk.size_class is size_class]
            assert len(own) == size_class.num_published, (len(own), size_class.num_published)
            held = size_class.num_reserved + size_class.num_published + size_class.num_quarantined
            assert len(size_class.free) + held == size_class.num_slots, (held, size_class.num_slots)
            assert len(set(size_class.free)) == len(size_class.free), "a slot is free twice"
            assert not set(size_class.free) & self.by_slot.keys(), "a free slot holds a chunk"
            in_slabs = Counter(chunk.slab for chunk in own)
            assert all(slab.num_chunks == in_slabs[slab] for slab in size_class.slabs.values())
            evictable = [chunk for chunk in own if not chunk.dropped and not chunk.pins]
            assert len(policy) == len(evictable), (len(policy), len(evictable))
            assert all(chunk.id in policy for chunk in evictable)
            assert policy.num_pinned == sum(1 for chunk in own if not chunk.dropped and chunk.pins)
