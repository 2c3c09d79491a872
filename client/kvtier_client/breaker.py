"""The circuit breaker: after a few missed deadlines in a row, calls stop waiting for a daemon that hangs.

Owns the counts: of all calls together, because a daemon that hangs answers none, and of each kind of call,
because a daemon that is too slow for lookups may well answer what is small in between. Only the background
thread closes it again, so that no engine call ever pays for a probe. Not thread-safe: the gate's lock is held
around every method; `is_open` and `is_clean` may be read without.
"""

from __future__ import annotations


class Breaker:
    """Opens at `threshold` missed deadlines without an answer between them. `call` names the kind of call."""

    __slots__ = ("_in_a_row", "_misses", "_threshold", "is_open")

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._in_a_row = 0
        self._misses: dict[str, int] = {}
        self.is_open = False

    def is_clean(self, call: str) -> bool:
        """Tell whether an answer would change nothing."""
        return not self._in_a_row and call not in self._misses

    def missed(self, call: str) -> bool:
        """Count a missed deadline; True if this one opened the breaker."""
        self._in_a_row += 1
        self._misses[call] = self._misses.get(call, 0) + 1
        if self.is_open or max(self._in_a_row, self._misses[call]) < self._threshold:
            return False
        self.is_open = True
        return True

    def answered(self, call: str) -> None:
        """Forget missed deadlines. Leaves an open breaker open: a late answer is no proof that it works."""
        if not self.is_open:
            self._in_a_row = 0
            self._misses.pop(call, None)

    def close(self) -> None:
        """Let calls through again, after a probe was answered in time.

        A probe is small: what had missed its deadlines opens the breaker again with its next miss.
        """
        self.is_open = False
        self._in_a_row = 0
        self._misses = {call: min(misses, self._threshold - 1) for call, misses in self._misses.items()}

    def reset(self) -> None:
        """Forget everything: another daemon answers now."""
        self.is_open = False
        self._in_a_row = 0
        self._misses.clear()
