"""Room that an operator wants: the coldest chunks of the pool, or of a tier below it, go.

Owns how much goes, from which size class, and the counts of the answer. What a lease or a copy holds stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvtier_server.core.below import MAX_CLEARS, Below
from kvtier_server.core.books import Books
from kvtier_server.core.events import POOL
from kvtier_server.core.lower_tiers import LowerTier
from kvtier_server.core.naming import Names
from kvtier_server.core.refused import BadRequest, Inflight, Refused
from kvtier_server.primary.size_classes import SizeClass
from kvtier_server.primary.tier import SLICE_ITEMS
from kvtier_server.secondary.base import ClearResult

STEP_CHUNKS, STEP_CHUNKS_OF_MANY = 64, 16
"""Chunks of the pool that go in one go, a fraction of a slice; fewer where size classes take turns, so that
the coldest of all of them go first."""

MAX_SETTLES = 16
"""Slices of settling before a step: then what is left, which calls go on adding, is settled in one go."""

REASON = "admin"
"""In events and in the counts of evictions."""


class CannotEvict(Refused):
    """A tier was named that does not evict at an operator's word."""

    reason = "CANNOT_EVICT"


@dataclass(slots=True)
class Eviction:
    """One eviction under way, made by `Evictions.begin`. Who steps through `pool` evicts from the pool."""

    tier: str
    num_bytes: int
    """To be freed, at least: chunks go whole."""
    num_evicted: int = 0
    evicted_bytes: int = 0
    num_kept: int = 0
    """Of the pool: chunks that are pinned when it ends."""
    is_over: bool = False
    pool: Iterator[None] = field(default_factory=lambda: iter(()))


class Evictions:
    """Begins evictions."""

    def __init__(self, books: Books, below: Below, names: Names) -> None:
        self._books = books
        self._below = below
        self._names = names

    def begin(self, num_bytes: int, tier: str, on_ended: Callable[[], None]) -> Eviction:
        """Begin to evict; "" = the pool. Raises BadRequest, CannotEvict, Inflight, or begins.

        A tier below ends by itself, and `on_ended` is called then.
        """
        if not num_bytes:
            raise BadRequest("bytes", "0; say how much is to be freed")
        name = tier or POOL
        below = self._names.tier(name)
        if below is None:
            used_bytes = sum(space.used_bytes for space in self._books.primary.spaces)
            eviction = Eviction(name, min(num_bytes, used_bytes))  # what comes meanwhile is not meant
            eviction.pool = self._evict_pool(eviction)
            return eviction
        eviction = Eviction(name, num_bytes)
        self._evict_below(below, eviction, on_ended)
        return eviction

    def _evict_below(self, below: LowerTier, eviction: Eviction, on_ended: Callable[[], None]) -> None:
        if not below.tier.can_evict:
            raise CannotEvict(
                f"tier {eviction.tier!r} ({below.tier.tier_type}) does not evict at a word: it keeps its own "
                "order, or none; drop what you name instead: kvtier admin clear --tier NAME"
            )

        def ended(result: ClearResult) -> None:
            eviction.num_evicted, eviction.evicted_bytes = result.num_removed, result.removed_bytes
            eviction.num_kept, eviction.is_over = result.num_kept, True
            on_ended()

        held = below.tier.stats().used_bytes  # what comes meanwhile is not meant
        if not self._below.evict(below, min(eviction.num_bytes, held), ended):
            raise Inflight(
                f"{MAX_CLEARS} evictions wait for tier {eviction.tier!r}, or it is ending; see what holds "
                "it: kvtier status"
            )

    def _evict_pool(self, eviction: Eviction) -> Iterator[None]:
        """Evict until enough is free, a step at a time. To be stepped to its end."""
        primary = self._books.primary
        while eviction.evicted_bytes < eviction.num_bytes:
            yield from self._settle()
            size_class = self._coldest_class()
            if size_class is None:
                break
            missing = -(-(eviction.num_bytes - eviction.evicted_bytes) // size_class.slot_bytes)
            most = STEP_CHUNKS if len(primary.slabs.classes) == 1 else STEP_CHUNKS_OF_MANY
            chunks = primary.evict(size_class, min(missing, most), REASON)
            if not chunks:
                break
            eviction.num_evicted += len(chunks)
            eviction.evicted_bytes += len(chunks) * size_class.slot_bytes
            yield
        eviction.num_kept = sum(c.policy.num_pinned for c in primary.slabs.classes.values())
        eviction.is_over = True

    def _settle(self) -> Iterator[None]:
        """Bring the policies in step with all pins, mostly in slices: a pinned chunk must not be named."""
        for _ in range(MAX_SETTLES):
            if self._books.primary.num_unsettled <= SLICE_ITEMS:
                break
            self._books.settle()
            yield
        self._books.unpin_all()
        self._books.primary.settle()

    def _coldest_class(self) -> SizeClass | None:
        """Return the class of the chunk that was used longest ago of all that can go."""
        coldest: tuple[int, SizeClass] | None = None
        for size_class in self._books.primary.slabs.classes.values():
            stamp = size_class.policy.coldest_stamp()
            if stamp is not None and (coldest is None or stamp < coldest[0]):
                coldest = stamp, size_class
        return coldest[1] if coldest is not None else None
