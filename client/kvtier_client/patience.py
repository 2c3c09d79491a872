"""Whether an answer is worth waiting for.

Owns one estimate: how long a lookup's answer takes while the scheduler waits for it. Where answers take
longer than a step may wait, waiting holds up every request of the engine and brings nothing; then only a few
lookups are waited for, to see whether that has changed.

The estimate is a moving average, as TCP keeps one of round trips (RFC 6298, with another gain). Only lookups
that were waited for count: an answer that arrives while the scheduler computes is read later, because both
need the interpreter's lock.
"""

from __future__ import annotations

GAIN = 1 / 4
"""Weight of the newest answer."""

TRY_EVERY = 16
"""Lookups of which one is waited for although it seems useless."""


class Patience:
    """Decides for one scheduler. Times in seconds. One thread."""

    def __init__(self) -> None:
        self._usual_s = 0.0
        self._untried = 0

    def is_worth(self, age_s: float, wait_s: float) -> bool:
        """Tell whether an answer that is `age_s` late by now is likely to come within `wait_s`."""
        if wait_s <= 0:
            return False
        if self._usual_s <= age_s + wait_s:
            return True
        self._untried += 1
        if self._untried < TRY_EVERY:
            return False
        self._untried = 0
        return True

    def note(self, took_s: float) -> None:
        """Take the time of an answer that was waited for."""
        self._usual_s += GAIN * (took_s - self._usual_s)
