"""A daemon's life as its surroundings see it: health, pages, files, and how it stops."""

from __future__ import annotations

import json
import signal
import socket
import stat
import struct
import tempfile
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, wait_until
from tests.raw_engine import RawEngine, refusal, to_key, to_keys

from kvtier.v1 import offload_pb2 as pb

SERVICES = {
    "kvtier.v1.OffloadService",
    "kvtier.v1.AdminService",
    "kvtier.v1.TransferService",
    "kvtier.v1.EventsService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_health_is_told_for_the_server_and_for_its_services(daemon: DaemonProcess) -> None:
    assert daemon.health("") == "SERVING"
    assert daemon.health("kvtier.v1.OffloadService") == "SERVING"
    assert daemon.health("no.such.Service") == "NOT_FOUND"


def settings_of(daemon: DaemonProcess) -> dict[int, int]:
    """What the daemon says first on a new connection: HTTP/2's settings, by identifier (RFC 9113, 6.5)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        connection.connect(str(daemon.socket))
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        with connection.makefile("rb") as said:
            head = said.read(9)
            assert head[3] == 4, f"a frame of type {head[3]} before the settings"
            return dict(struct.iter_unpack(">HI", said.read(int.from_bytes(head[:3], "big"))))


def test_a_connection_has_a_limit_of_streams_at_once(daemon: DaemonProcess) -> None:
    max_concurrent_streams = 0x3
    assert settings_of(daemon)[max_concurrent_streams] == 2048


def test_reflection_lists_the_services(daemon: DaemonProcess) -> None:
    with daemon.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = next(stub.ServerReflectionInfo(iter([asked]), timeout=10.0))
    assert {service.name for service in reply.list_services_response.service} == SERVICES


def test_reflection_describes_our_messages(daemon: DaemonProcess) -> None:
    with daemon.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvtier.v1.LookupRequest")
        reply = next(stub.ServerReflectionInfo(iter([asked]), timeout=10.0))
    assert reply.file_descriptor_response.file_descriptor_proto


def test_the_pages_say_that_it_lives_and_serves(daemon: DaemonProcess) -> None:
    assert daemon.page("/livez") == (200, "ok\n")
    assert daemon.page("/readyz") == (200, "serving\n")
    assert daemon.page("/no-such-page")[0] == 404
    assert json.loads(daemon.page("/debug/status")[1])["boot_id"] == daemon.status().boot_id


def test_metrics_count_what_engines_do(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    engine.store(to_keys(range(3)))
    engine.lookup(to_keys(range(5)))
    expected = {
        'kvtier_lookup_keys_total{result="hit"} 3.0',
        'kvtier_lookup_keys_total{result="miss"} 2.0',
        'kvtier_tier_chunks{tier="primary"} 3.0',
        'kvtier_sessions{role="worker"} 1.0',
        'kvtier_limit{name="limits.engines"} 64.0',
        'kvtier_rpc_duration_seconds_count{code="OK",method="OffloadService/Lookup"} 1.0',
        'kvtier_rpc_duration_seconds_count{code="NOT_FOUND",method="OffloadService/Reset"} 1.0',
    }
    refusal(lambda: engine.stub.Reset(pb.ResetRequest(session_id="none")))
    wait_until(
        lambda: expected <= set(daemon.page("/metrics")[1].splitlines()), f"metrics have all of {expected}"
    )


def test_socket_and_pool_are_open_to_their_user_alone(daemon: DaemonProcess) -> None:
    assert stat.S_ISSOCK(daemon.socket.stat().st_mode)
    assert mode_of(daemon.socket) == 0o600
    assert mode_of(daemon.socket.parent) == 0o700
    assert mode_of(daemon.pool_directory) == 0o700
    assert mode_of(daemon.pool_file) == 0o600


def test_sigterm_stops_an_idle_daemon_with_0_and_tells_how_to_free_the_pool(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    assert daemon.stop() == 0
    assert f"kvtier pool remove --name {daemon.name}" in daemon.out_text()
    assert daemon.pool_file.exists()
    assert not daemon.socket.exists()


@pytest.mark.parametrize("full", [["daemon.out"], ["daemon.out", "daemon.log"]], ids=["out", "both"])
def test_a_daemon_whose_output_cannot_be_written_serves_and_stops(tmp_path: Path, full: list[str]) -> None:
    with DaemonProcess(tmp_path) as daemon:
        for name in full:
            (tmp_path / daemon.name / name).symlink_to("/dev/full")
        daemon.launch()
        wait_until(lambda: daemon.exit_code() is not None or daemon.health() == "SERVING", "it serves")
        assert daemon.stop() == 0
        if "daemon.log" not in full:
            assert daemon.log_text().count("output_not_written") == 1
            assert "Traceback" not in daemon.log_text()
            assert "Exception ignored" not in daemon.log_text()


def test_a_stopped_daemon_names_the_directory_of_a_pool_that_has_one_of_its_own(
    start_daemon: StartDaemon,
) -> None:
    with tempfile.TemporaryDirectory(prefix="kvtier-test-", dir="/dev/shm") as shm:
        directory = f"{shm}/pool"
        daemon = start_daemon(env={"KVTIER_POOL__DIRECTORY": directory})
        assert daemon.stop() == 0
        assert f"kvtier pool remove --directory {directory}\n" in daemon.out_text()


def begin_to_drain(daemon: DaemonProcess, engine: RawEngine) -> pb.PrepareStoreResponse:
    """Send SIGTERM while a store is going on; returns once the engine was told."""
    granted = engine.prepare_store([to_key(1)])
    daemon.signal(signal.SIGTERM)
    assert engine.scheduler is not None
    assert engine.scheduler.wait_for("draining").draining.deadline_ms == 10_000
    return granted


def test_a_draining_daemon_grants_nothing_new_and_ends_when_the_last_copy_has(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    engine.store([to_key(2)])
    granted = begin_to_drain(daemon, engine)
    assert daemon.health() == "NOT_SERVING"
    assert daemon.health("kvtier.v1.OffloadService") == "NOT_SERVING"
    assert daemon.page("/readyz") == (503, "draining\n")
    assert daemon.page("/livez")[0] == 200
    assert daemon.status().state == "draining"
    for call in (
        lambda: engine.lookup([to_key(2)], lease_id=engine.new_lease_id()),
        lambda: engine.prepare_load([to_key(2)]),
        lambda: engine.prepare_store([to_key(3)]),
        make_engine(daemon).attach_scheduler,
    ):
        failed = refusal(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    engine.report_stores(granted.slot_ids, granted.generations, [to_key(1)])
    assert daemon.wait() == 0
    assert engine.scheduler is not None
    assert engine.scheduler.wait_for_end() is grpc.StatusCode.OK


def test_a_copy_that_does_not_end_holds_up_the_stop_only_so_long(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config='[drain]\ncopies = "100ms"\n')
    engine = make_engine(daemon).attach()
    engine.prepare_store([to_key(1)])
    assert daemon.stop() == 0
    assert '"left_copies": 1' in daemon.log_text()


def catches_sigterm(daemon: DaemonProcess) -> bool:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_a_sigterm_while_it_starts_is_exit_0_and_the_next_one_starts(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        for moment in (lambda: catches_sigterm(daemon), daemon.pool_file.exists):
            daemon.launch()
            wait_until(moment, "it starts")
            assert daemon.stop() == 0, daemon.log_text()
        daemon.start()


def test_a_second_sigterm_stops_at_once(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon()
    begin_to_drain(daemon, make_engine(daemon).attach())
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(timeout_s=5.0) == 0
    assert "stopped_at_once" in daemon.log_text()
    assert not daemon.socket.exists()


def test_a_daemon_starts_again_over_what_a_killed_one_left(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    make_engine(daemon).attach().store([to_key(1)])
    boot_id = daemon.status().boot_id
    daemon.kill()
    assert daemon.socket.exists()
    daemon.restart()
    assert daemon.status().boot_id != boot_id
    make_engine(daemon).attach().store([to_key(1)])
