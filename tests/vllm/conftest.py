"""Tests that run real vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vllm.workload import Answers

HERE = Path(__file__).parent

# Without vLLM there is nothing to collect: `make test` runs in an environment that has none.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

TIMEOUT_S = 600
"""A start of vLLM alone takes 15 to 25 seconds on 2 cores, and some tests start four."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama, fp32."""
    from tests.vllm.tiny_models import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    from tests.vllm.tiny_models import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What the chat answers without any offloading, fp32."""
    from tests.vllm.engine_process import EngineProcess
    from tests.vllm.workload import chat

    with EngineProcess(tiny_model, tmp_path_factory.mktemp("baseline"), kv_transfer=None) as engine:
        return chat(engine)


def skip_before(minor: int, reason: str) -> None:
    """Skip the test where vLLM is older than 0.`minor`."""
    from kvtier_client.vllm.versions import installed_version

    version = installed_version()
    if int(version.split(".")[1]) < minor:
        pytest.skip(f"vLLM {version}: {reason}")
