"""The demo itself kills an engine in mid-store and its daemon under an engine (R1 and R2 in small)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier_ops.directory import SHARED_MEMORY_ROOT

from ..daemon_process import child_environment

DEMO = [sys.executable, "-m", "kvtier_client.demo", "--quick"]


@pytest.mark.parametrize("options", [(), ("--sliding-window", "40", "--blocks-per-chunk", "1")], ids=str)
def test_every_check_of_the_demo_passes_and_nothing_is_left(tmp_path: Path, options: tuple[str, ...]) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    demo = subprocess.Popen(
        [*DEMO, *options, "--json", tmp_path / "result.json", "--keep-logs", tmp_path / "logs"],
        env=child_environment(TMPDIR=str(temporary)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = demo.communicate(timeout=100)
    finally:
        demo.terminate()  # it cleans up
        demo.wait()
    assert demo.returncode == 0, output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ok"]
    assert len(result["checks"]) == 13
    runs = {run["name"]: run for run in result["runs"]}
    assert list(runs) == ["baseline", "engine-1", "engine-2", "engine-4", "engine-5", "engine-6"]
    assert runs["engine-2"]["computed_tokens"] < runs["baseline"]["computed_tokens"] / 2
    logs = {path.name for path in (tmp_path / "logs").iterdir()}
    assert logs == {"daemon.log", "disk.log", *(f"{name}.log" for name in (*runs, "engine-3"))}
    assert not list(temporary.iterdir())
    assert not list(SHARED_MEMORY_ROOT.glob(f"kvtier-*-demo-{demo.pid}-*"))
