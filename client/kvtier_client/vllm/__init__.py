"""kvtier for vLLM: one flag, and KV cache survives in the daemon of the node.

    --kv-transfer-config '{"kv_connector": "KVTierConnector",
      "kv_connector_module_path": "kvtier_client.vllm", "kv_role": "kv_both",
      "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"address": "unix:///run/kvtier/kvtier.sock"}}'

The only room that imports vLLM. vLLM imports it in every process of an engine, also in the API server, which
only calls class methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtier_client.vllm.versions import check_version

if TYPE_CHECKING:
    from kvtier_client.vllm.connector import KVTierConnector
    from kvtier_client.vllm.spec import KVTierOffloadingSpec

__all__ = ["KVTierConnector", "KVTierOffloadingSpec"]


def __getattr__(name: str) -> Any:
    """Import a class when it is first asked for, and only with a vLLM whose classes are known.

    So that settings can be checked where no vLLM is.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version()
    from kvtier_client.vllm.connector import KVTierConnector
    from kvtier_client.vllm.spec import KVTierOffloadingSpec

    return {"KVTierConnector": KVTierConnector, "KVTierOffloadingSpec": KVTierOffloadingSpec}[name]
