"""A watcher of the core's events, as one beyond the wire would be: snapshots, and a mirror.

The mirror begins with a snapshot of an empty daemon and lives on events alone. Beside it snapshots are taken
in steps, between which anything may happen.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.events import POOL, STORED, OffloadingEvent
from kvtier_server.core.index_walk import IndexWalk, Rows
from kvtier_server.core.tiering import Core

from .rig import Rig

Mirror = set[tuple[str, SpaceName, bytes]]
"""Tier, space and key of every chunk."""


class Watcher:
    """Watches whatever core the rig has."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._core: Core | None = None
        self._mirror: Mirror = set()
        self._sequence = 0
        self._walk: IndexWalk | None = None
        self._steps: Iterator[Rows] = iter(())
        self._seen: Mirror = set()

    def check(self) -> None:
        """Assert that the mirror is the index, with what the tiers have changed and nobody has taken yet."""
        core = self._rig.core
        if core is not self._core:
            self._begin()
        events = core.books.events.since(self._sequence)
        assert events is not None, "the log is large enough for all that happens in one step"
        _apply(events, self._mirror)
        self._sequence = core.books.events.next_sequence
        mirror = set(self._mirror)
        for tier, rules in zip(self._rig.tiers, self._rig.rules, strict=True):
            for change in tier.holdings._changes:
                _change(mirror, {(rules.name, change.space, change.key)}, is_held=change.is_held)
        _assert_same(mirror, index_of(self._rig))

    def _begin(self) -> None:
        """A daemon that is new to it: a new boot, of which a snapshot is all that is known."""
        self._core = self._rig.core
        self._walk = None
        walk, self._mirror = self._new_walk(50), set()
        for rows in walk.steps():
            _add(rows, self._mirror)
        self._sequence = walk.next_sequence

    def _new_walk(self, slice_items: int) -> IndexWalk:
        core = self._rig.core
        return IndexWalk(core.books, core.below, lambda _: True, slice_items)

    def go_on(self, num_steps: int, slice_items: int) -> None:
        """Take the next steps of a snapshot; at its end compare."""
        if self._walk is None:
            self._walk = self._new_walk(slice_items)
            self._steps, self._seen = self._walk.steps(), set()
        for _ in range(num_steps):
            rows = next(self._steps, None)
            if rows is None:
                self._finish(self._walk)
                self._walk = None
                return
            _add(rows, self._seen)

    def _finish(self, walk: IndexWalk) -> None:
        events = self._rig.core.books.events
        missed = events.since(walk.next_sequence)
        assert missed is not None
        assert not walk.is_lost
        assert walk.exact_sequence == events.next_sequence, "nothing has happened since the last step"
        _apply(missed, self._seen)
        _assert_same(self._seen, index_of(self._rig))


def index_of(rig: Rig) -> Mirror:
    """What is there: the pool's chunks, and what each tier knows of its own."""
    index = {(POOL, space, key) for space, key in rig.resident()}
    for tier, rules in zip(rig.tiers, rig.rules, strict=True):
        index |= {(rules.name, space, key) for space, key in tier.known()}
    return index


def _add(rows: Rows, mirror: Mirror) -> None:
    mirror |= {(tier, space, key) for (tier, space), keys in rows.items() for key in keys}


def _apply(events: list[OffloadingEvent], mirror: Mirror) -> None:
    for event in events:
        names = {(event.tier, event.space, key) for key in event.keys}
        _change(mirror, names, is_held=event.kind == STORED)


def _change(mirror: Mirror, names: Mirror, *, is_held: bool) -> None:
    if is_held:
        mirror |= names
    else:
        mirror -= names


def _assert_same(mirror: Mirror, index: Mirror) -> None:
    assert mirror == index, f"only mirrored: {mirror - index}; only there: {index - mirror}"
