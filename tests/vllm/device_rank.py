"""vLLM's worker class over a device of shared memory, with the scheduler's half that gives it slots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from tests.client.vllm.shared_device import SharedDevice
from tests.daemon_process import WAIT_S, wait_until
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)

from kvtier_client.bench.block_client import PATIENT, chunk_key
from kvtier_client.client import OffloadClient
from kvtier_client.context import ReqContext
from kvtier_client.options import EngineIdentity, Role, new_instance_nonce
from kvtier_client.vllm.load_store import KVTierLoadSpec, KVTierStoreSpec
from kvtier_client.vllm.worker import FailedLoad, KVTierOffloadingWorker
from kvtier_ops.namespace import GroupFacts, NamespaceFacts

NUM_BLOCKS = 32
PAGES = (4096, 2048)
BLOCKS_PER_CHUNK = 2
PART_BYTES = sum(PAGES) * BLOCKS_PER_CHUNK
POOL_BYTES = 256 * PART_BYTES


class DeviceRank:
    """An engine of one rank with two KV tensors of 32 blocks, two blocks a chunk. A context manager."""

    def __init__(
        self,
        address: str,
        device: SharedDevice,
        *,
        padding_bytes: int = 0,
        on_device: bool = True,
        **options: Any,
    ) -> None:
        self.device = device
        self.tensors = [device.tensor(NUM_BLOCKS, page, gap_bytes=64) for page in PAGES]
        for number, tensor in enumerate(self.tensors):
            generator = np.random.default_rng(number)
            tensor.copy_(torch.from_numpy(generator.integers(-128, 128, tuple(tensor.shape), np.int8)))
        facts = NamespaceFacts(
            model="device",
            weights_id="0",
            kv_dtype="int8",
            hash_algorithm="number",
            tokens_per_hash=16,
            blocks_per_chunk=BLOCKS_PER_CHUNK,
            kv_cache_layout="rows",
            groups=(
                GroupFacts(tokens_per_block=16, part_bytes=PART_BYTES + padding_bytes * BLOCKS_PER_CHUNK),
            ),
        )
        nonce = new_instance_nonce()
        self.scheduler = OffloadClient(
            address, EngineIdentity("device", nonce, Role.SCHEDULER), facts, options=PATIENT
        )
        caches = CanonicalKVCaches(
            tensors=[
                CanonicalKVCacheTensor(tensor, page) for tensor, page in zip(self.tensors, PAGES, strict=True)
            ],
            group_data_refs=[[CanonicalKVCacheRef(index, page) for index, page in enumerate(PAGES)]],
        )
        self.worker = KVTierOffloadingWorker(
            address,
            EngineIdentity("device", nonce, Role.WORKER),
            facts,
            caches,
            part=0,
            device=device if on_device else None,
            options=PATIENT,
            **options,
        )
        self._job_ids = itertools.count(1)
        self._results: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.scheduler.start()
        self.wait_attached()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.device.compute.let_go()
        self.scheduler.close()
        self.worker.shutdown()
        self.device.close()

    def wait_attached(self) -> None:
        """Wait until both halves are attached and know of each other.

        The scheduler hears of its worker before the worker has mapped the pool, and what is stored in between
        is not copied.
        """
        assert self.worker._client.wait_attached(WAIT_S), "the worker is not attached"
        wait_until(lambda: self.scheduler.ready, "scheduler and worker are attached")

    @property
    def remote(self) -> Any:
        """What has the daemon copy."""
        return self.worker._shim._remote

    def wait_remote(self) -> None:
        """Wait until the daemon copies."""
        wait_until(lambda: self.remote.ready, "the daemon has opened the memory")

    def store(self, chunks: Sequence[int], block_ids: Sequence[int]) -> int:
        """Begin to store blocks as chunks, two each; returns the job."""
        keys = [chunk_key(chunk) for chunk in chunks]
        grant = self.scheduler.prepare_store(ReqContext(f"store-{chunks[0]}", None), keys)
        assert len(grant.slot_ids) == len(keys), grant.reason
        job_id = next(self._job_ids)
        pool_id = self.scheduler.session.pool_id if self.scheduler.session else 0
        spec = KVTierStoreSpec(
            "r", pool_id, tuple(grant.slot_ids), tuple(grant.generations), tuple(keys), (len(keys),)
        )
        assert self.worker.submit_store(job_id, _blocks(block_ids), spec)
        return job_id

    def load(self, chunks: Sequence[int], block_ids: Sequence[int], first_block: int = 0) -> int:
        """Begin to load chunks into blocks, from the `first_block`th on; returns the job."""
        keys = [chunk_key(chunk) for chunk in chunks]
        answer = self.scheduler.lookup(ReqContext(f"load-{chunks[0]}", None), keys)
        assert len(answer.slot_ids) == len(keys), answer
        job_id, lease_id = next(self._job_ids), self.scheduler.new_lease_id()
        self.scheduler.start_load(answer.lease_id, lease_id, answer.slot_ids)
        self.scheduler.flush()
        pool_id = self.scheduler.session.pool_id if self.scheduler.session else 0
        spec = KVTierLoadSpec(
            req_id="r",
            pool_id=pool_id,
            slot_ids=tuple(answer.slot_ids),
            generations=tuple(answer.generations),
            keys=tuple(keys),
            group_slots=(len(keys),),
            lease_id=lease_id,
        )
        assert self.worker.submit_load(job_id, spec, _blocks(block_ids, first_block))
        return job_id

    def is_over(self, job_id: int) -> bool:
        """Whether vLLM was told of the job's end."""
        self._results |= {result.job_id: result for result in self.worker.get_finished()}
        return job_id in self._results

    def end(self, job_id: int) -> list[FailedLoad]:
        """Wait for the end of a job; returns the loads that brought nothing."""
        wait_until(lambda: self.is_over(job_id), f"job {job_id} ends")
        assert self._results[job_id].success, "vLLM would end the engine"
        return list(self.worker.take_failed_loads())

    def store_all(self, chunks: Sequence[int], block_ids: Sequence[int]) -> None:
        """Store, and wait until the chunks can be found."""
        self.end(self.store(chunks, block_ids))
        keys = [chunk_key(chunk) for chunk in chunks]

        def are_there() -> bool:
            answer = self.scheduler.lookup(ReqContext("look", None), keys, lease=False)
            return all(int(status) in (1, 2) for status in answer.statuses)

        wait_until(are_there, "the chunks are published")

    def load_all(self, chunks: Sequence[int], block_ids: Sequence[int]) -> None:
        """Load, successfully."""
        assert self.end(self.load(chunks, block_ids)) == []

    def blocks(self, block_ids: Sequence[int]) -> list[torch.Tensor]:
        """Return the bytes of blocks, per tensor."""
        return [tensor[list(block_ids)].clone() for tensor in self.tensors]

    def same(self, left: Sequence[int], right: Sequence[int]) -> bool:
        """Whether the blocks hold the same bytes."""
        return all(map(torch.equal, self.blocks(left), self.blocks(right)))


def _blocks(block_ids: Sequence[int], first_block: int = 0) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(list(block_ids), group_sizes=[len(block_ids)], block_indices=[first_block])
