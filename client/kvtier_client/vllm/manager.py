"""The scheduler side in vLLM: its OffloadingManager, answered by a KeyedSchedulerShim.

Owns the translation between vLLM's calls and the shim's, and one promise: no call raises, because an
exception in any of them kills the engine. What goes wrong here is a bug; it is logged, and the request
computes. Runs on the EngineCore's main thread only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    Locality,
    LookupResult,
    Medium,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

from kvtier_client.client import OffloadClient
from kvtier_client.jobs import NO_SLOT
from kvtier_client.keyed_scheduler import KeyedSchedulerShim, KeyStatus, LoadSlots
from kvtier_client.vllm.keys import ChunkKeys
from kvtier_client.vllm.load_store import KVTierLoadSpec, KVTierStoreSpec
from kvtier_client.vllm.metrics import MetricCollector

logger = init_logger("vllm.kvtier")

RESET_TIMEOUT_S = 0.25
"""What a weight update may wait for the daemon to confirm it, after at most `prepare_deadline_ms` for what is
still to be sent. Without its answer everything misses until it comes."""

START_WAIT_S = 1.0
"""What a start of the engine may wait for the daemon. It takes tens of milliseconds when one is there."""
START_POLL_S = 0.005

P = ParamSpec("P")
R = TypeVar("R")
Method = Callable[Concatenate["KVTierOffloadingManager", P], R]

_RESULTS = {
    KeyStatus.HIT: LookupResult.HIT,
    KeyStatus.PENDING: LookupResult.HIT_PENDING,
    KeyStatus.RETRY: LookupResult.RETRY,
    KeyStatus.MISS: LookupResult.MISS,
}


def _otherwise(result: R) -> Callable[[Method[P, R]], Method[P, R]]:
    """Answer with `result` where the method raises, and log the first exception of each method."""

    def decorate(method: Method[P, R]) -> Method[P, R]:
        @functools.wraps(method)
        def guarded(self: KVTierOffloadingManager, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not kill the engine
                self.note_bug(method.__name__, error)
                return result

        return guarded

    return decorate


class KVTierOffloadingManager(OffloadingManager):
    """vLLM's view of the daemon.

    `keys` names the chunks of a request. `load_source` is what vLLM reports hits as. With `has_connector` a
    KVTierConnector tells the keys of new requests, the failed loads and the end of each step; without, they
    are taken from what vLLM's own connector calls. Starts the client, and closes it.
    """

    def __init__(
        self, client: OffloadClient, keys: ChunkKeys, *, has_connector: bool, load_source: object = None
    ) -> None:
        self._client = client
        self._keys = keys
        self._has_connector = has_connector
        self._load_source = load_source
        self._shim = KeyedSchedulerShim(client, hears_of_failures=has_connector)
        self._metrics = MetricCollector(self._shim, client.stats)
        self._new: dict[str, ReqContext] = {}
        """Requests whose keys are not known yet."""
        self._preempted: set[str] = set()
        """Requests whose blocks are not theirs any more, until they are scheduled again."""
        self._failed_keys: dict[str, set[bytes]] = {}
        self._bugs: set[str] = set()
        client.start()
        self._wait_for_daemon()

    def _wait_for_daemon(self) -> None:
        """Give the engine's processes a moment to attach, so that its first requests are looked up too."""
        deadline = time.monotonic() + START_WAIT_S
        while not self._client.ready and time.monotonic() < deadline:
            time.sleep(START_POLL_S)
        if self._client.ready:
            logger.info("kvtier: attached")
        else:
            logger.warning(
                "kvtier: not attached yet (%s); requests compute until it is, and it goes on trying",
                self._client.away_reason or "waiting for the workers",
            )

    # What KVTierConnector tells beyond vLLM's calls

    @_otherwise(None)
    def add_request(self, req_id: str, block_hashes: Sequence[bytes], may_load: bool) -> None:
        """Send the lookup of a new request, for all full chunks of its prompt."""
        ctx = self._new.pop(req_id)
        self._add(ctx, self._keys.of_hashes(block_hashes), may_load)

    def _add(self, ctx: ReqContext, keys: Sequence[Sequence[bytes]], may_load: bool) -> None:
        self._new.pop(ctx.req_id, None)
        if self._shim.has_request(ctx.req_id):
            self._shim.finish(ctx.req_id)
        may_load = may_load and _may_load_from_pool(ctx)
        self._shim.add_request(ctx.req_id, keys, ctx.kv_transfer_params, None if may_load else 0)

    @_otherwise(True)
    def begin_attempt(self, req_id: str, block_hashes: Sequence[bytes], num_computed_tokens: int) -> bool:
        """Take the keys that a request has gained; False = no answer yet, its keys need not be asked for."""
        if not self._shim.has_request(req_id):
            return True
        for group in range(self._keys.num_groups):
            gained = self._keys.of_group(group, block_hashes, self._shim.num_keys(req_id, group))
            if gained:
                self._shim.extend_keys(req_id, group, gained)
        return self._shim.begin_attempt(req_id, num_computed_tokens)

    @_otherwise(None)
    def note_failed_loads(self, keys: Mapping[str, Collection[bytes]], reasons: Mapping[str, int]) -> None:
        """Hear which keys of which requests did not arrive, before `complete_load`."""
        for req_id, failed in keys.items():
            if self._shim.has_request(req_id):
                self._failed_keys.setdefault(req_id, set()).update(failed)
        self._metrics.note_failed_loads(reasons)

    @_otherwise(None)
    def note_fallbacks(self, reasons: Mapping[str, int]) -> None:
        """Hear that workers copy through shared memory themselves and should not have to."""
        self._metrics.note_fallbacks(reasons)

    @_otherwise(None)
    def note_scheduled(self, preempted: Collection[str], scheduled: Iterable[str]) -> None:
        """Hear who lost its blocks and who has blocks again, before the stores of a step are prepared.

        A preempted request may finish by the output of the step before. vLLM offers its last chunks then,
        with the block ids of before, which hold another request's KV by now.
        """
        if self._preempted:
            self._preempted.difference_update(scheduled)
        self._preempted.update(preempted)

    @_otherwise(None)
    def end_step(self) -> None:
        """Send what the step has to say, if anything."""
        self._shim.end_step()

    # vLLM's calls

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Remember the request: its keys come from KVTierConnector at once, else with the first lookup."""
        self._new[req_context.req_id] = req_context
        return RequestOffloadingContext()

    @_otherwise(LookupResult.MISS)
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        req_id = req_context.req_id
        if not self._has_connector:
            self._preempted.discard(req_id)  # it begins anew
        if not self._shim.has_request(req_id):
            # Without KVTierConnector: by now vLLM has noted all keys of the request in its context.
            positions = req_context._offload_key_positions  # noqa: SLF001 - there is no public list of them
            self._add(req_context, self._keys.of_positions(positions), may_load=True)
        return _RESULTS[self._shim.lookup(req_id, self._keys.wire(key))]

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """Name the slots to load from; where that fails, name none, so that the request computes."""
        try:
            wire_keys = self._keys.wire_all(keys)
            return self._load_spec(
                req_context.req_id, wire_keys, self._shim.prepare_load(req_context.req_id, wire_keys)
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not kill the engine
            self.note_bug("prepare_load", error)
            nowhere = LoadSlots(0, 0, (NO_SLOT,) * len(keys), (0,) * len(keys))
            return self._load_spec(req_context.req_id, self._keys.wire_all(keys), nowhere)

    def _load_spec(self, req_id: str, keys: Sequence[bytes], slots: LoadSlots) -> KVTierLoadSpec:
        return KVTierLoadSpec(
            req_id=req_id,
            lease_id=slots.lease_id,
            pool_id=slots.pool_id,
            slot_ids=slots.slot_ids,
            generations=slots.generations,
            keys=tuple(keys),
            group_slots=self._keys.count_by_group(keys),
        )

    @_otherwise(None)
    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        req_id = req_context.req_id
        self._shim.load_finished(req_id, self._keys.wire_all(keys), self._failed_keys.pop(req_id, ()))

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput:
        """Take slots for what is worth storing, as far as there are any, and give up the rest.

        An empty list gives up. None would have vLLM warn, and offer the same keys again in every step.
        """
        try:
            spec = self._prepare_store(keys, req_context)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not kill the engine
            self.note_bug("prepare_store", error)
            spec = KVTierStoreSpec.empty()
        return PrepareStoreOutput([self._keys.unwire(key) for key in spec.keys], spec, [])

    def _prepare_store(self, keys: Collection[OffloadKey], ctx: ReqContext) -> KVTierStoreSpec:
        if not self._shim.has_request(ctx.req_id):
            # Nobody looked it up, it may not read the cache: what it computes is stored on suspicion.
            self._add(ctx, [[] for _ in range(self._keys.num_groups)], may_load=False)
        if ctx.req_id in self._preempted:
            self._shim.give_up(len(keys))
            return KVTierStoreSpec.empty()
        whole = [key for key in keys if self._keys.is_whole_chunk(key, ctx)]
        slots = self._shim.prepare_store(ctx.req_id, self._keys.wire_all(whole))
        return KVTierStoreSpec(
            req_id=ctx.req_id,
            pool_id=slots.pool_id,
            slot_ids=slots.slot_ids,
            generations=slots.generations,
            keys=slots.keys,
            group_slots=self._keys.count_by_group(slots.keys),
        )

    @_otherwise(None)
    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        # vLLM says True always. How it went, every rank has told the daemon itself.
        self._shim.store_finished(self._keys.wire_all(keys))

    @_otherwise(None)
    def on_request_finished(self, req_context: ReqContext) -> None:
        self._new.pop(req_context.req_id, None)
        self._failed_keys.pop(req_context.req_id, None)
        self._preempted.discard(req_context.req_id)
        if self._shim.has_request(req_context.req_id):
            self._shim.finish(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext | None = None) -> None:
        """End the step, where no KVTierConnector does: before 0.33 stores are still to come then."""
        if not self._has_connector:
            if context is not None:
                self.note_scheduled(context.preempted_req_ids, ())
            self.end_step()

    @_otherwise(None)
    def get_stats(self) -> OffloadingConnectorStats | None:
        if not self._has_connector:
            self._shim.flush()
        return self._metrics.collect()

    @_otherwise(None)
    def reset_cache(self) -> None:
        """Move to another epoch: the weights are others now. Other engines keep what they have."""
        self._failed_keys.clear()
        if not self._shim.reset(timeout_s=RESET_TIMEOUT_S):
            logger.warning("kvtier has not confirmed the new weights yet; every lookup misses until it has")

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> Any:
        """Say where a hit came from: host memory."""
        return self._load_source

    def take_events(self) -> Iterable[Any]:
        """Return none: kvtier tells its events itself, for all engines of the node."""
        return ()

    def shutdown(self) -> None:
        """Close the session. Takes two seconds at most."""
        self._client.close()

    def note_bug(self, where: str, error: Exception) -> None:
        """Log an exception that must not reach the engine, once for each method."""
        if where not in self._bugs:
            self._bugs.add(where)
            logger.error(
                "kvtier's %s failed; requests compute instead. This is a bug: please report it",
                where,
                exc_info=error,
            )


def _may_load_from_pool(ctx: ReqContext) -> bool:
    """Tell whether a request's `kv_load_tiers` lets it load from host memory of this node."""
    tiers = getattr(ctx, "load_tier_filter", None)
    return tiers is None or bool(tiers.allows(Medium.CPU, Locality.LOCAL))
