"""Clearing: what an operator wants out of the pool and the tiers below it.

Owns which tiers are asked, what stays in the pool, and the counts of the answer. A chunk that somebody has
pinned, or that is on its way up to somebody, stays: a clearing takes nothing out of a hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.below import MAX_CLEARS, Below
from kvtier_server.core.books import Books
from kvtier_server.core.events import POOL
from kvtier_server.core.lower_tiers import LowerTier
from kvtier_server.core.naming import Names
from kvtier_server.core.refused import Inflight, Refused
from kvtier_server.primary.index import Chunk
from kvtier_server.secondary.base import ClearResult

STEP_CHUNKS = 256
"""Chunks of the pool that are dropped in one go, a fraction of a slice."""


class CannotClear(Refused):
    """A tier was named whose class has no way to remove chunks."""

    reason = "CANNOT_CLEAR"


@dataclass(slots=True)
class Cleared:
    """What became of one tier's chunks so far. `problem`: "" or why it was not cleared."""

    tier: str
    num_removed: int = 0
    removed_bytes: int = 0
    num_kept: int = 0
    problem: str = ""
    is_over: bool = False


class Clearing:
    """One clearing under way, made by `Clearings.begin`. Who steps through `pool` clears the pool."""

    def __init__(self, namespace: str, tenant: str | None) -> None:
        self.namespace = namespace
        self.tenant = tenant
        self.tiers: list[Cleared] = []
        self.pool: Iterator[None] = iter(())

    @property
    def is_over(self) -> bool:
        """Whether every tier has ended."""
        return all(tier.is_over for tier in self.tiers)

    def covers(self, space: SpaceName) -> bool:
        """Tell whether chunks of this space are to go."""
        return self.namespace in ("", space.namespace) and self.tenant in (None, space.tenant)


class Clearings:
    """Begins clearings."""

    def __init__(
        self,
        books: Books,
        below: Below,
        names: Names,
        forget_unused: Callable[[], None],
    ) -> None:
        """`forget_unused` is called when the pool has been cleared."""
        self._books = books
        self._below = below
        self._names = names
        self._forget_unused = forget_unused

    def begin(
        self,
        namespace: str,
        tenant: str | None,
        tier: str,
        on_ended: Callable[[], None],
        *,
        others: bool = False,
    ) -> Clearing:
        """Begin to drop what the filters cover; "" = any namespace, all tiers. Raises, or begins.

        The tiers below end by themselves; `on_ended` is called after each of them.
        """
        lower = self._tiers(tier)
        busy = [below.rules.name for below in lower if not self._below.may_clear(below)]
        if busy:
            raise Inflight(
                f"{MAX_CLEARS} clearings wait for tier {busy[0]}; see what holds it: kvtier status"
            )
        clearing = Clearing(self._names.digest(namespace, may_be_unknown=True), tenant)
        begin_tiers: list[Callable[[], None]] = []
        for below in lower:
            cleared = Cleared(below.rules.name)
            clearing.tiers.append(cleared)
            if below.tier.can_clear:
                # From now on: what came up or went down meanwhile would outlive the clearing.
                below.being_cleared.append(clearing.covers)
                ended = partial(_note_end, cleared, below, clearing, on_ended)
                begin = partial(self._below.clear, below, clearing.namespace, tenant, ended, others=others)
                begin_tiers.append(begin)
            else:
                cleared.problem, cleared.is_over = "its class has no way to remove chunks", True
        if tier in ("", POOL):
            clearing.tiers.insert(0, Cleared(POOL))
            clearing.pool = self._clear_pool(clearing, clearing.tiers[0], begin_tiers)
        else:
            for begin_tier in begin_tiers:
                begin_tier()
        return clearing

    def _tiers(self, tier: str) -> list[LowerTier]:
        if not tier:
            return self._below.tiers
        below = self._names.tier(tier)
        if below is None:
            return []
        if not below.tier.can_clear:
            raise CannotClear(f"tier {tier!r} has no way to remove chunks: its class has no submit_clear")
        return [below]

    def _clear_pool(
        self, clearing: Clearing, cleared: Cleared, begin_tiers: Sequence[Callable[[], None]]
    ) -> Iterator[None]:
        """Drop what nobody has pinned, a step at a time; then the tiers begin. To be stepped to its end."""
        primary = self._books.primary
        covered = [space for space in primary.spaces if clearing.covers(space.name)]
        cleared.num_kept += self._below.promotions.num_coming(clearing.covers)
        for space in covered:
            chunks = list(space.chunks.values())
            for first in range(0, len(chunks), STEP_CHUNKS):
                self._books.unpin_all()
                self._drop(chunks[first : first + STEP_CHUNKS], cleared)
                yield
        cleared.is_over = True
        for begin in begin_tiers:
            begin()
        self._forget_unused()

    def _drop(self, chunks: Sequence[Chunk], cleared: Cleared) -> None:
        cleared.num_kept += sum(chunk.pins > 0 and not chunk.dropped for chunk in chunks)
        dropped = self._books.primary.drop([chunk for chunk in chunks if not chunk.pins], "clear")
        cleared.num_removed += len(dropped)
        cleared.removed_bytes += sum(chunk.size_class.slot_bytes for chunk in dropped)


def _note_end(
    cleared: Cleared,
    below: LowerTier,
    clearing: Clearing,
    on_ended: Callable[[], None],
    result: ClearResult,
) -> None:
    below.being_cleared.remove(clearing.covers)
    cleared.num_removed, cleared.removed_bytes = result.num_removed, result.removed_bytes
    cleared.num_kept, cleared.is_over = result.num_kept, True
    on_ended()
