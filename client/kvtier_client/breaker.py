"""The circuit breaker: after a few missed deadlines in a row, calls stop waiting for a daemon that hangs.

Owns the count. Only the background thread closes it again, so that no engine call ever pays for a probe. Not
thread-safe: the gate's lock is held around every method; `is_open` may be read without.
"""

from __future__ import annotations


class Breaker:
    """Opens at `threshold` missed deadlines without an answer between them."""

    __slots__ = ("_misses", "_threshold", "is_open")

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._misses = 0
        self.is_open = False

    @property
    def is_clean(self) -> bool:
        """Whether an answer would change nothing."""
        return self._misses == 0

    def missed(self) -> bool:
        """Count a missed deadline; True if this one opened the breaker."""
        self._misses += 1
        if self.is_open or self._misses < self._threshold:
            return False
        self.is_open = True
        return True

    def answered(self) -> None:
        """Forget missed deadlines. Leaves an open breaker open: a late answer is no proof that it works."""
        if not self.is_open:
            self._misses = 0

    def close(self) -> None:
        """Let calls through again, after a probe was answered in time."""
        self._misses = 0
        self.is_open = False
