"""A tier below the pool, called so that nothing it raises gets into the core.

A tier may come from outside the project. Owns what each call answers in place of an exception, and that it is
counted, said and shown; a tier that raises is out of order as long as it does.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import (
    Change,
    ClearJob,
    ClearResult,
    EvictJob,
    JobResult,
    Locality,
    Medium,
    Presence,
    Removal,
    SecondaryTier,
    TierJob,
    TierStats,
)

logger = logging.getLogger(__name__)

MAX_DOUBTFUL = 1_024
"""Jobs whose submission raised, and whose end is passed over should it come; the oldest are forgotten."""

MAX_TOLD = 200
"""Characters of an exception that status repeats."""

T = TypeVar("T")


class GuardedTier:
    """A `SecondaryTier` whose calls raise nothing: it has nothing, takes nothing and tells nothing then."""

    def __init__(self, tier: SecondaryTier, name: str) -> None:
        """`name`: of the tier in the configuration, for the log."""
        self._tier = tier
        self._name = name
        self.num_raised = 0
        """Calls that raised."""
        self._num_shown = 0
        self._last = ""
        self._doubtful: deque[int] = deque(maxlen=MAX_DOUBTFUL)

    def _call(self, what: str, call: Callable[[], T], instead: T) -> T:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 an out-of-tree tier's own
            self._note(what, error)
            return instead

    def _note(self, what: str, error: Exception) -> None:
        self.num_raised += 1
        self._last = f"{what} raised {type(error).__name__}: {error}"[:MAX_TOLD]
        if not self.num_raised & (self.num_raised - 1):  # the first, second, fourth, eighth ...
            text = "tier %s: %s; its code has raised %d times"
            logger.error(text, self._name, self._last, self.num_raised, exc_info=error)

    def _submit(self, what: str, call: Callable[[], bool], job_id: int) -> bool:
        before = self.num_raised
        is_taken = self._call(what, call, instead=False)
        if self.num_raised > before:
            self._doubtful.append(job_id)
        return is_taken

    # What it is

    @property
    def tier_type(self) -> str:
        """As the tier says."""
        return self._tier.tier_type

    @property
    def medium(self) -> Medium:
        """As the tier says."""
        return self._tier.medium

    @property
    def locality(self) -> Locality:
        """As the tier says."""
        return self._tier.locality

    @property
    def is_shared(self) -> bool:
        """As the tier says; it may change."""
        return self._tier.is_shared

    @property
    def can_clear(self) -> bool:
        """As the tier says."""
        return self._tier.can_clear

    @property
    def can_evict(self) -> bool:
        """As the tier says."""
        return self._tier.can_evict

    @property
    def can_list(self) -> bool:
        """As the tier says."""
        return self._tier.can_list

    # What it is asked

    def lookup(self, space: SpaceName, keys: Sequence[bytes]) -> Sequence[Presence]:
        """As `SecondaryTier.lookup`; NO for every key if it raises."""
        try:  # not through `_call`: it is in the path of every miss
            return self._tier.lookup(space, keys)
        except Exception as error:  # noqa: BLE001 an out-of-tree tier's own
            self._note("lookup", error)
            return [Presence.NO] * len(keys)

    def submit_store(self, job: TierJob) -> bool:
        """As `SecondaryTier.submit_store`; False if it raises."""
        return self._submit("submit_store", lambda: self._tier.submit_store(job), job.id)

    def submit_load(self, job: TierJob) -> bool:
        """As `SecondaryTier.submit_load`; False if it raises."""
        return self._submit("submit_load", lambda: self._tier.submit_load(job), job.id)

    def submit_probe(self, job: TierJob) -> bool:
        """As `SecondaryTier.submit_probe`; False if it raises."""
        return self._submit("submit_probe", lambda: self._tier.submit_probe(job), job.id)

    def submit_clear(self, job: ClearJob) -> bool:
        """As `SecondaryTier.submit_clear`; False if it raises."""
        return self._submit("submit_clear", lambda: self._tier.submit_clear(job), job.id)

    def submit_evict(self, job: EvictJob) -> bool:
        """As `SecondaryTier.submit_evict`; False if it raises."""
        return self._submit("submit_evict", lambda: self._tier.submit_evict(job), job.id)

    def get_finished(self) -> Sequence[JobResult]:
        """As `SecondaryTier.get_finished`, without jobs that the tier raised at when it got them."""
        nothing: Sequence[JobResult] = ()
        finished = self._call("get_finished", self._tier.get_finished, nothing)
        if self._doubtful:
            finished = [result for result in finished if result.job_id not in self._doubtful]
        return finished

    def get_cleared(self) -> Sequence[ClearResult]:
        """As `SecondaryTier.get_cleared`, without jobs that the tier raised at when it got them."""
        nothing: Sequence[ClearResult] = ()
        cleared = self._call("get_cleared", self._tier.get_cleared, nothing)
        if self._doubtful:
            cleared = [result for result in cleared if result.job_id not in self._doubtful]
        return cleared

    def get_removed(self) -> Sequence[Removal]:
        """As `SecondaryTier.get_removed`."""
        return self._call("get_removed", self._tier.get_removed, ())

    def get_changes(self, max_changes: int) -> Sequence[Change] | None:
        """As `SecondaryTier.get_changes`."""
        nothing: Sequence[Change] | None = ()
        return self._call("get_changes", lambda: self._tier.get_changes(max_changes), nothing)

    def list_chunks(
        self, place: int, num_places: int
    ) -> tuple[Sequence[tuple[SpaceName, bytes]], int | None]:
        """As `SecondaryTier.list_chunks`; the walk ends where it raises."""
        nothing: tuple[Sequence[tuple[SpaceName, bytes]], int | None] = ((), None)
        return self._call("list_chunks", lambda: self._tier.list_chunks(place, num_places), nothing)

    def touch(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        """As `SecondaryTier.touch`."""
        self._call("touch", lambda: self._tier.touch(space, keys, stamps), None)

    def stats(self) -> TierStats:
        """As `SecondaryTier.stats`; with the problem that it has raised, if it has since the last call."""
        stats = self._call("stats", self._tier.stats, TierStats(0, 0, 0))
        if self.num_raised > self._num_shown:
            self._num_shown = self.num_raised
            problem = f"its code has raised {self.num_raised} times; {self._last}"
            stats = replace(stats, problem="; ".join(filter(None, [stats.problem, problem])))
        return stats
