"""What `kvtier top` shows, as figures: rates between two answers of one daemon, and what deserves a look.

Owns the arithmetic and the thresholds; draws nothing. Rates are per second of the daemon's own clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import GetStatusResponse, TierStatus

LEASE_STUCK_S = 600.0
"""A load or store lease older than this is one that nobody will end (the alert LeaseStuck)."""
COLLAPSE_SHARE = 0.5
"""The hit rate now, as a share of the one since start, below which it is worth a line."""
COLLAPSE_KEYS = 1000
"""Keys in the window below which a hit rate says nothing."""
DROPPED_SHARE = 0.2
"""Part of the chunks on their way down that may be dropped (the alert Backpressure)."""
DROPPED_CHUNKS = 100
"""Chunks in the window below which that part says nothing."""

LOOKUP_LEASES = ("lookup", "credit")
"""Leases that may be as old as a waiting request or an engine."""


@dataclass(frozen=True, slots=True)
class TierRates:
    """What moved between the pool and a tier, and what was found there."""

    hit_tokens_per_s: float
    down_bytes_per_s: float
    up_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two answers. Hit rates are None where nothing was looked up."""

    window_s: float
    lookup_keys_per_s: float
    hit_rate: float | None
    lookup_tokens_per_s: float
    store_bytes_per_s: float
    load_bytes_per_s: float
    evictions_per_s: float
    refused_per_s: float
    tiers: Mapping[str, TierRates]


def hit_rate(lookup_keys: Mapping[str, int]) -> float | None:
    """Return hits over keys looked up."""
    looked_up = sum(lookup_keys.values())
    return lookup_keys.get("hit", 0) / looked_up if looked_up else None


def copied_bytes(status: GetStatusResponse, direction: str) -> int:
    """Return bytes copied since start, over all paths."""
    return sum(transfer.bytes for transfer in status.transfers if transfer.direction == direction)


def difference(new: Mapping[str, int], old: Mapping[str, int]) -> dict[str, int]:
    """Subtract counters by name."""
    return {name: count - old.get(name, 0) for name, count in new.items()}


def rates(old: GetStatusResponse | None, new: GetStatusResponse) -> Rates | None:
    """Return what happened in between; None where `old` is no earlier answer of the same boot."""
    if old is None or old.boot_id != new.boot_id:
        return None
    window_s = new.uptime_seconds - old.uptime_seconds
    if window_s <= 0:
        return None
    keys = difference(new.lookup_keys, old.lookup_keys)
    before = {tier.name: tier for tier in old.tiers}
    return Rates(
        window_s=window_s,
        lookup_keys_per_s=sum(keys.values()) / window_s,
        hit_rate=hit_rate(keys),
        lookup_tokens_per_s=(new.lookup_tokens - old.lookup_tokens) / window_s,
        store_bytes_per_s=(copied_bytes(new, "store") - copied_bytes(old, "store")) / window_s,
        load_bytes_per_s=(copied_bytes(new, "load") - copied_bytes(old, "load")) / window_s,
        evictions_per_s=sum(difference(new.evictions, old.evictions).values()) / window_s,
        refused_per_s=sum(difference(new.store_refused, old.store_refused).values()) / window_s,
        tiers={
            tier.name: _tier_rates(before[tier.name], tier, window_s)
            for tier in new.tiers
            if tier.name in before
        },
    )


def _tier_rates(old: TierStatus, new: TierStatus, window_s: float) -> TierRates:
    return TierRates(
        hit_tokens_per_s=(new.hit_tokens - old.hit_tokens) / window_s,
        down_bytes_per_s=(new.cascade_bytes - old.cascade_bytes) / window_s,
        up_bytes_per_s=(new.promotion_bytes - old.promotion_bytes) / window_s,
    )


def hints(old: GetStatusResponse | None, new: GetStatusResponse) -> list[str]:
    """Say what deserves a look, the worst first, each with what to type where that is known."""
    earlier = old if old is not None and old.boot_id == new.boot_id else None
    return [
        *_wrong_bytes(new),
        *(f"tier {tier.name}: {tier.health}" for tier in new.tiers if tier.health not in ("", "ok")),
        *_held(new),
        *(_changed(earlier, new) if earlier is not None else ()),
        *_about_to_work(new),
    ]


def _wrong_bytes(status: GetStatusResponse) -> Iterator[str]:
    if status.checksum_failures:
        yield f"checksum failures: {status.checksum_failures}; none was served, engines computed instead"


def _held(status: GetStatusResponse) -> Iterator[str]:
    quarantined = sum(tier.quarantined_slots for tier in status.tiers)
    if quarantined:
        yield f"{quarantined} slots quarantined; who holds them: {holders_of(status.pool.path)}"
    for lease in status.leases:
        if lease.count and lease.kind not in LOOKUP_LEASES and lease.oldest_age_seconds > LEASE_STUCK_S:
            yield (
                f"a {lease.kind} lease is stuck for {lease.oldest_age_seconds / 60:.0f} min: an engine hangs "
                "in a copy"
            )


def holders_of(pool_file: str) -> str:
    """Return the command that names the processes which still map a pool."""
    return f"fuser -v {pool_file.rpartition('/')[0]}/owners/*"


def _changed(old: GetStatusResponse, new: GetStatusResponse) -> Iterator[str]:
    keys = difference(new.lookup_keys, old.lookup_keys)
    now, ever = hit_rate(keys), hit_rate(new.lookup_keys)
    if now is not None and ever is not None and _collapsed(now, ever, sum(keys.values())):
        yield f"hit rate {now:.0%} now, {ever:.0%} since start"
    before = {tier.name: tier for tier in old.tiers}
    for tier in new.tiers:
        if tier.name in before:
            done = sum(difference(tier.cascades, before[tier.name].cascades).values())
            dropped = sum(difference(tier.dropped, before[tier.name].dropped).values())
            if done + dropped >= DROPPED_CHUNKS and dropped > DROPPED_SHARE * (done + dropped):
                yield f"tier {tier.name} drops {dropped / (done + dropped):.0%} of what goes down: too slow"


def _collapsed(now: float, ever: float, num_keys: int) -> bool:
    return num_keys >= COLLAPSE_KEYS and now < ever * COLLAPSE_SHARE


def _about_to_work(status: GetStatusResponse) -> Iterator[str]:
    if status.state == "draining":
        yield "the daemon is draining: it grants nothing any more"
    if status.pool.backed_bytes < status.pool.data_bytes and status.state in ("serving", "starting"):
        yield f"{status.pool.backed_bytes / status.pool.data_bytes:.0%} of the pool has its memory so far"
    roles = {session.role for session in status.sessions}
    if not roles:
        yield "no engine is attached"
    elif "worker" not in roles or "scheduler" not in roles:
        missing = "worker" if "scheduler" in roles else "scheduler"
        yield f"an engine's {missing} is not attached: nothing is found or stored for it"
