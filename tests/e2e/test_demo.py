"""`kvtier demo` as a person starts it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from kvtier_ops.directory import SHARED_MEMORY_ROOT

from ..daemon_process import WAIT_S, child_environment, wait_until

DEMO = [sys.executable, "-m", "kvtier_client.demo"]


def pools_of(pid: int) -> list[Path]:
    return list(SHARED_MEMORY_ROOT.glob(f"kvtier-*-demo-{pid}-*"))


def processes_in(directory: Path) -> list[str]:
    """Processes whose command line names something below `directory`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(directory) in command:
                found.append(command)
    return found


def test_help_says_what_is_shown_and_what_the_exit_code_means() -> None:
    done = subprocess.run(
        [*DEMO, "--help"], env=child_environment(), capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    for word in ("baseline", "killed", "exit code", "--quick", "--json", "--keep-logs", "examples"):
        assert word in done.stdout


def test_a_text_that_cannot_be_used_is_said_before_anything_is_started(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("too short")
    for file, problem in ((text, "has 9 bytes"), (tmp_path / "none", "No such file")):
        done = subprocess.run(
            [*DEMO, "--text", file],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 2
        assert problem in done.stderr


def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--quick"],
        env=child_environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: any(tmp_path.rglob("baseline.log")), "the first engine is started")
        assert pools_of(demo.pid)
        assert processes_in(tmp_path)
        demo.send_signal(signal.SIGINT)
        _, messages = demo.communicate(timeout=WAIT_S)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 130, messages
    assert "everything was cleaned up" in messages
    assert not pools_of(demo.pid)
    assert not list(tmp_path.iterdir())
    # One that was just being started ends by itself, when it finds its standard input closed.
    wait_until(lambda: not processes_in(tmp_path), "no process of the demo is left")


def test_a_demo_that_fails_says_where_the_daemons_log_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--quick", "--pool-bytes", "64TiB"],
        env=child_environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "does not fit" in done.stderr, "the daemon's own words"
    (log,) = tmp_path.rglob("daemon.log")
    assert f"the daemons' logs are in {log.parent}" in done.stderr
    assert "does not fit" in log.read_text()
