from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from kvtier_ops.faults import FaultInjected, arm, disarm, fault_point, parse_faults

from .conftest import StartChild

PASS_THE_POINT = "from kvtier_ops.faults import fault_point; fault_point('here'); print('passed')"


def test_a_point_does_nothing_until_it_is_armed_and_after_it_is_disarmed() -> None:
    passes: list[str] = []
    fault_point("here")
    arm("here", lambda: passes.append("here"))
    fault_point("here")
    fault_point("there")
    disarm("here")
    fault_point("here")
    assert passes == ["here"]


def test_a_process_takes_its_faults_from_the_environment(start_child: StartChild) -> None:
    killed = start_child(PASS_THE_POINT, KVTIER_FAULTS="there=error, here=kill")
    assert killed.wait(timeout=60) == -signal.SIGKILL
    slept = start_child(PASS_THE_POINT, KVTIER_FAULTS="here=sleep:0.01")
    assert slept.communicate(timeout=60)[0] == "passed\n"


def test_a_process_waits_where_a_test_has_made_a_pipe_until_it_lets_go(
    start_child: StartChild, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    assert start_child(PASS_THE_POINT, KVTIER_FAULTS=f"here=wait:{pipe}").wait(timeout=60) == 0
    os.mkfifo(pipe)
    child = start_child(PASS_THE_POINT, KVTIER_FAULTS=f"here=wait:{pipe}")
    with pipe.open("wb"):  # returns when the child is there
        assert child.poll() is None
    assert child.communicate(timeout=60)[0] == "passed\n"


def test_an_error_names_its_point() -> None:
    faults = parse_faults("here=error")
    with pytest.raises(FaultInjected, match="here"):
        faults["here"]()


def test_a_fault_may_wait_for_its_pass() -> None:
    fault = parse_faults("here=error@3")["here"]
    fault()
    fault()
    with pytest.raises(FaultInjected):
        fault()
    fault()


@pytest.mark.parametrize(
    "text",
    [
        "here",
        "here=explode",
        "=kill",
        "here=sleep",
        "here=sleep:-1",
        "here=sleep:x",
        "here=wait",
        "here=kill@0",
        "here=kill@x",
    ],
)
def test_an_entry_that_is_no_fault_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_faults(f"ok=kill,{text}")


def test_importing_the_copies_pulls_no_torch(start_child: StartChild) -> None:
    child: subprocess.Popen[str] = start_child(
        "import sys, kvtier_ops.host; print(sorted({'torch', 'cupy', 'grpc'} & set(sys.modules)))"
    )
    assert child.communicate(timeout=60)[0].strip() == "[]"
