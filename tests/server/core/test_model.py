"""FAULTS M1, as many examples as `make test` has time for; more are in `tests/faults/test_m1_model.py`."""

from __future__ import annotations

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import CoreMachine


def test_no_order_of_calls_copies_and_crashes_reads_a_wrong_byte_or_leaks_a_slot() -> None:
    run_state_machine_as_test(
        CoreMachine, settings=settings(max_examples=300, stateful_step_count=40, deadline=None)
    )
