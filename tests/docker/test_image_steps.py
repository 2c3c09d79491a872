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


@pytest.mark.slow
@pytest.mark.timeout(BUILD_S + 30)
def test_the_image_for_cpus_is_built_serves_and_stops_with_exit_code_0() -> None:
    if reason := missing():
        pytest.skip(reason)
    done = subprocess.run(
        [*NAMESPACES, sys.executable, "-m", "tests.docker.image_steps", "cpu"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=BUILD_S,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "-- everything as the Dockerfile says" in done.stdout
