from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from kvtier.v1 import admin_pb2, events_pb2, offload_pb2, transfer_pb2
from kvtier_server.access import METHOD_ROLES, Gatekeeper
from kvtier_server.callers import (
    ENGINES,
    LOCAL,
    Caller,
    CertificateHolders,
    CertificateUnknown,
    Role,
    TenantMismatch,
    current_caller,
)
from kvtier_server.message_bytes import message_bytes
from kvtier_server.metrics import Metrics
from kvtier_server.rpc import CallScope

MAX_BYTES = message_bytes(max_keys=8192, max_params_bytes=65_536)

FILES = (offload_pb2, transfer_pb2, events_pb2, admin_pb2, health_pb2, reflection_pb2)


def served_methods() -> set[str]:
    services = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
    return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


def test_every_method_of_the_wire_contract_has_a_role_and_no_other_has() -> None:
    assert set(METHOD_ROLES) == served_methods()
    assert all(METHOD_ROLES.values()), "a method that no role may call"


def test_every_method_of_ours_has_a_longest_message_and_no_other_has() -> None:
    assert {f"/kvtier.v1.{method}" for method in MAX_BYTES} == {
        method for method in served_methods() if method.startswith("/kvtier.v1.")
    }


def test_what_an_engine_calls_changes_nothing_for_operators_and_the_other_way_round() -> None:
    by_role = {role: {name for name, roles in METHOD_ROLES.items() if roles == {role}} for role in Role}
    assert {name.split("/")[1] for name in by_role[Role.ENGINE]} == {
        "kvtier.v1.OffloadService",
        "kvtier.v1.TransferService",
    }
    assert not any("AdminService" in name for name in by_role[Role.ENGINE])
    assert {name.rpartition("/")[2] for name in by_role[Role.ADMIN]} == {
        "Evict",
        "Clear",
        "SetQuota",
        "Drain",
    }


def holders() -> CertificateHolders:
    return CertificateHolders(
        {"engine-a": "a", "spiffe://x/engine-b": "b", "both": "a"},
        admins=["ops"],
        observers=["watch", "both"],
    )


def certificate(dns: str = "", uri: str = "", common: str = "") -> dict[str, list[bytes]]:
    names = {"peer_dns": dns, "peer_uri": uri, "x509_common_name": common}
    return {kind: [text.encode() for text in name.split()] for kind, name in names.items() if name}


@pytest.mark.parametrize(
    ("shown", "roles", "tenant"),
    [
        (certificate(dns="engine-a"), {Role.ENGINE}, "a"),
        (certificate(uri="spiffe://x/engine-b"), {Role.ENGINE}, "b"),
        (certificate(common="engine-a"), {Role.ENGINE}, "a"),
        (certificate(dns="localhost engine-a"), {Role.ENGINE}, "a"),
        (certificate(dns="ops"), {Role.ADMIN, Role.OBSERVER}, ""),
        (certificate(dns="watch"), {Role.OBSERVER}, ""),
        (certificate(dns="both"), {Role.ENGINE, Role.OBSERVER}, "a"),
    ],
)
def test_a_name_of_a_certificate_gives_its_roles_and_its_one_tenant(
    shown: dict[str, list[bytes]], roles: set[Role], tenant: str
) -> None:
    caller = holders().holder(shown)
    assert caller.roles == roles
    assert caller.tenant == tenant


@pytest.mark.parametrize(
    "shown",
    [
        certificate(),
        certificate(dns="engine-c"),
        certificate(dns="ENGINE-A"),
        certificate(dns="engine-c", common="ops"),  # an authority checks names, and rarely what is common
        certificate(dns="engine-a", uri="spiffe://x/engine-b"),
        {"x509_email": [b"ops"], "x509_subject_alternative_name": [b"ops"], "peer_ip": [b"ops"]},
    ],
)
def test_a_certificate_that_stands_for_nobody_or_for_two_tenants_is_refused(
    shown: dict[str, list[bytes]],
) -> None:
    with pytest.raises(CertificateUnknown, match=r"\[tls\.tenants\]"):
        holders().holder(shown)


def test_a_certificate_of_many_long_names_gets_an_answer_that_fits_into_trailers() -> None:
    many = [f"{number}-{'x' * 200}" for number in range(600)]
    with pytest.raises(CertificateUnknown, match="and 592 more") as refused:
        holders().holder({"peer_dns": [name.encode() for name in many]})
    assert len(str(refused.value)) < 1000
    several = CertificateHolders({name: name for name in many}, [], [])
    with pytest.raises(CertificateUnknown, match="and 592 more, belong to several tenants") as refused:
        several.holder({"peer_dns": [name.encode() for name in many]})
    assert len(str(refused.value)) < 1000


def test_a_tenant_need_not_be_claimed_and_another_one_cannot() -> None:
    caller = holders().holder(certificate(dns="engine-a"))
    assert caller.tenant_to_attach_as("") == "a"
    assert caller.tenant_to_attach_as("a") == "a"
    with pytest.raises(TenantMismatch, match="'b' is claimed"):
        caller.tenant_to_attach_as("b")
    assert LOCAL.tenant_to_attach_as("b") == "b"
    assert Role.ADMIN not in ENGINES.roles


async def _tell(request: bytes, context: Any) -> bytes:
    return current_caller().name.encode()


async def _tell_over_a_stream(request: bytes, context: Any) -> None:
    await context.write(current_caller().name.encode())


async def _tell_as_a_generator(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield current_caller().name.encode()


HANDLERS: dict[str, Callable[[], Any]] = {
    "Describe": lambda: grpc.unary_unary_rpc_method_handler(_tell),
    "Attach": lambda: grpc.unary_stream_rpc_method_handler(_tell_over_a_stream),
    "Lookup": lambda: grpc.unary_stream_rpc_method_handler(_tell_as_a_generator),
    "Touch": lambda: grpc.stream_unary_rpc_method_handler(_tell),
    "Reset": lambda: grpc.stream_stream_rpc_method_handler(_tell_as_a_generator),
    "NotYetThere": lambda: grpc.unary_unary_rpc_method_handler(_tell),
}
"""A handler of each shape that gRPC knows, and a method that nobody gave a role."""


async def _call_all(caller: Caller, metrics: Metrics) -> dict[str, str]:
    """What each of HANDLERS answers to this caller over a real server: its word, or the refusal's."""
    with tempfile.TemporaryDirectory(prefix="kvtier-run-") as directory:
        address = f"unix:{Path(directory) / 's'}"
        scope = CallScope("boot", 10, metrics, lambda: None, MAX_BYTES)
        gatekeeper = Gatekeeper(scope, lambda context: caller)
        server = grpc.aio.server(interceptors=[gatekeeper])
        methods = {name: make() for name, make in HANDLERS.items()}
        handler = grpc.method_handlers_generic_handler("kvtier.v1.OffloadService", methods)
        server.add_generic_rpc_handlers((handler,))
        server.add_insecure_port(address)
        await server.start()
        answers = {}
        async with grpc.aio.insecure_channel(address) as channel:
            for name in HANDLERS:
                call: Any = channel.stream_stream(f"/kvtier.v1.OffloadService/{name}")
                try:
                    answers[name] = b"".join([reply async for reply in call(iter([b""]))]).decode()
                except grpc.aio.AioRpcError as error:
                    answers[name] = error.details() or ""
        await server.stop(None)
        return answers


def test_handlers_of_every_shape_are_guarded_and_know_their_caller() -> None:
    metrics = Metrics(version="0", limits={})
    allowed = asyncio.run(_call_all(Caller("engine-a", frozenset({Role.ENGINE}), "a"), metrics))
    unknown = allowed.pop("NotYetThere")
    assert "is open to no role yet" in unknown
    assert set(allowed.values()) == {"engine-a"}
    refused = asyncio.run(_call_all(Caller("ops", frozenset({Role.ADMIN, Role.OBSERVER}), ""), metrics))
    assert refused.pop("NotYetThere") == unknown
    assert all("needs the role engine; the certificate of 'ops' has" in told for told in refused.values())


def test_a_refused_call_counts_among_all_calls() -> None:
    metrics = Metrics(version="0", limits={})
    asyncio.run(_call_all(Caller("ops", frozenset({Role.ADMIN}), ""), metrics))
    for name in HANDLERS:
        labels = {"method": f"OffloadService/{name}", "code": "PERMISSION_DENIED"}
        assert metrics.registry.get_sample_value("kvtier_rpc_duration_seconds_count", labels) == 1
