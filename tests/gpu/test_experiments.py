"""What DESIGN.md assumes of a GPU at worst; run with -s to see what this one does. NOT RUN ON A GPU yet."""

from __future__ import annotations

import pytest
from tests.gpu.experiments import kill_engine_in_mid_copy, kill_helper_in_mid_copy
from tests.gpu.processes import why_no_gpu

NO_GPU = why_no_gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]

GRACE_MS = 250.0
"""How long an engine waits, from a helper's free lock on, before it hands its blocks back."""


@pytest.mark.parametrize("direction", ["STORE", "LOAD"])
def test_a_helper_ends_every_job_after_its_engine_was_killed(direction: str) -> None:
    seen = kill_engine_in_mid_copy(direction)
    print(seen)  # noqa: T201 - the experiment's outcome
    assert seen.jobs_ok_after + seen.jobs_failed_after == 50 or seen.broken


def test_nothing_is_written_by_a_dead_helper_after_the_grace() -> None:
    seen = kill_helper_in_mid_copy(rounds=5)
    print(seen)  # noqa: T201 - the experiment's outcome
    assert seen.last_write_ms < GRACE_MS
