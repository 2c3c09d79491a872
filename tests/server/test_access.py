from __future__ import annotations

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from kvtier.v1 import admin_pb2, events_pb2, offload_pb2, transfer_pb2
from kvtier_server.access import METHOD_ROLES
from kvtier_server.callers import ENGINES, LOCAL, CertificateHolders, CertificateUnknown, Role, TenantMismatch

FILES = (offload_pb2, transfer_pb2, events_pb2, admin_pb2, health_pb2, reflection_pb2)


def served_methods() -> set[str]:
    services = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
    return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


def test_every_method_of_the_wire_contract_has_a_role_and_no_other_has() -> None:
    assert set(METHOD_ROLES) == served_methods()
    assert all(METHOD_ROLES.values()), "a method that no role may call"


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


def test_a_tenant_need_not_be_claimed_and_another_one_cannot() -> None:
    caller = holders().holder(certificate(dns="engine-a"))
    assert caller.tenant_to_attach_as("") == "a"
    assert caller.tenant_to_attach_as("a") == "a"
    with pytest.raises(TenantMismatch, match="'b' is claimed"):
        caller.tenant_to_attach_as("b")
    assert LOCAL.tenant_to_attach_as("b") == "b"
    assert Role.ADMIN not in ENGINES.roles
