"""Operator calls on the wire. GetStatus and Clear are here; the others say that they are not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc

from kvtier.v1 import admin_pb2 as pb
from kvtier_server.core.clearing import Clearing, Clearings
from kvtier_server.core.refused import BadRequest
from kvtier_server.rpc import CallScope
from kvtier_server.stats import StatsSnapshot

SERVICE = "kvtier.v1.AdminService"
UNIMPLEMENTED = (
    "ListSessions", "ListNamespaces", "ListTenants", "Evict", "SetQuota", "Drain", "Explain",
)  # fmt: skip

MAX_CLEAR_WAIT_S = 60.0
"""Longest wait of a Clear for the tiers below the pool: they go on without it."""


def handlers(
    scope: CallScope, snapshot: Callable[[], StatsSnapshot], clearings: Clearings
) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
    """Method handlers by RPC name. `snapshot` makes a fresh one."""

    def get_status(_: pb.GetStatusRequest) -> pb.GetStatusResponse:
        return status_response(snapshot())

    def clear(request: pb.ClearRequest) -> Awaitable[pb.ClearResponse]:
        return _clear(clearings, request)

    made = {
        "GetStatus": scope.unary("AdminService/GetStatus", pb.GetStatusRequest, get_status),
        "Clear": scope.unary("AdminService/Clear", pb.ClearRequest, clear),
    }
    for method in UNIMPLEMENTED:
        behaviour = scope.unimplemented(f"AdminService/{method}", f"AdminService.{method}")
        made[method] = grpc.unary_unary_rpc_method_handler(behaviour)
    return made


_running: set[asyncio.Task[None]] = set()
"""Pools that are being cleared: the loop itself keeps no task alive."""


async def _clear(clearings: Clearings, request: pb.ClearRequest) -> pb.ClearResponse:
    """Clear the pool in slices, between which other calls get in, and wait for the tiers below it."""
    tenant = request.tenant if request.HasField("tenant") else None
    if not (request.namespace or request.tier or request.everything) and tenant is None:
        raise BadRequest(
            "everything", "no filter is given; say which namespace, tenant or tier, or everything"
        )
    ended = asyncio.Event()
    clearing = clearings.begin(request.namespace, tenant, request.tier, ended.set, others=request.others)
    pool = asyncio.create_task(_clear_pool(clearing))
    _running.add(pool)  # whatever becomes of this call, it goes on
    pool.add_done_callback(_running.discard)
    await asyncio.shield(pool)
    try:
        async with asyncio.timeout(min(request.wait_ms / 1000, MAX_CLEAR_WAIT_S)):
            while not clearing.is_over:
                await ended.wait()
                ended.clear()
    except TimeoutError:
        pass  # the reply says which tiers go on
    return clear_response(clearing)


async def _clear_pool(clearing: Clearing) -> None:
    for _ in clearing.pool:
        await asyncio.sleep(0)


def clear_response(clearing: Clearing) -> pb.ClearResponse:
    """Translate what became of a clearing so far."""
    tiers = [
        pb.TierCleared(
            tier=tier.tier,
            chunks=tier.num_removed,
            freed_bytes=tier.removed_bytes,
            kept_chunks=tier.num_kept,
            over=tier.is_over,
            problem=tier.problem,
        )
        for tier in clearing.tiers
    ]
    return pb.ClearResponse(
        chunks=sum(tier.chunks for tier in tiers),
        freed_bytes=sum(tier.freed_bytes for tier in tiers),
        kept_chunks=sum(tier.kept_chunks for tier in tiers),
        tiers=tiers,
    )


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
                path=session.path,
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
        copy_devices=[
            pb.CopyDeviceStatus(
                device=each.device,
                state=each.state,
                restarts=each.restarts,
                memories=each.memories,
                jobs=each.jobs,
                pinned_bytes=each.pinned_bytes,
                problem=each.problem,
            )
            for each in snapshot.copy_devices
        ],
    )
