from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvtier_client import worker as worker_module
from kvtier_client.jobs import NO_SLOT, JobId, JobKind, JobResult, LoadJob, StoreJob
from kvtier_client.reports import StoreReportItem
from kvtier_client.worker import VerifyLoads, WorkerShim
from kvtier_ops import faults
from kvtier_ops.checksum import part_checksum
from kvtier_ops.host import HostTensors
from kvtier_ops.layout import GroupLayout, TensorLayout, part_offset, slot_bytes
from kvtier_ops.namespace import GroupFacts, NamespaceFacts
from kvtier_ops.pool import Pool

from .builders import wait_for_child
from .doubles import RecordingClient, session

LONG_S = 20.0
LAYERS, BLOCKS, PAGE = 3, 16, 1024
BLOCKS_PER_CHUNK = 2
OWNER = 5


class Rank:
    """One rank's device memory and its shim, over a real pool."""

    def __init__(
        self,
        pool: Pool,
        *,
        rank: int = 0,
        num_parts: int = 1,
        world_size: int = 1,
        verify_loads: VerifyLoads = "always",
    ) -> None:
        self.pool = pool
        self.part = rank if num_parts > 1 else 0
        self.device = np.random.default_rng(rank).integers(0, 256, (LAYERS, BLOCKS, PAGE), np.uint8)
        tensors = tuple(TensorLayout(f"layer.{layer}", PAGE) for layer in range(LAYERS))
        self.layout = GroupLayout(tensors, BLOCKS_PER_CHUNK)
        self.client = RecordingClient(
            _facts(self.layout.part_bytes, num_parts), rank=rank, world_size=world_size
        )
        self.shim = WorkerShim(
            self.client,
            HostTensors([list(self.device)]),
            [self.layout],
            BLOCKS_PER_CHUNK,
            self.part,
            verify_loads=verify_loads,
        )
        self.client.attach(session([self.slot_bytes], pool))

    @property
    def slot_bytes(self) -> int:
        return slot_bytes(self.layout.part_bytes, self.client.facts.num_parts)

    def result(self) -> JobResult:
        """Wait for one result."""
        deadline = time.monotonic() + LONG_S
        while time.monotonic() < deadline:
            finished = self.shim.get_finished()
            if finished:
                assert len(finished) == 1
                return finished[0]
            threading.Event().wait(0.001)
        raise AssertionError("no job finished")

    def chunk(self, block_ids: Sequence[int]) -> bytes:
        """The bytes of a chunk as a slot holds them."""
        return b"".join(self.device[layer, list(block_ids)].tobytes() for layer in range(LAYERS))

    def part_of(self, slot_id: int) -> npt.NDArray[np.uint8]:
        offset = part_offset(self.layout.part_bytes, self.part)
        return self.pool.part_view(slot_id, offset, self.layout.part_bytes)


def _facts(part_bytes: int, num_parts: int) -> NamespaceFacts:
    return NamespaceFacts(
        model="model",
        weights_id="weights",
        kv_dtype="float32",
        hash_algorithm="sha256",
        tokens_per_hash=16,
        blocks_per_chunk=BLOCKS_PER_CHUNK,
        kv_cache_layout="LBHNC",
        groups=(GroupFacts(16, part_bytes),),
        num_parts=num_parts,
    )


@pytest.fixture
def pool() -> Iterator[Pool]:
    directory = Path(tempfile.mkdtemp(prefix="kvtier-test-", dir="/dev/shm"))
    made = Pool.create(directory, 1 << 20)
    made.back(0, made.data_bytes)
    made.back_records(range(made.data_bytes // 4096))
    yield made
    made.close()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def rank(pool: Pool) -> Iterator[Rank]:
    made = Rank(pool)
    yield made
    made.shim.close()


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.disarm()


_job_ids = itertools.count(1)


def key_of(slot_id: int) -> bytes:
    return b"key-%d" % slot_id


def reserve(rank: Rank, count: int) -> tuple[list[int], list[int]]:
    """Reserve slots as the daemon does, and return them with their generations."""
    slots = [index * rank.slot_bytes // 4096 for index in range(count)]
    return slots, rank.pool.slots.reserve(slots, OWNER, rank.slot_bytes)


def store_job(
    rank: Rank, slots: Sequence[int], generations: Sequence[int], blocks: Sequence[int]
) -> StoreJob:
    return StoreJob(
        job_id=JobId(next(_job_ids)),
        pool_id=rank.pool.pool_id,
        slot_ids=tuple(slots),
        generations=tuple(generations),
        keys=tuple(key_of(slot_id) for slot_id in slots),
        block_ids=tuple(blocks),
        group_sizes=(len(blocks),),
        block_indices=(0,),
    )


def load_job(
    rank: Rank, slots: Sequence[int], generations: Sequence[int], blocks: Sequence[int], first_block: int = 0
) -> LoadJob:
    return LoadJob(
        job_id=JobId(next(_job_ids)),
        pool_id=rank.pool.pool_id,
        slot_ids=tuple(slots),
        generations=tuple(generations),
        keys=tuple(key_of(slot_id) for slot_id in slots),
        block_ids=tuple(blocks),
        group_sizes=(len(blocks),),
        block_indices=(first_block,),
        load_lease_id=77,
    )


def store_and_publish(rank: Rank, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
    """Store whole chunks, and publish them with the checksums the rank reported."""
    slots, generations = reserve(rank, len(blocks) // BLOCKS_PER_CHUNK)
    rank.shim.submit_store(store_job(rank, slots, generations, blocks))
    assert rank.result().ok
    for slot_id, checksum in zip(slots, rank.client.told.store_reports[-1].checksums, strict=True):
        rank.pool.slots.publish(slot_id, 1, key_of(slot_id), [checksum])
    return slots, generations


class Hold:
    """Stops a copy at a fault point until the test lets it go on."""

    def __init__(self, point: str) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()
        faults.arm(point, self._wait)

    def _wait(self) -> None:
        self.reached.set()
        assert self.released.wait(LONG_S)


# Copies


def test_what_was_stored_is_loaded_into_other_blocks(rank: Rank) -> None:
    stored = rank.chunk([3, 7]), rank.chunk([8, 1])
    slots, generations = store_and_publish(rank, [3, 7, 8, 1])
    rank.shim.submit_load(load_job(rank, slots, generations, [10, 11, 12, 13]))

    assert rank.result().ok
    assert (rank.chunk([10, 11]), rank.chunk([12, 13])) == stored


def test_a_store_is_reported_to_the_daemon_with_the_checksums_of_its_parts(rank: Rank) -> None:
    slots, generations = reserve(rank, 2)
    rank.shim.submit_store(store_job(rank, slots, generations, [3, 7, 8, 1]))
    result = rank.result()

    (report,) = rank.client.told.store_reports
    assert list(report.slot_ids) == slots
    assert list(report.generations) == generations
    assert list(report.keys) == [key_of(slot_id) for slot_id in slots]
    assert list(report.checksums) == [part_checksum(rank.part_of(slot_id)) for slot_id in slots]
    assert list(report.failed) == []
    assert report.num_bytes == result.bytes == 2 * rank.layout.part_bytes
    assert rank.client.told.flushes == 1


def test_a_load_is_reported_to_the_daemon_under_its_lease(rank: Rank) -> None:
    slots, generations = store_and_publish(rank, [3, 7])
    rank.shim.submit_load(load_job(rank, slots, generations, [10, 11]))
    rank.result()

    (report,) = rank.client.told.load_reports
    assert report.lease_id == 77
    assert (list(report.torn_slot_ids), list(report.mismatches)) == ([], [])
    assert report.num_bytes == rank.layout.part_bytes


def test_a_load_may_start_and_end_inside_chunks(rank: Rank) -> None:
    second_of_first, first_of_second = rank.device[:, 7].copy(), rank.device[:, 8].copy()
    slots, generations = store_and_publish(rank, [3, 7, 8, 1])
    untouched = rank.device[:, 12:].copy()
    rank.shim.submit_load(load_job(rank, slots, generations, [10, 11], first_block=1))

    assert rank.result().ok
    assert np.array_equal(rank.device[:, 10], second_of_first)
    assert np.array_equal(rank.device[:, 11], first_of_second)
    assert np.array_equal(rank.device[:, 12:], untouched)


def test_each_rank_writes_its_own_part(pool: Pool) -> None:
    ranks = [Rank(pool, rank=index, num_parts=2, world_size=2) for index in range(2)]
    slots, generations = reserve(ranks[0], 1)
    for rank in ranks:
        rank.shim.submit_store(store_job(rank, slots, generations, [3, 7]))
        assert rank.result().ok
        rank.shim.close()

    for rank in ranks:
        assert rank.part_of(slots[0]).tobytes() == rank.chunk([3, 7])


def test_where_ranks_hold_equal_bytes_only_rank_0_stores(pool: Pool) -> None:
    rank = Rank(pool, rank=1, num_parts=1, world_size=2)
    slots, generations = reserve(rank, 1)
    job = store_job(rank, slots, generations, [3, 7])
    rank.shim.submit_store(job)

    assert rank.shim.get_finished() == [JobResult(job.job_id, JobKind.STORE, ok=True)]
    assert rank.client.told.store_reports == []
    assert not rank.part_of(slots[0]).any()


def test_a_large_job_is_cut_into_tasks_and_ends_once(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "TASK_BYTES", rank.layout.part_bytes)
    blocks = list(range(1, 15))
    slots, generations = reserve(rank, 7)
    rank.shim.submit_store(store_job(rank, slots, generations, blocks))

    assert rank.result().ok
    for index, slot_id in enumerate(slots):
        assert rank.part_of(slot_id).tobytes() == rank.chunk(blocks[2 * index : 2 * index + 2])
    assert len(rank.client.told.store_reports) == 1


# What must fail


def test_a_load_of_a_slot_that_was_given_away_fails(rank: Rank) -> None:
    slots, generations = store_and_publish(rank, [3, 7, 8, 1])
    rank.pool.slots.retire(slots[1:])
    rank.shim.submit_load(load_job(rank, slots, generations, [10, 11, 12, 13]))

    result = rank.result()
    assert not result.ok
    assert result.failed_keys == {key_of(slots[1])}
    assert list(rank.client.told.load_reports[0].torn_slot_ids) == slots[1:]


def test_a_slot_given_away_during_the_copy_is_a_failed_load(rank: Rank) -> None:
    slots, generations = store_and_publish(rank, [3, 7])
    hold = Hold("load.after_copy")
    rank.shim.submit_load(load_job(rank, slots, generations, [10, 11]))
    assert hold.reached.wait(LONG_S)
    rank.pool.slots.retire(slots)
    hold.released.set()

    assert not rank.result().ok


def test_bytes_that_differ_from_their_checksum_are_a_failed_load(rank: Rank) -> None:
    slots, generations = store_and_publish(rank, [3, 7])
    rank.part_of(slots[0])[5] ^= 1
    rank.shim.submit_load(load_job(rank, slots, generations, [10, 11]))

    assert rank.result().failed_keys == {key_of(slots[0])}
    (mismatch,) = rank.client.told.load_reports[0].mismatches
    assert (mismatch.slot_id, mismatch.generation) == (slots[0], generations[0])
    assert mismatch.checksum == part_checksum(rank.part_of(slots[0]))


def test_without_verification_the_fence_still_holds(pool: Pool) -> None:
    rank = Rank(pool, verify_loads="off")
    slots, generations = store_and_publish(rank, [3, 7])
    rank.part_of(slots[0])[5] ^= 1
    rank.shim.submit_load(load_job(rank, slots, generations, [10, 11]))
    assert rank.result().ok  # what "off" means
    rank.pool.slots.retire(slots)
    rank.shim.submit_load(load_job(rank, slots, generations, [10, 11]))
    assert not rank.result().ok
    rank.shim.close()


def test_a_sampled_load_verifies_one_of_sixteen(pool: Pool) -> None:
    rank = Rank(pool, verify_loads="sampled")
    slots, generations = store_and_publish(rank, [3, 7])
    rank.part_of(slots[0])[5] ^= 1
    oks = []
    for _ in range(32):
        rank.shim.submit_load(load_job(rank, slots, generations, [10, 11]))
        oks.append(rank.result().ok)

    assert oks.count(False) == 2
    rank.shim.close()


def test_a_load_without_a_slot_fails_alone(rank: Rank) -> None:
    slots, generations = store_and_publish(rank, [3, 7])
    job = load_job(rank, [slots[0], NO_SLOT], [generations[0], 0], [10, 11, 12, 13])
    rank.shim.submit_load(job)

    assert rank.result().failed_keys == {key_of(NO_SLOT)}
    assert rank.client.told.load_reports[0].lease_id == 77


def test_a_chunk_that_is_not_whole_is_reported_failed_and_not_written(rank: Rank) -> None:
    slots, generations = reserve(rank, 2)
    rank.shim.submit_store(store_job(rank, slots, generations, [3, 7, 8]))

    assert rank.result().failed_keys == {key_of(slots[1])}
    assert list(rank.client.told.store_reports[0].failed) == [1]
    assert not rank.part_of(slots[1]).any()


@pytest.mark.parametrize("end", ["free", "retire", "quarantine", "reserve again"])
def test_a_store_writes_nothing_into_a_slot_that_is_not_its_own_any_more(rank: Rank, end: str) -> None:
    slots, generations = reserve(rank, 1)
    match end:
        case "free":
            rank.pool.slots.free(slots)
        case "retire":
            rank.pool.slots.retire(slots)
        case "quarantine":
            rank.pool.slots.quarantine(slots, OWNER)
        case _:
            rank.pool.slots.reserve(slots, OWNER + 1, rank.slot_bytes)
    rank.shim.submit_store(store_job(rank, slots, generations, [3, 7]))

    assert not rank.result().ok
    assert not rank.part_of(slots[0]).any()


def test_a_copy_that_raises_fails_its_chunk_and_no_other(
    rank: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    slots, generations = reserve(rank, 2)
    with caplog.at_level(logging.CRITICAL):
        rank.shim.submit_store(store_job(rank, slots, generations, [3, 7, 8, BLOCKS]))
        result = rank.result()

    assert result.failed_keys == {key_of(slots[1])}
    assert rank.part_of(slots[0]).tobytes() == rank.chunk([3, 7])


def test_a_job_that_contradicts_itself_fails_and_harms_nothing(rank: Rank) -> None:
    slots, generations = reserve(rank, 1)
    rank.shim.submit_store(store_job(rank, slots, generations, [3, 7, 8, 1]))

    assert not rank.result().ok
    assert not rank.part_of(slots[0]).any()
    assert list(rank.client.told.store_reports[0].failed) == [0]


@pytest.mark.parametrize("is_away", [False, True])
def test_a_load_of_blocks_without_any_slot_is_never_a_good_one(rank: Rank, is_away: bool) -> None:
    job = load_job(rank, [], [], [10, 11])
    if is_away:
        rank.client.detach()
    rank.shim.submit_load(job)
    assert not rank.result().ok
    rank.shim.submit_load(replace(job, pool_id=0))
    assert not rank.result().ok


def test_a_store_without_any_slot_has_stored_all_that_it_was_to(rank: Rank) -> None:
    rank.shim.submit_store(replace(store_job(rank, [], [], []), pool_id=0))
    assert rank.result().ok


# Waiting and ending


def test_wait_returns_when_the_jobs_have_ended_and_their_results_still_come(rank: Rank) -> None:
    slots, generations = reserve(rank, 1)
    job = store_job(rank, slots, generations, [3, 7])
    rank.shim.submit_store(job)
    rank.shim.wait([job.job_id, JobId(123_456)])

    assert [result.job_id for result in rank.shim.get_finished()] == [job.job_id]
    assert rank.shim.get_finished() == []


def test_when_the_session_ends_queued_jobs_fail_and_a_running_load_finishes(rank: Rank) -> None:
    slots, generations = store_and_publish(rank, [3, 7])
    stored = rank.chunk([3, 7])
    hold = Hold("load.before_copy")
    jobs = [load_job(rank, slots, generations, [10 + index, 13 - index]) for index in range(2)]
    for job in jobs:
        rank.shim.submit_load(job)
    assert hold.reached.wait(LONG_S)
    queued = [load_job(rank, slots, generations, [14, 15]) for _ in range(5)]
    # Both threads are held: the first in the point, the second as well or about to be.
    for job in queued:
        rank.shim.submit_load(job)
    rank.client.detach()
    failed = {result.job_id for result in rank.shim.get_finished()}
    assert {job.job_id for job in queued} <= failed
    assert not rank.shim.drain(0)
    hold.released.set()

    assert rank.shim.drain(LONG_S)
    finished = rank.shim.get_finished()
    assert failed | {result.job_id for result in finished} == {job.job_id for job in jobs + queued}
    assert all(result.ok for result in finished)
    assert rank.chunk([10, 13]) == stored
    assert rank.client.told.load_reports == []


def test_a_store_that_runs_when_the_session_ends_does_not_count(rank: Rank) -> None:
    slots, generations = reserve(rank, 1)
    hold = Hold("worker.after_store_copy")
    job = store_job(rank, slots, generations, [3, 7])
    rank.shim.submit_store(job)
    assert hold.reached.wait(LONG_S)
    rank.client.detach()
    hold.released.set()
    rank.shim.wait([job.job_id])

    assert not rank.result().ok
    assert rank.client.told.store_reports == []


def test_what_is_submitted_while_the_daemon_is_away_fails_at_once(rank: Rank) -> None:
    slots, generations = reserve(rank, 1)
    rank.client.detach()
    load, store = load_job(rank, slots, generations, [10, 11]), store_job(rank, slots, generations, [3, 7])
    rank.shim.submit_load(load)
    rank.shim.submit_store(store)

    results = {result.job_id: result for result in rank.shim.get_finished()}
    assert set(results) == {load.job_id, store.job_id}
    assert not any(result.ok for result in results.values())


def test_a_job_that_came_before_the_rank_was_attached_is_reported_failed_when_it_is(rank: Rank) -> None:
    slots, generations = reserve(rank, 1)
    rank.client.detach()
    load, store = load_job(rank, slots, generations, [10, 11]), store_job(rank, slots, generations, [3, 7])
    rank.shim.submit_load(load)
    rank.shim.submit_store(store)
    assert rank.client.told.store_reports == []
    rank.client.attach(session([rank.slot_bytes], rank.pool))

    (stored,) = rank.client.told.store_reports
    assert (list(stored.slot_ids), list(stored.failed)) == (list(slots), [0])
    (loaded,) = rank.client.told.load_reports
    assert loaded.lease_id == load.load_lease_id
    rank.client.detach()
    rank.client.attach(session([rank.slot_bytes], rank.pool))
    assert len(rank.client.told.store_reports) == 1


@pytest.mark.parametrize("is_its_pool", [True, False])
def test_a_job_that_its_session_overtakes_is_reported_failed_in_that_session(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, is_its_pool: bool
) -> None:
    slots, generations = reserve(rank, 1)
    rank.client.detach()
    end = rank.shim._end

    def attach_first(progress: worker_module._Progress) -> None:
        rank.client.attach(session([rank.slot_bytes], rank.pool))  # the client's thread is faster here
        end(progress)

    monkeypatch.setattr(rank.shim, "_end", attach_first)
    job = store_job(rank, slots, generations, [3, 7])
    rank.shim.submit_store(job if is_its_pool else replace(job, pool_id=rank.pool.pool_id ^ 1))

    assert not rank.result().ok
    told = [(list(report.slot_ids), list(report.failed)) for report in rank.client.told.store_reports]
    assert told == ([(list(slots), [0])] if is_its_pool else [])


def test_after_attaching_again_jobs_are_copied_again(rank: Rank) -> None:
    rank.client.detach()
    assert rank.shim.drain(LONG_S)
    rank.client.attach(session([rank.slot_bytes], rank.pool))
    slots, generations = reserve(rank, 1)
    rank.shim.submit_store(store_job(rank, slots, generations, [3, 7]))

    assert rank.result().ok


@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_job_for_another_pool_than_the_mapped_one_fails_and_is_not_reported(rank: Rank, kind: str) -> None:
    slots, generations = store_and_publish(rank, [3, 7])
    told = len(rank.client.told.store_reports)
    before = rank.part_of(slots[0]).tobytes()
    other = rank.pool.pool_id ^ 1
    if kind == "load":
        rank.shim.submit_load(replace(load_job(rank, slots, generations, [10, 11]), pool_id=other))
    else:
        granted = rank.pool.slots.reserve(slots, OWNER, rank.slot_bytes)
        rank.shim.submit_store(replace(store_job(rank, slots, granted, [8, 1]), pool_id=other))

    (result,) = rank.shim.get_finished()
    assert not result.ok
    assert result.failed_keys == {key_of(slots[0])}
    assert rank.part_of(slots[0]).tobytes() == before
    assert rank.client.told.load_reports == []
    assert len(rank.client.told.store_reports) == told


def test_a_job_whose_end_cannot_be_reported_ends_all_the_same(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(item: StoreReportItem) -> None:
        raise TypeError("a key that is no bytes")

    slots, generations = reserve(rank, 4)
    with monkeypatch.context() as patch:
        patch.setattr(rank.client, "report_store", fail)
        jobs = [store_job(rank, [slots[n]], [generations[n]], [3, 7]) for n in range(3)]
        for job in jobs:
            rank.shim.submit_store(job)
        rank.shim.wait([job.job_id for job in jobs])
    results = rank.shim.get_finished()
    assert {result.job_id for result in results} == {job.job_id for job in jobs}
    assert not any(result.ok for result in results)
    assert rank.shim.drain(LONG_S)
    rank.shim.submit_store(store_job(rank, slots[3:], generations[3:], [3, 7]))
    assert rank.result().ok


def test_in_the_child_of_a_fork_every_job_fails_at_once(rank: Rank) -> None:
    slots, generations = reserve(rank, 1)
    rank.shim.submit_store(store_job(rank, slots, generations, [3, 7]))
    assert rank.result().ok
    stored = rank.part_of(slots[0]).tobytes()
    hold = Hold("worker.before_load")
    running = load_job(rank, slots, generations, [10, 11])
    rank.shim.submit_load(running)
    assert hold.reached.wait(LONG_S)
    with rank.shim._changed:  # as a copy thread may at the fork
        child = os.fork()
        if not child:
            status = 1
            try:
                store = store_job(rank, slots, generations, [8, 1])
                load = load_job(rank, slots, generations, [8, 1])
                rank.shim.submit_store(store)
                rank.shim.submit_load(load)
                rank.shim.wait([store.job_id, load.job_id, running.job_id])
                results = rank.shim.get_finished()
                assert [result.job_id for result in results] == [store.job_id, load.job_id]
                assert not any(result.ok for result in results)
                rank.shim.close()
                status = 0
            finally:
                os._exit(status)
    assert wait_for_child(child) == 0
    assert rank.part_of(slots[0]).tobytes() == stored
    hold.released.set()
    assert rank.result().job_id == running.job_id


def test_close_fails_what_is_queued_and_ends_the_threads(pool: Pool) -> None:
    before = threading.active_count()
    rank = Rank(pool)
    slots, generations = reserve(rank, 1)
    hold = Hold("worker.before_store")
    jobs = [store_job(rank, slots, generations, [3, 7]) for _ in range(6)]
    for job in jobs:
        rank.shim.submit_store(job)
    assert hold.reached.wait(LONG_S)
    hold.released.set()
    rank.shim.close()

    assert threading.active_count() == before
    late = store_job(rank, slots, generations, [3, 7])
    rank.shim.submit_store(late)
    assert {result.job_id for result in rank.shim.get_finished()} == {job.job_id for job in [*jobs, late]}


def test_tensors_of_another_shape_are_refused(pool: Pool) -> None:
    layout = GroupLayout((TensorLayout("layer.0", 2 * PAGE),), BLOCKS_PER_CHUNK)
    tensors = HostTensors([[np.zeros((BLOCKS, PAGE), np.uint8)]])
    with pytest.raises(ValueError, match="rows of 1024 bytes"):
        WorkerShim(RecordingClient(_facts(layout.part_bytes, 1)), tensors, [layout], BLOCKS_PER_CHUNK, 0)


def test_over_many_sessions_each_job_ends_once_and_a_drained_worker_writes_nothing(rank: Rank) -> None:
    submitted: list[JobId] = []
    results: list[JobResult] = []
    stop = threading.Event()
    slots, _ = reserve(rank, 4)
    granted: list[list[int]] = [rank.pool.slots.reserve(slots, OWNER, rank.slot_bytes)]

    def run_engine() -> None:
        while not stop.is_set():
            store = store_job(rank, slots, granted[-1], [1, 2, 3, 4, 5, 6, 7, 8])
            load = load_job(rank, slots, granted[-1], [8, 9, 10, 11, 12, 13, 14, 15])
            rank.shim.submit_store(store)
            rank.shim.submit_load(load)
            submitted.extend([store.job_id, load.job_id])
            if len(submitted) % 3 == 0:
                rank.shim.wait(submitted[-4:])
            results.extend(rank.shim.get_finished())
            if len(submitted) - len(results) > 100:
                rank.shim.wait(submitted)

    engine = threading.Thread(target=run_engine)
    engine.start()
    for _ in range(30):
        reports = len(rank.client.told.store_reports)
        deadline = time.monotonic() + LONG_S
        while len(rank.client.told.store_reports) < reports + 3 and time.monotonic() < deadline:
            threading.Event().wait(0.0001)
        rank.client.detach()
        assert rank.shim.drain(LONG_S)
        # Drained: the daemon may give the slots to somebody else now, who writes them.
        rank.pool.slots.free(slots)
        for slot_id in slots:
            rank.part_of(slot_id)[:] = 0xEE
        threading.Event().wait(0.0005)
        assert all((rank.part_of(slot_id) == 0xEE).all() for slot_id in slots)
        granted.append(rank.pool.slots.reserve(slots, OWNER, rank.slot_bytes))
        rank.client.attach(session([rank.slot_bytes], rank.pool))
    stop.set()
    engine.join()
    rank.shim.wait(submitted)
    results.extend(rank.shim.get_finished())

    assert sorted(result.job_id for result in results) == submitted
    assert any(result.ok and result.kind is JobKind.STORE for result in results)
