"""R9: slots that a process may still be writing are given to nobody, and come back once it cannot."""

from __future__ import annotations

import shutil

import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.raw_engine import RawEngine, to_key, to_keys
from tests.raw_engine_process import RawEngineProcess

from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.locks import OwnerLock

POOL_SLOTS = 256
SHARE = POOL_SLOTS // 2
"""Slots that one instance may have reserved."""


def quarantined(daemon: DaemonProcess) -> int:
    return daemon.status().tiers[0].quarantined_slots


def let_time_pass(daemon: DaemonProcess) -> None:
    """Wait until the daemon has tried the locks again: some ticks, of 50 ms each."""
    until = daemon.status().uptime_seconds + 0.5
    wait_until(lambda: daemon.status().uptime_seconds > until, "the daemon's clock goes on")


def everything_is_free(daemon: DaemonProcess) -> bool:
    tier = daemon.status().tiers[0]
    return not (tier.quarantined_slots or tier.reserved_slots or tier.pinned_chunks)


def test_a_stopped_writer_keeps_its_slots_from_others_until_it_is_killed(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes="1MiB")
    engine = make_engine(daemon)
    engine.attach_scheduler()
    with RawEngineProcess(engine, rank=0) as worker:
        granted = engine.prepare_store(to_keys(range(SHARE)))
        assert len(granted.slot_ids) == SHARE
        worker.stop_running()  # in mid-store, as far as the daemon can know
        engine.close()  # ... and its scheduler goes
        wait_until(lambda: quarantined(daemon) == SHARE, "the slots of the dead instance are quarantined")
        other = make_engine(daemon).attach()
        verdicts = list(other.prepare_store(to_keys(range(SHARE))).verdicts)
        assert verdicts.count(pb.STORE_VERDICT_GRANTED) == SHARE
        third = make_engine(daemon).attach()
        assert list(third.prepare_store([to_key(1)]).verdicts) == [pb.STORE_VERDICT_FULL]
        let_time_pass(daemon)
        assert quarantined(daemon) == SHARE
    wait_until(lambda: quarantined(daemon) == 0, "the slots of the killed process are free")
    again = third.prepare_store(to_keys(range(SHARE)), request_id="again")
    assert sorted(again.slot_ids) == sorted(granted.slot_ids)
    # Whoever got a slot again got it under a later generation: a late report can publish nothing.
    assert min(again.generations) > max(granted.generations)


def test_an_engine_killed_in_mid_store_leaves_no_slot_and_no_chunk_behind(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes="1MiB")
    reader = make_engine(daemon).attach()
    for _ in range(3):
        with RawEngineProcess(make_engine(daemon, facts=reader.facts), num_stores=SHARE) as engine:
            assert len(engine.hello.slot_ids) == SHARE
            assert daemon.status().tiers[0].reserved_slots == SHARE
        wait_until(lambda: everything_is_free(daemon), "the slots of a killed engine are free")
        assert set(reader.lookup(to_keys(range(SHARE))).statuses) == {pb.LOOKUP_STATUS_MISS}
    assert len(reader.prepare_store(to_keys(range(SHARE))).slot_ids) == SHARE


def attach_worker_again(engine: RawEngine, *, promise: bool) -> None:
    """Attach the worker's process again after its session was lost, naming that session or not."""
    lost = engine.workers[0]
    request = engine.attach_request(pb.SESSION_ROLE_WORKER)
    request.previous_session = lost.id if promise else ""
    request.mapped_pool_id = engine.describe().pool.pool_id
    engine.workers[0] = engine.open_session(request, lock=lost.lock)


def test_a_worker_that_attaches_again_clears_its_quarantine_only_by_its_promise(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes="1MiB")
    engine = make_engine(daemon).attach()
    engine.prepare_store(to_keys(range(8)))
    engine.workers[0].close(release_lock=False)  # the stream is cut; the process and its copies live on
    wait_until(lambda: quarantined(daemon) == 8, "the slots are quarantined")
    attach_worker_again(engine, promise=False)
    let_time_pass(daemon)
    assert quarantined(daemon) == 8
    attach_worker_again(engine, promise=True)
    assert quarantined(daemon) == 0


def test_slots_of_an_earlier_daemon_do_not_wait_for_a_process_that_mapped_no_pool(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes="1MiB")
    engine = make_engine(daemon).attach()
    engine.prepare_store(to_keys(range(8)))
    late = make_engine(daemon)
    locks = [OwnerLock.acquire(daemon.pool_directory) for _ in range(2)]
    daemon.kill()
    engine.close()
    daemon.start()
    assert quarantined(daemon) == 8, "either of the two processes that live might be the writer"
    late.open_session(late.attach_request(pb.SESSION_ROLE_SCHEDULER), lock=locks[0])
    let_time_pass(daemon)
    assert quarantined(daemon) == 8
    late.open_session(late.attach_request(pb.SESSION_ROLE_WORKER), lock=locks[1])
    wait_until(lambda: quarantined(daemon) == 0, "nobody is left who could be writing")


def test_slots_with_two_writers_wait_for_both(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon(pool_bytes="1MiB")
    engine = make_engine(daemon, world_size=2)
    engine.attach_scheduler()
    with RawEngineProcess(engine, rank=0) as first, RawEngineProcess(engine, rank=1) as second:
        engine.prepare_store(to_keys(range(8)))
        first.stop_running()
        second.stop_running()
        engine.close()
        wait_until(lambda: quarantined(daemon) == 8, "the slots are quarantined")
        first.kill()
        let_time_pass(daemon)
        assert quarantined(daemon) == 8
    wait_until(lambda: quarantined(daemon) == 0, "both writers are dead")


@pytest.mark.parametrize("what", ["owners", "."])
def test_a_writer_that_lives_keeps_its_slots_though_somebody_removes_the_files_of_the_pool(
    start_daemon: StartDaemon, make_engine: MakeEngine, what: str
) -> None:
    """A logout with systemd's RemoveIPC, a cleaner: the files go, their holders live and copy."""
    daemon = start_daemon(pool_bytes="1MiB")
    engine, other = make_engine(daemon).attach(), make_engine(daemon).attach()
    engine.prepare_store(to_keys(range(SHARE)))
    shutil.rmtree(daemon.pool_directory / what)
    engine.workers[0].close(release_lock=False)  # the stream is cut; the process and its copies live on
    wait_until(lambda: quarantined(daemon) == SHARE, "the slots are quarantined")
    let_time_pass(daemon)
    assert quarantined(daemon) == SHARE
    engine.close()
    wait_until(lambda: quarantined(daemon) == 0, "the process is gone, file or not")
    assert len(other.prepare_store(to_keys(range(SHARE))).slot_ids) == SHARE
