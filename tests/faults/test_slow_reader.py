"""A client that does not read its stream."""

from __future__ import annotations

import contextlib

import grpc
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, wait_until
from tests.raw_engine import RawEngine

from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.locks import OwnerLock


def test_a_session_that_does_not_read_its_events_is_ended_and_one_that_does_goes_on(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="[limits]\nsession_events = 600\n")
    writer = make_engine(daemon).attach()
    reader = make_engine(daemon, facts=writer.facts).attach()
    slow = make_engine(daemon, facts=writer.facts)
    slow.attach_worker()
    lock = OwnerLock.acquire(daemon.pool_directory)
    request = slow.attach_request(pb.SESSION_ROLE_SCHEDULER)
    request.lock_file = lock.name
    stream = slow.stub.Attach(request)
    session_id = next(stream).attached.session_id  # and from here on it reads nothing

    def is_gone() -> bool:
        keys = [number.to_bytes(128, "big") for number in range(512)]
        granted = writer.prepare_store(keys)
        _wait_for_keys(reader, reader.session_id, keys)
        with contextlib.suppress(grpc.RpcError):  # ended meanwhile
            _wait_for_keys(slow, session_id, keys)
        failed = pb.StoreReport(
            slot_ids=granted.slot_ids,
            generations=granted.generations,
            keys=keys,
            checksums=[0] * 512,
            failed=range(512),
        )
        writer.complete(writer.workers[0], store_reports=[failed])
        for _ in keys:
            assert reader.scheduler is not None
            reader.scheduler.wait_for("resolved")
        return slow.engine_id not in {session.engine_id for session in daemon.status().sessions}

    wait_until(is_gone, "the session that reads nothing is ended")
    assert "SLOW_READER" in daemon.log_text()
    assert reader.engine_id in {session.engine_id for session in daemon.status().sessions}
    lock.release()


def _wait_for_keys(engine: RawEngine, session_id: str, keys: list[bytes]) -> None:
    asked = pb.LookupRequest(
        session_id=session_id,
        context=pb.RequestContext(request_id="request"),
        keys=keys,
        lease_id=engine.new_lease_id(),
        pending_wait_ms=2000,
    )
    engine.stub.Lookup(asked, timeout=WAIT_S)
