"""The configurations here are vLLM's own, made as an engine makes them; no model is loaded."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)

from kvtier_client import Role
from kvtier_client.vllm.facts import (
    NONCE_VARIABLE,
    EngineFacts,
    describe_engine,
    engine_identity,
    group_ids,
    namespace_facts,
    window_chunks,
)
from kvtier_client.vllm.settings import Settings
from kvtier_client.vllm.weights import WeightsError
from kvtier_ops.namespace import NamespaceFacts

SETTINGS = Settings("unix:///run/kvtier.sock")
BLOCK_TOKENS = 32
PAGE_BYTES = 2 * BLOCK_TOKENS * 2 * 16 * 4  # keys and values, heads, head size, float32
ATTENTION = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=16, dtype=torch.float32)
WINDOW = SlidingWindowSpec(
    block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=16, dtype=torch.float32, sliding_window=100
)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}

MakeConfig = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").write_bytes(b"never read here")
    return folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("PYTHONHASHSEED", "VLLM_KV_CACHE_LAYOUT", "VLLM_PP_LAYER_PARTITION", NONCE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(model: Path) -> MakeConfig:
    def make_config(extra_config: dict[str, object] | None = None, **arguments: Any) -> Any:
        transfer = KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            engine_id="engine",
            kv_connector_extra_config=extra_config or {},
        )
        given: dict[str, Any] = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "block_size": BLOCK_TOKENS,
            "dtype": "float32",
            **arguments,
        }
        return EngineArgs(**given, kv_transfer_config=transfer).create_engine_config()

    return make_config


def cache_of(*specs: Any, num_blocks: int = 10) -> Any:
    """Describe a device cache with two layers of each spec."""
    groups = [
        KVCacheGroupSpec([f"layers.{2 * index}", f"layers.{2 * index + 1}"], spec)
        for index, spec in enumerate(specs)
    ]
    layers = [name for group in groups for name in group.layer_names]
    total_bytes = num_blocks * PAGE_BYTES * 2
    if "shared_by" in {field.name for field in fields(KVCacheTensor)}:  # up to 0.28
        tensors = [KVCacheTensor(size=total_bytes, shared_by=layers)]
    else:
        tensors = [KVCacheTensor(total_bytes, layers, num_blocks * PAGE_BYTES, PAGE_BYTES)]
    return KVCacheConfig(num_blocks, tensors, groups)


def facts_of(vllm_config: Any, cache: Any = None, settings: Settings = SETTINGS) -> NamespaceFacts:
    """Describe an engine as KVTierConnector does."""
    cache = cache or cache_of(ATTENTION)
    engine = describe_engine(vllm_config, cache)
    return namespace_facts(build_offloading_config(vllm_config, cache), settings, engine)


def with_parallel(config: Any, **changed: int) -> Any:
    return replace(config, parallel=replace(config.parallel, **changed))


def engine_with(config: Any, **changed: Any) -> EngineFacts:
    return replace(describe_engine(config, cache_of(ATTENTION)), **changed)


def test_a_chunk_is_described_in_full(make: MakeConfig, model: Path) -> None:
    facts = facts_of(make({"blocks_per_chunk": 4}))
    facts.validate()
    assert facts.model == str(model)
    assert facts.weights_id.startswith("files:")
    assert facts.kv_dtype == "float32"
    assert facts.hash_algorithm == "sha256"
    assert (facts.tokens_per_hash, facts.blocks_per_chunk, facts.num_parts) == (BLOCK_TOKENS, 4, 1)
    (group,) = facts.groups
    assert group.tokens_per_block == BLOCK_TOKENS
    assert group.part_bytes == 2 * PAGE_BYTES * 4
    assert group.layer_names == ("layers.0", "layers.1")


def test_a_worker_comes_to_the_same_facts_after_it_has_loaded_its_model(make: MakeConfig) -> None:
    scheduler = make()
    worker = pickle.loads(pickle.dumps(scheduler))
    worker.parallel_config.rank = 0
    worker.cache_config.num_gpu_blocks = 10
    # What models and layers of vLLM write into their configuration while they are made.
    worker.model_config.hf_config.attn_temperature_tuning = True
    worker.model_config.hf_config.dtype = torch.float16
    worker.model_config.hf_text_config.max_model_len = 77
    worker.cache_config.cache_dtype = "fp8"
    assert describe_engine(worker, cache_of(ATTENTION)) == describe_engine(scheduler, cache_of(ATTENTION))
    assert facts_of(worker).digest() == facts_of(scheduler).digest()


def test_engines_that_only_schedule_differently_share(make: MakeConfig) -> None:
    others = [
        make(max_num_seqs=3, max_num_batched_tokens=256, max_model_len=256),
        make(num_gpu_blocks_override=40, gpu_memory_utilization=0.5),
        make(served_model_name="another name", max_logprobs=1),
        make({"address": "127.0.0.1:1", "offload_prompt_only": False}),
    ]
    expected = facts_of(make()).digest()
    assert [facts_of(other).digest() for other in others] == [expected] * len(others)
    assert facts_of(make(), cache_of(ATTENTION, num_blocks=99)).digest() == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "bfloat16"},
        {"hf_overrides": {"rope_theta": 5.0}},
        {"hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        {"load_format": "dummy"},
        {"load_format": "dummy", "seed": 1},
        {"prefix_caching_hash_algo": "sha256_cbor"},
        {"model_impl": "transformers"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"extra_config": {"blocks_per_chunk": 2}},
    ],
    ids=str,
)
def test_what_changes_the_bytes_under_a_key_changes_the_namespace(
    make: MakeConfig, arguments: dict[str, Any]
) -> None:
    try:
        other = make(**arguments)
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"this vLLM refuses it here: {error}")
    assert facts_of(other).digest() != facts_of(make()).digest()


def test_the_seed_makes_dummy_weights_even_under_one_name(make: MakeConfig) -> None:
    named = replace(SETTINGS, weights_id="mine")
    ids = {facts_of(make(load_format="dummy", seed=seed), settings=named).weights_id for seed in (0, 1)}
    assert ids == {"mine:dummy:0", "mine:dummy:1"}
    assert facts_of(make(seed=0)).digest() == facts_of(make(seed=1)).digest()


def test_a_name_for_the_weights_replaces_the_files_and_nothing_else(make: MakeConfig, model: Path) -> None:
    named = replace(SETTINGS, weights_id="mine")
    facts = facts_of(make(), settings=named)
    assert facts.weights_id == "mine"
    assert facts_of(make(dtype="bfloat16"), settings=named).digest() != facts.digest()
    os.utime(model / "model.safetensors")
    assert facts_of(make(), settings=named).digest() == facts.digest()


@pytest.mark.parametrize(
    "spec",
    [
        replace(ATTENTION, dtype=torch.uint8),
        replace(ATTENTION, num_kv_heads=1, head_size=32),
        WINDOW,
    ],
    ids=["dtype", "heads", "window"],
)
def test_the_cache_itself_is_part_of_the_facts(make: MakeConfig, spec: Any) -> None:
    assert facts_of(make(), cache_of(spec)).digest() != facts_of(make()).digest()


def test_the_seed_of_the_hashes_is_told_apart(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    has_default = hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED")
    unset = describe_engine(make(), cache_of(ATTENTION))
    assert unset.extra["hash_seed"] == ("default" if has_default else "random")
    assert unset.keys_outlive_engine is has_default
    weak = describe_engine(make(prefix_caching_hash_algo="xxhash"), cache_of(ATTENTION))
    assert not weak.keys_outlive_engine
    digests = {facts_of(make()).digest()}
    for seed in ("0", "1"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        digests.add(facts_of(make()).digest())
        assert describe_engine(make(), cache_of(ATTENTION)).keys_outlive_engine
    assert len(digests) == 3


def test_long_rope_tells_its_two_sets_of_factors_apart(make: MakeConfig) -> None:
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "rope_theta": 1e4}
    overrides = {"rope_parameters": {**rope, "factor": 4.0, "original_max_position_embeddings": 512}}
    lengths = {
        length: facts_of(make(hf_overrides=overrides, max_model_len=length)) for length in (256, 512, 1024)
    }
    assert lengths[256].digest() == lengths[512].digest() != lengths[1024].digest()


def test_windows_are_whole_chunks(make: MakeConfig) -> None:
    vllm_config, cache = make({"blocks_per_chunk": 2}), cache_of(ATTENTION, WINDOW)
    config, engine = build_offloading_config(vllm_config, cache), describe_engine(vllm_config, cache)
    assert engine.window_tokens == (None, 100)
    assert window_chunks(config, engine) == (None, 2)
    assert group_ids(config) == (0, 1)
    facts = namespace_facts(config, SETTINGS, engine)
    assert [group.sliding_window_tokens for group in facts.groups] == [0, 128]


def test_a_state_reaches_back_one_chunk(make: MakeConfig) -> None:
    state = MambaSpec(block_size=BLOCK_TOKENS, shapes=((4, 4),), dtypes=(torch.float32,))
    assert describe_engine(make(), cache_of(state)).window_tokens == (1,)


def test_under_the_plain_connector_the_weights_have_to_be_named(make: MakeConfig) -> None:
    config = build_offloading_config(make(), cache_of(ATTENTION))
    with pytest.raises(WeightsError, match=r'KVTierConnector.*"weights_id"'):
        namespace_facts(config, SETTINGS, None)
    facts = namespace_facts(config, replace(SETTINGS, weights_id="mine"), None)
    facts.validate()
    assert (facts.weights_id, facts.kv_dtype) == ("mine", "float32")


def test_ranks_have_parts_unless_they_hold_equal_bytes(make: MakeConfig) -> None:
    config = with_parallel(build_offloading_config(make(), cache_of(ATTENTION)), world_size=2, tp_size=2)
    engine = describe_engine(make(), cache_of(ATTENTION))
    assert namespace_facts(config, SETTINGS, engine).num_parts == 2
    assert namespace_facts(replace(config, replicated_layout=True), SETTINGS, engine).num_parts == 1
    ranks = {namespace_facts(with_parallel(config, rank=rank), SETTINGS, engine).digest() for rank in (0, 1)}
    replicas = with_parallel(config, data_parallel_index=3)
    assert ranks == {namespace_facts(replicas, SETTINGS, engine).digest()}


def test_too_many_ranks_are_refused(make: MakeConfig) -> None:
    config = with_parallel(build_offloading_config(make(), cache_of(ATTENTION)), world_size=64, tp_size=64)
    engine = describe_engine(make(), cache_of(ATTENTION))
    with pytest.raises(ValueError, match="at most 32: use a smaller tensor_parallel_size"):
        namespace_facts(config, SETTINGS, engine)
    with pytest.raises(ValueError, match="smaller tensor_parallel_size"):
        engine_identity(config, SETTINGS, engine, Role.SCHEDULER)


def test_stages_must_be_known_to_be_equal(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_config = make()
    plain = build_offloading_config(vllm_config, cache_of(ATTENTION))
    config = with_parallel(plain, world_size=2, pp_size=2)
    with pytest.raises(ValueError, match="pipeline parallelism of 2 stages needs KVTierConnector"):
        namespace_facts(config, replace(SETTINGS, weights_id="mine"), None)
    facts = namespace_facts(config, SETTINGS, engine_with(vllm_config))
    assert facts.groups[0].layer_names == ()
    with pytest.raises(ValueError, match="does not divide the model's 5 layers evenly"):
        namespace_facts(config, SETTINGS, engine_with(vllm_config, num_layers=5))
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,2")
    assert namespace_facts(config, SETTINGS, engine_with(vllm_config)) == facts
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    with pytest.raises(ValueError, match="VLLM_PP_LAYER_PARTITION=1,3"):
        namespace_facts(config, SETTINGS, engine_with(vllm_config))


def test_a_model_without_kv_is_refused(make: MakeConfig) -> None:
    config = replace(build_offloading_config(make(), cache_of(ATTENTION)), worker_kv_bytes_per_block=0)
    with pytest.raises(ValueError, match="no KV cache to offload"):
        namespace_facts(config, SETTINGS, engine_with(make()))


def test_all_processes_of_one_start_have_one_nonce_and_the_next_start_another(make: MakeConfig) -> None:
    first, second = make(), make()
    config = with_parallel(build_offloading_config(first, cache_of(ATTENTION)), world_size=2, rank=1)
    settings = replace(SETTINGS, tenant="search")
    engine = describe_engine(first, cache_of(ATTENTION))
    copied = describe_engine(pickle.loads(pickle.dumps(first)), cache_of(ATTENTION))
    scheduler = engine_identity(config, settings, engine, Role.SCHEDULER)
    worker = engine_identity(config, settings, copied, Role.WORKER)
    assert (scheduler.rank, worker.rank, worker.world_size, worker.tenant) == (0, 1, 2, "search")
    assert scheduler.instance_nonce == worker.instance_nonce
    restarted = engine_identity(config, settings, engine_with(second), Role.SCHEDULER)
    assert restarted.engine_id == scheduler.engine_id == "engine"
    assert restarted.instance_nonce != scheduler.instance_nonce


def test_the_plain_connector_takes_the_start_from_the_environment(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_offloading_config(make(), cache_of(ATTENTION))
    nonces = set()
    for start in ("", "1", "2"):
        monkeypatch.setenv(NONCE_VARIABLE, start)
        nonces.add(engine_identity(config, SETTINGS, None, Role.SCHEDULER).instance_nonce)
    assert len(nonces) == 3


def test_a_long_engine_id_is_digested(make: MakeConfig) -> None:
    config = build_offloading_config(make(), cache_of(ATTENTION))
    ids = {
        engine_identity(replace(config, engine_id="é" * 100 + tail), SETTINGS, None, Role.SCHEDULER).engine_id
        for tail in ("", "x")
    }
    assert len(ids) == 2
    assert all(len(each.encode()) <= 128 for each in ids)
