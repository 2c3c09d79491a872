"""The checked-in code is what `make proto` writes from the checked-in .proto files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROTO_ROOT = Path(__file__).resolve().parents[2] / "proto"


def generated_below(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for pattern in ("*_pb2*.py", "*_pb2*.pyi")
        for path in folder.rglob(pattern)
    }


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROTO_ROOT / "generate.py", "--out", tmp_path], check=True)
    fresh = generated_below(tmp_path)
    assert fresh, "the generator wrote nothing"
    checked_in = generated_below(PROTO_ROOT)
    differing = sorted(
        name for name in fresh.keys() | checked_in.keys() if fresh.get(name) != checked_in.get(name)
    )
    assert not differing, "run `make proto` and commit the result"
