"""Quarantine: slots that a process may still be writing, kept from reuse until it provably is not.

Owns the bookkeeping only. A *guard* is the name of a process's lock file: it is clear when the lock can be
taken (the process and all its forks are gone) or when the process itself attached again and so promised that
its copies are drained. Who can take locks tells us through `clear`. A slot with several guards waits for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier_ops.namespace import SpaceName
from kvtier_server.primary.index import Chunk
from kvtier_server.primary.size_classes import SizeClass
from kvtier_server.primary.tier import SLICE_ITEMS, PrimaryTier

BATCH_SLOTS = 256
"""Slots that are freed in one go, a fraction of a slice."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What was being stored into a quarantined slot, and by whom."""

    space: SpaceName
    key: bytes
    engine_id: str


class _Batch:
    """Slots of one class with the same guards. `unfinished`: as far as it is known what they were for.

    `condemned`: the corrupt chunk that the slot held; tiers may still be reading it.
    """

    __slots__ = ("condemned", "guards", "size_class", "slot_ids", "unfinished")

    def __init__(
        self,
        size_class: SizeClass,
        slot_ids: Sequence[int],
        guards: set[str],
        unfinished: Sequence[Unfinished],
        condemned: Chunk | None = None,
    ) -> None:
        self.condemned = condemned
        self.size_class = size_class
        self.slot_ids = slot_ids
        self.guards = guards
        self.unfinished = unfinished


class Quarantine:
    """Quarantined slots by guard; those without any left are freed in slices."""

    def __init__(self, primary: PrimaryTier) -> None:
        self._primary = primary
        self._batches_of: dict[str, list[_Batch]] = {}
        self._unguarded: deque[_Batch] = deque()
        self._num_slots = 0

    @property
    def guards(self) -> list[str]:
        """Names of the locks that somebody should try."""
        return list(self._batches_of)

    def unfinished(self) -> list[Sequence[Unfinished]]:
        """Return what quarantined slots were for, as far as it is known, a batch of slots each."""
        batches = [batch for batches in self._batches_of.values() for batch in batches]
        return [batch.unfinished for batch in {id(batch): batch for batch in batches}.values()]

    def add(
        self,
        size_class: SizeClass,
        slot_ids: Sequence[int],
        guards: set[str],
        unfinished: Sequence[Unfinished] = (),
    ) -> None:
        """Note slots that are quarantined in the tier already; `guards` must not be empty.

        `unfinished` says what they were for, for people who ask.
        """
        assert guards, "a quarantine without guards would never end"
        for first in range(0, len(slot_ids), BATCH_SLOTS):
            some = slot_ids[first : first + BATCH_SLOTS]
            batch = _Batch(size_class, some, set(guards), () if first else unfinished)
            self._num_slots += len(batch.slot_ids)
            for guard in guards:
                self._batches_of.setdefault(guard, []).append(batch)

    def add_condemned(self, chunk: Chunk, guards: set[str]) -> None:
        """Note the slot of a chunk that the tier has condemned; without guards it is free at the next slice.

        Its last pin has to go too.
        """
        batch = _Batch(chunk.size_class, [chunk.slot_id], set(guards), (), chunk)
        self._num_slots += 1
        for guard in guards:
            self._batches_of.setdefault(guard, []).append(batch)
        if not guards:
            self._unguarded.append(batch)

    def clear(self, guard: str) -> None:
        """Lift one guard; slots without any left are free again, a slice of them at once."""
        for batch in self._batches_of.pop(guard, []):
            batch.guards.discard(guard)
            if not batch.guards:
                self._unguarded.append(batch)
        self.free_slice(SLICE_ITEMS)

    def free_slice(self, max_items: int) -> int:
        """Free about `max_items` slots that have no guard left. Returns how many more could have been."""
        left = max_items
        while self._unguarded and left > 0:
            batch = self._unguarded.popleft()
            if batch.condemned is not None:
                self._primary.unpin([batch.condemned])
            else:
                self._primary.end_quarantine(batch.size_class, batch.slot_ids)
            self._num_slots -= len(batch.slot_ids)
            left -= len(batch.slot_ids)
        return left

    @property
    def has_unguarded(self) -> bool:
        """Whether `free_slice` has work."""
        return bool(self._unguarded)

    def __len__(self) -> int:
        """Return the number of slots that are not free yet."""
        return self._num_slots
