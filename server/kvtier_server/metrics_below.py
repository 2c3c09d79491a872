"""What Prometheus sees of the tiers below the pool: what goes down and comes up, errors, their disks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from kvtier_server.metric_families import counter, gauge
from kvtier_server.secondary.io_errors import IO_ERRNOS
from kvtier_server.stats import (
    BACKPRESSURE_REASONS,
    CASCADE_RESULTS,
    DROP_REASONS,
    PRIMARY_TIER,
    PROMOTION_RESULTS,
    StatsSnapshot,
    TierStats,
)

_Samples = dict[tuple[str, ...], float]


def tiers_below(snapshot: StatsSnapshot) -> Iterator[Metric]:
    """Families of every tier but the pool; `io_errors` has the pool's too."""
    tiers = [tier for tier in snapshot.tiers if tier.name != PRIMARY_TIER]
    yield from _cascades(tiers)
    yield from _promotions(tiers)
    yield from _errors(snapshot.tiers, tiers)
    yield from _disks(tiers)


def _cascades(tiers: list[TierStats]) -> Iterator[Metric]:
    cascaded: _Samples = {}
    dropped: _Samples = {}
    for tier in tiers:
        results = {**dict.fromkeys(CASCADE_RESULTS, 0), **tier.cascades}
        cascaded |= {(tier.name, result): count for result, count in results.items()}
        reasons = {**dict.fromkeys(DROP_REASONS, 0), **tier.dropped}
        dropped |= {(tier.name, reason): count for reason, count in reasons.items()}
    went: _Samples = {(tier.name,): tier.cascade_bytes for tier in tiers}
    yield counter("cascade_bytes", "Bytes that went down to a tier.", ("tier",), went)
    yield counter("cascades", "Chunks that a tier was given to write.", ("tier", "result"), cascaded)
    yield counter("cascade_dropped", "Chunks that were not given to a tier.", ("tier", "reason"), dropped)
    yield counter(
        "backpressure_dropped",
        "Chunks that a tier did not get because it could not keep up.",
        ("tier",),
        {(t.name,): sum(dropped[t.name, reason] for reason in BACKPRESSURE_REASONS) for t in tiers},
    )
    refused: _Samples = {(t.name, reason): count for t in tiers for reason, count in t.refused.items()}
    yield counter("tier_refused", "Chunks that a tier's limit kept out.", ("tier", "reason"), refused)
    yield gauge(
        "tier_queued_bytes",
        "Bytes of chunks that wait to go down, or do.",
        ("tier",),
        {(tier.name,): tier.queued_bytes for tier in tiers},
    )


def _promotions(tiers: list[TierStats]) -> Iterator[Metric]:
    promoted: _Samples = {}
    for tier in tiers:
        results = {**dict.fromkeys(PROMOTION_RESULTS, 0), **tier.promotions}
        promoted |= {(tier.name, result): count for result, count in results.items()}
    yield counter(
        "promotion_bytes",
        "Bytes that came up from a tier.",
        ("tier",),
        {(tier.name,): tier.promotion_bytes for tier in tiers},
    )
    yield counter("promotions", "Chunks that were to come up.", ("tier", "result"), promoted)


def _errors(all_tiers: tuple[TierStats, ...], tiers: list[TierStats]) -> Iterator[Metric]:
    errors: _Samples = {}
    for tier in all_tiers:
        counts = {**dict.fromkeys(IO_ERRNOS, 0), **tier.io_errors}
        errors |= {(tier.name, name): count for name, count in counts.items()}
    yield counter(
        "io_errors",
        "I/O that failed, by the name of its error; ETIMEDOUT = it came after its deadline.",
        ("tier", "errno"),
        errors,
    )
    failed: _Samples = {
        (tier.name,): tier.cascades.get("failed", 0) + tier.promotions.get("failed", 0) for tier in tiers
    }
    yield counter("tier_io_failures", "Chunks whose I/O failed or came too late.", ("tier",), failed)
    healthy: _Samples = {(tier.name,): tier.health == "ok" for tier in tiers}
    yield gauge("tier_healthy", "1 where a tier below the pool is in order.", ("tier",), healthy)


def _disks(tiers: list[TierStats]) -> Iterator[Metric]:
    """The file systems that tiers lie on; a tier without one has no sample."""
    disks = {tier.name: tier.disk for tier in tiers if tier.disk is not None}
    for name, help_text, values in (
        ("size", "Size of the file system that a tier is on.", [d.size_bytes for d in disks.values()]),
        ("free", "Bytes that are free on it, for this user.", [d.free_bytes for d in disks.values()]),
        ("reserve", "Bytes of it that the tier leaves free.", [d.reserve_bytes for d in disks.values()]),
        (
            "daily_budget",
            "Bytes that the tier may write to it a day (writes_per_day); 0 = no limit.",
            [d.daily_budget_bytes for d in disks.values()],
        ),
    ):
        samples: _Samples = {(tier,): value for tier, value in zip(disks, values, strict=True)}
        yield gauge(f"tier_disk_{name}_bytes", help_text, ("tier",), samples)
