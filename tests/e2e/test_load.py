"""The reference engine as a load on a daemon that runs already."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ..conftest import StartDaemon
from ..daemon_process import WAIT_S, child_environment, wait_until

LOAD = [sys.executable, "-m", "kvtier_client.demo.load"]
SMALL = ["--conversations", "2", "--turns", "2", "--num-blocks", "64"]


@pytest.mark.timeout(180)
def test_what_a_round_stored_is_loaded_when_its_chats_come_again(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes="32MiB")
    done = subprocess.run(
        [*LOAD, *SMALL, "--address", daemon.address, "--rounds", "5"],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    rounds = re.findall(
        r"^round (\d): 4 requests, .* ([\d.]+)% of what the device lacked", done.stdout, re.MULTILINE
    )
    assert [number for number, _ in rounds] == ["1", "2", "3", "4", "5"]
    assert float(rounds[4][1]) > 90, done.stdout  # the chats of round 1


def test_sigterm_ends_it_and_its_engine_with_exit_code_0(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes="32MiB")
    load = subprocess.Popen(
        [*LOAD, *SMALL, "--address", daemon.address], env=child_environment(), stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: len(daemon.status().sessions) == 2, "the engine's sessions are there")
        load.terminate()
        assert load.wait(WAIT_S) == 0
    finally:
        load.kill()
        load.wait()
    wait_until(lambda: not daemon.status().sessions, "the engine is gone")


def test_without_an_address_it_says_what_to_type() -> None:
    done = subprocess.run(
        LOAD, env=child_environment(), capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--address" in done.stderr
