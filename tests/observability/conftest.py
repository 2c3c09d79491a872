"""One stack for all tests here: what they ask is asked of the same run."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from .prometheus import NoPrometheus, program
from .stack import Stack

ANSWERED_S = 100.0
"""Three times what it takes until every query of the dashboard has been answered."""


@pytest.fixture(scope="session", autouse=True)
def _needs_prometheus() -> None:
    try:
        program("prometheus")
        program("promtool")
    except NoPrometheus as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A stack whose dashboard has an answer to every query, or that had the time for it."""
    with Stack() as stack:
        until = time.monotonic() + ANSWERED_S
        stack.ask()
        while stack.unanswered() and time.monotonic() < until:
            time.sleep(1.0)  # between two scrapes there is nothing new to ask for
            stack.ask()
        yield stack
