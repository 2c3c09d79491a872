from __future__ import annotations

import pytest

from kvtier_server.doctor import examination
from kvtier_server.doctor.examination import Request, examine
from kvtier_server.doctor.finding import Finding, Verdict
from kvtier_server.doctor.serving import Silence

from .conftest import MadeMachine


def run(made: MadeMachine) -> list[Finding]:
    request = Request(
        flags={},
        options=(),
        config=None,
        env={},
        address="unix:///nonexistent/kvtier.sock",
        is_quick=True,
        machine=made.machine,
    )
    return list(examine(request, lambda address: Silence(f"no daemon at {address}", is_listening=False)))


def test_every_family_has_its_say_in_the_order_in_which_one_explains_the_next(made: MadeMachine) -> None:
    families = [finding.name.partition(".")[0] for finding in run(made)]
    assert list(dict.fromkeys(families)) == [
        "kvtier", "installation", "configuration", "daemon", "pool", "limits", "numa", "gpu", "tier"
    ]  # fmt: skip


def test_a_check_with_a_bug_keeps_no_other_from_its_turn(
    made: MadeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_limits(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(examination, "check_limits", check_limits)
    found = run(made)
    (bug,) = [finding for finding in found if finding.name == "limits"]
    assert (bug.verdict, bug.text) == (Verdict.FAIL, "this check has a bug: ZeroDivisionError: by zero")
    assert found[-1].name == "tier"
