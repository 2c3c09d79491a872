"""Operator calls on the wire. GetStatus is here; the others say that they are not."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from kvtier.v1 import admin_pb2 as pb
from kvtier_server.rpc import CallScope
from kvtier_server.stats import StatsSnapshot

SERVICE = "kvtier.v1.AdminService"
UNIMPLEMENTED = (
    "ListSessions", "ListNamespaces", "ListTenants", "Evict", "Clear", "SetQuota", "Drain", "Explain",
)  # fmt: skip


def handlers(
    scope: CallScope, snapshot: Callable[[], StatsSnapshot]
) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
    """Method handlers by RPC name. `snapshot` makes a fresh one."""

    def get_status(_: pb.GetStatusRequest) -> pb.GetStatusResponse:
        return status_response(snapshot())

    made = {"GetStatus": scope.unary("AdminService/GetStatus", pb.GetStatusRequest, get_status)}
    for method in UNIMPLEMENTED:
        behaviour = scope.unimplemented(f"AdminService/{method}", f"AdminService.{method}")
        made[method] = grpc.unary_unary_rpc_method_handler(behaviour)
    return made


def status_response(snapshot: StatsSnapshot) -> pb.GetStatusResponse:
    """Translate a snapshot."""
    pool = snapshot.pool
    return pb.GetStatusResponse(
        boot_id=snapshot.boot_id,
        version=snapshot.version,
        state=snapshot.phase,
        uptime_seconds=snapshot.uptime_s,
        pool=pb.PoolStatus(
            path=pool.path,
            name=pool.name,
            data_bytes=pool.data_bytes,
            backed_bytes=pool.backed_bytes,
            policy=pool.policy,
        ),
        tiers=[
            pb.TierStatus(
                name=tier.name,
                capacity_bytes=tier.capacity_bytes,
                usable_bytes=tier.usable_bytes,
                used_bytes=tier.used_bytes,
                chunks=tier.chunks,
                free_slots=tier.free_slots,
                reserved_slots=tier.reserved_slots,
                quarantined_slots=tier.quarantined_slots,
                pinned_chunks=tier.pinned_chunks,
                health=tier.health,
            )
            for tier in snapshot.tiers
        ],
        sessions=[
            pb.SessionStatus(
                engine_id=session.engine_id,
                role=session.role,
                rank=session.rank,
                tenant=session.tenant,
                namespace=session.namespace,
                model=session.model,
                age_seconds=session.age_s,
                pinned_chunks=session.pinned_chunks,
                credits=session.credits,
            )
            for session in snapshot.sessions
        ],
        leases=[
            pb.LeaseStatus(kind=lease.kind, count=lease.count, oldest_age_seconds=lease.oldest_age_s)
            for lease in snapshot.leases
        ],
        lookup_keys=snapshot.lookup_keys,
        evictions=snapshot.evictions_by_reason(),
        store_refused=snapshot.store_refused,
        checksum_failures=sum(snapshot.checksum_failures.values()),
    )
