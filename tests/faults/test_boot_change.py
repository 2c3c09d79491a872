"""R3: the daemon is another one than a moment ago."""

from __future__ import annotations

import grpc
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.raw_engine import failure, refusal, to_key, to_keys

from kvtier.v1 import offload_pb2 as pb


@pytest.mark.parametrize("in_mid_store", [False, True])
def test_a_daemon_restarted_between_two_calls_knows_no_old_session_and_says_which_boot_it_is(
    start_daemon: StartDaemon, make_engine: MakeEngine, in_mid_store: bool
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    lease_id = engine.new_lease_id()
    granted = engine.prepare_store([to_key(1)])
    if not in_mid_store:
        engine.report_stores(granted.slot_ids, granted.generations, [to_key(1)])
        engine.lookup([to_key(1)], lease_id=lease_id)
    old_boot = engine.describe().boot_id
    daemon.restart()
    new_boot = daemon.status().boot_id
    assert new_boot != old_boot
    engine.describe()  # waits until the channel is connected again
    for call in (
        lambda: engine.lookup([to_key(1)]),
        lambda: engine.prepare_load([to_key(1)], lease_id=lease_id),
        lambda: engine.prepare_store([to_key(2)]),
        lambda: engine.complete(load_starts=[pb.LoadStart(lookup_lease_id=lease_id, load_lease_id=77)]),
        lambda: engine.report_stores(granted.slot_ids, granted.generations, [to_key(1)]),
    ):
        failed = refusal(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN")
        assert failed.trailers["kvtier-boot-id"] == new_boot


def test_the_streams_of_a_killed_daemon_end_and_its_engines_attach_to_the_next(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    engine.prepare_store(to_keys(range(4)))
    assert engine.scheduler is not None
    daemon.kill()
    assert engine.scheduler.wait_for_end() is grpc.StatusCode.UNAVAILABLE
    failed = failure(lambda: engine.lookup([to_key(1)]))
    assert failed.code is grpc.StatusCode.UNAVAILABLE
    assert failed.reason == ""  # gRPC says so: nobody else is there
    daemon.restart()
    for session in (engine.scheduler, engine.workers[0]):
        role = pb.SESSION_ROLE_SCHEDULER if session is engine.scheduler else pb.SESSION_ROLE_WORKER
        request = engine.attach_request(role)
        request.previous_session = session.id
        again = engine.open_session(request, lock=session.lock)
        assert again.id.startswith(again.attached.boot_id)
        if role == pb.SESSION_ROLE_SCHEDULER:
            engine.scheduler = again
        else:
            engine.workers[0] = again
    engine.store([to_key(1)])
    assert list(engine.lookup(to_keys([1, 2])).statuses) == [pb.LOOKUP_STATUS_HIT, pb.LOOKUP_STATUS_MISS]
