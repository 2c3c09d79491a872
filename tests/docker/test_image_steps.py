"""The steps of docker/Dockerfile, run one by one in a clean directory, and the image's process after them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.daemon_process import REPOSITORY

NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
BUILD_S = 900
"""Far above the 20 s that it takes where the packages are near."""


def missing() -> str:
    """Say what this machine lacks, "" if nothing."""
    if os.geteuid() != 0:
        return "needs root: it mounts a root file system for every stage"
    try:
        tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "no unshare here: apt-get install util-linux"
    return "" if tried.returncode == 0 else f"cannot make namespaces here: {tried.stderr.strip()}"


def build_and_run(target: str) -> str:
    """Build a target and run it; return what that said. Skips the test where this machine cannot."""
    if reason := missing():
        pytest.skip(reason)
    done = subprocess.run(
        [*NAMESPACES, sys.executable, "-m", "tests.docker.image_steps", target],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=BUILD_S,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(BUILD_S + 30)
def test_the_image_for_cpus_is_built_serves_and_stops_with_exit_code_0() -> None:
    assert "-- everything as the Dockerfile says" in build_and_run("cpu")


@pytest.mark.slow
@pytest.mark.timeout(BUILD_S + 30)
def test_an_engine_in_another_container_needs_two_volumes_and_leaves_nothing_when_it_is_killed() -> None:
    said = build_and_run("demo")
    assert "-- everything as the Dockerfile says" in said
    assert "round 2: " in said
