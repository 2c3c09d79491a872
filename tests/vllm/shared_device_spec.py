"""A spec whose vLLM has its KV cache in shared memory, as if that were a device. For tests only.

$KVTIER_EXPORT_PROBLEM: why that memory cannot be exported.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from tests.client.vllm.shared_device import SharedDevice

from kvtier_client.vllm.device import Device
from kvtier_client.vllm.spec import KVTierOffloadingSpec

PROBLEM_VARIABLE = "KVTIER_EXPORT_PROBLEM"


class SharedDeviceSpec(KVTierOffloadingSpec):
    """kvtier's spec, on a device. vLLM makes it before it allocates the KV cache."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._shared = shared = SharedDevice(os.environ.get(PROBLEM_VARIABLE, ""))
        zeros = torch.zeros

        def shared_zeros(*size: Any, **options: Any) -> Any:
            # The one buffer of all layers is asked for as a number of bytes.
            if len(size) == 1 and isinstance(size[0], int) and options.get("dtype") is torch.int8:
                return shared.tensor(1, size[0])[0]
            return zeros(*size, **options)

        torch.zeros = shared_zeros

    def device(self) -> Device:
        return self._shared
