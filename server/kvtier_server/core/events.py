"""What happened to chunks, in order: recorded for watchers and tests, bounded.

Owns the sequence numbers. Does not send anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier_server.primary.index import SpaceName


@dataclass(frozen=True, slots=True)
class OffloadingEvent:
    """`kind` is "stored" or "removed"; `sequence` ascends by one within a boot."""

    sequence: int
    kind: str
    space: SpaceName
    tier: str
    reason: str
    keys: tuple[bytes, ...]


class EventLog:
    """The last `max_events` events. Who asks for older ones is told that they are gone."""

    def __init__(self, max_events: int) -> None:
        self._events: deque[OffloadingEvent] = deque(maxlen=max_events)
        self.next_sequence = 1

    def record(
        self, kind: str, space: SpaceName, reason: str, keys: Sequence[bytes], tier: str = "primary"
    ) -> None:
        """Append one event."""
        self._events.append(OffloadingEvent(self.next_sequence, kind, space, tier, reason, tuple(keys)))
        self.next_sequence += 1

    def since(self, sequence: int) -> list[OffloadingEvent] | None:
        """Events from `sequence` on, or None if the first of them is no longer kept."""
        oldest = self.next_sequence - len(self._events)
        if sequence < oldest:
            return None
        return [event for event in self._events if event.sequence >= sequence]
