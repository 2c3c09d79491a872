"""What makes the KV of two vLLM engines interchangeable: NamespaceFacts, and who an engine is.

Owns the translation of vLLM's configuration. Scheduler and workers each call it for themselves, with their
own copy of the configuration, and must come to equal facts; so nothing is read here that a worker changes
while it loads its model. Where a fact is, and why it is there:

    model, weights_id       what was computed with; for dummy weights the seed
    kv_dtype                of the cache itself. vLLM's workers rewrite `cache_dtype` while they load, so the
                            dtype comes from the cache's own specs
    hash_algorithm, extra.hash_seed
                            what a key is made of. LoRA, images and cache salt are in the hash already
    tokens_per_hash, blocks_per_chunk, groups
                            what a chunk covers; layer names only without pipeline parallelism
    kv_cache_layout         bytes inside a block, and extra.layout_asked, which decided it up to vLLM 0.28
    *_parallel_size         which heads and layers a part holds
    extra.vllm, extra.platform, extra.runner, extra.attention*
                            who lays out a block: release, device (a CPU's tile unit changes the layout of
                            keys), model runner, the backend if one was asked for
    extra.specs             heads, sizes, quantization and windows of the cache, as vLLM describes them
    extra.model_dtype, extra.quantization*, extra.code*
                            how the model computes
    extra.config, extra.overrides
                            what it computes: configuration file and --hf-overrides (rope scaling)
    extra.long_rope, extra.llama4
                            the two places where max_model_len changes what is computed
    extra.draft             a draft model's layers lie in the same chunks
    extra.own_scales        scales that vLLM takes from the first request: good for this start only

What differs between engines and is not here, on purpose: everything about scheduling (max_num_seqs, number of
blocks, max_model_len but for the two places above), ports, data parallel rank, and what changes rounding
only, which vLLM's own prefix cache does not tell apart either (batch sizes, compilation, kernels).

Under vLLM's plain OffloadingConnector a spec sees an OffloadingConfig and nothing else. Then everything that
only EngineFacts know has to be in the operator's weights_id, which is therefore required.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from kvtier_client.options import EngineIdentity, Role
from kvtier_client.vllm.settings import Settings
from kvtier_client.vllm.versions import installed_version
from kvtier_client.vllm.weights import (
    DUMMY,
    WeightsError,
    WeightsSource,
    config_digest,
    config_file_digest,
    default_weights_id,
    display_name,
    model_folder,
    stable_digest,
)
from kvtier_ops.namespace import MAX_WORLD_SIZE, GroupFacts, NamespaceFacts

NONCE_VARIABLE = "KVTIER_INSTANCE_NONCE"
"""Tells two starts of an engine apart where its `engine_id` is fixed and its connector is the plain one."""

MAX_ENGINE_ID_BYTES = 128

# vLLM's names for "as the model computes" and for the plain fp8 of a platform, which it swaps for one another
# while a model loads; the dtype of the cache tells them apart.
_PLAIN_CACHE_DTYPES = frozenset({"auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_inc"})
_LLAMA4_SHORT_TOKENS = 32_768
"""Above this max_model_len, Llama 4 tunes the temperature of its attention."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What VllmConfig and KVCacheConfig know and an OffloadingConfig does not. Equal in all processes."""

    instance_id: str
    """vLLM's name for this start of the engine."""
    weights: WeightsSource
    num_layers: int
    kv_dtype: str
    hash_algorithm: str
    window_tokens: tuple[int | None, ...]
    """How far attention reaches back, per KV-cache group in vLLM's numbering; None: without a bound."""
    draft: WeightsSource | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys_outlive_engine(self) -> bool:
        """Whether another start makes the same keys. If not, nothing it stores is ever found again."""
        return self.extra.get("hash_seed") != "random"


engine_facts: ContextVar[EngineFacts | None] = ContextVar("kvtier_engine_facts", default=None)
"""Set by KVTierConnector while vLLM makes its spec; unset under vLLM's plain OffloadingConnector."""


def describe_engine(vllm_config: Any, kv_cache_config: Any) -> EngineFacts:
    """Read what the engine computes with, on either side."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    specs = [_first_layer_spec(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    algorithm = str(cache.prefix_caching_hash_algo)
    speculative = vllm_config.speculative_config
    draft_model = getattr(speculative, "draft_model_config", None)
    draft_load = getattr(speculative, "draft_load_config", None) or vllm_config.load_config
    source = _weights_source(model, vllm_config.load_config)
    attention = getattr(vllm_config, "attention_config", None)
    extra = {
        "specs": stable_digest(specs),
        "hash_seed": _hash_seed(algorithm),
        "runner": "v2" if getattr(vllm_config, "use_v2_model_runner", False) else "v1",
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "quantization": _said(model.quantization),
        "quantization_config": _said_digest(getattr(model, "quantization_config", None)),
        "code": _said(getattr(model, "model_impl", None)),
        "code_revision": _said(model.code_revision),
        "code_overrides": _said_digest(getattr(model, "model_class_overrides", None)),
        "config": _config(model, source),
        "overrides": _said_digest(model.hf_overrides),
        "long_rope": _long_rope(model),
        "llama4": _llama4(model),
        "attention": _said(getattr(attention, "backend", None)),
        "attention_kinds": _said_digest(getattr(attention, "backend_per_kind", None)),
        "attention_index": _said(getattr(attention, "indexer_kv_dtype", None)),
        "draft": _said(getattr(speculative, "method", None)),
        "own_scales": str(vllm_config.instance_id) if getattr(cache, "calculate_kv_scales", False) else "",
    }
    return EngineFacts(
        instance_id=str(vllm_config.instance_id),
        weights=source,
        num_layers=int(model.get_total_num_hidden_layers()),
        kv_dtype=_kv_dtype(specs, str(cache.cache_dtype)),
        hash_algorithm=algorithm,
        window_tokens=tuple(_window_tokens(spec) for spec in specs),
        draft=None if draft_model is None else _weights_source(draft_model, draft_load),
        extra={key: value for key, value in extra.items() if value},
    )


def namespace_facts(config: Any, settings: Settings, engine: EngineFacts | None) -> NamespaceFacts:
    """Return the facts of an OffloadingConfig, equal for the scheduler and all workers.

    Raise ValueError for what kvtier cannot keep, and WeightsError where nothing names the weights.
    """
    parallel = config.parallel
    _check_parallel(parallel, engine)
    if config.worker_kv_bytes_per_block < 1:
        raise ValueError("vLLM says that a block has no bytes: this model has no KV cache to offload")
    blocks_per_chunk = config.cache.blocks_per_chunk
    extra = {"vllm": installed_version(), "platform": _platform()}
    if getattr(config, "kv_cache_layout", None) is None and os.environ.get("VLLM_KV_CACHE_LAYOUT"):
        extra["layout_asked"] = os.environ["VLLM_KV_CACHE_LAYOUT"]
    if engine is not None:
        extra |= engine.extra
        if engine.draft is not None:
            extra["draft"] = f"{engine.extra.get('draft', '')}:{_draft_weights(engine.draft)}"
    else:
        extra["hash_seed"] = _hash_seed("")
    return NamespaceFacts(
        model=display_name(engine.weights.remote or engine.weights.model if engine else config.model.name),
        weights_id=_weights_id(config, settings, engine),
        kv_dtype=engine.kv_dtype if engine else config.model.dtype,
        hash_algorithm=engine.hash_algorithm if engine else "unknown",
        tokens_per_hash=config.cache.tokens_per_hash,
        blocks_per_chunk=blocks_per_chunk,
        kv_cache_layout=getattr(config, "kv_cache_layout", None) or "default",
        groups=tuple(
            GroupFacts(
                tokens_per_block=group.tokens_per_block,
                part_bytes=config.worker_kv_bytes_per_block * blocks_per_chunk,
                sliding_window_tokens=(window or 0) * group.tokens_per_block * blocks_per_chunk,
                layer_names=() if parallel.pp_size > 1 else tuple(group.layer_names),
            )
            for group, window in zip(config.groups, window_chunks(config, engine), strict=True)
        ),
        num_parts=1 if config.replicated_layout else parallel.world_size,
        tensor_parallel_size=parallel.tp_size,
        pipeline_parallel_size=parallel.pp_size,
        prefill_context_parallel_size=parallel.pcp_size,
        decode_context_parallel_size=parallel.dcp_size,
        extra=extra,
    )


def group_ids(config: Any) -> tuple[int, ...]:
    """Return vLLM's numbers of the offloaded groups; up to 0.29 it offloads all."""
    return tuple(getattr(group, "group_id", index) for index, group in enumerate(config.groups))


def window_chunks(config: Any, engine: EngineFacts | None) -> tuple[int | None, ...]:
    """Return per offloaded group how many chunks attention reaches back.

    None is without a bound, or not known: before 0.33 only EngineFacts know.
    """
    windows: list[int | None] = []
    for group, group_id in zip(config.groups, group_ids(config), strict=True):
        if hasattr(group, "sliding_window_size_in_chunks"):
            windows.append(group.sliding_window_size_in_chunks)
        else:
            tokens = engine.window_tokens[group_id] if engine else None
            chunk_tokens = group.tokens_per_block * config.cache.blocks_per_chunk
            windows.append(None if tokens is None else -(-tokens // chunk_tokens))
    return tuple(windows)


def engine_identity(
    config: Any, settings: Settings, engine: EngineFacts | None, role: Role
) -> EngineIdentity:
    """Return who this process is to the daemon. The nonce is equal in all processes of one start."""
    parallel = config.parallel
    _check_world_size(parallel)
    start = engine.instance_id if engine else os.environ.get(NONCE_VARIABLE, "")
    digest = hashlib.sha256(f"{start}|{config.engine_id}".encode()).digest()
    engine_id = config.engine_id
    if len(engine_id.encode()) > MAX_ENGINE_ID_BYTES:
        engine_id = hashlib.sha256(engine_id.encode()).hexdigest()
    return EngineIdentity(
        engine_id=engine_id,
        instance_nonce=int.from_bytes(digest[:8], "big") or 1,
        role=role,
        rank=parallel.rank if role is Role.WORKER else 0,
        world_size=parallel.world_size,
        tenant=settings.tenant,
    )


def _weights_id(config: Any, settings: Settings, engine: EngineFacts | None) -> str:
    if settings.weights_id is not None:
        if engine is not None and engine.weights.load_format == DUMMY:
            return f"{settings.weights_id}:{default_weights_id(engine.weights)}"  # no name tells seeds apart
        return settings.weights_id
    if engine is not None:
        return default_weights_id(engine.weights)
    raise WeightsError(
        f"OffloadingConnector does not tell kvtier how {config.model.name!r} was loaded (revision, dtype, "
        'quantization, overrides). Use "kv_connector": "KVTierConnector" with "kv_connector_module_path": '
        '"kvtier_client.vllm", or name all of it: "weights_id": "<a name of your own>" in '
        "kv_connector_extra_config"
    )


def _draft_weights(source: WeightsSource) -> str:
    try:
        return default_weights_id(source)
    except WeightsError:
        # The target verifies what a draft proposes: another draft's KV costs speed, never a token.
        return f"{source.model}@{source.revision or ''}"


def _check_world_size(parallel: Any) -> None:
    if parallel.world_size > MAX_WORLD_SIZE:
        raise ValueError(
            f"{parallel.world_size} workers share a chunk (tensor_parallel_size {parallel.tp_size}, "
            f"pipeline_parallel_size {parallel.pp_size}); kvtier keeps chunks of at most {MAX_WORLD_SIZE}: "
            "use a smaller tensor_parallel_size"
        )


def _check_parallel(parallel: Any, engine: EngineFacts | None) -> None:
    _check_world_size(parallel)
    if parallel.pp_size == 1:
        return
    # A slot has equal parts, one for each rank, and ranks with more layers would need more.
    what = f"pipeline parallelism of {parallel.pp_size} stages"
    if engine is None:
        raise ValueError(
            f"{what} needs KVTierConnector: under OffloadingConnector kvtier cannot see whether all stages "
            "have the same number of layers"
        )
    partition = os.environ.get("VLLM_PP_LAYER_PARTITION")
    if partition and len({count.strip() for count in partition.split(",")}) > 1:
        raise ValueError(
            f"{what} with VLLM_PP_LAYER_PARTITION={partition} gives the stages different numbers of layers, "
            "which kvtier cannot keep; unset it"
        )
    if engine.num_layers % parallel.pp_size:
        raise ValueError(
            f"{what} does not divide the model's {engine.num_layers} layers evenly, which kvtier cannot "
            "keep; choose a pipeline_parallel_size that does"
        )


def _weights_source(model: Any, load: Any) -> WeightsSource:
    # A configuration from another place says nothing of the commit of the weights.
    elsewhere = bool(getattr(model, "hf_config_path", None))
    commit = None if elsewhere else getattr(model.hf_config, "_commit_hash", None)
    return WeightsSource(
        model=str(model.model),
        revision=model.revision,
        commit=str(commit) if commit else None,
        load_format=str(getattr(load.load_format, "value", load.load_format)),
        seed=int(model.seed or 0),
        download_dir=load.download_dir,
        remote=str(getattr(model, "model_weights", "") or ""),
    )


def _config(model: Any, source: WeightsSource) -> str:
    """Digest the configuration file; the object that was made of it changes while some models load."""
    path = getattr(model, "hf_config_path", None)
    where = source if path is None else WeightsSource(model=str(path), download_dir=source.download_dir)
    digest = None if callable(model.hf_overrides) else config_file_digest(model_folder(where))
    return digest or config_digest(model.hf_config.to_dict())


def _first_layer_spec(spec: Any) -> Any:
    """Return the spec of a group's first layer, which is what vLLM's scheduler sees of a group."""
    layers = getattr(spec, "kv_cache_specs", None)
    return next(iter(layers.values())) if layers else spec


def _window_tokens(spec: Any) -> int | None:
    """Ask vLLM how many chunks a group needs, with chunks of one token."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
            get_sliding_window_size_in_chunks,
        )
    except ImportError:  # up to 0.32
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
            get_sliding_window_size_in_chunks,
        )
    try:
        tokens = get_sliding_window_size_in_chunks(spec, 1)
    except AssertionError:  # a kind of cache that vLLM does not offload
        return None
    return None if tokens is None else int(tokens)


def _kv_dtype(specs: list[Any], asked: str) -> str:
    dtypes = {
        str(dtype).removeprefix("torch.")
        for spec in specs
        for dtype in getattr(spec, "dtypes", None) or [getattr(spec, "dtype", "unknown")]
    }
    kept = "+".join(sorted(dtypes))
    asked = asked.removesuffix("_ds_mla")
    return kept if asked in _PLAIN_CACHE_DTYPES else f"{kept}/{asked}"


def _hash_seed(algorithm: str) -> str:
    """Say what the first hash of a chain is made of, as vLLM's init_none_hash chooses it."""
    from vllm.v1.core import kv_cache_utils

    seed = os.environ.get("PYTHONHASHSEED")
    if seed is not None:
        return "set:" + hashlib.sha256(seed.encode()).hexdigest()[:16]
    if algorithm.startswith("xxhash") or not hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED"):
        return "random"  # up to 0.28 with every algorithm
    return "default"


def _platform() -> str:
    from vllm.platforms import current_platform

    parts = [str(current_platform.device_type)]
    if parts == ["cpu"]:
        import platform

        import torch

        # vLLM's CPU kernels lay keys out for the unit that multiplies them.
        has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
        parts += [platform.machine(), *(["amx"] if has_tiles is not None and has_tiles() else [])]
    else:
        capability = current_platform.get_device_capability()
        parts += [] if capability is None else [capability.as_version_str()]
    return " ".join(parts)


def _long_rope(model: Any) -> str:
    """Say which of its two sets of factors LongRoPE uses: max_model_len decides, for all positions."""
    text = model.hf_text_config
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for rope in [found, *(found.values() if isinstance(found, dict) else [])]:
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in {"longrope", "su"}:
            continue
        short = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        return "short" if short is not None and model.max_model_len <= short else "long"
    return ""


def _llama4(model: Any) -> str:
    if not str(getattr(model.hf_config, "model_type", "")).startswith("llama4"):
        return ""
    asked = [model.generation_config, model.override_generation_config.get("attn_temperature_tuning")]
    return f"{model.max_model_len > _LLAMA4_SHORT_TOKENS}:{stable_digest(asked)}"


def _said(value: Any) -> str:
    return "" if value is None else str(getattr(value, "name", value))


def _said_digest(value: Any) -> str:
    return stable_digest(value) if value else ""
