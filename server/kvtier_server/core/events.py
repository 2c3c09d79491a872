"""What happened to chunks, in order: recorded for watchers and tests, bounded.

Owns the sequence numbers. Does not send anything.

Events are recorded where the index changes, in the order in which it does, and read as operations on sets:
STORED puts keys into a tier, REMOVED takes them out. What follows one another for the same reason becomes one
event, until somebody reads it: eviction by single chunks would otherwise be an event for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier_ops.namespace import SpaceName

POOL = "primary"
"""What the pool is called where tiers have names."""

STORED, REMOVED = "stored", "removed"
KINDS = (STORED, REMOVED)

MAX_OPEN_NS = 10**9
"""How long one event takes more in: so much may be wrong about when a key came or went."""


@dataclass(frozen=True, slots=True)
class OffloadingEvent:
    """`kind` is "stored" or "removed"; `sequence` ascends by one within a boot.

    `at_ns`: when the first of its keys came or went, a tick late at most, the others within MAX_OPEN_NS.
    """

    sequence: int
    kind: str
    space: SpaceName
    tier: str
    reason: str
    keys: tuple[bytes, ...]
    at_ns: int = 0


class _OpenEvent:
    """The newest event, as long as nobody has read it."""

    __slots__ = ("at_ns", "keys", "kind", "reason", "space", "tier")

    def __init__(self, kind: str, space: SpaceName, reason: str, tier: str, at_ns: int) -> None:
        self.kind = kind
        self.space = space
        self.reason = reason
        self.tier = tier
        self.at_ns = at_ns
        self.keys: list[bytes] = []

    def takes(self, kind: str, space: SpaceName, reason: str, tier: str, now_ns: int) -> bool:
        if self.kind != kind or self.reason != reason or self.tier != tier:
            return False
        if now_ns - self.at_ns > MAX_OPEN_NS:
            return False
        return self.space is space or self.space == space


class EventLog:
    """The last `max_events` events, fewer if they have more than `max_keys` keys together.

    Who asks for older ones is told that they are gone. No event has more than `max_keys_per_event` keys.
    """

    def __init__(self, max_events: int, max_keys: int, max_keys_per_event: int = 1_024) -> None:
        self._events: dict[int, OffloadingEvent] = {}
        """By sequence: a watcher may stand anywhere."""
        self._open: _OpenEvent | None = None
        self._max_events = max_events
        self._max_keys = max_keys
        self._max_keys_per_event = min(max_keys_per_event, max_keys)
        self._num_keys = 0
        self._next_sequence = 1
        """Of the open event, if there is one."""
        self.oldest = 1
        """The first sequence that is kept, or the next one if none is."""
        self.num_recorded: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        """Keys recorded so far, by kind."""
        self.now_ns = 0
        """What events are dated with; whoever lets time pass sets it."""

    def record(
        self, kind: str, space: SpaceName, reason: str, keys: Sequence[bytes], tier: str = POOL
    ) -> None:
        """Note what has happened to keys of one space, one at least, after all that was noted before."""
        current = self._open
        if current is None or not current.takes(kind, space, reason, tier, self.now_ns):
            self._seal()
            current = self._open = _OpenEvent(kind, space, reason, tier, self.now_ns)
        current.keys += keys
        self.num_recorded[kind] += len(keys)
        self._num_keys += len(keys)
        if len(current.keys) >= self._max_keys_per_event:
            self._split(current)
        while self._num_keys > self._max_keys:
            self._forget_oldest()

    def _split(self, current: _OpenEvent) -> None:
        """End as many events as there are whole ones in what was noted; the rest stays open."""
        keys, most = current.keys, self._max_keys_per_event
        for first in range(0, len(keys), most):
            self._open = _OpenEvent(current.kind, current.space, current.reason, current.tier, current.at_ns)
            self._open.keys = keys[first : first + most]
            if len(self._open.keys) == most:
                self._seal()

    def _seal(self) -> None:
        """End the open event: what comes next has another number."""
        current, self._open = self._open, None
        if current is None:
            return
        sequence = self._next_sequence
        self._events[sequence] = OffloadingEvent(
            sequence,
            current.kind,
            current.space,
            current.tier,
            current.reason,
            tuple(current.keys),
            current.at_ns,
        )
        self._next_sequence += 1
        if len(self._events) > self._max_events:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        if not self._events:
            self._seal()
        self._num_keys -= len(self._events.pop(self.oldest).keys)
        self.oldest += 1

    def forget_all(self) -> None:
        """Leave a gap: something has happened that is not recorded. Every watcher needs a new snapshot."""
        self._seal()
        self._events.clear()
        self._num_keys = 0
        self._next_sequence += 1
        self.oldest = self._next_sequence

    @property
    def next_sequence(self) -> int:
        """The number of the first event to come; all that has happened so far is in those before it."""
        self._seal()
        return self._next_sequence

    def keeps(self, sequence: int) -> bool:
        """Tell whether all events from `sequence` on are kept, or it is the next one.

        Ask for `next_sequence` first, if it is wanted too: it may push one out.
        """
        return sequence >= self.oldest

    def get(self, sequence: int) -> OffloadingEvent:
        """Return an event that is kept. O(1)."""
        return self._events[sequence]

    def kept(self) -> list[OffloadingEvent]:
        """Return all events that are kept, the oldest first."""
        self._seal()
        return list(self._events.values())

    def since(self, sequence: int) -> list[OffloadingEvent] | None:
        """Events from `sequence` on, or None if the first of them is no longer kept."""
        end = self.next_sequence  # first: what is ended here may push out another
        if not self.keeps(sequence):
            return None
        return [self._events[number] for number in range(sequence, end)]
