"""The facts that make bytes under equal keys interchangeable, and their digest.

An OffloadKey says nothing about model, dtype, layout or parallelism, so the daemon files every key under the
digest of these facts. Client and daemon compute it each for itself, with this module, and compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from kvtier_ops.layout import slot_bytes

DIGEST_RULE = 1
"""Raised whenever the canonical form below changes, so that old and new never share a digest."""

MAX_GROUPS = 64
"""KV-cache groups of one namespace, at most: hybrid models have two to eight."""

MAX_TENSORS = 2048
"""Layer names of one namespace, and tensors of one rank, over all groups, at most: the deepest models have
some hundred layers with one or two tensors each."""

MAX_EXTRA_FACTS = 256
"""Further facts of one namespace, at most: vLLM's are a dozen."""

MAX_TEXT_BYTES = 1 << 10
"""UTF-8 bytes of one fact in words, at most: names of models, longer ones as paths."""

MAX_NAMES_BYTES = 64 << 10
"""UTF-8 bytes of all layer names of one namespace, of all its further facts, and of all names of one rank's
tensors, at most each: a thousand layers with names of 60 bytes."""

MAX_WORLD_SIZE = 32
"""Worker ranks and parts of one slot, at most: what a slot record has room for."""


@dataclass(frozen=True, slots=True)
class SpaceName:
    """What files a key besides itself: equal keys of different names never meet."""

    namespace: str
    tenant: str
    epoch: int


class FactsError(ValueError):
    """A fact is missing or out of range. The message names the field; nothing was registered."""


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """One KV-cache group: `part_bytes` is one rank's share of a chunk, without padding."""

    tokens_per_block: int
    part_bytes: int
    sliding_window_tokens: int = 0
    layer_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NamespaceFacts:
    """Rank-independent facts that scheduler and workers both know.

    `num_parts` is the world size, or 1 where all ranks hold equal bytes. `layer_names` of the groups stay
    empty with pipeline parallelism, where ranks hold different layers.
    """

    model: str
    weights_id: str
    kv_dtype: str
    hash_algorithm: str
    tokens_per_hash: int
    blocks_per_chunk: int
    kv_cache_layout: str
    groups: tuple[GroupFacts, ...]
    num_parts: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    extra: Mapping[str, str] = field(default_factory=dict)

    def chunk_tokens(self, group: int) -> int:
        """Tokens that one chunk of `group` covers."""
        return self.groups[group].tokens_per_block * self.blocks_per_chunk

    def slot_bytes(self, group: int) -> int:
        """Bytes of a slot for chunks of `group`, all parts and padding included."""
        return slot_bytes(self.groups[group].part_bytes, self.num_parts)

    def digest(self) -> str:
        """32 hex digits of SHA-256 over the facts as canonical JSON; the same in every process."""
        facts = {"rule": DIGEST_RULE, **asdict(self), "extra": dict(self.extra)}
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def validate(self) -> None:
        """Raise FactsError, naming the first field that cannot be right."""
        for name in ("model", "weights_id", "kv_dtype", "hash_algorithm", "kv_cache_layout"):
            if not getattr(self, name):
                raise FactsError(f"namespace.{name} is empty")
            _check_at_most(f"namespace.{name}", utf8_bytes([getattr(self, name)]), MAX_TEXT_BYTES, "bytes")
        for name in (
            "tokens_per_hash",
            "blocks_per_chunk",
            "num_parts",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "decode_context_parallel_size",
        ):
            if getattr(self, name) < 1:
                raise FactsError(f"namespace.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_parts > MAX_WORLD_SIZE:
            raise FactsError(f"namespace.num_parts is {self.num_parts}; at most {MAX_WORLD_SIZE} can be")
        if not 1 <= len(self.groups) <= MAX_GROUPS:
            raise FactsError(f"namespace.groups has {len(self.groups)} entries; 1 to {MAX_GROUPS} can be")
        for index, group in enumerate(self.groups):
            for name in ("tokens_per_block", "part_bytes"):
                if getattr(group, name) < 1:
                    found = f"namespace.groups[{index}].{name} is {getattr(group, name)}"
                    raise FactsError(f"{found}; it must be at least 1")
        layer_names = [name for group in self.groups for name in group.layer_names]
        for field_name, names, most in (
            ("namespace.groups.layer_names", layer_names, MAX_TENSORS),
            ("namespace.extra", [*self.extra, *self.extra.values()], 2 * MAX_EXTRA_FACTS),
        ):
            _check_at_most(field_name, len(names), most, "texts")
            _check_at_most(field_name, utf8_bytes(names), MAX_NAMES_BYTES, "bytes")


def utf8_bytes(texts: Iterable[str]) -> int:
    """Bytes of these texts together."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _check_at_most(name: str, found: int, most: int, unit: str) -> None:
    if found > most:
        raise FactsError(f"{name} has {found} {unit}; at most {most} are allowed")
