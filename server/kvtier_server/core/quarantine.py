"""Quarantine: slots that a process may still be writing, kept from reuse until it provably is not.

Owns the bookkeeping only. A *guard* is the name of a process's lock file: it is clear when the lock can be
taken (the process and all its forks are gone) or when the process itself attached again and so promised that
its copies are drained. Who can take locks tells us through `clear`. A slot with several guards waits for all.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvtier_server.primary.size_classes import SizeClass
from kvtier_server.primary.tier import PrimaryTier


class Quarantine:
    """Quarantined slots by guard."""

    def __init__(self, primary: PrimaryTier) -> None:
        self._primary = primary
        self._guards_of: dict[int, set[str]] = {}
        self._slots_of: dict[str, dict[int, SizeClass]] = {}

    @property
    def guards(self) -> list[str]:
        """Names of the locks that somebody should try."""
        return list(self._slots_of)

    def add(self, size_class: SizeClass, slot_ids: Iterable[int], guards: set[str]) -> None:
        """Note slots that are quarantined in the tier already; `guards` must not be empty."""
        assert guards, "a quarantine without guards would never end"
        for slot_id in slot_ids:
            self._guards_of[slot_id] = set(guards)
            for guard in guards:
                self._slots_of.setdefault(guard, {})[slot_id] = size_class

    def clear(self, guard: str) -> int:
        """Lift one guard; slots without any left are free again. Returns how many."""
        freed: dict[SizeClass, list[int]] = {}
        for slot_id, size_class in self._slots_of.pop(guard, {}).items():
            left = self._guards_of[slot_id]
            left.discard(guard)
            if not left:
                del self._guards_of[slot_id]
                freed.setdefault(size_class, []).append(slot_id)
        for size_class, slot_ids in freed.items():
            self._primary.end_quarantine(size_class, slot_ids)
        return sum(map(len, freed.values()))

    def __len__(self) -> int:
        return len(self._guards_of)
