"""Sessions, namespaces and tenants as an operator lists them.

Owns the counting, in steps: a daemon may have many of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvtier.v1 import admin_pb2 as pb
from kvtier_server.admin.slices import run_in_slices
from kvtier_server.core.tiering import Core
from kvtier_server.facts import facts_message
from kvtier_server.snapshot import session_row
from kvtier_server.stats import SessionStats

MAX_FACTS_BYTES = 2 << 20
"""Facts of namespaces in one list; what comes after them is listed without its facts."""

STEP_ITEMS = 128
"""Sessions or key spaces that are counted in one step."""


@dataclass(slots=True)
class _Sum:
    chunks: int = 0
    used_bytes: int = 0
    engines: int = 0


def session_status(session: SessionStats) -> pb.SessionStatus:
    """Translate one session."""
    return pb.SessionStatus(
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


async def list_sessions(core: Core, now_ns: int, paths: Mapping[str, str]) -> pb.ListSessionsResponse:
    """List the open sessions in order of Attach.

    `paths`: by session, of the workers that do not copy themselves.
    """
    reply = pb.ListSessionsResponse()

    def steps() -> Iterator[None]:
        for number, session in enumerate(list(core.books.instances.sessions.values()), 1):
            reply.sessions.append(session_status(session_row(session, now_ns, paths)))
            if not number % STEP_ITEMS:
                yield

    await run_in_slices(steps())
    return reply


async def list_namespaces(core: Core) -> pb.ListNamespacesResponse:
    """List the namespaces of engines in order of their first Attach, then those that only chunks have."""
    sums = {digest: _Sum() for digest in core.names.namespaces()}
    reply = pb.ListNamespacesResponse()

    def steps() -> Iterator[None]:
        for number, space in enumerate(list(core.books.primary.spaces), 1):
            _add(sums.setdefault(space.name.namespace, _Sum()), len(space.chunks), space.used_bytes)
            if not number % STEP_ITEMS:
                yield
        left_bytes = MAX_FACTS_BYTES
        for digest, total in sums.items():
            known = core.namespaces.get(digest)
            facts = None
            if known is not None and left_bytes > 0:
                facts = facts_message(known.facts)
                left_bytes -= facts.ByteSize()
            reply.namespaces.add(
                digest=digest,
                facts=facts,
                chunks=total.chunks,
                used_bytes=total.used_bytes,
                engines=known.num_engines if known is not None else 0,
            )
            yield

    await run_in_slices(steps())
    return reply


async def list_tenants(core: Core) -> pb.ListTenantsResponse:
    """List the tenants that have chunks or engines, the largest first."""
    sums: dict[str, _Sum] = {}

    def steps() -> Iterator[None]:
        for number, space in enumerate(list(core.books.primary.spaces), 1):
            _add(sums.setdefault(space.name.tenant, _Sum()), len(space.chunks), space.used_bytes)
            if not number % STEP_ITEMS:
                yield

    await run_in_slices(steps())
    for instance in core.books.instances:
        sums.setdefault(instance.tenant, _Sum()).engines += 1
    ranked = sorted(sums.items(), key=lambda item: (-item[1].used_bytes, item[0]))
    return pb.ListTenantsResponse(
        tenants=[
            pb.TenantStatus(
                tenant=tenant, used_bytes=total.used_bytes, chunks=total.chunks, engines=total.engines
            )
            for tenant, total in ranked
        ]
    )


def _add(total: _Sum, chunks: int, used_bytes: int) -> None:
    total.chunks += chunks
    total.used_bytes += used_bytes
