"""A spec that writes down the bytes of every block that is stored and loaded. For tests only.

It reads vLLM's own tensors, so it shares nothing with the copies that it checks. For models with one group
and one block a chunk. Lines of the file that $KVTIER_RECORD names: {"store" or "load": {key: digest}}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvtier_client.vllm.spec import KVTierOffloadingSpec

FILE_VARIABLE = "KVTIER_RECORD"


class RecordingSpec(KVTierOffloadingSpec):
    """kvtier's spec, watched."""

    def get_worker(self, kv_caches: Any) -> Any:
        worker: Any = super().get_worker(kv_caches)
        tensors = [each.tensor for each in kv_caches.tensors]
        loads: dict[int, tuple[Any, Any]] = {}
        submit_store, submit_load, get_finished = worker.submit_store, worker.submit_load, worker.get_finished

        def recorded_store(job_id: int, src: Any, dst: Any) -> Any:
            record("store", dst.keys, src.block_ids, tensors)  # before anybody may copy
            return submit_store(job_id, src, dst)

        def recorded_load(job_id: int, src: Any, dst: Any, **options: Any) -> Any:
            loads[job_id] = (src.keys, dst.block_ids)
            return submit_load(job_id, src, dst, **options)

        def recorded_finished() -> Any:
            results = get_finished()
            for result in results:
                if (load := loads.pop(result.job_id, None)) is not None:
                    record("load", *load, tensors)
            return results

        worker.submit_store, worker.submit_load = recorded_store, recorded_load
        worker.get_finished = recorded_finished
        return worker


def record(kind: str, keys: Iterable[bytes], block_ids: Any, tensors: list[Any]) -> None:
    """Append the digests of some blocks."""
    digests = {}
    for key, block_id in zip(keys, block_ids.tolist(), strict=True):
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor[block_id].contiguous().numpy().tobytes())
        digests[key.hex()] = digest.hexdigest()
    with Path(os.environ[FILE_VARIABLE]).open("a") as file:
        file.write(json.dumps({kind: digests}) + "\n")
