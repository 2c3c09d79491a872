"""A worker whose copies the daemon makes: the client's half, against a real daemon."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess, state_of, wait_until
from tests.integration.test_transfer import helper_pid
from tests.stall import Stall

from kvtier_client import transfers
from kvtier_client.bench.block_client import BlockClient, chunk_key
from kvtier_client.context import ReqContext
from kvtier_client.jobs import JobId, JobResult, LoadJob, StoreJob
from kvtier_client.transfers import RemoteCopies
from kvtier_client.worker import WorkerShim
from kvtier_ops.host import Bytes, HostTensors
from kvtier_ops.ipc import SharedAllocation, export_shared
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.locks import CopyGate
from kvtier_ops.pool import MappedPool

PAGE_BYTES = 4096
NUM_BLOCKS = 32
POOL_BYTES = 256 * PAGE_BYTES


class RecordingTensors(HostTensors):
    """Notes which pools it is to use."""

    def __init__(self, blocks: Bytes) -> None:
        super().__init__([[blocks]])
        self.pools: list[tuple[MappedPool | None, bool]] = []
        """Pool and whether to pin it, in the order of the calls."""

    def use_pool(self, pool: MappedPool | None, *, pin: bool) -> None:
        self.pools.append((pool, pin))


class RemoteRank(BlockClient):
    """Both sessions of an engine of one rank, with 32 blocks of shared memory as its device."""

    def __init__(self, address: str) -> None:
        super().__init__(address, PAGE_BYTES)
        self.memory = SharedAllocation(NUM_BLOCKS * PAGE_BYTES)
        self.blocks = self.memory.data.reshape(NUM_BLOCKS, PAGE_BYTES)
        handle = export_shared(self.memory, 0, NUM_BLOCKS * PAGE_BYTES, PAGE_BYTES, NUM_BLOCKS)
        self.remote = RemoteCopies(address, [[handle]])
        layout = GroupLayout((TensorLayout("rows", PAGE_BYTES),), 1)
        self.tensors = RecordingTensors(self.blocks)
        self.shim = WorkerShim(self.worker, self.tensors, [layout], 1, 0, remote=self.remote)
        self._job_ids = iter(range(1, 1_000))

    def may_store(self, key: bytes) -> bool:
        """Tell whether a store would be granted."""
        return bool(self.scheduler.prepare_store(ReqContext("may-store", None), [key]).slot_ids)

    def prepared_store(self, numbers: range, block_ids: list[int]) -> StoreJob:
        """Make a job that stores blocks as chunks."""
        keys = [chunk_key(number) for number in numbers]
        grant = self.scheduler.prepare_store(ReqContext(f"store-{numbers.start}", None), keys)
        assert len(grant.slot_ids) == len(keys), grant.reason
        return StoreJob(
            JobId(next(self._job_ids)),
            self.pool.pool_id,
            tuple(grant.slot_ids),
            tuple(grant.generations),
            tuple(keys),
            tuple(block_ids),
            (len(block_ids),),
            (0,),
        )

    def store(self, numbers: range, block_ids: list[int]) -> JobId:
        """Begin to store blocks as chunks."""
        job = self.prepared_store(numbers, block_ids)
        self.shim.submit_store(job)
        return job.job_id

    def prepared_load(self, numbers: range, block_ids: list[int]) -> LoadJob:
        """Make a job that loads chunks into blocks."""
        keys = [chunk_key(number) for number in numbers]
        answer = self.scheduler.lookup(ReqContext(f"load-{numbers.start}", None), keys)
        assert len(answer.slot_ids) == len(keys), answer
        lease_id = self.scheduler.new_lease_id()
        self.scheduler.start_load(answer.lease_id, lease_id, answer.slot_ids)
        self.scheduler.flush()
        return LoadJob(
            JobId(next(self._job_ids)),
            self.pool.pool_id,
            tuple(answer.slot_ids),
            tuple(answer.generations),
            tuple(keys),
            tuple(block_ids),
            (len(block_ids),),
            (0,),
            lease_id,
        )

    def load(self, numbers: range, block_ids: list[int]) -> JobId:
        """Begin to load chunks into blocks."""
        job = self.prepared_load(numbers, block_ids)
        self.shim.submit_load(job)
        return job.job_id

    def results(self, count: int) -> list[JobResult]:
        """Wait until so many jobs have ended."""
        ended: list[JobResult] = []

        def are_there() -> bool:
            ended.extend(self.shim.get_finished())
            return len(ended) >= count

        wait_until(are_there, f"{count} jobs end")
        return ended

    def result(self, job_id: JobId) -> JobResult:
        """Wait for the end of a job."""
        results: list[JobResult] = []

        def is_there() -> bool:
            results.extend(result for result in self.shim.get_finished() if result.job_id == job_id)
            return bool(results)

        wait_until(is_there, "the job ends")
        return results[0]

    def store_all(self, numbers: range, block_ids: list[int]) -> None:
        """Store, and wait until the chunks can be found."""
        assert self.result(self.store(numbers, block_ids)).ok
        self.flush()


@contextmanager
def remote_rank(daemon: DaemonProcess) -> Iterator[RemoteRank]:
    rank = RemoteRank(daemon.address)
    try:
        with rank:
            wait_until(lambda: rank.remote.ready, "the daemon copies for it")
            yield rank
        rank.shim.close()
    finally:
        rank.memory.close()


def hung_load(rank: RemoteRank, stall: Stall) -> JobId:
    """Begin to load four chunks; the helper stands still in the middle of it."""
    stall.arm()
    job_id = rank.load(range(4), [8, 9, 10, 11])
    stall.wait_until_hung()
    return job_id


def end_while_it_hangs(daemon: DaemonProcess, rank: RemoteRank, stall: Stall, job_id: JobId) -> None:
    """Kill the daemon over a load: it fails when the helper, which stands still, is gone, and not before."""
    helper = helper_pid(daemon)
    daemon.kill()
    wait_until(lambda: not rank.worker.attached, "the session has ended")
    # The helper has the engine's memory open.
    assert state_of(helper) != ""
    assert rank.shim.get_finished() == []
    stall.let_go()
    assert not rank.result(job_id).ok
    assert state_of(helper) in ("", "Z"), "it is gone"


def test_a_worker_stores_and_loads_without_touching_the_pool_itself(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with remote_rank(daemon) as rank:
        rank.blocks[:8] = np.random.default_rng(1).integers(0, 256, (8, PAGE_BYTES), np.uint8)
        rank.store_all(range(8), list(range(8)))
        result = rank.result(rank.load(range(8), list(range(16, 24))))
        assert result.ok
        assert result.bytes == 8 * PAGE_BYTES
        assert np.array_equal(rank.blocks[16:24], rank.blocks[:8])
        assert rank.memory.name in Path(f"/proc/{helper_pid(daemon)}/maps").read_text()
        assert not any(thread.name.startswith("kvtier-copy") for thread in threading.enumerate())


def test_a_load_that_the_daemon_dies_over_fails_when_nothing_can_arrive_any_more(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, "helper.before_job")
    daemon = start_daemon(pool_bytes=POOL_BYTES, env=stall.env)
    with remote_rank(daemon) as rank:
        rank.store_all(range(4), [0, 1, 2, 3])
        job_id = hung_load(rank, stall)
        end_while_it_hangs(daemon, rank, stall, job_id)
        daemon.start()
        rank.wait_attached()
        wait_until(lambda: rank.remote.ready, "the new daemon copies for it")
        rank.store_all(range(20, 24), [0, 1, 2, 3])
        assert rank.result(rank.load(range(20, 24), [4, 5, 6, 7])).ok


def test_a_helper_that_dies_fails_its_loads_and_the_next_ones_succeed(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, "helper.before_job")
    daemon = start_daemon(pool_bytes=POOL_BYTES, env=stall.env)
    with remote_rank(daemon) as rank:
        rank.store_all(range(4), [0, 1, 2, 3])
        helper = helper_pid(daemon)
        job_id = hung_load(rank, stall)
        os.kill(helper, signal.SIGKILL)
        assert not rank.result(job_id).ok
        stall.let_go()
        assert rank.result(rank.load(range(4), [8, 9, 10, 11])).ok
        assert np.array_equal(rank.blocks[8:12], rank.blocks[:4])


def test_a_stream_that_the_daemon_ends_costs_its_jobs_and_a_session(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with remote_rank(daemon) as rank:
        rank.store_all(range(4), [0, 1, 2, 3])
        stream = rank.remote._stream
        assert stream is not None
        stream._memory_id = 12_345  # not this session's: the daemon ends the stream over it
        assert not rank.result(rank.load(range(4), [8, 9, 10, 11])).ok
        wait_until(lambda: rank.remote._stream is not stream and rank.scheduler.ready, "the next session")
        rank.wait_attached()
        wait_until(lambda: rank.remote.ready, "the daemon copies again")
        assert rank.result(rank.load(range(4), [8, 9, 10, 11])).ok
        assert np.array_equal(rank.blocks[8:12], rank.blocks[:4])


def test_a_job_does_not_end_before_the_second_helper_of_its_session_either(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, "helper.before_job")
    daemon = start_daemon(pool_bytes=POOL_BYTES, env=stall.env)
    with remote_rank(daemon) as rank:
        rank.store_all(range(4), [0, 1, 2, 3])
        first = helper_pid(daemon)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: state_of(first) == "", "the first one is gone")
        assert rank.result(rank.load(range(4), [4, 5, 6, 7])).ok
        job_id = hung_load(rank, stall)
        assert helper_pid(daemon) != first
        end_while_it_hangs(daemon, rank, stall, job_id)


def test_memory_that_the_daemon_cannot_open_is_copied_by_the_worker_and_said_aloud(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    rank = RemoteRank(daemon.address)
    rank.memory.close()  # its name is gone; the engine's own mapping is not
    with rank:
        wait_until(lambda: bool(rank.remote.problem), "the daemon says why it cannot copy")
        assert "cannot be opened" in rank.remote.problem
        rank.blocks[:4] = 7
        rank.store_all(range(4), [0, 1, 2, 3])
        assert rank.result(rank.load(range(4), [8, 9, 10, 11])).ok
        assert np.array_equal(rank.blocks[8:12], rank.blocks[:4])
    rank.shim.close()


def quick_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "PING_S", 0.3)


def test_jobs_of_a_daemon_that_is_stopped_end_all_the_same(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_to_give_up(monkeypatch)
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with remote_rank(daemon) as rank:
        rank.store_all(range(4), [0, 1, 2, 3])
        load = rank.prepared_load(range(4), [8, 9, 10, 11])
        store = rank.prepared_store(range(20, 24), [0, 1, 2, 3])
        daemon.signal(signal.SIGSTOP)
        # The copy process works, and hears nothing of them: what it has not begun it will not.
        rank.shim.submit_load(load)
        rank.shim.submit_store(store)
        ended = rank.results(2)
        assert {result.job_id for result in ended} == {store.job_id, load.job_id}
        assert not any(result.ok for result in ended)
        daemon.signal(signal.SIGCONT)
        rank.wait_attached()
        wait_until(lambda: rank.remote.ready, "the daemon copies again")
        assert rank.result(rank.load(range(4), [8, 9, 10, 11])).ok
        wait_until(lambda: daemon.status().tiers[0].reserved_slots == 0, "the slots of the store are free")


def test_a_load_whose_copy_process_stands_still_with_its_daemon_waits_and_a_store_does_not(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_to_give_up(monkeypatch)
    stall = Stall(tmp_path, "helper.before_job")
    daemon = start_daemon(pool_bytes=POOL_BYTES, env=stall.env)
    with remote_rank(daemon) as rank:
        rank.store_all(range(4), [0, 1, 2, 3])
        store = rank.prepared_store(range(20, 24), [0, 1, 2, 3])
        load = hung_load(rank, stall)
        daemon.signal(signal.SIGSTOP)
        rank.shim.submit_store(store)
        (ended,) = rank.results(1)
        assert ended.job_id == store.job_id, "what is still read for it nobody publishes"
        # Nobody can tell what the copy process writes when it goes on: the load's blocks are not free.
        stall.let_go()
        assert not rank.result(load).ok
        daemon.signal(signal.SIGCONT)


def test_a_load_ends_when_its_copy_does_though_no_session_ever_follows(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, "helper.before_job")
    daemon = start_daemon(pool_bytes=POOL_BYTES, env=stall.env)
    with remote_rank(daemon) as rank:
        rank.store_all(range(4), [0, 1, 2, 3])
        load = hung_load(rank, stall)
        owners, aside = daemon.pool_directory / "owners", daemon.pool_directory / "aside"
        owners.rename(aside)
        owners.touch()  # no lock file can be made any more, and without one there is no session
        stream = rank.remote._stream
        assert stream is not None
        assert stream._call is not None
        stream._call.cancel()
        wait_until(lambda: "no lock file can be made" in rank.worker.away_reason, "it cannot attach")
        assert rank.shim.get_finished() == []
        stall.let_go()
        assert not rank.result(load).ok
        owners.unlink()
        aside.rename(owners)


def open_gates(daemon: DaemonProcess) -> list[str]:
    """Gates of a daemon that this process has open."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return [link for link in links if link.startswith(f"{daemon.pool_directory}/gates/")]


def test_a_copy_that_a_dead_daemon_left_behind_writes_nothing_after_its_load_has_ended(
    start_daemon: StartDaemon,
) -> None:
    first = start_daemon(pool_bytes=POOL_BYTES)
    with remote_rank(first) as rank:
        rank.blocks[:4] = 7
        rank.store_all(range(4), [0, 1, 2, 3])
        load = rank.prepared_load(range(4), [8, 9, 10, 11])
        helper = helper_pid(first)
        os.kill(helper, signal.SIGSTOP)
        try:
            rank.shim.submit_load(load)
            wait_until(lambda: first.status().copy_devices[0].jobs == 1, "the daemon has the job")
            assert first.status().copy_devices[0].jobs == 1, "and has passed it on"
            first.kill()
            assert not rank.result(load.job_id).ok, "nothing is copied, and the blocks are the engine's"
            start_daemon(pool_bytes=POOL_BYTES, address=first.address)
            rank.wait_attached()
            wait_until(lambda: rank.remote.ready, "another daemon copies for it")
            rank.blocks[8:12] = 99
        finally:
            os.kill(helper, signal.SIGCONT)
        wait_until(lambda: state_of(helper) in ("", "Z"), "the process of the dead one is gone")
        assert (rank.blocks[8:12] == 99).all()
        assert len(open_gates(first)) == 1
        session = rank.worker.session
        assert session is not None
        rank.worker.reattach(session.session_id, "a test")
        wait_until(lambda: not open_gates(first), "the gate of the dead one is closed")


def test_copies_that_outlive_their_session_are_waited_for_as_long_as_the_daemon_answers(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PING_S", 0.1)
    stall = Stall(tmp_path, "copy_engine.before_chunk")
    daemon = start_daemon(pool_bytes=POOL_BYTES, env=stall.env)
    with remote_rank(daemon) as rank:
        rank.blocks[:4] = 7
        rank.store_all(range(4), [0, 1, 2, 3])
        load = hung_load(rank, stall)
        stream, session = rank.remote._stream, rank.worker.session
        assert stream is not None
        assert session is not None
        rank.worker.reattach(session.session_id, "a test")
        wait_until(lambda: rank.remote._stream is not stream, "the session has ended")
        patience_ends = time.monotonic() + 3 * transfers.MAX_UNANSWERED * transfers.PING_S
        wait_until(lambda: stream._has_ended or time.monotonic() > patience_ends, "its patience ends")
        assert not stream._has_ended
        stall.let_go()
        assert rank.result(load).ok
        assert (rank.blocks[8:12] == 7).all()
        wait_until(lambda: stream._has_ended, "the stream ends with its last answer")


def test_a_refusal_pins_no_pool_that_is_not_in_use_any_more(
    start_daemon: StartDaemon,
) -> None:
    first = start_daemon(pool_bytes=POOL_BYTES)
    rank = RemoteRank(first.address)
    rank.memory.close()  # so that the daemon refuses

    class AttachMeanwhile(logging.Filter):
        has_begun = is_over = False

        def filter(self, record: logging.LogRecord) -> bool:
            """When the worker says that it was refused, another daemon takes the place of the first one."""
            if not self.has_begun and "cannot copy for this engine" in record.getMessage():
                self.has_begun = True
                pools = [pool for pool, _ in rank.tensors.pools]
                first.kill()
                start_daemon(pool_bytes=POOL_BYTES, address=first.address)
                wait_until(lambda: rank.tensors.pools[-1][0] not in pools, "another pool is attached")
                self.is_over = True
            return True

    meanwhile = AttachMeanwhile()
    logger = logging.getLogger("kvtier_client.worker")
    logger.addFilter(meanwhile)
    try:
        with rank:
            wait_until(lambda: meanwhile.is_over, "it was refused")
            rank.wait_attached()
            second = rank.pool
            wait_until(lambda: (second, True) in rank.tensors.pools, "the second one refuses too")
            wait_until(
                lambda: sum(thread.name == "kvtier-transfers" for thread in threading.enumerate()) == 0,
                "nobody registers any more",
            )
            used = [pool for pool, _ in rank.tensors.pools]
            assert all(pool is second for pool in used[used.index(second) :])
            rank.shim.close()
            rank.remote.on_refused("too late")
            assert rank.tensors.pools[-1] == (None, False)
    finally:
        logger.removeFilter(meanwhile)


def test_a_session_that_ends_while_its_memory_is_registered_leaves_no_gate_open(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    rank = RemoteRank(daemon.address)
    opened: list[CopyGate] = []
    open_gate = CopyGate.open

    def open_late(directory: Path, name: str) -> CopyGate:
        """Return the first one when the next session has begun."""
        opened.append(open_gate(directory, name))
        if len(opened) == 1:
            stream, session = rank.remote._stream, rank.worker.session
            assert session is not None
            rank.worker.reattach(session.session_id, "a test")
            wait_until(lambda: rank.remote._stream not in (None, stream), "the next session")
            return opened[0]
        return opened[-1]

    monkeypatch.setattr(CopyGate, "open", open_late)
    with rank:
        wait_until(lambda: len(opened) == 2 and rank.remote.ready, "the daemon copies for it")
        wait_until(lambda: len(open_gates(daemon)) == 1, "only the gate of the open session is left")
        wait_until(lambda: rank.may_store(chunk_key(99)), "the scheduler has attached again too")
        rank.store_all(range(4), [0, 1, 2, 3])
    rank.shim.close()
    rank.memory.close()


@pytest.mark.parametrize("wrong", [{"block_ids": (8, 9, 10, 1 << 32)}, {"keys": ("a", "b", "c", "d")}])
def test_a_job_that_no_message_can_hold_fails_and_the_next_one_succeeds(
    start_daemon: StartDaemon, wrong: dict[str, tuple[int | str, ...]]
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    with remote_rank(daemon) as rank:
        rank.blocks[:4] = 7
        rank.store_all(range(4), [0, 1, 2, 3])
        job = replace(rank.prepared_load(range(4), [8, 9, 10, 11]), **wrong)  # type: ignore[arg-type]
        rank.shim.submit_load(job)
        rank.shim.wait([job.job_id])
        (ended,) = rank.shim.get_finished()
        assert not ended.ok
        assert ended.failures == {"error": 4}
        assert rank.result(rank.load(range(4), [8, 9, 10, 11])).ok
        assert (rank.blocks[8:12] == 7).all()
