"""What the daemon is doing, counted for status, metrics and the health pages.

Owns the phase and the age of the last tick; the figures are the core's, the pool's and the tiers'. `state`
may be asked from any thread, the rest runs on the loop's.
"""

from __future__ import annotations

import time

from kvtier_ops.pool import Pool
from kvtier_server import __version__
from kvtier_server.config import Config
from kvtier_server.core.tiering import Core
from kvtier_server.events import EventStreams
from kvtier_server.metrics import Metrics
from kvtier_server.pool_slots import Backing, PoolPlace
from kvtier_server.service import boottime_ns
from kvtier_server.snapshot import (
    by_suffix,
    lease_stats,
    lower_stats,
    primary_stats,
    session_stats,
    tenant_bytes,
)
from kvtier_server.stats import (
    PHASE_DEGRADED,
    PHASE_SERVING,
    PHASE_STARTING,
    PRIMARY_TIER,
    DaemonState,
    PoolStats,
    StatsSnapshot,
)
from kvtier_server.tier_health import in_order
from kvtier_server.transfer.service import TransferService


class Observer:
    """Counts one daemon. `phase` is set by the daemon: starting, serving, draining."""

    def __init__(
        self,
        boot_id: str,
        config: Config,
        pool: Pool,
        core: Core,
        backing: Backing,
        transfers: TransferService,
        events: EventStreams,
        metrics: Metrics,
    ) -> None:
        self._boot_id = boot_id
        self._config = config
        self._pool = pool
        self._core = core
        self._backing = backing
        self._transfers = transfers
        self._events = events
        self._metrics = metrics
        self._start_ns = self._last_tick_ns = boottime_ns()
        self._start_time_s = time.time()
        self._loop_lag_s = 0.0
        self._has_tier_trouble = False
        self._place = PoolPlace(pool)
        self.phase = PHASE_STARTING

    def ticked(self, now_ns: int, late_s: float) -> None:
        """Note that the loop has come round."""
        self._last_tick_ns = now_ns
        self._loop_lag_s = late_s

    def state(self) -> DaemonState:
        """Tell the phase, and how long ago the loop came round."""
        return DaemonState(self._current_phase(), (boottime_ns() - self._last_tick_ns) / 1e9)

    def _current_phase(self) -> str:
        is_degraded = bool(self._place.problem or self._backing.shortage) or self._has_tier_trouble
        return PHASE_DEGRADED if is_degraded and self.phase == PHASE_SERVING else self.phase

    def snapshot(self) -> StatsSnapshot:
        """Count everything now."""
        books, now_ns = self._core.books, boottime_ns()
        books.unpin_all()
        books.primary.settle()  # or pins would show as they were a tick ago
        counts = books.counts
        tiers = self._core.below.tiers
        lower = [lower_stats(below) for below in tiers]
        self._has_tier_trouble = not all(map(in_order, lower))
        self._place.look()
        health = self._place.problem or self._backing.shortage or "ok"
        io_errors = {**self._backing.io_errors, **self._place.io_errors}
        return StatsSnapshot(
            boot_id=self._boot_id,
            version=__version__,
            phase=self._current_phase(),
            start_time_s=self._start_time_s,
            uptime_s=(now_ns - self._start_ns) / 1e9,
            loop_lag_s=self._loop_lag_s,
            pool=PoolStats(
                path=str(self._pool.path),
                name=self._config.server.name,
                data_bytes=self._pool.data_bytes,
                backed_bytes=books.primary.slabs.backed_bytes,
                policy=self._config.pool.policy,
            ),
            tiers=(primary_stats(books, health, io_errors), *lower),
            sessions=session_stats(books, now_ns, self._transfers.paths()),
            copy_devices=self._transfers.devices(),
            leases=lease_stats(books, now_ns),
            lookup_keys=by_suffix(counts, "lookup"),
            lookup_tokens=counts["lookup_tokens"],
            hit_tokens={
                PRIMARY_TIER: counts["hit_tokens"],
                **{below.rules.name: below.counts["hit_tokens"] for below in tiers},
            },
            evictions={
                PRIMARY_TIER: by_suffix(counts, "removed"),
                **{below.rules.name: by_suffix(below.counts, "removed") for below in tiers},
            },
            store_refused=by_suffix(counts, "refused"),
            sessions_ended=by_suffix(counts, "session_ended"),
            checksum_failures={
                PRIMARY_TIER: counts["checksum:corrupt"],
                **{below.rules.name: below.counts["promotion:corrupt"] for below in tiers},
            },
            loads_torn=counts["load:torn"],
            credits=books.reservations.num_credits,
            tenant_used_bytes=tenant_bytes(books),
            transfer_bytes=self._metrics.transfer_bytes(),
            watchers=self._events.num_open,
            event_keys=dict(books.events.num_recorded),
            event_overflows=self._events.num_overflows,
            quota_refused=dict(books.quota_refused),
        )
