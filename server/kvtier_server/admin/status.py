"""A snapshot as GetStatus tells it. Owns the translation alone."""

from __future__ import annotations

from kvtier.v1 import admin_pb2 as pb
from kvtier_server.admin.listing import session_status
from kvtier_server.stats import StatsSnapshot, TierStats


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
        tiers=[_tier_status(tier, snapshot.hit_tokens.get(tier.name, 0)) for tier in snapshot.tiers],
        sessions=[session_status(session) for session in snapshot.sessions],
        leases=[
            pb.LeaseStatus(kind=lease.kind, count=lease.count, oldest_age_seconds=lease.oldest_age_s)
            for lease in snapshot.leases
        ],
        lookup_keys=snapshot.lookup_keys,
        evictions=snapshot.evictions_by_reason(),
        store_refused=snapshot.store_refused,
        checksum_failures=sum(snapshot.checksum_failures.values()),
        lookup_tokens=snapshot.lookup_tokens,
        transfers=[
            pb.TransferStatus(direction=direction, path=path, bytes=copied)
            for direction, paths in snapshot.transfer_bytes.items()
            for path, copied in paths.items()
        ],
        loads_torn=snapshot.loads_torn,
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


def _tier_status(tier: TierStats, hit_tokens: int) -> pb.TierStatus:
    return pb.TierStatus(
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
        reserved_bytes=tier.reserved_bytes,
        quarantined_bytes=tier.quarantined_bytes,
        queued_bytes=tier.queued_bytes,
        cascade_bytes=tier.cascade_bytes,
        promotion_bytes=tier.promotion_bytes,
        cascades=tier.cascades,
        dropped=tier.dropped,
        hit_tokens=hit_tokens,
    )
