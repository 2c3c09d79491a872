"""kvtier behind the seam: the reference engine's offload, made of the two shims.

This is the file to copy for another engine. What an engine has to bring is here and nowhere else: the facts
that make its KV interchangeable, its KV tensors, the names of its chunks, and the step in which each call of
the shims is made. What it need not care about is not here: sessions, deadlines, leases, credits and what
becomes of all that when the daemon dies.

The scheduler and the one worker live in the same process here. Where workers are processes of their own, the
jobs that `prepare_load` and `prepare_store` return travel to them with the engine's own messages, the results
travel back, and each process has the one client of its half.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from kvtier_client.client import OffloadClient
from kvtier_client.demo.cache import NULL_BLOCK, BlockTable, DeviceCache, OffloadKey
from kvtier_client.demo.model import ModelConfig
from kvtier_client.demo.offload import OffloadAdapter, RequestId, StoreJob
from kvtier_client.jobs import JobId, JobKind
from kvtier_client.options import ClientOptions, EngineIdentity, Role, new_instance_nonce
from kvtier_client.scheduler import SchedulerShim
from kvtier_client.worker import VerifyLoads, WorkerShim
from kvtier_ops.host import HostTensors
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts

READY_POLL_S = 0.002


@dataclass(slots=True)
class CopyStats:
    """Bytes that were copied, and the seconds that the copies took."""

    loaded_bytes: int = 0
    load_s: float = 0.0
    failed_loads: int = 0
    stored_bytes: int = 0
    store_s: float = 0.0
    failed_stores: int = 0


class KvtierOffload(OffloadAdapter):
    """Loads from and stores into the daemon at `address`, through a session for each half of the engine.

    Never waits for the daemon: while there is none, nothing is found and nothing is stored.
    """

    def __init__(
        self,
        address: str,
        engine_id: str,
        model: ModelConfig,
        cache: DeviceCache,
        *,
        blocks_per_chunk: int = 4,
        verify_loads: VerifyLoads = "always",
        options: ClientOptions | None = None,
    ) -> None:
        self.copies = CopyStats()
        self._cache = cache
        self._blocks_per_chunk = blocks_per_chunk
        layouts = group_layouts(cache, blocks_per_chunk)
        facts = namespace_facts(model, cache, layouts)
        nonce = new_instance_nonce()  # one for all processes of this start of the engine
        self._scheduler_client = OffloadClient(
            address, EngineIdentity(engine_id, nonce, Role.SCHEDULER), facts, options=options
        )
        self._worker_client = OffloadClient(
            address,
            EngineIdentity(engine_id, nonce, Role.WORKER),
            facts,
            geometry=[layout.tensors for layout in layouts],
            options=options,
        )
        self._scheduler = SchedulerShim(self._scheduler_client, null_block_id=NULL_BLOCK, offers_ahead=False)
        tensors = HostTensors([cache.pages(group) for group in range(len(cache.groups))])
        self._worker = WorkerShim(
            self._worker_client, tensors, layouts, blocks_per_chunk, part=0, verify_loads=verify_loads
        )
        self._loading: dict[JobId, RequestId] = {}
        self._ended_loads: list[tuple[RequestId, bool]] = []
        self._ended_stores: list[StoreJob] = []
        # After the shims were made: they have to hear of the first session too.
        self._worker_client.start()
        self._scheduler_client.start()

    # The engine's calls, in the order in which a request makes them

    def on_new_request(
        self,
        request_id: RequestId,
        keys: Sequence[Sequence[OffloadKey]],
        loadable_tokens: int,
        params: Mapping[str, object],
    ) -> None:
        last = self._blocks_per_chunk - 1
        chunk_keys = [blocks[last :: self._blocks_per_chunk] for blocks in keys]
        self._scheduler.add_request(request_id, chunk_keys, params, max_lookup_tokens=loadable_tokens)

    def lookup(self, request_id: RequestId, num_computed_tokens: int, max_load_tokens: int) -> int | None:
        # `loadable_tokens` has told the shim where to end: its answer is never more than `max_load_tokens`.
        return self._scheduler.lookup(request_id, num_computed_tokens)

    def begin_load(
        self,
        request_id: RequestId,
        block_ids: Sequence[BlockTable],
        first_blocks: Sequence[int],
        num_tokens: int,
    ) -> None:
        end = (first_blocks[0] + len(block_ids[0])) * self._cache.tokens_per_block
        job = self._scheduler.prepare_load(request_id, end - num_tokens, num_tokens, block_ids, first_blocks)
        self._loading[job.job_id] = request_id
        self._worker.submit_load(job)

    def finished_loads(self) -> Sequence[tuple[RequestId, bool]]:
        self._collect()
        ended, self._ended_loads = self._ended_loads, []
        return ended

    def store(
        self, request_id: RequestId, num_full_blocks: int, block_ids: Sequence[BlockTable]
    ) -> StoreJob | None:
        num_tokens = num_full_blocks * self._cache.tokens_per_block
        job = self._scheduler.prepare_store(request_id, num_tokens, block_ids)
        if job is None:
            return None
        # The forwards are done when this engine stores. One with a device queue submits behind an event.
        self._worker.submit_store(job)
        return StoreJob(job.job_id)

    def finished_stores(self) -> Sequence[StoreJob]:
        self._collect()
        ended, self._ended_stores = self._ended_stores, []
        return ended

    def wait_for_stores(self, jobs: Collection[StoreJob]) -> None:
        self._worker.wait([JobId(job) for job in jobs])

    def preempt(self, request_id: RequestId) -> None:
        """Do nothing: the next `lookup` says with `num_computed_tokens` what was lost."""

    def finish(self, request_id: RequestId) -> None:
        self._scheduler.finish(request_id)

    def end_step(self) -> None:
        self._scheduler.end_step()

    def _collect(self) -> None:
        """Hand the worker's results to the scheduler, and keep what the engine is to be told."""
        for result in self._worker.get_finished():
            if result.kind is JobKind.LOAD:
                self._scheduler.load_finished(result.job_id, result.ok, result.failed_keys)
                self._ended_loads.append((self._loading.pop(result.job_id), result.ok))
                self.copies.loaded_bytes += result.bytes
                self.copies.load_s += result.seconds
                self.copies.failed_loads += not result.ok
            else:
                self._scheduler.store_finished(result.job_id)
                self._ended_stores.append(StoreJob(result.job_id))
                self.copies.stored_bytes += result.bytes
                self.copies.store_s += result.seconds
                self.copies.failed_stores += not result.ok

    # Around the engine's life

    @property
    def ready(self) -> bool:
        """Whether both halves are attached, so that a lookup can find something."""
        return self._scheduler_client.ready and self._worker_client.attached

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for `ready`. Engines do not; whoever measures does, before the first request."""
        deadline = time.monotonic() + timeout_s
        while not self.ready and time.monotonic() < deadline:
            time.sleep(READY_POLL_S)
        return self.ready

    def counters(self) -> Mapping[str, int]:
        """Return what the scheduler's client has counted."""
        return self._scheduler_client.stats.snapshot()

    def close(self) -> None:
        """End the copies, then the sessions. The engine has no request left."""
        self._worker.close()
        self._scheduler_client.close()
        self._worker_client.close()


def group_layouts(cache: DeviceCache, blocks_per_chunk: int) -> list[GroupLayout]:
    """Say per group which tensors it has, and what one block of each takes."""
    return [
        GroupLayout(
            tuple(TensorLayout(f"layer.{layer}", cache.page_bytes) for layer in group.layers),
            blocks_per_chunk,
        )
        for group in cache.groups
    ]


def namespace_facts(model: ModelConfig, cache: DeviceCache, layouts: Sequence[GroupLayout]) -> NamespaceFacts:
    """Say what must be equal for one engine to use what another one stored.

    The weights follow from the configuration and its seed, so their digest stands for them. Whatever else
    changes a bit of the KV belongs in here too: another build of torch rounds differently.
    """
    weights = json.dumps(asdict(model), sort_keys=True)
    return NamespaceFacts(
        model="kvtier-demo",
        weights_id=hashlib.sha256(weights.encode()).hexdigest(),
        kv_dtype="float32",
        hash_algorithm="sha256-chained",
        tokens_per_hash=cache.tokens_per_block,
        blocks_per_chunk=layouts[0].blocks_per_chunk,
        kv_cache_layout="kv,token,head,dim",
        groups=tuple(
            GroupFacts(
                tokens_per_block=cache.tokens_per_block,
                part_bytes=layout.part_bytes,
                sliding_window_tokens=group.window or 0,
                layer_names=tuple(tensor.name for tensor in layout.tensors),
            )
            for group, layout in zip(cache.groups, layouts, strict=True)
        ),
        extra={"torch": torch.__version__},
    )
