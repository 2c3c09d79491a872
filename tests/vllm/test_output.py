"""Real vLLM says the same with kvtier as without, and finds what it stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import StartDaemon
from tests.vllm.conftest import skip_before
from tests.vllm.engine_process import TWO_RANKS, EngineProcess, kvtier, plain, plain_kvtier
from tests.vllm.workload import Answers, chat

CHUNK_BYTES = 32 * 2 * 2 * 64 * 4 * 4  # tokens, K and V, kv heads, head size, fp32, layers
POOL_CHUNKS = 256

AS_GOOD = 4 / 32
"""Log probability by which two tokens may differ and be as good in bf16: four steps of a logit in [4, 8).

A prefix that is loaded is computed on from another place than one that is computed whole, and what comes out
is rounded otherwise: with vLLM's own manager exactly as with kvtier.
"""


def test_output_is_identical_and_hits_are_those_of_vllms_own_manager(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL_CHUNKS * CHUNK_BYTES)
    config = kvtier(daemon.address)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=config) as engine:
        assert chat(engine).tokens == expected.tokens
        assert engine.external_hits() > 0
        found = engine.found_tokens()
    native_config = plain("NativeSpec", "tests.vllm.other_specs", num_chunks=POOL_CHUNKS)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=native_config) as engine:
        assert chat(engine).tokens == expected.tokens
        found_by_native = engine.found_tokens()

    print(f"tokens found: kvtier {found}, vLLM's own manager {found_by_native}")  # noqa: T201 - a figure for people
    assert found >= 0.95 * found_by_native


@pytest.mark.parametrize(
    ("extra_config", "options"),
    [
        pytest.param({"blocks_per_chunk": 4}, {}, id="4 blocks a chunk"),
        pytest.param({"offload_prompt_only": False}, {}, id="decoded chunks too"),
        pytest.param({"blocks_per_chunk": 4, "offload_prompt_only": False}, {}, id="both"),
    ],
)
def test_output_is_identical_with(
    extra_config: dict[str, Any],
    options: dict[str, Any],
    tiny_model: Path,
    expected: Answers,
    start_daemon: StartDaemon,
    tmp_path: Path,
) -> None:
    daemon = start_daemon(pool_bytes=2 * POOL_CHUNKS * CHUNK_BYTES)
    config = kvtier(daemon.address, **extra_config)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=config, **options) as engine:
        assert chat(engine).tokens == expected.tokens
        assert engine.external_hits() > 0


def test_a_pool_of_12_chunks_gives_hits_and_no_warnings(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=12 * CHUNK_BYTES)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=kvtier(daemon.address)) as engine:
        assert chat(engine).tokens == expected.tokens
        metrics = engine.metrics()
        log = engine.log_text()

    assert metrics["vllm:external_prefix_cache_hits"] > 0
    assert metrics.get("vllm:kv_offload_allocation_failure", 0) == 0
    assert log.count("cannot store chunks") == 0


def test_the_plain_offloading_connector_works_too(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    skip_before(31, "the plain connector tells no keys before the first lookup")
    daemon = start_daemon(pool_bytes=POOL_CHUNKS * CHUNK_BYTES)
    config = plain_kvtier(daemon.address)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=config) as engine:
        assert chat(engine).tokens == expected.tokens
        assert engine.external_hits() > 0


def test_output_is_identical_on_two_tensor_parallel_ranks(
    tiny_model: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    with EngineProcess(tiny_model, tmp_path, kv_transfer=None, **TWO_RANKS) as engine:
        without = chat(engine)
    daemon = start_daemon(pool_bytes=POOL_CHUNKS * CHUNK_BYTES)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=kvtier(daemon.address), **TWO_RANKS) as engine:
        assert chat(engine).tokens == without.tokens
        assert engine.external_hits() > 0


def test_bf16_loads_what_was_stored_and_differs_only_where_two_tokens_were_as_good(
    tiny_model: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    with EngineProcess(tiny_model, tmp_path, kv_transfer=None, dtype="bfloat16") as engine:
        without = chat(engine, logprobs=2)
    daemon = start_daemon(pool_bytes=POOL_CHUNKS * CHUNK_BYTES)
    config = kvtier(daemon.address, spec_name="RecordingSpec", spec_module_path="tests.vllm.recording")
    record = tmp_path / "bytes.jsonl"
    env = {"KVTIER_RECORD": str(record)}
    with EngineProcess(tiny_model, tmp_path, kv_transfer=config, env=env, dtype="bfloat16") as engine:
        answers = chat(engine, logprobs=2, forced=without)
        assert engine.external_hits() > 0

    stored: dict[str, set[str]] = {}
    loaded = 0
    for line in map(json.loads, record.read_text().splitlines()):
        for key, digest in line.get("store", {}).items():
            stored.setdefault(key, set()).add(digest)
        for key, digest in line.get("load", {}).items():
            assert digest in stored[key], f"{key} was loaded with other bytes than were stored"
            loaded += 1
    assert loaded > 0
    differing = 0
    for ours, theirs, gaps in zip(answers.tokens, without.tokens, without.gaps, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if first is not None:
            differing += 1
            assert gaps[first] <= AS_GOOD, f"token {first} differs where the gap was {gaps[first]}"
    print(  # noqa: T201 - a figure for people
        f"bf16: {loaded} chunks loaded byte for byte; {differing} of {len(answers.tokens)} answers differ"
    )
