"""The circuit breaker: after a few missed deadlines in a row, calls stop waiting for a daemon that hangs.

Owns the counts: of all calls together, because a daemon that hangs answers none, and of each kind of call,
because a daemon that is too slow for lookups may well answer what is small in between. Calls that were on
their way together miss together when the daemon pauses once, say because its CPUs were busy: that is one
miss. Only the background thread closes the breaker again, so that no engine call ever pays for a probe. Not
thread-safe: the gate's lock is held around every method; `is_open` and `is_clean` may be read without.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Misses:
    """Missed deadlines in a row; `together_s` apart or less they are one."""

    together_s: float
    count: int = 0
    last_at: float = float("-inf")

    def add(self, now: float) -> int:
        if now - self.last_at >= self.together_s:
            self.count += 1
            self.last_at = now
        return self.count


class Breaker:
    """Opens at `threshold` missed deadlines without an answer between them. `call` names the kind of call.

    `shortest_deadline_s`: of all calls. Misses less than half of it apart were on their way together.
    """

    __slots__ = ("_in_a_row", "_misses", "_threshold", "_together_s", "is_open")

    def __init__(self, threshold: int, shortest_deadline_s: float) -> None:
        self._threshold = threshold
        self._together_s = shortest_deadline_s / 2
        self._in_a_row = _Misses(self._together_s)
        self._misses: dict[str, _Misses] = {}
        self.is_open = False

    def is_clean(self, call: str) -> bool:
        """Tell whether an answer would change nothing."""
        return not self._in_a_row.count and call not in self._misses

    def missed(self, call: str, now: float) -> bool:
        """Count a missed deadline; True if this one opened the breaker. `now`: seconds of any clock."""
        of_its_kind = self._misses.setdefault(call, _Misses(self._together_s))
        if max(self._in_a_row.add(now), of_its_kind.add(now)) < self._threshold or self.is_open:
            return False
        self.is_open = True
        return True

    def answered(self, call: str) -> None:
        """Forget missed deadlines. Leaves an open breaker open: a late answer is no proof that it works."""
        if not self.is_open:
            self._in_a_row = _Misses(self._together_s)
            self._misses.pop(call, None)

    def close(self) -> None:
        """Let calls through again, after a probe was answered in time.

        A probe is small: what had missed its deadlines opens the breaker again with its next miss.
        """
        self.is_open = False
        self._in_a_row = _Misses(self._together_s)
        for misses in self._misses.values():
            misses.count = min(misses.count, self._threshold - 1)

    def reset(self) -> None:
        """Forget everything: another daemon answers now."""
        self.is_open = False
        self._in_a_row = _Misses(self._together_s)
        self._misses.clear()
