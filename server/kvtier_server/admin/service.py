"""Operator calls on the wire. SetQuota says that it is not there; all others are.

Owns the translation of messages and the checks of fields; what may be done is the core's to say. Everything
here runs on the loop's thread, long work in slices of about a millisecond.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from kvtier.v1 import admin_pb2 as pb
from kvtier_server.admin.listing import list_namespaces, list_sessions, list_tenants
from kvtier_server.admin.slices import run_in_slices, run_in_turn
from kvtier_server.admin.status import status_response
from kvtier_server.core.clearing import Clearing, Clearings
from kvtier_server.core.evicting import Evictions
from kvtier_server.core.explaining import MAX_EXPLAINED_KEYS, Explainer
from kvtier_server.core.namespaces import MAX_KEY_BYTES, MIN_KEY_BYTES, check_number_of_keys
from kvtier_server.core.refused import BadRequest
from kvtier_server.core.tiering import Core
from kvtier_server.rpc import CallScope
from kvtier_server.stats import StatsSnapshot
from kvtier_server.stopping import Stopping, held

SERVICE = "kvtier.v1.AdminService"

MAX_CLEAR_WAIT_S = 60.0
"""Longest wait of a Clear or an Evict for the tiers below the pool: they go on without it."""

MAX_DRAIN_MS = 3_600_000
"""Longest wait for copies that a Drain may ask for."""

RequestT = TypeVar("RequestT", bound=Message)
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"


def handlers(
    scope: CallScope,
    snapshot: Callable[[], StatsSnapshot],
    core: Core,
    stopping: Stopping,
    clock: Callable[[], int],
    paths: Callable[[], Mapping[str, str]],
) -> dict[str, Handler]:
    """Method handlers by RPC name. `snapshot` makes a fresh one; `paths` tells how sessions' bytes go."""

    def unary(
        method: str, request: type[RequestT], answer: Callable[[RequestT], Message | Awaitable[Message]]
    ) -> Handler:
        return scope.unary(f"AdminService/{method}", request, answer)

    return {
        "GetStatus": unary(
            "GetStatus", pb.GetStatusRequest, lambda _: run_in_turn(lambda: status_response(snapshot()))
        ),
        "ListSessions": unary(
            "ListSessions", pb.ListSessionsRequest, lambda _: list_sessions(core, clock(), paths())
        ),
        "ListNamespaces": unary("ListNamespaces", pb.ListNamespacesRequest, lambda _: list_namespaces(core)),
        "ListTenants": unary("ListTenants", pb.ListTenantsRequest, lambda _: list_tenants(core)),
        "Explain": unary("Explain", pb.ExplainRequest, lambda r: _explain(core.explainer, r, clock())),
        "Evict": unary("Evict", pb.EvictRequest, lambda r: _evict(core.evictions, r)),
        "Clear": unary("Clear", pb.ClearRequest, lambda r: _clear(core.clearings, r)),
        "Drain": unary("Drain", pb.DrainRequest, lambda r: _drain(core, stopping, scope.boot_id, r)),
        "SetQuota": grpc.unary_unary_rpc_method_handler(
            scope.unimplemented("AdminService/SetQuota", "AdminService.SetQuota (quotas of tenants)")
        ),
    }


async def _explain(explainer: Explainer, request: pb.ExplainRequest, now_ns: int) -> pb.ExplainResponse:
    if request.key and request.keys:
        raise BadRequest("keys", "given beside key; give one of the two")
    if not request.key and not request.keys:
        raise BadRequest("key", "missing; give the key that is to be explained, or a request's keys")
    if request.key and not MIN_KEY_BYTES <= len(request.key) <= MAX_KEY_BYTES:
        raise BadRequest("key", f"{len(request.key)} bytes; {MIN_KEY_BYTES} to {MAX_KEY_BYTES} are allowed")
    if request.keys:
        check_number_of_keys(request.keys, MAX_EXPLAINED_KEYS)
    keys = [request.key] if request.key else list(request.keys)
    explanation = explainer.begin(request.namespace, request.tenant, keys, now_ns)
    await run_in_slices(explanation.steps)
    told = next((key for key in explanation.keys if not key.is_hit), explanation.keys[0])
    reply = pb.ExplainResponse(
        verdict=told.verdict, details=told.details, leading_hits=explanation.num_leading_hits
    )

    def translate() -> Iterator[None]:
        for each in explanation.keys:
            reply.keys.add(key=each.key, verdict=each.verdict, details=each.details)
            yield

    await run_in_slices(translate())
    return reply


async def _evict(evictions: Evictions, request: pb.EvictRequest) -> pb.EvictResponse:
    ended = asyncio.Event()
    eviction = evictions.begin(request.bytes, request.tier, ended.set)
    await run_in_slices(eviction.pool)
    if not eviction.is_over:
        await _wait(ended, lambda: eviction.is_over, request.wait_ms)
    return pb.EvictResponse(
        tier=eviction.tier,
        freed_bytes=eviction.evicted_bytes,
        chunks=eviction.num_evicted,
        kept_chunks=eviction.num_kept,
        over=eviction.is_over,
    )


def _drain(core: Core, stopping: Stopping, boot_id: str, request: pb.DrainRequest) -> pb.DrainResponse:
    if request.deadline_ms > MAX_DRAIN_MS:
        raise BadRequest("deadline_ms", f"{request.deadline_ms}; at most {MAX_DRAIN_MS} are allowed")
    stopping.ask(request.deadline_ms or None)
    now = held(core)
    return pb.DrainResponse(
        boot_id=boot_id,
        pid=os.getpid(),
        leases=now.leases,
        sessions=now.sessions,
        loads=now.loads,
        stores=now.stores,
        queued_bytes=now.queued_bytes,
        deadline_ms=stopping.left_ms,
    )


async def _wait(ended: asyncio.Event, is_over: Callable[[], bool], wait_ms: int) -> None:
    """Wait for tiers, which say so by `ended`, as long as the caller does and the daemon allows."""
    try:
        async with asyncio.timeout(min(wait_ms / 1000, MAX_CLEAR_WAIT_S)):
            while not is_over():
                await ended.wait()
                ended.clear()
    except TimeoutError:
        pass  # the reply says what goes on


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
    pool = asyncio.create_task(run_in_slices(clearing.pool))
    _running.add(pool)  # whatever becomes of this call, it goes on
    pool.add_done_callback(_running.discard)
    await asyncio.shield(pool)
    await _wait(ended, lambda: clearing.is_over, request.wait_ms)
    return clear_response(clearing)


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
