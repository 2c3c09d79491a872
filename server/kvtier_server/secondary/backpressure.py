"""Whether a tier may be given more to write, and whether it works at all.

Owns one tier's estimate of its speed, its cap on what waits, and its breaker. Pure: time is passed in, in
seconds of any clock. One thread at a time; `workers.py` holds a lock around it.

The speed is an exponential average of seconds per MiB, by bytes, so that small chunks do not count as much as
large ones. What waits is refused by bytes, and by the time that it would take at that speed: a disk that has
become a hundred times slower must not hold a queue that was sized for its better days.
"""

from __future__ import annotations

MIB = 1 << 20
AVERAGE_BYTES = 256 * MIB
"""Bytes over which the average forgets: some seconds of a fast disk."""

MAX_WAIT_S = 10.0
"""Longest time that a new store may have to wait for those before it."""

TRIP_AFTER = 5
"""Failures in a row that end the tier's use for a while."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Bounds of that while; it doubles with each trial that fails."""


class Backpressure:
    """Admits stores of one tier, up to `max_queued_bytes` waiting."""

    def __init__(self, max_queued_bytes: int) -> None:
        self.max_queued_bytes = max_queued_bytes
        self.queued_bytes = 0
        self.seconds_per_mib = 0.0
        """0 until something was written."""
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._closed_until: float | None = None
        self._trying = False

    @property
    def is_tripped(self) -> bool:
        """Whether the tier failed so often that it is left alone, but for a trial now and then."""
        return self._closed_until is not None

    def admits(self, num_bytes: int, now: float) -> bool:
        """Tell whether so much more may wait; once per trial while tripped. Empty queues admit any size."""
        if self._closed_until is not None:
            if now < self._closed_until or self._trying:
                return False
            self._trying = True
            return True
        if not self.queued_bytes:
            return True
        queued_bytes = self.queued_bytes + num_bytes
        return (
            queued_bytes <= self.max_queued_bytes and queued_bytes / MIB * self.seconds_per_mib <= MAX_WAIT_S
        )

    def admits_trial(self, now: float) -> bool:
        """Tell whether something may be read: always, but for one trial after each pause while tripped."""
        return self._closed_until is None or self.admits(0, now)

    def queued(self, num_bytes: int) -> None:
        """Note what was taken."""
        self.queued_bytes += num_bytes

    def left(self, num_bytes: int) -> None:
        """Note what has left the queue, however it ended."""
        self.queued_bytes -= num_bytes

    def written(self, num_bytes: int, seconds: float) -> None:
        """Note how long a write took."""
        if num_bytes <= 0:
            return
        newest = seconds / (num_bytes / MIB)
        if not self.seconds_per_mib:
            self.seconds_per_mib = newest
            return
        weight = min(1.0, num_bytes / AVERAGE_BYTES)
        # At least a sixteenth, or chunks of some KiB would never be noticed.
        self.seconds_per_mib += max(weight, 1 / 16) * (newest - self.seconds_per_mib)

    def worked(self) -> None:
        """Note an I/O that the medium did, whatever it found."""
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._closed_until = None
        self._trying = False

    def undecided(self) -> None:
        """Note that an I/O did not come about: if it was a trial, the next one is."""
        self._trying = False

    def failed(self, now: float) -> bool:
        """Note an error of the medium; True if this one tripped it."""
        self._failures += 1
        if self._closed_until is not None:
            if self._trying:
                self._trying = False
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
                self._closed_until = now + self._pause_s
            return False
        if self._failures < TRIP_AFTER:
            return False
        self._closed_until = now + self._pause_s
        return True
