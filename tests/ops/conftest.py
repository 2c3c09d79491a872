"""What the tests of `ops` share: a pool directory of their own in shared memory, and real child processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier_ops import faults
from kvtier_ops.pool import Pool

MIB = 1 << 20

StartChild = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def pool_directory() -> Iterator[Path]:
    """A directory in /dev/shm, mode 0700, gone after the test whatever it did."""
    directory = Path(tempfile.mkdtemp(prefix="kvtier-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def pool(pool_directory: Path) -> Iterator[Pool]:
    """An 8 MiB pool, all of it backed."""
    made = Pool.create(pool_directory, 8 * MIB)
    made.back(0, made.data_bytes)
    made.back_records(range(made.data_bytes // 4096))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_armed_faults() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture
def start_child() -> Iterator[StartChild]:
    """Start `python -c code args...` with our packages; read its lines from stdout. Killed after the test."""
    children: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()
