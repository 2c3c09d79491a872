"""A walk over everything that the pool and the tiers below it hold, a slice at a time.

Owns the order of the walk. While it goes on, chunks come and go. Why what it has seen, and the events from
its beginning on, make the exact index all the same:

* Events are operations on sets, applied per chunk and tier: STORED puts it in, REMOVED takes it out. Of
  several the last one alone decides, whatever was there before.
* A chunk of which no event is recorded from the walk's first sequence on has been there all the time, or has
  not been there at any time. The walk saw which: a chunk keeps its slot in the pool and its place in a tier
  (`secondary/holdings.py`) as long as it is there, and every slot and every place is looked at once. Slabs
  that are given to a class meanwhile hold only chunks with events.
* A chunk of which there are such events is where the last of them says, and the mirror takes what the walk
  saw first and the events after it.
* A change of a tier below is recorded when the core takes it, after it has happened. One that is taken
  before the walk begins has been seen by it, since the tier changes first; one that is taken later is an
  event from the first sequence on. So the mirror is exact as soon as it has applied the changes that the
  walk may have seen: those that were taken until `exact_sequence`.

What is older than the log keeps may be needed: then the walk is worth nothing, and says so (`is_lost`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.below import Below
from kvtier_server.core.books import Books
from kvtier_server.core.events import POOL

Rows = dict[tuple[str, SpaceName], list[bytes]]
"""Keys by tier and space."""


class IndexWalk:
    """One walk. To be stepped to its end; each step looks at most at `slice_items` slots or places."""

    def __init__(
        self, books: Books, below: Below, covers: Callable[[SpaceName], bool], slice_items: int
    ) -> None:
        self._books = books
        self._below = below
        self._covers = covers
        self._slice_items = slice_items
        self.next_sequence = books.events.next_sequence
        """Events from here on are to be applied to what the walk has seen."""
        self.exact_sequence = 0
        """Once the walk is over: with the events before it applied, the mirror is exact."""
        self.unlisted_tiers = [lower.rules.name for lower in below.tiers if not lower.tier.can_list]

    @property
    def is_lost(self) -> bool:
        """Whether events that are needed are not kept any more."""
        return not self._books.events.keeps(self.next_sequence)

    def steps(self) -> Iterator[Rows]:
        """Yield what each step has seen, possibly nothing. Stops early when the walk is lost."""
        for rows in self._pool():
            yield rows
            if self.is_lost:
                return
        for lower in self._below.tiers:
            place: int | None = 0 if lower.tier.can_list else None
            while place is not None:
                names, place = lower.tier.list_chunks(place, self._slice_items)
                yield self._rows(lower.rules.name, names)
                if self.is_lost:
                    return
        # What the walk may have seen of the tiers and the log does not have yet.
        while self._below.take_changes():
            yield {}
        self.exact_sequence = self._books.events.next_sequence

    def _pool(self) -> Iterator[Rows]:
        primary = self._books.primary
        by_slot = primary.by_slot
        slot_ranges = [
            slab.slot_ids
            for size_class in primary.slabs.classes.values()
            for slab in size_class.slabs.values()
        ]
        names: list[tuple[SpaceName, bytes]] = []
        left = self._slice_items
        for slab_slot_ids in slot_ranges:
            slot_ids = slab_slot_ids
            while slot_ids:
                some, slot_ids = slot_ids[:left], slot_ids[left:]
                # What is dropped and still pinned has left the index.
                chunks = (by_slot[slot_id] for slot_id in some if slot_id in by_slot)
                names += [(chunk.space.name, chunk.key) for chunk in chunks if not chunk.dropped]
                left -= len(some)
                if not left:
                    yield self._rows(POOL, names)
                    names, left = [], self._slice_items
        yield self._rows(POOL, names)

    def _rows(self, tier: str, names: Sequence[tuple[SpaceName, bytes]]) -> Rows:
        rows: Rows = {}
        space: SpaceName | None = None
        keys: list[bytes] = []
        for name, key in names:
            if name is not space:
                if not self._covers(name):
                    continue
                space, keys = name, rows.setdefault((tier, name), [])
            keys.append(key)
        return rows
