"""`status` and `health` against a gRPC server that answers what the test says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from kvtier.v1 import admin_pb2

from .conftest import Kvtier


def full_status() -> admin_pb2.GetStatusResponse:
    return admin_pb2.GetStatusResponse(
        boot_id="00112233aabbccdd",
        version="1.2.3",
        state="serving",
        uptime_seconds=95,
        pool=admin_pb2.PoolStatus(
            path="/dev/shm/kvtier-1-default/pool",
            name="default",
            data_bytes=4 << 30,
            backed_bytes=1 << 30,
            policy="lru",
        ),
        tiers=[
            admin_pb2.TierStatus(
                name="primary",
                capacity_bytes=4 << 30,
                usable_bytes=1 << 30,
                used_bytes=512 << 20,
                chunks=1 << 20,
                pinned_chunks=123456,
                free_slots=1 << 20,
                reserved_slots=1000,
                quarantined_slots=100,
                health="ok",
            )
        ],
        sessions=[
            admin_pb2.SessionStatus(
                engine_id="vllm-" + "x" * 60,
                role="worker",
                rank=3,
                tenant="team-a",
                namespace="0123456789ab",
                model="meta-llama/Llama-3.1-70B-Instruct",
                age_seconds=7260,
                pinned_chunks=5,
                credits=64,
            )
        ],
        leases=[admin_pb2.LeaseStatus(kind="lookup", count=2, oldest_age_seconds=1.5)],
        lookup_keys={"hit": 30, "miss": 10},
        evictions={"evict": 4},
        checksum_failures=1,
    )


class AdminService:
    """Answers GetStatus with what the test puts here."""

    def __init__(self) -> None:
        self.status = full_status()
        self.code: grpc.StatusCode | None = None
        self.hang = threading.Event()
        self.hang.set()

    def get_status(
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        self.hang.wait(60)
        if self.code is not None:
            context.abort(self.code, "said the test")
        return self.status


class Server:
    def __init__(self, address: str) -> None:
        self.address = address
        self.admin = AdminService()
        self.health = HealthServicer()
        self.grpc = grpc.server(futures.ThreadPoolExecutor(2))
        get_status = grpc.unary_unary_rpc_method_handler(
            self.admin.get_status,
            request_deserializer=admin_pb2.GetStatusRequest.FromString,
            response_serializer=admin_pb2.GetStatusResponse.SerializeToString,
        )
        self.grpc.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("kvtier.v1.AdminService", {"GetStatus": get_status})]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        assert self.grpc.add_insecure_port(address)
        self.grpc.start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "kvtier").mkdir()
    server = Server(f"unix://{tmp_path}/kvtier/kvtier.sock")
    yield server
    server.admin.hang.set()
    server.grpc.stop(None).wait(30)


def test_status_fits_a_page_and_says_what_counts(kvtier: Kvtier, server: Server) -> None:
    shown = kvtier("status", "--address", server.address)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for fact in (
        "serving",
        "1m35s",
        "00112233aabbccdd",
        "4GiB, 1GiB backed",
        "50%",
        "rank 3",
        "tenant team-a",
        "75.0% hits of 40 keys",
    ):
        assert fact in shown.stdout
    assert "checksum failures   1" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_status_as_json_has_every_field_and_numbers_as_numbers(kvtier: Kvtier, server: Server) -> None:
    shown = json.loads(kvtier("status", "-o", "json", "--address", server.address).stdout)
    assert shown.keys() == {field.name for field in admin_pb2.GetStatusResponse.DESCRIPTOR.fields}
    assert shown["pool"]["data_bytes"] == 4 << 30
    assert shown["tiers"][0]["chunks"] == 1 << 20
    assert shown["sessions"][0]["rank"] == 3
    assert shown["lookup_keys"] == {"hit": 30, "miss": 10}
    assert shown["store_refused"] == {}


def test_who_copies_and_how_far_the_pool_is_pinned_are_shown(kvtier: Kvtier, server: Server) -> None:
    server.admin.status.sessions[0].path = "cuda_ipc"
    server.admin.status.copy_devices.add(
        device="00112233445566778899aabbccddeeff",
        state="serving",
        restarts=2,
        memories=8,
        jobs=3,
        pinned_bytes=1 << 30,
        problem="64 bytes of the pool at 1073741824 cannot be registered: check `ulimit -l` of the user",
    )
    server.admin.status.copy_devices.add(device="host", state="it cannot be begun: no memory")
    shown = kvtier("status", "--address", server.address).stdout
    problem = "  64 bytes of the pool at 1073741824 cannot be registered: check `ulimit -l` of the user"
    assert problem in shown.splitlines(), "no line is broken off a terminal"
    as_one_line = " ".join(shown.split())
    assert "copied by cuda_ipc" in as_one_line
    assert "copies by device 00112233445566778899aabbccddeeff serving 8 memories, 3 jobs" in as_one_line
    assert "pinned 1GiB of 4GiB begun anew 2 times" in as_one_line
    assert "check `ulimit -l`" in as_one_line
    assert "copies by device host it cannot be begun: no memory" in as_one_line
    told = json.loads(kvtier("status", "-o", "json", "--address", server.address).stdout)
    assert told["sessions"][0]["path"] == "cuda_ipc"
    assert told["copy_devices"][0]["pinned_bytes"] == 1 << 30


def test_an_engine_is_one_entry_whatever_the_number_of_its_ranks(kvtier: Kvtier, server: Server) -> None:
    worker = server.admin.status.sessions[0]
    worker.engine_id = "e1"
    for rank in (0, 1, 2):
        server.admin.status.sessions.add().CopyFrom(worker)
        server.admin.status.sessions[-1].rank = rank
    for rank in (5, 0):
        server.admin.status.sessions.add().CopyFrom(worker)
        server.admin.status.sessions[-1].rank = rank
    server.admin.status.sessions[-1].role = "scheduler"
    shown = kvtier("status", "--address", server.address).stdout
    assert "engine e1  scheduler + ranks 0-3,5  for 2h01m  5 pinned, 64 credits" in shown
    assert shown.count("engine ") == 1


@pytest.mark.parametrize(
    ("state", "code"), [("serving", 0), ("degraded", 1), ("starting", 1), ("draining", 1)]
)
def test_the_exit_code_of_status_is_the_daemons_state(
    kvtier: Kvtier, server: Server, state: str, code: int
) -> None:
    server.admin.status.state = state
    server.admin.status.tiers[0].health = "ENOSPC: 1.0GiB of 4.0GiB backed"
    shown = kvtier("status", "--address", server.address)
    assert shown.returncode == code
    assert state in shown.stdout
    assert "tier primary: ENOSPC" in shown.stdout


def test_an_empty_daemon_has_a_status_too(kvtier: Kvtier, server: Server) -> None:
    server.admin.status = admin_pb2.GetStatusResponse(state="starting")
    shown = kvtier("status", "--address", server.address)
    assert (shown.returncode, shown.stderr) == (1, "")
    assert "no engine is attached" in shown.stdout
    assert "none yet" in shown.stdout


@pytest.mark.parametrize("command", ["status", "health"])
def test_the_address_comes_from_the_option_or_the_environment(
    kvtier: Kvtier, server: Server, command: str
) -> None:
    nowhere = "unix:///nonexistent/kvtier.sock"
    assert kvtier(command, KVTIER_ADDRESS=server.address).returncode == 0
    assert kvtier(command, "--address", server.address, KVTIER_ADDRESS=nowhere).returncode == 0
    assert kvtier(command, "--address", nowhere, KVTIER_ADDRESS=server.address).returncode == 2


@pytest.mark.parametrize("command", ["status", "health"])
def test_without_a_daemon_both_say_how_to_start_one(kvtier: Kvtier, tmp_path: Path, command: str) -> None:
    missing = f"unix://{tmp_path}/none.sock"
    refused = kvtier(command, "--address", missing)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"kvtier: no daemon at {missing}; start one: kvtier serve --address {missing}\n"


@pytest.mark.parametrize("command", ["status", "health"])
def test_a_socket_that_a_dead_daemon_left_is_no_daemon(kvtier: Kvtier, tmp_path: Path, command: str) -> None:
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    refused = kvtier(command, "--address", f"unix://{path}")
    assert refused.returncode == 2
    assert "start one: kvtier serve" in refused.stderr


def test_a_bad_address_is_explained(kvtier: Kvtier) -> None:
    refused = kvtier("status", "--address", "localhost")
    assert refused.returncode == 2
    assert "is not host:port; for example" in refused.stderr


def test_a_daemon_that_hangs_is_down_after_the_timeout(kvtier: Kvtier, server: Server) -> None:
    server.admin.hang.clear()
    refused = kvtier("status", "--timeout", "0.2", "--address", server.address)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "does not answer in time" in refused.stderr


@pytest.mark.parametrize(
    ("code", "exit_code", "text"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, 1, "compare the versions: kvtier version"),
        (grpc.StatusCode.UNAVAILABLE, 2, "is going away: said the test"),
        (grpc.StatusCode.PERMISSION_DENIED, 2, "refuses: PERMISSION_DENIED: said the test"),
        (grpc.StatusCode.INTERNAL, 1, "refuses: INTERNAL: said the test"),
    ],
)
def test_an_error_of_the_daemon_is_one_line(
    kvtier: Kvtier, server: Server, code: grpc.StatusCode, exit_code: int, text: str
) -> None:
    server.admin.code = code
    refused = kvtier("status", "--address", server.address)
    assert (refused.returncode, refused.stdout) == (exit_code, "")
    assert text in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (health_pb2.HealthCheckResponse.SERVING, 0),
        (health_pb2.HealthCheckResponse.NOT_SERVING, 1),
        (health_pb2.HealthCheckResponse.UNKNOWN, 1),
    ],
)
def test_health_prints_the_answer_of_the_health_service(
    kvtier: Kvtier, server: Server, answer: health_pb2.HealthCheckResponse.ServingStatus, code: int
) -> None:
    server.health.set("", answer)
    shown = kvtier("health", "--address", server.address)
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer)
    assert (shown.returncode, shown.stdout, shown.stderr) == (code, f"{name}\n", "")
