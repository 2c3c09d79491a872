"""Times of calls that take turns, and what is said of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class BenchFailed(RuntimeError):
    """What was to be measured did not happen; the message says what to do about it."""


def timed_ms(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of all values do not exceed."""
    assert values
    return sorted(values)[max(math.ceil(len(values) * share) - 1, 0)]


@dataclass(frozen=True, slots=True)
class Timing:
    """One line: times of one thing, and of the floor that took turns with it. `ratio` is of the medians."""

    name: str
    floor: str
    """What the floor is."""
    samples: int
    p50_ms: float
    p99_ms: float
    floor_p50_ms: float
    floor_p99_ms: float
    ratio: float


def timing(name: str, floor: str, real_ms: Sequence[float], floor_ms: Sequence[float]) -> Timing:
    """Sum up the times of one thing and of its floor."""
    p50, floor_p50 = percentile(real_ms, 0.5), percentile(floor_ms, 0.5)
    return Timing(
        name,
        floor,
        len(real_ms),
        round(p50, 4),
        round(percentile(real_ms, 0.99), 4),
        round(floor_p50, 4),
        round(percentile(floor_ms, 0.99), 4),
        round(p50 / floor_p50, 3),
    )
