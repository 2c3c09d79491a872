"""A model with sliding-window layers: several KV-cache groups, chunks that are no longer whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conftest import StartDaemon
from tests.vllm.conftest import skip_before
from tests.vllm.engine_process import EngineProcess, kvtier
from tests.vllm.workload import chat


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.vllm.tiny_models import save_hybrid

    return save_hybrid(tmp_path_factory.mktemp("models") / "hybrid", seed=0)


def test_output_of_a_hybrid_model_is_identical(
    hybrid_model: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    skip_before(30, "a failed load of a model with several groups ends the engine; kvtier refuses it")
    options: dict[str, Any] = {"num_gpu_blocks_override": 80, "disable_hybrid_kv_cache_manager": False}
    with EngineProcess(hybrid_model, tmp_path, kv_transfer=None, **options) as engine:
        without = chat(engine)
    assert (
        len({tuple(tokens) for tokens in without.tokens}) > 30
    )  # a model that always says the same hides all
    for extra_config in ({}, {"blocks_per_chunk": 2, "offload_prompt_only": False}):
        daemon = start_daemon(pool_bytes="128MiB")
        config = kvtier(daemon.address, **extra_config)
        with EngineProcess(hybrid_model, tmp_path, kv_transfer=config, **options) as engine:
            assert chat(engine).tokens == without.tokens
            assert engine.external_hits() > 0

    daemon = start_daemon(pool_bytes="128MiB")
    env = {"KVTIER_FAULTS": "worker.before_load=error"}
    with EngineProcess(
        hybrid_model, tmp_path, kv_transfer=kvtier(daemon.address), env=env, **options
    ) as engine:
        assert chat(engine).tokens == without.tokens
        assert engine.metrics()['vllm:kvtier_loads_failed{"reason": "error"}'] > 0
