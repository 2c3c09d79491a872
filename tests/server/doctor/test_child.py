from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from tests.daemon_process import wait_until

from kvtier_server.doctor.child import ChildFailed, run_child


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_it_writes_is_the_answer() -> None:
    assert run_child(python("print('yes')"), 30.0) == "yes\n"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; sys.exit('first\\nlast words')", "it ended with status 1: last words"),
        ("raise ValueError(3)", "it ended with status 1: ValueError: 3"),
        ("import os; os.kill(os.getpid(), 6)", "it ended with SIGABRT: it said nothing"),
    ],
)
def test_a_bad_end_is_told_with_its_last_words(code: str, told: str) -> None:
    with pytest.raises(ChildFailed) as failed:
        run_child(python(code), 30.0)
    assert str(failed.value) == told


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(ChildFailed, match=r"cannot be begun: No such file"):
        run_child(["/nonexistent/python"], 30.0)


def test_one_that_hangs_is_ended_with_all_that_it_has_begun(tmp_path: Path) -> None:
    """Its own child holds the pipes, ignores what can be ignored, and would keep them open for an hour."""
    pids = tmp_path / "pids"
    begun = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    code = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {begun!r}])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(3600)\n"
    )
    began = time.monotonic()
    with pytest.raises(ChildFailed, match=r"no answer within 5 s"):
        run_child(python(code), 5.0)
    assert time.monotonic() - began < 30.0
    for pid in pids.read_text().split():
        wait_until(lambda pid=pid: not _runs(pid), f"process {pid} is gone")  # type: ignore[misc]


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_it_gets_no_keyboard_and_the_terminals_ctrl_c_is_not_its() -> None:
    out = run_child(
        python("import os, sys; print(repr(sys.stdin.read()), os.getpgid(0) == os.getpid())"), 30.0
    )
    assert out == "'' True\n"
