"""What happened to chunks, in order: recorded for watchers and tests, bounded.

Owns the sequence numbers. Does not send anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier_ops.namespace import SpaceName

POOL = "primary"
"""What the pool is called where tiers have names."""


@dataclass(frozen=True, slots=True)
class OffloadingEvent:
    """`kind` is "stored" or "removed"; `sequence` ascends by one within a boot.

    `at_ns`: when the log last heard of the time before it, a tick earlier at most.
    """

    sequence: int
    kind: str
    space: SpaceName
    tier: str
    reason: str
    keys: tuple[bytes, ...]
    at_ns: int = 0


class EventLog:
    """The last `max_events` events, fewer if they have more than `max_keys` keys together.

    Who asks for older ones is told that they are gone.
    """

    def __init__(self, max_events: int, max_keys: int) -> None:
        self._events: deque[OffloadingEvent] = deque()
        self._max_events = max_events
        self._max_keys = max_keys
        self._num_keys = 0
        self.next_sequence = 1
        self.now_ns = 0
        """What events are dated with; whoever lets time pass sets it."""

    def record(
        self, kind: str, space: SpaceName, reason: str, keys: Sequence[bytes], tier: str = POOL
    ) -> None:
        """Append one event."""
        event = OffloadingEvent(self.next_sequence, kind, space, tier, reason, tuple(keys), self.now_ns)
        self._events.append(event)
        self.next_sequence += 1
        self._num_keys += len(keys)
        while len(self._events) > self._max_events or self._num_keys > self._max_keys:
            self._num_keys -= len(self._events.popleft().keys)

    def kept(self) -> list[OffloadingEvent]:
        """Return all events that are kept, the oldest first."""
        return list(self._events)

    def since(self, sequence: int) -> list[OffloadingEvent] | None:
        """Events from `sequence` on, or None if the first of them is no longer kept."""
        oldest = self.next_sequence - len(self._events)
        if sequence < oldest:
            return None
        return [event for event in self._events if event.sequence >= sequence]
