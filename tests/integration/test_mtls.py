"""TCP with certificates, on a real daemon: who is let in, as whom, and what happens when files change."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.certificate_authority import CertificateAuthority, Issued, tls_section
from tests.client.builders import make_client
from tests.conftest import StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, child_environment, wait_until
from tests.raw_engine import RawEngine, failure, failure_of, refusal, to_key

from kvtier.v1 import admin_pb2, admin_pb2_grpc, offload_pb2_grpc
from kvtier.v1 import offload_pb2 as pb
from kvtier_client import ClientOptions, TlsFiles
from kvtier_client.mirror import IndexMirror
from kvtier_server.access import METHOD_ROLES

SPIFFE = "spiffe://example.com/engine-b"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def issued(authority: CertificateAuthority) -> dict[str, Issued]:
    names = {
        "daemon": "DNS:localhost,IP:127.0.0.1",
        "engine-a": "",
        "engine-b": f"URI:{SPIFFE}",
        "watch": "",
        "ops": "",
        "stranger": "",
    }
    return {name: authority.issue(name, san) for name, san in names.items()}


def configuration(issued: dict[str, Issued]) -> str:
    tenants = {"engine-a": "a", SPIFFE: "b"}
    return tls_section(issued["daemon"], tenants=tenants, observers='"watch"', admins='"ops"')


@pytest.fixture(scope="module")
def served(issued: dict[str, Issued], tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("mtls"), config=configuration(issued)) as daemon:
        yield daemon.start()


class TlsEngine(RawEngine):
    """A raw engine over TCP."""

    def __init__(self, port: int, certificate: Issued, tenant: str = "") -> None:
        super().__init__(f"localhost:{port}", tenant=tenant, channel=certificate.channel(port))


HARMLESS = {
    "/kvtier.v1.AdminService/Drain": admin_pb2.DrainRequest(deadline_ms=(1 << 32) - 1).SerializeToString()
}
"""An empty request would be an order."""


def call_every_method(channel: grpc.Channel) -> dict[str, str]:
    """What each method answers to a harmless request: the reason of a refusal, or the status of an answer."""
    answers = {}
    for method in METHOD_ROLES:
        if "reflection" in method:
            continue
        call = channel.stream_stream(method, request_serializer=bytes, response_deserializer=bytes)
        running = call(iter([HARMLESS.get(method, b"")]), timeout=WAIT_S)
        try:
            next(running)
            answers[method] = "OK"
        except StopIteration:
            answers[method] = "OK"
        except grpc.RpcError as error:
            failed = failure_of(error)
            answers[method] = failed.reason or f"{failed.code.name}: {failed.message}"
        finally:
            running.cancel()
    return answers


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("engine-a", {"engine"}),
        ("engine-b", {"engine"}),
        ("watch", {"observer"}),
        ("ops", {"observer", "admin"}),
    ],
)
def test_a_certificate_opens_exactly_the_methods_of_its_role(
    served: DaemonProcess, issued: dict[str, Issued], name: str, roles: set[str]
) -> None:
    with issued[name].channel(served.tcp_port) as channel:
        answers = call_every_method(channel)
    for method, reason in answers.items():
        is_open = bool(roles & set(METHOD_ROLES[method]))
        assert (reason != "ROLE_MISSING") == is_open, (method, reason)


def test_a_certificate_without_a_name_in_the_configuration_is_refused_with_what_to_write(
    served: DaemonProcess, issued: dict[str, Issued]
) -> None:
    with issued["stranger"].channel(served.tcp_port) as channel:
        assert set(call_every_method(channel).values()) == {"CERTIFICATE_UNKNOWN"}
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        refused = refusal(lambda: stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=WAIT_S))
        assert refused.code is grpc.StatusCode.PERMISSION_DENIED
        assert "'stranger'" in refused.message
        assert "[tls.tenants]" in refused.message
    wait_until(lambda: "call_refused" in served.log_text(), "the refusal is in the log")


def test_without_a_certificate_or_with_one_of_somebody_else_there_is_no_connection(
    served: DaemonProcess, issued: dict[str, Issued], tmp_path: Path
) -> None:
    foreign = CertificateAuthority(tmp_path).issue("ops")
    mixed = Issued(issued["ops"].ca, foreign.cert, foreign.key)
    none = grpc.ssl_channel_credentials(issued["ops"].ca.read_bytes())
    target = f"localhost:{served.tcp_port}"
    channels = [
        grpc.secure_channel(target, none),
        mixed.channel(served.tcp_port),
        grpc.insecure_channel(target),
    ]
    for channel in channels:
        with channel:
            stub = health_pb2_grpc.HealthStub(channel)
            error = failure(lambda stub=stub: stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S))  # type: ignore[misc]
            assert error.code is grpc.StatusCode.UNAVAILABLE


def test_reflection_is_for_the_unix_socket(served: DaemonProcess, issued: dict[str, Issued]) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with issued["ops"].channel(served.tcp_port) as channel:
        call = channel.stream_stream(path, request_serializer=bytes, response_deserializer=bytes)
        error = failure(lambda: next(call(iter([b""]), timeout=WAIT_S)))
    assert error.code is grpc.StatusCode.UNIMPLEMENTED


def test_a_session_has_the_tenant_of_its_certificate_whatever_it_claims(
    served: DaemonProcess, issued: dict[str, Issued]
) -> None:
    with ExitStack() as engines:
        for claimed in ("", "a"):
            engine = engines.enter_context(TlsEngine(served.tcp_port, issued["engine-a"], claimed))
            engine.attach()
            (mine,) = {s.tenant for s in served.status().sessions if s.engine_id == engine.engine_id}
            assert mine == "a"
        other = engines.enter_context(TlsEngine(served.tcp_port, issued["engine-a"], "b"))
        refused = refusal(other.attach_scheduler)
    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "TENANT_MISMATCH")
    assert "[tls.tenants]" in refused.message


def test_a_tenant_cannot_use_what_it_knows_of_another_ones_session(
    served: DaemonProcess, issued: dict[str, Issued]
) -> None:
    with (
        TlsEngine(served.tcp_port, issued["engine-a"]) as victim,
        TlsEngine(served.tcp_port, issued["engine-b"]) as thief,
    ):
        victim.attach().store([to_key(1)])
        thief.attach()
        asked = [
            ("Lookup", pb.LookupRequest(session_id=victim.session_id, keys=[to_key(1)])),
            (
                "PrepareLoad",
                pb.PrepareLoadRequest(session_id=victim.session_id, keys=[to_key(1)], lease_id=7),
            ),
            (
                "PrepareStore",
                pb.PrepareStoreRequest(session_id=victim.session_id, keys=[to_key(2)], lease_id=8),
            ),
            ("Complete", pb.CompleteRequest(session_id=victim.session_id)),
            ("RenewLeases", pb.RenewLeasesRequest(session_id=victim.session_id)),
            ("Touch", pb.TouchRequest(session_id=victim.session_id, keys=[to_key(1)])),
            ("FinishRequest", pb.FinishRequestRequest(session_id=victim.session_id)),
            ("Reset", pb.ResetRequest(session_id=victim.session_id)),
        ]
        unknown = refusal(lambda: thief.stub.Lookup(pb.LookupRequest(session_id="x", keys=[to_key(1)])))
        for method, request in asked:
            refused = refusal(lambda m=method, r=request: getattr(thief.stub, m)(r, timeout=WAIT_S))  # type: ignore[misc]
            assert refused.reason == "SESSION_UNKNOWN", method
            assert refused.message.replace(victim.session_id, "x") == unknown.message
        seat = thief.attach_request(pb.SESSION_ROLE_SCHEDULER)
        seat.engine_id = victim.engine_id
        assert thief.scheduler is not None
        assert victim.scheduler is not None
        seat.lock_file = thief.scheduler.lock.name
        taken = refusal(lambda: list(thief.stub.Attach(seat, timeout=WAIT_S)))
        assert taken.reason == "RANK_TAKEN"
        assert "lock" not in taken.metadata
        seat.lock_file = victim.scheduler.lock.name
        assert refusal(lambda: list(thief.stub.Attach(seat, timeout=WAIT_S))).reason == "RANK_TAKEN"
        assert list(thief.lookup([to_key(1)]).statuses) == [pb.LOOKUP_STATUS_MISS]
        assert list(victim.lookup([to_key(1)]).statuses) == [pb.LOOKUP_STATUS_HIT]


def test_the_client_stores_and_loads_over_mtls(served: DaemonProcess, issued: dict[str, Issued]) -> None:
    files = TlsFiles(str(issued["engine-a"].ca), str(issued["engine-a"].cert), str(issued["engine-a"].key))
    options = ClientOptions(tls=files, lookup_deadline_ms=5000, prepare_deadline_ms=5000)
    client = make_client(f"localhost:{served.tcp_port}", options=options)
    client.start()
    try:
        assert client.wait_attached(WAIT_S), client.away_reason
        assert "a" in {session.tenant for session in served.status().sessions}
    finally:
        client.close()


def test_a_router_mirrors_over_mtls_and_is_told_of_a_file_that_is_not_there(
    served: DaemonProcess, issued: dict[str, Issued]
) -> None:
    files = TlsFiles(str(issued["watch"].ca), str(issued["watch"].cert), str(issued["watch"].key))
    mirror = IndexMirror(f"localhost:{served.tcp_port}", tls=files)
    missing = IndexMirror(f"localhost:{served.tcp_port}", tls=dataclasses.replace(files, cert="/nowhere.pem"))
    mirror.start()
    missing.start()
    try:
        assert mirror.wait_live(WAIT_S), mirror.state.problem
        wait_until(lambda: "/nowhere.pem cannot be read" in missing.state.problem, "it says what is missing")
    finally:
        mirror.close()
        missing.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cert": "/nowhere.pem"}, "/nowhere.pem cannot be read"),
        ({"name": "stranger"}, "certificate_unknown"),
        ({"name": "ops"}, "role_missing"),
        ({"server_name": "elsewhere"}, "whether it refuses this client's certificate"),
    ],
)
def test_a_client_that_is_not_let_in_misses_and_says_why(
    served: DaemonProcess, issued: dict[str, Issued], change: dict[str, str], reason: str
) -> None:
    mine = issued[change.get("name", "engine-a")]
    files = TlsFiles(
        str(mine.ca), change.get("cert", str(mine.cert)), str(mine.key), change.get("server_name", "")
    )
    client = make_client(
        f"127.0.0.1:{served.tcp_port}", options=ClientOptions(tls=files, prepare_deadline_ms=5000)
    )
    client.start()
    try:
        wait_until(lambda: reason in client.away_reason, f"the client says {reason}")
        assert not client.attached
    finally:
        client.close()


def kvtier(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvtier_server", *arguments],
        env=child_environment(**env), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_commands_reach_the_daemon_by_options_and_by_the_environment(
    served: DaemonProcess, issued: dict[str, Issued]
) -> None:
    address = f"localhost:{served.tcp_port}"
    asked = kvtier("health", "--address", address, *issued["watch"].options())
    assert (asked.returncode, asked.stdout) == (0, "SERVING\n"), asked.stderr
    ops = issued["ops"]
    env = {"KVTIER_TLS_CA": str(ops.ca), "KVTIER_TLS_CERT": str(ops.cert), "KVTIER_TLS_KEY": str(ops.key)}
    cleared = kvtier("admin", "clear", "--tier", "all", "--yes", "--address", address, **env)
    assert cleared.returncode == 0, cleared.stderr
    refused = kvtier(
        "admin", "clear", "--tier", "all", "--yes", "--address", address, *issued["watch"].options()
    )
    assert refused.returncode == 1
    assert "needs the role admin" in refused.stderr
    bare = kvtier("health", "--address", address)
    assert bare.returncode == 2
    assert "--tls-ca" in bare.stderr
    half = kvtier("health", "--address", address, "--tls-ca", str(ops.ca))
    assert half.returncode == 2
    assert "--tls-cert (or KVTIER_TLS_CERT) is missing" in half.stderr


def test_a_certificate_or_an_authority_that_is_not_the_right_one_is_told_in_one_line(
    served: DaemonProcess, issued: dict[str, Issued], tmp_path: Path
) -> None:
    address = f"localhost:{served.tcp_port}"
    for command in ("health", "status"):
        unknown = kvtier(command, "--address", address, *issued["stranger"].options())
        assert unknown.returncode == 2
        assert "PERMISSION_DENIED" in unknown.stderr
    other = CertificateAuthority(tmp_path / "other").issue("ops")
    ops = issued["ops"]
    distrusted = kvtier("health", "--address", address, *Issued(other.ca, ops.cert, ops.key).options())
    said = f"kvtier: --tls-ca: {other.ca} does not vouch for the daemon at {address}"
    assert distrusted.stderr.startswith(said)
    refused = kvtier("health", "--address", address, *Issued(ops.ca, other.cert, other.key).options())
    assert "it may refuse your certificate" in refused.stderr
    for each in (unknown, distrusted, refused):
        assert (each.returncode, len(each.stderr.splitlines())) == (2, 1), each.stderr


def presented(port: int, issued: Issued) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=issued.ca)
    context.load_cert_chain(issued.cert, issued.key)
    with (
        socket.create_connection(("localhost", port), timeout=WAIT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        shown = tls.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def as_der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


def replace(source: Path, target: Path) -> None:
    copy = target.with_suffix(".new")
    shutil.copyfile(source, copy)
    os.replace(copy, target)


def test_new_certificates_are_taken_without_a_restart_and_bad_ones_are_not(
    authority: CertificateAuthority, issued: dict[str, Issued], tmp_path: Path, start_daemon: StartDaemon
) -> None:
    first, second = authority.issue_for_daemon(), authority.issue("later", "DNS:localhost")
    live = Issued(tmp_path / "ca.pem", tmp_path / "tls.pem", tmp_path / "tls.key")
    for source, target in ((first.ca, live.ca), (first.cert, live.cert), (first.key, live.key)):
        shutil.copyfile(source, target)
    daemon = start_daemon(config=configuration({"daemon": live}))
    ops = issued["ops"]
    with ops.channel(daemon.tcp_port) as open_before:
        health = health_pb2_grpc.HealthStub(open_before)
        health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert presented(daemon.tcp_port, ops) == as_der(first.cert)

        live.cert.write_text("not a certificate")
        wait_until(lambda: refusals(daemon) == 1, "the bad file is in the log")
        assert presented(daemon.tcp_port, ops) == as_der(first.cert)
        replace(second.cert, live.cert)  # and not yet its key: the two do not belong together
        wait_until(lambda: refusals(daemon) == 2, "the two are in the log")
        assert presented(daemon.tcp_port, ops) == as_der(first.cert)
        live.ca.unlink()
        wait_until(lambda: refusals(daemon) == 3, "the missing file is in the log")
        assert presented(daemon.tcp_port, ops) == as_der(first.cert)
        replace(second.key, live.key)
        replace(first.ca, live.ca)
        wait_until(lambda: presented(daemon.tcp_port, ops) == as_der(second.cert), "the new ones are taken")
        assert "tls_files_reloaded" in daemon.log_text()
        assert refusals(daemon) == 3, "each is in the log once"
        health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)

        other = CertificateAuthority(tmp_path / "other")
        successor = other.issue("ops")
        replace(successor.ca, live.ca)
        wait_until(lambda: daemon.log_text().count("tls_files_reloaded") == 2, "the authority is taken")
        with Issued(ops.ca, successor.cert, successor.key).channel(daemon.tcp_port) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        with ops.channel(daemon.tcp_port) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            error = failure(lambda: stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S))
            assert error.code is grpc.StatusCode.UNAVAILABLE


def refusals(daemon: DaemonProcess) -> int:
    return daemon.log_text().count("tls_files_refused")


def test_a_certificate_that_becomes_a_fifo_holds_nobody_up(
    authority: CertificateAuthority, issued: dict[str, Issued], tmp_path: Path, start_daemon: StartDaemon
) -> None:
    first, second = authority.issue_for_daemon(), authority.issue("after-fifo", "DNS:localhost")
    live = Issued(first.ca, tmp_path / "tls.pem", tmp_path / "tls.key")
    shutil.copyfile(first.cert, live.cert)
    shutil.copyfile(first.key, live.key)
    daemon = start_daemon(config=configuration({"daemon": live}))
    live.cert.unlink()
    os.mkfifo(live.cert)
    for _ in range(3):
        assert presented(daemon.tcp_port, issued["ops"]) == as_der(first.cert)
    wait_until(lambda: "is no regular file" in daemon.log_text(), "the fifo is in the log")
    assert presented(daemon.tcp_port, issued["ops"]) == as_der(first.cert)
    assert daemon.health() == "SERVING"
    replace(second.key, live.key)
    replace(second.cert, live.cert)
    wait_until(
        lambda: presented(daemon.tcp_port, issued["ops"]) == as_der(second.cert), "the new one is taken"
    )
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("cert", "are no certificate and its key"),
        ("key", "are no certificate and its key"),
        ("ca", "client_ca_file"),
    ],
)
def test_files_that_cannot_be_used_end_the_start_and_are_named(
    issued: dict[str, Issued], tmp_path: Path, broken: str, told: str
) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("nonsense")
    files = {
        "ca": issued["daemon"].ca,
        "cert": issued["daemon"].cert,
        "key": issued["daemon"].key,
        broken: bad,
    }
    with DaemonProcess(tmp_path, config=configuration({"daemon": Issued(**files)})) as daemon:
        assert daemon.launch().wait() == 2
        assert told in daemon.log_text()
        assert str(bad) in daemon.log_text()
        assert "Traceback" not in daemon.log_text()
    missing = Issued(issued["daemon"].ca, issued["daemon"].cert, tmp_path / "none.key")
    with DaemonProcess(tmp_path, config=configuration({"daemon": missing})) as daemon:
        assert daemon.launch().wait() == 2
        assert f"key_file {tmp_path}/none.key cannot be read" in daemon.log_text()


def test_calls_that_change_something_have_a_socket_of_their_own_where_that_is_wished(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    admin = Path(f"/tmp/{tmp_path.name[:20]}-{os.getpid()}")
    address = f"unix://{admin}/a/admin.sock"
    try:
        daemon = start_daemon(config=f'[server]\nadmin_address = "{address}"\n')
        for socket_file in (daemon.socket, admin / "a" / "admin.sock"):
            assert socket_file.stat().st_mode & 0o777 == 0o600
            assert socket_file.parent.stat().st_mode & 0o777 == 0o700
        with daemon.channel() as channel:
            answers = call_every_method(channel)
            refused = {method for method, reason in answers.items() if reason == "ROLE_MISSING"}
            assert refused == {method for method, roles in METHOD_ROLES.items() if roles == {"admin"}}
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            told = refusal(lambda: stub.Clear(admin_pb2.ClearRequest(everything=True), timeout=WAIT_S))
            assert "server.admin_address" in told.message
        with grpc.insecure_channel(address) as channel:
            assert "ROLE_MISSING" not in call_every_method(channel).values()
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            stub.Clear(admin_pb2.ClearRequest(everything=True), timeout=WAIT_S)
        with RawEngine(daemon.address) as engine:
            engine.attach().store([to_key(1)])
        assert daemon.stop() == 0
        assert not (admin / "a" / "admin.sock").exists()
    finally:
        shutil.rmtree(admin, ignore_errors=True)


def test_a_socket_for_operators_leaves_them_no_other_way_without_a_certificate(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    admin = Path(f"/tmp/{tmp_path.name[:20]}-{os.getpid()}")
    try:
        daemon = start_daemon(
            config=f'[server]\nadmin_address = "unix://{admin}/admin.sock"\ntcp_address = "127.0.0.1:0"\n'
        )
        with grpc.insecure_channel(f"127.0.0.1:{daemon.tcp_port}") as channel:
            assert call_every_method(channel)["/kvtier.v1.AdminService/Clear"] == "ROLE_MISSING"
    finally:
        shutil.rmtree(admin, ignore_errors=True)


def test_a_port_that_is_taken_ends_the_start_and_is_named(served: DaemonProcess, tmp_path: Path) -> None:
    config = f'[server]\ntcp_address = "localhost:{served.tcp_port}"\n'
    with DaemonProcess(tmp_path, config=config) as daemon:
        assert daemon.launch().wait() == 1
        said = f"server.tcp_address localhost:{served.tcp_port} is in use; choose another"
        assert f"{said} (who has it: ss -ltnp)" in daemon.log_text()


def test_what_a_caller_claims_is_not_repeated_at_length(
    served: DaemonProcess, issued: dict[str, Issued]
) -> None:
    with TlsEngine(served.tcp_port, issued["engine-a"], "x" * 500_000) as engine:
        assert len(refusal(engine.attach_scheduler).message) < 1000
        lookup = pb.LookupRequest(session_id="y" * (1 << 20), keys=[to_key(1)])
        assert len(refusal(lambda: engine.stub.Lookup(lookup, timeout=WAIT_S)).message) < 1000


def test_loopback_tcp_without_certificates_works_and_says_to_whom_it_is_open(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(config='[server]\ntcp_address = "127.0.0.1:0"\n')
    assert "(open to every user of this machine)" in daemon.out_text()
    assert "tcp_without_tls" in daemon.log_text()
    with grpc.insecure_channel(f"127.0.0.1:{daemon.tcp_port}") as channel:
        described = offload_pb2_grpc.OffloadServiceStub(channel).Describe(
            pb.DescribeRequest(), timeout=WAIT_S
        )
    assert described.pool.directory == str(daemon.pool_directory)
