"""KVTierOffloadingSpec: what vLLM makes in each of its processes, from which manager and worker come.

Owns how the two halves of one engine come to the same facts about it, each by itself. Opens nothing at
import or in the constructor, because vLLM may fork afterwards: clients start in `get_manager` and
`get_worker`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
    ReqContext,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from kvtier_client.client import OffloadClient
from kvtier_client.options import Role
from kvtier_client.vllm.connector import adopt
from kvtier_client.vllm.device import Device
from kvtier_client.vllm.facts import engine_facts, engine_identity, group_ids, namespace_facts
from kvtier_client.vllm.keys import ChunkKeys
from kvtier_client.vllm.manager import KVTierOffloadingManager
from kvtier_client.vllm.metrics import METRIC_DEFINITIONS
from kvtier_client.vllm.settings import Settings
from kvtier_client.vllm.worker import KVTierOffloadingWorker


class KVTierOffloadingSpec(OffloadingSpec):
    """Offloading to the kvtier daemon of the node.

    Raises SettingsError or another ValueError, at the engine's start, for what the user must change.
    """

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return dict(METRIC_DEFINITIONS)

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self._settings = Settings.from_extra_config(config.extra_config)
        self._engine = engine_facts.get()
        self._facts = namespace_facts(config, self._settings, self._engine)
        # Ranks that hold equal bytes share one part of a slot: rank 0 stores, all load.
        self.replicated_layout = config.replicated_layout

    def get_manager(self) -> OffloadingManager:
        if self._engine is None and "_offload_key_positions" not in getattr(
            ReqContext, "__dataclass_fields__", {}
        ):
            raise ValueError(
                "this vLLM's OffloadingConnector does not tell which keys a request has; use kvtier's own: "
                '"kv_connector": "KVTierConnector", "kv_connector_module_path": "kvtier_client.vllm"'
            )
        client = OffloadClient(
            self._settings.address,
            engine_identity(self.config, self._settings, self._engine, Role.SCHEDULER),
            self._facts,
            options=self._settings.client_options(),
        )
        return KVTierOffloadingManager(
            client,
            ChunkKeys(self._facts, group_ids(self.config)),
            has_connector=self._engine is not None,
            load_source=_host_memory(),
        )

    def device(self) -> Device | None:
        """Return where the KV tensors are; None = as torch says. A border for tests without a GPU."""
        return None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._engine is None:
            adopt(_connectors_of_this_worker())
        return KVTierOffloadingWorker(
            self._settings.address,
            engine_identity(self.config, self._settings, self._engine, Role.WORKER),
            self._facts,
            kv_caches,
            part=0 if self._facts.num_parts == 1 else self.config.parallel.rank,
            transfer=self._settings.transfer,
            device=self.device(),
            verify_loads=self._settings.verify_loads,
            options=self._settings.client_options(),
        )


def _connectors_of_this_worker() -> list[object]:
    """Return the connector that this process uses, or those in it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return []
    connector = get_kv_transfer_group()
    return list(getattr(connector, "_connectors", [connector]))


def _host_memory() -> object:
    """Return vLLM's name for hits in host memory; versions that do not ask have none."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.HOST
