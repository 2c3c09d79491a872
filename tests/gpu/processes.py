"""Starts the two processes of the GPU tests, and says why there is no GPU where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu.device_helper import read_handle

from kvtier_ops.cuda_driver import visible_devices
from kvtier_ops.ipc import HandleError, MemoryHandle

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def why_no_gpu() -> str:
    """Return what is missing for the tests on a GPU; empty where nothing is."""
    for module in ("cupy", "cuda.bindings.driver"):
        try:
            __import__(module)
        except ImportError as error:
            return f"no GPU tests: {error}"
    try:
        devices = visible_devices()
    except HandleError as error:
        return f"no GPU tests: {error}"
    return "" if devices else "no GPU tests: the driver sees no device"


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python with our packages."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "ops"), *sys.path])
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


class EngineProcess:
    """An engine with device memory; see device_engine.py."""

    def __init__(self) -> None:
        self.process = start(str(HERE / "device_engine.py"))

    def ask(self, name: str, argument: object) -> Any:
        """Ask and wait for the answer."""
        self.tell(name, argument)
        return self.answer()

    def tell(self, name: str, argument: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({name: argument}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the engine's process has ended, see its last words above"
        return json.loads(line)

    def allocate(self, *sizes: int) -> list[MemoryHandle]:
        return [read_handle(fields) for fields in self.ask("allocate", sizes)]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def engine_process() -> Iterator[EngineProcess]:
    """Start an engine, and end it."""
    engine = EngineProcess()
    try:
        yield engine
    finally:
        engine.kill()
