"""The tiers below the pool, in their order: the one door to what goes down and what comes up.

Owns who hears what: the ends of jobs, uses, removals and clearings go from the tiers to `cascades.py` and
`promotions.py`, and back. The order of the tiers is the order in which they are asked. Does no I/O: tiers get
jobs, and their ends are heard of in `collect`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from kvtier_server.core.books import Books
from kvtier_server.core.cascades import Cascades
from kvtier_server.core.events import REMOVED, STORED
from kvtier_server.core.lower_tiers import LowerTier, ShapeOf, TierRules
from kvtier_server.core.promotions import Promotions
from kvtier_server.core.requests import Request
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.secondary.base import (
    Change,
    ClearJob,
    ClearResult,
    EvictJob,
    Removal,
    SecondaryTier,
)

SLICE_CHUNKS = 16
"""Chunks of cascades that are looked at in one go, so that a flood of stores never holds the core."""

SLICE_CHANGES = 1_024
"""Changes of a tier's index that are recorded in one go."""

SLICE_USES = 4_096
"""Uses that the tiers are told of in one go."""

MAX_CLEARS = 64
"""Clearings under way, and those of one tier that chunks in its queue have still to pass."""

MAX_UNTOLD_USES = 65_536
"""Keys whose uses the tiers have not been told of. Beyond it the oldest are forgotten: only order suffers."""


@dataclass(slots=True)
class _Clear:
    """A clearing of one tier. It begins when the cascades in `behind` are over, which would undo it."""

    below: LowerTier
    job: ClearJob
    on_ended: Callable[[ClearResult], None]
    behind: set[int]
    is_begun: bool = False


class Below:
    """Moves chunks between the pool and the tiers below it."""

    def __init__(
        self,
        books: Books,
        tiers: Sequence[tuple[SecondaryTier, TierRules]],
        shape_of: ShapeOf,
    ) -> None:
        self.tiers = [LowerTier(tier, rules, index) for index, (tier, rules) in enumerate(tiers)]
        self._books = books
        self._job_ids = count(1)
        self._cascades = Cascades(books, self.tiers, shape_of, self._job_ids)
        self.promotions = Promotions(
            books, self.tiers, shape_of, self._job_ids, self._cascades.published, self.used
        )
        self._clears: dict[int, _Clear] = {}
        self._evictions: dict[int, Callable[[ClearResult], None]] = {}
        """Under way because an operator wants room in a tier."""
        self._uses: deque[tuple[KeySpace, Request, Sequence[bytes], Sequence[int]]] = deque()
        self._num_uses = 0
        self._has_changes = False
        """Whether tiers had more changes than were taken in one go."""

    def published(self, chunk: Chunk) -> None:
        """Note that a chunk was stored."""
        self._cascades.published(chunk)

    def pump(self) -> bool:
        """Hand the tiers what they may take now, a slice of it; True if more could go at once."""
        self._tell_uses(SLICE_USES)
        if self._has_changes:
            self.take_changes()
        self._cascades.offer_cold()
        self.promotions.go_on()
        num_looked_at = self._cascades.submit(SLICE_CHUNKS)
        is_behind = num_looked_at == SLICE_CHUNKS and self._cascades.is_behind
        return bool(self._uses) or self._has_changes or is_behind or self.promotions.is_behind

    def collect(self, now_ns: int) -> None:
        """Take the ends of jobs, and what the tiers have let go of."""
        for below in self.tiers:
            for removal in below.tier.get_removed():
                self._removed(below, removal)
            for job in below.tier.get_finished():
                if self._cascades.take_end(job):
                    self._no_longer_behind(job.job_id)
                else:
                    self.promotions.take_end(below, job, now_ns)
            for result in below.tier.get_cleared():
                on_ended = self._evictions.pop(result.job_id, None)
                (on_ended or self._clears.pop(result.job_id).on_ended)(result)
        self.take_changes()
        self.promotions.go_on()

    def take_changes(self) -> bool:
        """Record what has come into the tiers' indexes and left them, a slice of it; True if more is there.

        Not the ends of jobs: those of two threads come in another order than what they did to the index.
        """
        self._has_changes = False
        for below in self.tiers:
            if not below.tier.can_list:
                continue
            changes = below.tier.get_changes(SLICE_CHANGES)
            if changes is None:
                self._books.events.forget_all()
            else:
                self._record(below.rules.name, changes)
            self._has_changes |= changes is None or len(changes) >= SLICE_CHANGES
        return self._has_changes

    def _record(self, tier: str, changes: Sequence[Change]) -> None:
        record = self._books.events.record
        for change in changes:
            kind = STORED if change.is_held else REMOVED
            record(kind, change.space, change.reason, (change.key,), tier)

    def _removed(self, below: LowerTier, removal: Removal) -> None:
        space = self._books.primary.spaces.get(removal.space)
        if space is not None:
            for key in removal.keys:
                if (chunk := space.chunks.get(key)) is not None:
                    chunk.below &= ~below.bit
                    chunk.offered &= ~below.bit
        below.counts[f"removed:{removal.reason}"] += len(removal.keys)

    def used(
        self, space: KeySpace, request: Request, keys: Sequence[bytes], first: int = 0, end: int | None = None
    ) -> None:
        """Note a request's uses of the chunks `keys[first:end]`, also of those that the pool has.

        The tiers hear of them when there is time.
        """
        if not self.tiers:
            return
        keys, stamps = request.stamped(keys, first, len(keys) if end is None else end)
        if not keys:
            return
        self._uses.append((space, request, keys, stamps))
        self._num_uses += len(keys)
        while self._num_uses > MAX_UNTOLD_USES:
            self._num_uses -= len(self._uses.popleft()[2])

    def _tell_uses(self, max_keys: int) -> None:
        """Tell the tiers of `max_keys` uses."""
        told = 0
        while self._uses and told < max_keys:
            space, request, keys, stamps = self._uses.popleft()
            left = max_keys - told
            if len(keys) > left:
                self._uses.appendleft((space, request, keys[left:], stamps[left:]))
                keys, stamps = keys[:left], stamps[:left]
            told += len(keys)
            self._cascades.count_uses(space, request, keys)
            for below in self.tiers:
                below.tier.touch(space.name, keys, stamps)
        self._num_uses -= told

    # Clearing

    def clear(
        self,
        below: LowerTier,
        namespace: str,
        tenant: str | None,
        on_ended: Callable[[ClearResult], None],
        *,
        others: bool = False,
    ) -> None:
        """Have a tier remove chunks; `on_ended` is called once, within `collect` or at once.

        What waits to go down does not any more; what comes later may be removed too, until it begins.
        """
        job = ClearJob(next(self._job_ids), namespace, tenant, others)
        behind = self._cascades.jobs_with(below, job.covers)
        if below.waiting:
            below.cleared.append((below.num_taken + len(below.waiting), job))
        self._clears[job.id] = _Clear(below, job, on_ended, behind)
        self._begin_clear(self._clears[job.id])

    def may_clear(self, below: LowerTier) -> bool:
        """Tell whether one more clearing may wait for this tier."""
        below.forget_cleared(below.num_taken)
        return len(self._clears) < MAX_CLEARS and len(below.cleared) < MAX_CLEARS

    def _begin_clear(self, clear: _Clear) -> None:
        if clear.behind or clear.is_begun:
            return
        clear.is_begun = True
        if not clear.below.tier.submit_clear(clear.job):
            del self._clears[clear.job.id]
            clear.on_ended(ClearResult(clear.job.id, 0, 0, clear.below.tier.stats().num_chunks))

    def _no_longer_behind(self, job_id: int) -> None:
        for clear in list(self._clears.values()):
            clear.behind.discard(job_id)
            self._begin_clear(clear)

    def evict(self, below: LowerTier, num_bytes: int, on_ended: Callable[[ClearResult], None]) -> bool:
        """Have a tier remove what would go next; `on_ended` is called once, within `collect`. False = no."""
        job = EvictJob(next(self._job_ids), num_bytes)
        if len(self._evictions) >= MAX_CLEARS or not below.tier.submit_evict(job):
            return False
        self._evictions[job.id] = on_ended
        return True

    # What there is

    @property
    def is_behind(self) -> bool:
        """Whether `pump` may have something to hand out."""
        has_more = bool(self._uses) or self._has_changes
        return has_more or self._cascades.is_behind or self.promotions.is_behind

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or under way."""
        return self._cascades.has_work or self.promotions.has_work

    def pins(self) -> Iterator[Chunk]:
        """Chunks that are pinned for tiers to read, once per pin."""
        return self._cascades.pins()

    def check_integrity(self) -> None:
        """Assert that the sums are right."""
        self._cascades.check_integrity()
        self.promotions.check_integrity()
