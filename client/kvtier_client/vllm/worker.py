"""The worker side in vLLM: its OffloadingWorker, over a WorkerShim.

Owns the translation of jobs, and which loads brought nothing. vLLM asserts that every job succeeds, so every
job is reported as a success; KVTierConnector asks `take_failed_loads` in the same step and tells the
scheduler. No call raises into the engine, with one exception: a load whose blocks nobody can name. It could
not be told as failed, and an engine that ends is better than one that computes with what the blocks held
before. Runs on the worker's main thread only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from kvtier_client.client import OffloadClient
from kvtier_client.jobs import CopyFailure, JobId, JobResult, LoadJob, StoreJob
from kvtier_client.options import ClientOptions, EngineIdentity
from kvtier_client.vllm.device import Device
from kvtier_client.vllm.load_store import KVTierLoadSpec, KVTierStoreSpec
from kvtier_client.vllm.paths import choose_path
from kvtier_client.vllm.settings import Transfer
from kvtier_client.vllm.tensors import bind_tensors
from kvtier_client.worker import VerifyLoads, WorkerShim
from kvtier_ops.namespace import NamespaceFacts

logger = init_logger("vllm.kvtier")


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """A load that was reported as ended and did not bring all its bytes: none of its blocks is of use."""

    req_id: str
    """"" where the job named no request; then only the blocks tell whose it was."""
    keys: frozenset[bytes]
    block_ids: tuple[int, ...]
    expedited: bool
    """The step waited for it: the request is being computed already."""
    reasons: Mapping[str, int]
    """Chunks by reason."""


@dataclass(frozen=True, slots=True)
class _Load:
    """What a load that fails is told with."""

    req_id: str
    keys: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    expedited: bool

    @classmethod
    def of(cls, source: LoadStoreSpec, blocks: GPULoadStoreSpec, expedited: bool) -> _Load:
        """Read what the specs say, however odd they are. Raises where they name no blocks."""
        is_ours = isinstance(source, KVTierLoadSpec)
        req_id, keys = (source.req_id, source.keys) if is_ours else ("", ())
        return cls(req_id, keys, _block_ids(blocks), expedited)


class KVTierOffloadingWorker(OffloadingWorker):
    """One rank's copies. Starts the client, and closes it.

    `part` is which part of a slot is this rank's. Raises UnsupportedTensors, at the engine's start.
    """

    def __init__(
        self,
        address: str,
        identity: EngineIdentity,
        facts: NamespaceFacts,
        kv_caches: CanonicalKVCaches,
        part: int,
        *,
        transfer: Transfer = "auto",
        device: Device | None = None,
        verify_loads: VerifyLoads = "always",
        options: ClientOptions | None = None,
    ) -> None:
        """`device`: where the tensors are, None = as torch says."""
        bound = bind_tensors(kv_caches, facts)
        geometry = [layout.tensors for layout in bound.layouts]
        self._client = OffloadClient(address, identity, facts, geometry=geometry, options=options)
        path = choose_path(transfer, bound, address, options.tls if options else None, device)
        self._fallbacks: Counter[str] = Counter({"export": 1} if path.problem else {})
        self._shim = WorkerShim(
            self._client,
            path.tensors,
            bound.layouts,
            facts.blocks_per_chunk,
            part,
            verify_loads=verify_loads,
            remote=path.remote,
        )
        self._loads: dict[int, _Load] = {}
        self._failed: list[FailedLoad] = []
        self._refused: list[tuple[int, _Load | None]] = []
        """Jobs that could not even be submitted, None for a store. They are over."""
        self._bugs: set[str] = set()
        self._client.start()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        try:
            assert isinstance(dst_spec, KVTierStoreSpec), f"{type(dst_spec).__name__} is no KVTierStoreSpec"
            sizes, indices = _groups(src_spec)
            self._shim.submit_store(
                StoreJob(
                    job_id=JobId(job_id),
                    pool_id=dst_spec.pool_id,
                    slot_ids=dst_spec.slot_ids,
                    generations=dst_spec.generations,
                    keys=dst_spec.keys,
                    block_ids=_block_ids(src_spec),
                    group_sizes=sizes,
                    block_indices=indices,
                    group_slots=dst_spec.group_slots,
                )
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not kill the engine
            self._refuse(job_id, None, "submit_store", error)
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        load = _Load.of(src_spec, dst_spec, expedited)  # not in the `try`: see the top of this file
        try:
            assert isinstance(src_spec, KVTierLoadSpec), f"{type(src_spec).__name__} is no KVTierLoadSpec"
            sizes, indices = _groups(dst_spec)
            self._shim.submit_load(
                LoadJob(
                    job_id=JobId(job_id),
                    pool_id=src_spec.pool_id,
                    slot_ids=src_spec.slot_ids,
                    generations=src_spec.generations,
                    keys=src_spec.keys,
                    block_ids=load.block_ids,
                    group_sizes=sizes,
                    block_indices=indices,
                    group_slots=src_spec.group_slots,
                    load_lease_id=src_spec.lease_id,
                )
            )
            self._loads[job_id] = load
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not kill the engine
            self._refuse(job_id, load, "submit_load", error)
        return True

    def get_finished(self) -> list[TransferResult]:
        results = [self._result(result) for result in self._shim.get_finished()]
        if self._refused:
            for job_id, load in self._refused:
                self._fail_load(load, None)
                results.append(TransferResult(job_id=job_id, success=True))
            self._refused.clear()
        return results

    def _result(self, result: JobResult) -> TransferResult:
        job_id = int(result.job_id)
        load = self._loads.pop(job_id, None)
        if not result.ok:
            self._fail_load(load, result)
            return TransferResult(job_id=job_id, success=True)
        return TransferResult(
            job_id=job_id, success=True, transfer_size=result.bytes, transfer_time=result.seconds
        )

    def _fail_load(self, load: _Load | None, result: JobResult | None) -> None:
        """Note a failed load, None for a failed store: the daemon was told of it, and vLLM need not know.

        `result`: None where the load was never submitted.
        """
        if load is None:
            return
        self._failed.append(
            FailedLoad(
                req_id=load.req_id,
                keys=frozenset(load.keys) if result is None else result.failed_keys,
                block_ids=load.block_ids,
                expedited=load.expedited,
                # Without keys nobody knows how many chunks it was; counted it is all the same.
                reasons={CopyFailure.ERROR.value: len(load.keys) or 1} if result is None else result.failures,
            )
        )

    def take_failed_loads(self) -> Sequence[FailedLoad]:
        """Return the loads that `get_finished` has reported since the last call and that brought nothing."""
        if not self._failed:
            return ()
        failed, self._failed = self._failed, []
        return failed

    def take_fallbacks(self) -> Counter[str]:
        """Return why this worker copies itself and should not have to, since the last call: times by
        reason.
        """
        fallbacks, self._fallbacks = self._fallbacks, Counter()
        refused = self._shim.take_refusals()
        if refused:
            fallbacks["refused"] += refused
        return fallbacks

    def wait(self, job_ids: set[int]) -> None:
        self._shim.wait([JobId(job_id) for job_id in job_ids])

    def shutdown(self) -> None:
        self._shim.close()
        self._client.close()

    def _refuse(self, job_id: int, load: _Load | None, where: str, error: Exception) -> None:
        self._refused.append((job_id, load))
        if where not in self._bugs:
            self._bugs.add(where)
            logger.error(
                "kvtier's %s failed; requests compute instead. This is a bug: please report it",
                where,
                exc_info=error,
            )


def _block_ids(spec: GPULoadStoreSpec) -> tuple[int, ...]:
    """Return the block ids of vLLM's side of a job, as plain ints, whatever holds them."""
    return tuple(np.asarray(spec.block_ids).tolist())


def _groups(spec: GPULoadStoreSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the group sizes and block indices of vLLM's side of a job, as plain ints."""
    return tuple(int(size) for size in spec.group_sizes), tuple(int(index) for index in spec.block_indices)
