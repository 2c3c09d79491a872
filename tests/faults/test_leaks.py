"""F1: whatever clients do wrong, and however often they come and go, the daemon holds no more than before."""

from __future__ import annotations

from typing import Protocol

import grpc
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import CHANNEL_OPTIONS, WAIT_S, DaemonProcess, wait_until
from tests.raw_engine import RawEngine, failure, failure_of, to_key, to_keys

from kvtier.v1 import admin_pb2
from kvtier.v1 import offload_pb2 as pb


class _Ending(Protocol):
    """A call that is going on."""

    def exception(self) -> BaseException | None: ...


ATTACHES = 1_000
FAILED_CALLS = 10_000
IDLE_CONNECTIONS = 200
LONG_CALLS = 20


def assert_as_before(daemon: DaemonProcess, fds: int, threads: int) -> None:
    """Everything that was opened is closed again, at once or soon."""
    wait_until(lambda: not daemon.status().sessions, "all sessions have ended")
    wait_until(lambda: daemon.num_fds() <= fds, f"at most {fds} files are open, not {daemon.num_fds()}")
    wait_until(lambda: daemon.num_threads() <= threads, f"at most {threads} threads run")
    tier = daemon.status().tiers[0]
    assert (tier.reserved_slots, tier.pinned_chunks) == (0, 0)
    assert not any(lease.count for lease in daemon.status().leases)


def warm_up(daemon: DaemonProcess, engine: RawEngine) -> tuple[int, int]:
    """Let the daemon open what it opens once; returns its files and threads."""
    engine.attach().store([to_key(1)])
    engine.lookup([to_key(1)], lease_id=1)
    failure(lambda: engine.prepare_load([to_key(2)]))
    daemon.page("/metrics")
    engine.close()
    wait_until(lambda: not daemon.status().sessions, "the first engine is gone")
    return daemon.num_fds(), daemon.num_threads()


def test_a_thousand_engines_that_come_and_go_leave_nothing_open(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    fds, threads = warm_up(daemon, make_engine(daemon))
    engine = make_engine(daemon)
    for number in range(ATTACHES // 2):
        engine.nonce += 1
        scheduler = engine.attach_scheduler()
        worker = engine.attach_worker()
        if number % 10 == 0:
            engine.prepare_store(to_keys(range(number, number + 4)), request_id=str(number))
            engine.lookup([to_key(1)], lease_id=engine.new_lease_id(), request_id=str(number))
        for session in (scheduler, worker):
            session.close()
        engine.sessions.clear()
        wait_until(lambda: not daemon_has_sessions(engine), "the sessions have ended")
    engine.close()
    assert_as_before(daemon, fds, threads)
    wait_until(
        lambda: not list((daemon.pool_directory / "owners").iterdir()), "no lock file of a dead process stays"
    )


def daemon_has_sessions(engine: RawEngine) -> bool:
    """Ask over the engine's own channel: a new one for each question would be the load that is tested."""
    return bool(engine.admin.GetStatus(admin_pb2.GetStatusRequest()).sessions)


def test_ten_thousand_failed_calls_leave_nothing_open(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    fds, threads = warm_up(daemon, make_engine(daemon))
    engine = make_engine(daemon).attach()
    bad_attach = engine.attach_request(pb.SESSION_ROLE_WORKER)
    bad_attach.instance_nonce = 0
    wrong_session = pb.LookupRequest(session_id="none", keys=[to_key(1)])
    calls = [
        lambda: engine.prepare_load([to_key(99)]),
        lambda: engine.lookup([b"four"]),
        lambda: engine.send_bytes("/kvtier.v1.OffloadService/Lookup", b"\x0a\xff"),
        lambda: engine.stub.Lookup(wrong_session),
        lambda: engine.send_bytes("/kvtier.v1.AdminService/Evict", b""),
        lambda: list(engine.stub.Attach(bad_attach)),
    ]
    for _ in range(FAILED_CALLS // len(calls)):
        for call in calls:
            failure(call)
    engine.close()
    assert_as_before(daemon, fds, threads)


def test_hundreds_of_connections_that_end_leave_nothing_open(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    fds, threads = warm_up(daemon, make_engine(daemon))
    channels = [
        grpc.insecure_channel(daemon.address, options=CHANNEL_OPTIONS) for _ in range(IDLE_CONNECTIONS)
    ]
    for channel in channels:
        grpc.channel_ready_future(channel).result(WAIT_S)
    assert daemon.num_fds() >= IDLE_CONNECTIONS
    make_engine(daemon).attach().store([to_key(2)])  # others are served
    for channel in channels:
        channel.close()
    wait_until(lambda: daemon.num_fds() <= fds + 2, "the files of the closed connections are closed")
    assert daemon.num_threads() <= threads


def test_a_session_that_ends_during_long_calls_leaves_nothing_reserved(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    """Long calls are taken in slices, so a session can end between two of them."""
    daemon = start_daemon(pool_bytes="64MiB")
    engine = make_engine(daemon).attach()
    fds, threads = daemon.num_fds(), daemon.num_threads()
    keys = to_keys(range(8192))
    for number in range(LONG_CALLS):
        doomed = make_engine(daemon, facts=engine.facts).attach()
        context = pb.RequestContext(request_id="long")
        asked = pb.PrepareStoreRequest(session_id=doomed.session_id, context=context, keys=keys, lease_id=1)
        storing = doomed.stub.PrepareStore.future(asked)
        call: _Ending = storing
        if number % 2:
            granted = storing.result()
            pairs = zip(keys, granted.verdicts, strict=True)
            report = pb.StoreReport(
                slot_ids=granted.slot_ids,
                generations=granted.generations,
                keys=[key for key, verdict in pairs if verdict == pb.STORE_VERDICT_GRANTED],
                checksums=[0] * len(granted.slot_ids),
            )
            call = doomed.stub.Complete.future(
                pb.CompleteRequest(session_id=doomed.workers[0].id, store_reports=[report])
            )
        doomed.workers[0].close()
        error = call.exception()
        assert error is None or failure_of(error).reason == "SESSION_UNKNOWN"
        doomed.close()
    engine.close()
    assert_as_before(daemon, fds, threads)
    wait_until(lambda: not daemon.status().tiers[0].quarantined_slots, "no slot stays quarantined")
    assert "call_failed" not in daemon.log_text()
