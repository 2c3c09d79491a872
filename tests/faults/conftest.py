"""Engines as processes for the fault tests, and how often each fault is repeated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from tests.faults.engine_process import EngineProcess

FULL_COUNTS = os.environ.get("KVTIER_FAULT_COUNTS") == "full"

StartEngine = Callable[..., EngineProcess]


def repeats(reduced: int, full: int) -> range:
    """Numbers of a fault's repetitions: the reduced count, or the full one where it is asked for."""
    return range(full if FULL_COUNTS else reduced)


@pytest.fixture
def start_engine() -> Iterator[StartEngine]:
    """Start block engines; after the test they are gone."""
    with contextlib.ExitStack() as engines:

        def start(engine_id: str = "") -> EngineProcess:
            return engines.enter_context(EngineProcess(engine_id))

        yield start
