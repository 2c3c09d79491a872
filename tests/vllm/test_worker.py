"""vLLM's worker class on jobs that it cannot take, without a daemon: what the connector is told of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.client.builders import FACTS
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LoadStoreSpec,
)

from kvtier_client.options import EngineIdentity, Role
from kvtier_client.vllm.connector import KVTierConnector
from kvtier_client.vllm.load_store import KVTierLoadSpec
from kvtier_client.vllm.worker import FailedLoad, KVTierOffloadingWorker

KEY = b"k" * 36
SOURCE = KVTierLoadSpec("r", 1, (1,), (1,), (KEY,), (1,), lease_id=5)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[KVTierOffloadingWorker]:
    page_bytes = FACTS.groups[0].part_bytes
    caches = CanonicalKVCaches(
        tensors=[CanonicalKVCacheTensor(torch.zeros((8, page_bytes), dtype=torch.int8), page_bytes)],
        group_data_refs=[[CanonicalKVCacheRef(0, page_bytes)]],
    )
    identity = EngineIdentity("engine-1", 7, Role.WORKER)
    made = KVTierOffloadingWorker(f"unix://{tmp_path / 'no.sock'}", identity, FACTS, caches, part=0)
    yield made
    made.shutdown()


class OtherSpec(LoadStoreSpec):
    """Of another offloading, which names neither request nor keys."""

    @staticmethod
    def medium() -> str:
        return "OTHER"


class OddBlocks:
    """vLLM's side of a job in a shape of another version."""

    def __init__(self, block_ids: Any, **columns: Any) -> None:
        self.block_ids = block_ids
        for name, column in columns.items():
            setattr(self, name, column)


def blocks(*block_ids: int) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(list(block_ids), group_sizes=[len(block_ids)], block_indices=[0])


def failed_load_of(worker: KVTierOffloadingWorker, source: Any, blocks: Any) -> FailedLoad:
    """Submit a load that cannot be one, and return what is told of it with its end."""
    assert worker.submit_load(1, source, blocks)
    (result,) = worker.get_finished()
    assert (result.job_id, result.success) == (1, True)  # vLLM asserts it
    (failed,) = worker.take_failed_loads()
    return failed


def test_a_load_whose_source_is_none_of_ours_is_told_as_failed_with_its_blocks(
    worker: KVTierOffloadingWorker,
) -> None:
    failed = failed_load_of(worker, OtherSpec(), blocks(3, 5))
    assert failed.block_ids == (3, 5)
    assert sum(failed.reasons.values()) == 1


def test_a_load_whose_blocks_lack_their_groups_is_told_as_failed_with_its_blocks(
    worker: KVTierOffloadingWorker,
) -> None:
    failed = failed_load_of(worker, SOURCE, OddBlocks([3, 5]))
    assert failed == FailedLoad("r", frozenset([KEY]), (3, 5), expedited=False, reasons={"error": 1})


@pytest.mark.parametrize("nameless", [OddBlocks(None), OddBlocks(object()), object()])
def test_a_load_whose_blocks_nobody_can_know_ends_the_engine_rather_than_its_answers_being_wrong(
    worker: KVTierOffloadingWorker, nameless: Any
) -> None:
    with pytest.raises((AttributeError, TypeError)):
        worker.submit_load(1, SOURCE, nameless)


def test_block_ids_in_a_plain_list_are_as_good_as_an_array(worker: KVTierOffloadingWorker) -> None:
    failed = failed_load_of(worker, SOURCE, OddBlocks([3], group_sizes=[1], block_indices=[0]))
    assert failed.block_ids == (3,)
    assert "error" not in failed.reasons  # it was a job, and found no daemon


def test_the_connector_names_the_blocks_of_a_failed_load_that_names_no_request(
    worker: KVTierOffloadingWorker,
) -> None:
    connector = KVTierConnector.__new__(KVTierConnector)
    connector.connector_worker = SimpleNamespace(worker=worker)
    worker.submit_load(1, OtherSpec(), blocks(3, 5))
    worker.get_finished()
    connector._take_failed_loads()
    assert connector.get_block_ids_with_load_errors() == {3, 5}
    assert connector._failed_requests == frozenset()
