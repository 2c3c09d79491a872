"""KVTierConnector: vLLM's OffloadingConnector that survives a failed load, and asks early.

vLLM's own connector asserts that every load succeeds. This one reports which requests lost theirs, so that
the scheduler computes them (`kv_load_failure_policy: recompute`), and tells the manager which keys failed, so
that the request does not look them up, hit, and fail for ever. It also sees a request when it is added, a
step or more before its first lookup.

Owns what passes between the two roles of one connector: failed loads, from the workers to the scheduler. Runs
on the main threads of the EngineCore and of the workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger

from kvtier_client.vllm.facts import EngineFacts, describe_engine, engine_facts
from kvtier_client.vllm.manager import KVTierOffloadingManager
from kvtier_client.vllm.versions import is_at_least
from kvtier_client.vllm.worker import FailedLoad, KVTierOffloadingWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvtier")

SPEC_NAME = "KVTierOffloadingSpec"
SPEC_MODULE_PATH = "kvtier_client.vllm"

_SYNC_BUDGET = "sync_load_budget_bytes"


@dataclass
class KVTierWorkerMetadata(OffloadingWorkerMetadata):
    """What one step's workers tell the scheduler: vLLM's ended jobs, and which loads brought nothing."""

    failed_keys: dict[str, set[bytes]] = field(default_factory=dict)
    """Request id -> keys that did not arrive."""
    failure_reasons: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Why workers copy through shared memory themselves and should not have to, since the last step."""

    @classmethod
    def of(cls, meta: OffloadingWorkerMetadata) -> KVTierWorkerMetadata:
        """Return vLLM's metadata as ours."""
        if isinstance(meta, cls):
            return meta
        return cls(**{each.name: getattr(meta, each.name) for each in fields(meta)})

    def add(self, load: FailedLoad) -> None:
        """Note a load of this rank."""
        self.failed_keys.setdefault(load.req_id, set()).update(load.keys)
        self.failure_reasons.update(load.reasons)

    def aggregate(self, other: Any) -> KVTierWorkerMetadata:
        """Put two ranks together."""
        merged = self.of(super().aggregate(other))
        merged.failed_keys = {req_id: set(keys) for req_id, keys in self.failed_keys.items()}
        merged.failure_reasons = Counter(self.failure_reasons)
        merged.fallbacks = Counter(self.fallbacks)
        if isinstance(other, KVTierWorkerMetadata):
            for req_id, keys in other.failed_keys.items():
                merged.failed_keys.setdefault(req_id, set()).update(keys)
            merged.failure_reasons.update(other.failure_reasons)
            merged.fallbacks.update(other.fallbacks)
        return merged


class KVTierConnector(OffloadingConnector):
    """Turned on by `kv_connector: KVTierConnector, kv_connector_module_path: kvtier_client.vllm`.

    Names the spec itself. Wrong settings raise at construction, which is when vLLM starts.
    """

    # Set here and not in __init__: a plain OffloadingConnector becomes one of these after its own.
    _failed_requests: frozenset[str] = frozenset()
    _failed_blocks: frozenset[int] = frozenset()
    _unreported: tuple[FailedLoad, ...] = ()
    _defers: bool = False
    """Whether a request was told to wait in this step."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        fill_in_spec(vllm_config)
        _adapt_to_version(vllm_config, kv_cache_config)
        facts = describe_engine(vllm_config, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            _warn_of_policy(vllm_config)
            _warn_of_keys(facts)
        token = engine_facts.set(facts)
        try:
            super().__init__(vllm_config, role, kv_cache_config)
        finally:
            engine_facts.reset(token)

    # What the API-server process calls, which never constructs a connector

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        fill_in_spec(vllm_config)
        layout: str | None = super().get_required_kvcache_layout(vllm_config)
        return layout

    @classmethod
    def build_prom_metrics(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        """Declare vLLM's metrics and kvtier's."""
        fill_in_spec(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)

    # Scheduler

    @property
    def _manager(self) -> KVTierOffloadingManager:
        assert self.connector_scheduler is not None
        manager = self.connector_scheduler.manager
        assert isinstance(manager, KVTierOffloadingManager), f"manager is a {type(manager).__name__}"
        return manager

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        most = (request.kv_transfer_params or {}).get("max_load_tokens")
        # As strict as vLLM: it takes an int, and ignores False and 0.0.
        may_load = not request.skip_reading_prefix_cache and not (type(most) is int and most == 0)
        self._manager.add_request(request.request_id, request.block_hashes, may_load)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._defers and not _OVERTAKING_IS_SAFE:
            return None, False
        if not request.skip_reading_prefix_cache and not self._manager.begin_attempt(
            request.request_id, request.block_hashes, num_computed_tokens
        ):
            self._defers = True
            return None, False
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self._defers |= matched[0] is None
        return matched

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        self._manager.note_scheduled(
            scheduler_output.preempted_req_ids or (), scheduler_output.num_scheduled_tokens
        )
        meta = super().build_connector_meta(scheduler_output)
        self._manager.end_step()
        self._defers = False
        return meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, KVTierWorkerMetadata) and meta.failed_keys:
            self._manager.note_failed_loads(meta.failed_keys, meta.failure_reasons)
        if isinstance(meta, KVTierWorkerMetadata) and meta.fallbacks:
            self._manager.note_fallbacks(meta.fallbacks)
        super().update_connector_output(connector_output)

    # Workers

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        sent, received = super().get_finished(finished_req_ids)
        self._take_failed_loads()
        return sent, received

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        if self._failed_requests:
            results.failed_recving |= self._failed_requests
            self._failed_requests = frozenset()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        blocks, self._failed_blocks = self._failed_blocks, frozenset()
        return set(blocks)

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        meta = super().build_connector_worker_meta()
        fallbacks = self._worker.take_fallbacks()
        if meta is None and not self._unreported and not fallbacks:
            return None
        told = KVTierWorkerMetadata.of(OffloadingWorkerMetadata() if meta is None else meta)
        told.fallbacks.update(fallbacks)
        for load in self._unreported:
            told.add(load)
        self._unreported = ()
        return told

    @property
    def _worker(self) -> KVTierOffloadingWorker:
        assert self.connector_worker is not None
        worker = self.connector_worker.worker
        assert isinstance(worker, KVTierOffloadingWorker), f"worker is a {type(worker).__name__}"
        return worker

    def _take_failed_loads(self) -> None:
        failed = self._worker.take_failed_loads()
        if not failed:
            return
        self._unreported += tuple(failed)
        for load in failed:
            if load.expedited or not _REPORTS_REQUESTS or not load.req_id:
                self._failed_blocks |= frozenset(load.block_ids)
            else:
                self._failed_requests |= {load.req_id}


_REPORTS_REQUESTS = hasattr(OffloadingConnector, "get_transfer_results")
"""Whether failed loads are named by request. Older versions know blocks only, and one group only."""


_OVERTAKING_IS_SAFE = is_at_least(31)
"""Whether a request may begin to load while an earlier one still waits for an answer.

Up to 0.30 vLLM looks at waiting requests in their order and stops at the first that finds no blocks. Later
ones that have blocks, because they load, are not reached then: when the first needs these, all wait for ever.
"""


def fill_in_spec(vllm_config: VllmConfig) -> None:
    """Name kvtier's spec in the connector's settings, where vLLM looks for it. Repeating it does nothing."""
    extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra_config.setdefault("spec_name", SPEC_NAME)
    extra_config.setdefault("spec_module_path", SPEC_MODULE_PATH)


def adopt(connectors: Iterable[object]) -> None:
    """Make a plain OffloadingConnector of this worker a KVTierConnector.

    It would take a load that brought nothing for a good one, or end the engine. Nothing but methods differs,
    so changing the class of the object is enough. Raises ValueError if there is none to change.
    """
    seen = []
    for connector in connectors:
        if type(connector) is OffloadingConnector:
            connector.__class__ = KVTierConnector
        if isinstance(connector, KVTierConnector):
            return
        seen.append(type(connector).__name__)
    raise ValueError(
        f"kvtier cannot tell {' and '.join(seen) or 'this connector'} of failed loads, which it would take "
        'for good ones; use kvtier\'s own: "kv_connector": "KVTierConnector", "kv_connector_module_path": '
        '"kvtier_client.vllm"'
    )


def _warn_of_policy(vllm_config: VllmConfig) -> None:
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != "recompute":
        logger.warning(
            "kvtier: kv_load_failure_policy is %r: a request whose KV cannot be loaded (the daemon was "
            "restarted, a chunk was evicted) ENDS WITH AN ERROR. Set it to 'recompute' in "
            "--kv-transfer-config, and it is computed instead",
            policy,
        )


def _warn_of_keys(facts: EngineFacts) -> None:
    if not facts.keys_outlive_engine:
        logger.warning(
            "kvtier: this vLLM draws its block hashes anew at every start, so nothing that this engine "
            "stores is found by another one or after a restart. Set PYTHONHASHSEED to the same number for "
            "all engines"
        )


def _adapt_to_version(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse, or turn off with a warning, what this vLLM could not recover from. Raises ValueError."""
    extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
    several_groups = len(kv_cache_config.kv_cache_groups) > 1
    if getattr(kv_cache_config, "hisparse_host_num_blocks", None) is not None:
        raise ValueError("kvtier does not support HiSparse attention: run without its --kv-transfer-config")
    if several_groups and not _REPORTS_REQUESTS:
        raise ValueError(
            "this model has several KV-cache groups, and this vLLM ends when a load of such a model fails: "
            "kvtier needs vLLM 0.30 or newer for it"
        )
    if not _REPORTS_REQUESTS and not extra_config.get("offload_prompt_only", True):
        # Up to 0.29 the chunk that ends with the last sampled token is stored, whose KV was never computed.
        logger.warning("kvtier: offload_prompt_only=false stores wrong KV in this vLLM, and is ignored")
        extra_config["offload_prompt_only"] = True
    is_async = bool(getattr(vllm_config.scheduler_config, "async_scheduling", False))
    if extra_config.get(_SYNC_BUDGET) and (several_groups or is_async):
        logger.warning(
            "kvtier: %s is ignored: vLLM could not recover from a synchronous load that fails, with several "
            "KV-cache groups or with asynchronous scheduling",
            _SYNC_BUDGET,
        )
        extra_config[_SYNC_BUDGET] = 0
