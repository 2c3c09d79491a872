"""What a tier holds, in an order that can be walked while it changes, and what has changed in it.

Owns a place for each chunk of a tier's index, and the list of changes that the core has not taken yet. Both
follow the index: the tier calls `add` and `remove` under the lock under which it changes its index, so that
the changes of one chunk are listed in the order in which they happened. The core's side takes no lock.

A chunk keeps its place as long as it is held, and a place that is free is given to another. So a walk over
the places, a piece at a time, meets every chunk that was there all the time; of one that came or went
meanwhile it may see either, and a change says which. The place is changed before the change is listed:
whoever has seen a change being listed has seen, or will see, the place as it is after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import Change

Name = tuple[SpaceName, bytes]

MAX_CHANGES = 1 << 17
"""Changes that the core has not taken, some 20 MiB; it takes tens of thousands in a tenth of a second. Beyond
it they are dropped, and the core is told so."""


class Holdings:
    """The chunks of one tier, each at a place. One writer at a time, one reader at a time."""

    def __init__(self, max_changes: int = MAX_CHANGES) -> None:
        self._places: list[Name | None] = []
        self._free: list[int] = []
        self._changes: deque[Change] = deque()
        self._max_changes = max_changes
        self._lost = False

    # The tier's side, under its lock

    def add(self, name: Name, reason: str) -> int:
        """Note a chunk that is held from now on; returns its place."""
        if self._free:
            place = self._free.pop()
            self._places[place] = name
        else:
            place = len(self._places)
            self._places.append(name)
        self._note(Change(True, name[0], name[1], reason))
        return place

    def remove(self, place: int, reason: str) -> None:
        """Note that the chunk at this place is not held any more."""
        name = self._places[place]
        assert name is not None, f"place {place} is free already"
        self._places[place] = None
        self._free.append(place)
        self._note(Change(False, name[0], name[1], reason))

    def _note(self, change: Change) -> None:
        if len(self._changes) >= self._max_changes:
            # In this order: who takes changes between the two gets a beginning of them, and the gap with its
            # next call. The other way round it could take the gap first, and then miss what is dropped.
            self._changes.clear()
            self._lost = True
            return
        self._changes.append(change)

    # The core's side

    def get_changes(self, max_changes: int) -> Sequence[Change] | None:
        """Take the oldest changes; None if some were dropped since the last call."""
        if self._lost:
            self._lost = False
            return None
        changes: list[Change] = []
        while len(changes) < max_changes:
            try:
                changes.append(self._changes.popleft())
            except IndexError:  # none is left, or they were dropped just now
                break
        return changes

    def chunks_from(self, place: int, num_places: int) -> tuple[list[Name], int | None]:
        """Return the chunks at the next places, and the place to go on from; None at the end."""
        names = [name for name in self._places[place : place + num_places] if name is not None]
        end = place + num_places
        return names, end if end < len(self._places) else None
