"""The import rule finds what it forbids and nothing else, on real trees checked by the program itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("check_imports.py")


def report(root: Path, files: dict[str, str]) -> list[str]:
    """Write the files, run the program on the tree, and return its lines."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run([sys.executable, PROGRAM, root], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == (1 if done.stdout else 0)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("client/kvtier_client/a.py", "import kvtier_server.config\n"),
        ("server/kvtier_server/a.py", "from kvtier_client import client\n"),
        ("ops/kvtier_ops/a.py", "import kvtier.v1\n"),
        ("ops/kvtier_ops/a.py", "def f() -> None:\n    import kvtier_client\n"),
        ("proto/kvtier/v1/a.py", "import kvtier_ops\n"),
        ("server/kvtier_server/secondary/a.py", "from kvtier_server.core import tiering\n"),
        ("server/kvtier_server/secondary/a.py", "from ..core import tiering\n"),
        ("server/kvtier_server/secondary/a.py", "from .. import core\n"),
        ("server/kvtier_server/policies/a.py", "from kvtier_server import daemon\n"),
        ("server/kvtier_server/core/a.py", "from kvtier_server.config import Limits\n"),
        ("server/kvtier_server/core/a.py", "from kvtier_server.secondary import filesystem\n"),
        ("client/kvtier_client/a.py", "from kvtier_client.demo import engine\n"),
    ],
)
def test_an_arrow_to_another_room_that_is_not_below_is_found(tmp_path: Path, file: str, text: str) -> None:
    (line,) = report(tmp_path, {file: text})
    assert line.startswith(f"{file}:{text.count(chr(10))}: ")
    assert " may not import " in line


@pytest.mark.parametrize("file", ["core/a.py", "primary/a.py", "policies/a.py", "admission.py"])
def test_a_pure_room_may_import_no_clock_no_chance_no_input_and_no_library(tmp_path: Path, file: str) -> None:
    impure = ["time", "os.path", "asyncio", "random", "grpc", "numpy", "kvtier_ops.pool"]
    text = "".join(f"import {module}\n" for module in impure)
    lines = report(tmp_path, {f"server/kvtier_server/{file}": text})
    for line, module in zip(lines, impure, strict=True):
        assert f"may not import {module}: " in line


@pytest.mark.parametrize("file", ["ops/kvtier_ops/cuda.py", "client/kvtier_client/worker.py"])
def test_torch_is_found_when_it_is_loaded_on_import_only(tmp_path: Path, file: str) -> None:
    late = "def f() -> None:\n    import torch\n"
    assert report(tmp_path, {file: late}) == []
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    assert report(tmp_path, {file: for_types}) == []
    early = "try:\n    from torch import Tensor\nexcept ImportError:\n    pass\n"
    (line,) = report(tmp_path, {file: early})
    assert line.startswith(f"{file}:2: ")
    assert "may not import torch.Tensor outside a function" in line


def test_an_engine_gets_no_library_beyond_the_four(tmp_path: Path) -> None:
    text = "def f() -> None:\n    import pydantic\n    from google.rpc import error_details_pb2\n"
    first, second = report(tmp_path, {"client/kvtier_client/client.py": text})
    assert "may not import pydantic" in first
    assert "may not import google.rpc.error_details_pb2" in second


def test_vllm_is_imported_in_its_room_only(tmp_path: Path) -> None:
    text = "def f() -> None:\n    from vllm.config import VllmConfig\n"
    assert report(tmp_path, {"client/kvtier_client/vllm/spec.py": text}) == []
    (line,) = report(
        tmp_path, {"client/kvtier_client/vllm/spec.py": "", "client/kvtier_client/worker.py": text}
    )
    assert line.startswith("client/kvtier_client/worker.py:2: ")


def test_a_circle_is_found_once_with_its_way_round(tmp_path: Path) -> None:
    files = {
        "ops/kvtier_ops/__init__.py": "",
        "ops/kvtier_ops/a.py": "import kvtier_ops.b\n",
        "ops/kvtier_ops/b.py": "\nfrom kvtier_ops.c import thing\n",
        "ops/kvtier_ops/c.py": "def f() -> None:\n    from . import a\n",
    }
    way_round = "kvtier_ops.a -> kvtier_ops.b -> kvtier_ops.c -> kvtier_ops.a"
    assert report(tmp_path, files) == [f"ops/kvtier_ops/a.py:1: a circle of imports: {way_round}"]


def test_two_circles_through_one_module_are_both_found(tmp_path: Path) -> None:
    files = {
        "ops/kvtier_ops/a.py": "import kvtier_ops.m\n",
        "ops/kvtier_ops/b.py": "import kvtier_ops.m\n",
        "ops/kvtier_ops/m.py": "import kvtier_ops.a\nimport kvtier_ops.b\n",
    }
    assert [line.partition(": ")[0] for line in report(tmp_path, files)] == [
        "ops/kvtier_ops/a.py:1",
        "ops/kvtier_ops/b.py:1",
    ]


def test_a_package_that_gathers_its_modules_is_no_circle(tmp_path: Path) -> None:
    files = {
        "ops/kvtier_ops/__init__.py": "from kvtier_ops.a import thing\n",
        "ops/kvtier_ops/a.py": "from kvtier_ops.b import thing\n",
        "ops/kvtier_ops/b.py": "thing = 1\n",
    }
    assert report(tmp_path, files) == []


@pytest.mark.parametrize("name", ["utils.py", "common.py", "helpers.py", "types.py", "utils/a.py"])
@pytest.mark.parametrize("folder", ["ops/kvtier_ops", "tests/server"])
def test_a_file_or_folder_whose_name_says_nothing_is_found(tmp_path: Path, folder: str, name: str) -> None:
    (line,) = report(tmp_path, {f"{folder}/{name}": ""})
    assert "names no noun of the field" in line


def test_a_file_outside_every_room_is_found(tmp_path: Path) -> None:
    (line,) = report(tmp_path, {"server/other/a.py": ""})
    assert line.startswith("server/other/a.py:1: no room for this file")


def test_arrows_that_go_down_are_permitted(tmp_path: Path) -> None:
    files = {
        "proto/kvtier/v1/a_pb2_grpc.py": "import grpc\nfrom kvtier.v1 import a_pb2\n",
        "ops/kvtier_ops/host.py": "import mmap\nimport numpy as np\nfrom kvtier_ops import plan\n",
        "client/kvtier_client/client.py": "from google.protobuf import message\nimport kvtier_ops.pool\n",
        "client/kvtier_client/demo/engine.py": "import torch\nfrom kvtier_client import worker\n",
        "server/kvtier_server/daemon.py": "import time\nfrom kvtier_server.core import leases\n",
        "server/kvtier_server/core/leases.py": "from kvtier_server.policies.base import CachePolicy\n",
        "server/kvtier_server/core/tiering.py": "from . import leases\nfrom ..secondary.base import Tier\n",
        "server/kvtier_server/primary/index.py": "import heapq\nimport kvtier_ops.prefix\n",
    }
    assert report(tmp_path, files) == []
