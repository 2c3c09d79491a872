"""Specs for vLLM's own connector to hold kvtier against: vLLM's memory manager in the engine, and nothing.

vLLM's own CPU spec refuses the CPU platform, so its manager gets a worker here that copies with the same code
as kvtier's, at once and without threads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from kvtier_client.vllm.tensors import bind_tensors
from kvtier_ops.host import copy_in, copy_out
from kvtier_ops.namespace import GroupFacts, NamespaceFacts
from kvtier_ops.plan import plan_job


class CopyingWorker(OffloadingWorker):
    """Copies between the device blocks and an array of chunks, when a job is submitted."""

    def __init__(self, kv_caches: CanonicalKVCaches, facts: NamespaceFacts, num_chunks: int) -> None:
        bound = bind_tensors(kv_caches, facts)
        self._tensors, self._layouts = bound.on_host(), bound.layouts
        self._blocks_per_chunk = facts.blocks_per_chunk
        self._chunks = np.zeros((num_chunks, facts.groups[0].part_bytes), np.uint8)
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, copy_out)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        return self._copy(job_id, dst_spec, src_spec, copy_in)

    def _copy(self, job_id: int, blocks: GPULoadStoreSpec, chunks: Any, copy: Any) -> bool:
        copies = plan_job(
            blocks.block_ids.tolist(), blocks.group_sizes, blocks.block_indices, self._blocks_per_chunk
        )
        for each, chunk in zip(copies, chunks.block_ids.tolist(), strict=True):
            copy(self._tensors, self._layouts[each.group], each, self._chunks[chunk])
        self._finished.append(TransferResult(job_id=job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Do nothing: every job is over when it was submitted."""


class NativeSpec(OffloadingSpec):
    """vLLM's CPUOffloadingManager with `num_chunks` chunks, LRU."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        definitions: dict[str, Any] = CPUOffloadingSpec.build_metric_definitions(extra_config)
        return definitions

    def get_manager(self) -> OffloadingManager:
        return CPUOffloadingManager(self.extra_config["num_chunks"])  # its name differs between versions

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return CopyingWorker(kv_caches, _facts(self.config), self.extra_config["num_chunks"])


class NothingManager(OffloadingManager):
    """Has nothing and wants nothing: what a call to a manager costs at least."""

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.MISS

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        raise AssertionError("nothing was a hit")

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput:
        return PrepareStoreOutput([], LoadStoreSpec(), [])

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()


class NothingSpec(NativeSpec):
    """Offloads nothing."""

    def get_manager(self) -> OffloadingManager:
        return NothingManager()

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return CopyingWorker(kv_caches, _facts(self.config), 1)


def _facts(config: Any) -> NamespaceFacts:
    size = config.cache.blocks_per_chunk
    part_bytes = config.worker_kv_bytes_per_block * size
    return NamespaceFacts(
        model="any",
        weights_id="any",
        kv_dtype="any",
        hash_algorithm="any",
        tokens_per_hash=config.cache.tokens_per_hash,
        blocks_per_chunk=size,
        kv_cache_layout="any",
        groups=tuple(GroupFacts(group.tokens_per_block, part_bytes) for group in config.groups),
    )
