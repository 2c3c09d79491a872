"""Both shims over the real client, with nobody at the address: the engine must not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtier_client import EngineIdentity, OffloadClient, Role, new_instance_nonce
from kvtier_client.jobs import JobId, LoadJob, StoreJob
from kvtier_client.requests import SkipReason
from kvtier_client.scheduler import SchedulerShim
from kvtier_client.worker import WorkerShim
from kvtier_ops.host import HostTensors
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts

TENSORS = (TensorLayout("layer.0", 1024),)
LAYOUT = GroupLayout(TENSORS, blocks_per_chunk=1)
FACTS = NamespaceFacts(
    model="model",
    weights_id="weights",
    kv_dtype="float32",
    hash_algorithm="sha256",
    tokens_per_hash=16,
    blocks_per_chunk=1,
    kv_cache_layout="LBHNC",
    groups=(GroupFacts(16, LAYOUT.part_bytes),),
)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[SchedulerShim]:
    client = OffloadClient(
        f"unix://{tmp_path}/nobody.sock",
        EngineIdentity("engine", new_instance_nonce(), Role.SCHEDULER),
        FACTS,
    )
    shim = SchedulerShim(client)
    client.start()
    yield shim
    client.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerShim]:
    client = OffloadClient(
        f"unix://{tmp_path}/nobody.sock",
        EngineIdentity("engine", new_instance_nonce(), Role.WORKER),
        FACTS,
        geometry=[TENSORS],
    )
    shim = WorkerShim(client, HostTensors([[np.zeros((4, 1024), np.uint8)]]), [LAYOUT], 1, part=0)
    client.start()
    yield shim
    shim.close()
    client.close()


def test_every_lookup_is_a_miss_at_once_and_nothing_is_stored(scheduler: SchedulerShim) -> None:
    scheduler.add_request("r", [[b"key-%d" % chunk for chunk in range(3)]], {"max_offload_tokens": 1000})
    assert scheduler.lookup("r", 0) == 0
    assert scheduler.prepare_store("r", 48, [[1, 2, 3]]) is None
    scheduler.end_step()
    scheduler.finish("r")
    scheduler.end_step()

    assert scheduler.stats.skipped == {SkipReason.AWAY: 3}


def test_a_load_that_was_prepared_all_the_same_fails_in_the_worker(
    scheduler: SchedulerShim, worker: WorkerShim
) -> None:
    scheduler.add_request("r", [[b"key-0"]])
    job = scheduler.prepare_load("r", 0, 16, [[1]])
    worker.submit_load(job)
    worker.wait([job.job_id])

    (result,) = worker.get_finished()
    assert result.failed_keys == {b"key-0"}
    scheduler.load_finished(job.job_id, result.ok, result.failed_keys)
    assert scheduler.lookup("r", 0) == 0


def test_jobs_of_a_worker_that_was_never_attached_come_back_failed(worker: WorkerShim) -> None:
    columns = (1, (8,), (1,), (b"key-0",), (1,), (1,), (0,))
    worker.submit_store(StoreJob(JobId(1), *columns))
    worker.submit_load(LoadJob(JobId(2), *columns, load_lease_id=9))

    assert {(result.job_id, result.ok) for result in worker.get_finished()} == {(1, False), (2, False)}
