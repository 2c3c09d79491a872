"""FAULTS M1 with more examples than `make test` has time for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from ..server.core.machine import CoreMachine


@pytest.mark.timeout(600)  # a minute where nothing else runs
def test_no_order_of_calls_copies_and_crashes_reads_a_wrong_byte_or_leaks_a_slot() -> None:
    run_state_machine_as_test(
        CoreMachine, settings=settings(max_examples=1_000, stateful_step_count=50, deadline=None)
    )
