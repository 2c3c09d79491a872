"""The core's books as a StatsSnapshot: what status, metrics and the debug page show.

Owns the counting over the books, nothing of the books. Runs on the loop's thread, about once a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from kvtier_server.core.books import Books
from kvtier_server.core.instances import Role, Session
from kvtier_server.core.leases import LeaseKind
from kvtier_server.core.lower_tiers import LowerTier
from kvtier_server.metrics import SHM
from kvtier_server.stats import LEASE_KINDS, PRIMARY_TIER, LeaseStats, SessionStats, TierStats

NAMESPACE_DIGITS = 12


def by_suffix(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Counters called `prefix:WORD`, by lower-case word."""
    return {
        name.removeprefix(prefix + ":").lower(): count
        for name, count in counts.items()
        if name.startswith(prefix + ":")
    }


def primary_stats(books: Books, health: str, io_errors: Mapping[str, int]) -> TierStats:
    """The pool as a tier."""
    classes = list(books.primary.slabs.classes.values())

    def total(field: str, unit_bytes: bool) -> int:
        return sum(getattr(c, field) * (c.slot_bytes if unit_bytes else 1) for c in classes)

    free_slots = sum(len(slab.free) for c in classes for slab in c.slabs.values())
    quarantined_bytes = total("num_quarantined", unit_bytes=True)
    return TierStats(
        name=PRIMARY_TIER,
        capacity_bytes=books.primary.slabs.pool_bytes,
        usable_bytes=max(books.primary.slabs.backed_bytes - quarantined_bytes, 0),
        used_bytes=total("num_published", unit_bytes=True),
        reserved_bytes=total("num_reserved", unit_bytes=True),
        quarantined_bytes=quarantined_bytes,
        chunks=total("num_published", unit_bytes=False),
        free_slots=free_slots,
        reserved_slots=total("num_reserved", unit_bytes=False),
        quarantined_slots=total("num_quarantined", unit_bytes=False),
        pinned_chunks=sum(c.policy.num_pinned for c in classes),
        health=health,
        io_errors=io_errors,
    )


def lower_stats(below: LowerTier) -> TierStats:
    """A tier below the pool."""
    stats = below.tier.stats()
    return TierStats(
        name=below.rules.name,
        capacity_bytes=stats.capacity_bytes,
        usable_bytes=stats.capacity_bytes,
        used_bytes=stats.used_bytes,
        chunks=stats.num_chunks,
        health=stats.problem or "ok",
        queued_bytes=below.waiting_bytes + below.running_bytes,
        dropped=by_suffix(below.counts, "dropped"),
        refused=dict(stats.counts),
        cascades=by_suffix(below.counts, "cascade"),
        cascade_bytes=below.counts["cascade_bytes"],
        promotions=by_suffix(below.counts, "promotion"),
        promotion_bytes=below.counts["promotion_bytes"],
        io_errors=dict(stats.io_errors),
        disk=stats.disk,
    )


def session_stats(books: Books, now_ns: int, paths: Mapping[str, str]) -> tuple[SessionStats, ...]:
    """The open sessions in order of Attach; pins and credits are their instance's.

    `paths`: by session, of the workers that do not copy themselves.
    """
    return tuple([session_row(session, now_ns, paths) for session in books.instances.sessions.values()])


def session_row(session: Session, now_ns: int, paths: Mapping[str, str]) -> SessionStats:
    """One session."""
    instance = session.instance
    slot_bytes = max(c.slot_bytes for c in instance.namespace.classes)
    return SessionStats(
        engine_id=instance.engine_id,
        role=str(session.role),
        rank=session.rank,
        tenant=instance.tenant,
        namespace=instance.namespace.digest[:NAMESPACE_DIGITS],
        model=instance.namespace.facts.model,
        age_s=(now_ns - session.attached_ns) / 1e9,
        pinned_chunks=instance.pinned_bytes // slot_bytes,
        credits=instance.credit_bytes // slot_bytes,
        path=paths.get(session.id, SHM) if session.role is Role.WORKER else "",
    )


def lease_stats(books: Books, now_ns: int) -> tuple[LeaseStats, ...]:
    """Number and oldest age of the leases, by kind."""
    rows = []
    for kind in LEASE_KINDS:
        oldest = books.leases.oldest(LeaseKind(kind))
        age_s = 0.0 if oldest is None else (now_ns - oldest.created_ns) / 1e9
        rows.append(LeaseStats(kind, books.leases.count(LeaseKind(kind)), age_s))
    return tuple(rows)


def tenant_bytes(books: Books) -> dict[str, int]:
    """Bytes of published chunks' slots by tenant. O(spaces)."""
    used: Counter[str] = Counter()
    for space in books.primary.spaces:
        used[space.name.tenant] += space.used_bytes
    return dict(used)
