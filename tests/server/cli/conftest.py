"""Runs `kvtier` as people do: a process with arguments, an environment and two streams."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOTS = [str(Path(__file__).parents[3] / root) for root in ("proto", "ops", "server", "client")]

Kvtier = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(home: Path, **env: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVTIER_", "XDG_"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(ROOTS), "XDG_RUNTIME_DIR": str(home), **env}


@pytest.fixture
def kvtier(tmp_path: Path) -> Kvtier:
    """Run a command to its end."""

    def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvtier_server", *arguments],
            env=environment(tmp_path, **env),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run
