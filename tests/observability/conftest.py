"""One stack for all tests here: what they ask is asked of the same run."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from .prometheus import NoPrometheus, program
from .stack import Stack

ANSWERED_S = 150.0
"""Three times what it takes until every query of the dashboard has been answered."""

MOVES = (
    'increase(kvtier_hit_tokens_total{tier="primary"}[5m])',
    'increase(kvtier_hit_tokens_total{tier="disk"}[5m])',
    'increase(kvtier_evictions_total{tier="primary", reason="evict"}[5m])',
    'increase(kvtier_cascades_total{result="done"}[5m])',
    'increase(kvtier_promotions_total{result="done"}[5m])',
    'increase(kvtier_transfer_bytes_total{direction="load", path="shm"}[5m])',
    'increase(kvtier_transfer_bytes_total{direction="store", path="shm"}[5m])',
    "increase(kvtier_loaded_tokens_total[5m])",
    "increase(kvtier_load_seconds_total[5m])",
    "increase(kvtier_computed_tokens_total[5m])",
    "increase(kvtier_compute_seconds_total[5m])",
)
"""What a load on a pool that is too small, with a tier below it, makes grow."""


@pytest.fixture(scope="session", autouse=True)
def _needs_prometheus() -> None:
    try:
        program("prometheus")
        program("promtool")
    except NoPrometheus as error:
        pytest.fail(str(error))


def moves(stack: Stack) -> bool:
    """Tell whether all of MOVES do."""
    return all(sum(series.value for series in stack.prometheus.query(each)) > 0 for each in MOVES)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A stack whose dashboard has an answer to every query, or that had the time for it."""
    with Stack() as stack:
        until = time.monotonic() + ANSWERED_S
        stack.ask()
        while (stack.unanswered() or not moves(stack)) and time.monotonic() < until:
            time.sleep(1.0)  # between two scrapes there is nothing new to ask for
            stack.ask()
        yield stack
