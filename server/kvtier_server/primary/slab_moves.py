"""Slabs on their way from one size class to another that has no room left.

Owns which slab a class takes and how it is emptied, both in slices: a class first looks at the slabs of the
others, then the chunks of the coldest are dropped. From that moment on no slot of the slab is handed out, and
what becomes free in it stays there: so each chunk goes once, and nothing comes back in. A chunk that is
pinned meanwhile goes like the others, and the slab waits for its last pin.

Does not own slots, chunks or stamps; the tier is told what to drop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_server.primary.index import Chunk
from kvtier_server.primary.size_classes import SizeClass, Slab, SlabMap

SLAB_REVIEW_USES = 4_096
"""Uses of chunks after which a class that found no slab to take looks again: at most every chunk of the
others is looked at."""

LOOKS_PER_ITEM = 4
"""Slots looked at in the time that one chunk takes to be dropped."""

Drop = Callable[[Iterable[Chunk], str], list[Chunk]]


class _Search:
    """A look at the slabs of other classes for the coldest one. Over when no `candidates` are left."""

    def __init__(
        self, candidates: list[tuple[Slab, SizeClass]], bound: int, protected: object | None, stamp: int
    ) -> None:
        self.candidates = candidates
        self.best: tuple[Slab, SizeClass] | None = None
        self.begun_stamp = stamp
        self._bound = bound
        self._protected = protected
        self._position = 0
        self._youngest = -1
        self._left = 0

    def look(self, by_slot: Mapping[int, Chunk], max_slots: int) -> int:
        """Look at the next slots, at most `max_slots`; returns how many were left."""
        self._left = max_slots
        while self.candidates and self._left > 0:
            slab, owner = self.candidates[-1]
            slot_ids = slab.slot_ids[self._position : self._position + self._left]
            is_cold = can_be_taken(slab, owner) and self._is_cold(by_slot, slot_ids)
            self._position += len(slot_ids)
            if is_cold and self._position < slab.num_slots:
                return 0
            if is_cold:
                self.best, self._bound = self.candidates[-1], self._youngest
            self.candidates.pop()
            self._position, self._youngest = 0, -1
        return self._left

    def _is_cold(self, by_slot: Mapping[int, Chunk], slot_ids: range) -> bool:
        """Whether all chunks in these slots are older than what was found before, and may go."""
        bound, protected, youngest = self._bound, self._protected, self._youngest
        for looks, slot_id in enumerate(slot_ids, 1):
            chunk = by_slot.get(slot_id)
            if chunk is None:
                continue
            if chunk.pins or chunk.stamp >= bound or (protected is not None and chunk.user is protected):
                self._left -= looks
                return False
            if chunk.stamp > youngest:  # noqa: PLR1730 a call of max() costs as much as the rest of the loop
                youngest = chunk.stamp
        self._youngest = youngest
        self._left -= len(slot_ids)
        return True


class _Drain:
    """A slab that leaves; its slots before `position` hold no chunk, or one that was dropped."""

    def __init__(self, slab: Slab, giver: SizeClass) -> None:
        self.slab = slab
        self.giver = giver
        self.position = 0


def can_be_taken(slab: Slab, owner: SizeClass) -> bool:
    """Whether the slab can be emptied, and its class can do without it."""
    if owner.slabs.get(slab.index) is not slab or slab.is_leaving or not slab.can_be_emptied:
        return False
    if not owner.live_engines:
        return True
    staying = (other for other in owner.slabs.values() if not other.is_leaving)
    return len(list(islice(staying, 2))) == 2


class SlabMoves:
    """All moves, at most one per taking class."""

    def __init__(self, slabs: SlabMap, by_slot: Mapping[int, Chunk], drop: Drop) -> None:
        self._slabs = slabs
        self._by_slot = by_slot
        self._drop = drop
        self._moves: dict[SizeClass, _Search | _Drain] = {}

    def begin(self, taker: SizeClass, stamp: int, protected: object | None, max_items: int) -> list[Chunk]:
        """Look for a slab whose chunks are all colder than this class's coldest, and begin to take it.

        Without any slab of its own the class takes the coldest one whatever its age; with one, it does not
        look again for SLAB_REVIEW_USES uses after it found none. Never a slab with a chunk that is pinned,
        or that `protected` used last. Returns the chunks that went at once.
        """
        if len(self._slabs.classes) < 2 or taker in self._moves:
            return []  # what goes on already was begun for somebody else: it may drop what is protected now
        bound = sys.maxsize
        if taker.slabs:
            if stamp < taker.next_review:
                return []
            own = taker.policy.coldest_stamp()
            bound = stamp if own is None else own
        candidates = [
            (slab, owner)
            for owner in self._slabs.classes.values()
            if owner is not taker
            for slab in owner.slabs.values()
            if slab.num_units * SLOT_UNIT_BYTES >= taker.slot_bytes and can_be_taken(slab, owner)
        ]
        self._moves[taker] = _Search(candidates, bound, protected, stamp)
        gone: list[Chunk] = []
        self._go_on(taker, max_items, gone)
        return gone

    @property
    def is_busy(self) -> bool:
        """Whether a slice would do something, other than wait for pins."""
        return any(
            isinstance(move, _Search)
            or move.position < move.slab.num_slots
            or len(move.slab.free) == move.slab.num_slots
            for move in self._moves.values()
        )

    def go_on(self, max_items: int) -> list[Chunk]:
        """Go on with all moves, at most so many chunks; hand over slabs that are empty.

        Returns the chunks that went.
        """
        left = max_items
        gone: list[Chunk] = []
        for taker in list(self._moves):
            if left > 0:
                left = self._go_on(taker, left, gone)
        return gone

    def _go_on(self, taker: SizeClass, left: int, gone: list[Chunk]) -> int:
        move = self._moves[taker]
        is_wanted = self._slabs.classes.get(taker.slot_bytes) is taker  # its engines have not left
        if isinstance(move, _Search):
            if not is_wanted:
                del self._moves[taker]
                return left
            left = move.look(self._by_slot, left * LOOKS_PER_ITEM) // LOOKS_PER_ITEM
            if not move.candidates:
                self._decide(taker, move)
            found = self._moves.get(taker)
            if not isinstance(found, _Drain):
                return left
            move = found
        slab = move.slab
        if not is_wanted or not slab.can_be_emptied:  # a chunk in it turned out corrupt: its slot is lost
            del self._moves[taker]
            self._slabs.stay(slab, move.giver)
            return left
        slot_ids = slab.slot_ids[move.position : move.position + left]
        move.position += len(slot_ids)
        chunks = [self._by_slot[slot_id] for slot_id in slot_ids if slot_id in self._by_slot]
        gone += self._drop(chunks, "slab_move")
        if len(slab.free) == slab.num_slots:
            del self._moves[taker]
            self._slabs.release(slab, move.giver)
            self._slabs.grow(taker)
        return left - len(slot_ids)

    def _decide(self, taker: SizeClass, search: _Search) -> None:
        """Take the coldest slab that was found, if it can still be had."""
        if search.best is not None and can_be_taken(*search.best):
            self._slabs.begin_leaving(*search.best)
            self._moves[taker] = _Drain(*search.best)
            return
        del self._moves[taker]
        if taker.slabs:
            taker.next_review = search.begun_stamp + SLAB_REVIEW_USES

    def check_integrity(self) -> None:
        """Assert that the slabs that leave are those that somebody takes."""
        leaving = [
            slab for owner in self._slabs.classes.values() for slab in owner.slabs.values() if slab.is_leaving
        ]
        drains = [move.slab for move in self._moves.values() if isinstance(move, _Drain)]
        assert sorted(slab.index for slab in leaving) == sorted(slab.index for slab in drains)
