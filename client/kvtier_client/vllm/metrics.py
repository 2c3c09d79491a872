"""What kvtier tells through vLLM's own metrics.

Owns the names and their collection. vLLM's API server dies on a sample whose name was not declared to it, so
every name that is emitted here stands in `METRIC_DEFINITIONS`, and a test holds that against the code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)

from kvtier_client.keyed_scheduler import KeyedSchedulerShim
from kvtier_client.stats import ClientStats

LOOKUP_WAIT = "vllm:kvtier_lookup_wait_seconds"
AWAY_MISSES = "vllm:kvtier_away_misses"
STORES_SKIPPED = "vllm:kvtier_stores_skipped"
LOADS_FAILED = "vllm:kvtier_loads_failed"
TRANSFER_FALLBACKS = "vllm:kvtier_transfer_fallbacks"

METRIC_DEFINITIONS: Mapping[str, OffloadingMetricMetadata] = {
    LOOKUP_WAIT: OffloadingHistogramMetadata(
        documentation="Time that the scheduler waited for the answer to a lookup, in seconds.",
        buckets=(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05),
    ),
    AWAY_MISSES: OffloadingCounterMetadata(
        documentation="Lookups that missed because the kvtier daemon was away, silent or too late.",
    ),
    STORES_SKIPPED: OffloadingCounterMetadata(
        documentation="Computed chunks that were not stored, by reason.",
        labelnames=("reason",),
    ),
    LOADS_FAILED: OffloadingCounterMetadata(
        documentation="Chunks whose load failed and that are computed instead, by reason.",
        labelnames=("reason",),
    ),
    TRANSFER_FALLBACKS: OffloadingCounterMetadata(
        documentation="How often a worker on a GPU had to copy through shared memory itself: its memory "
        "could not be exported, or the daemon refused it. Its log says why and what to change.",
        labelnames=("reason",),
    ),
}

_AWAY_COUNTERS = ("away_misses", "breaker_misses", "deadline_misses")


class MetricCollector:
    """Turns counts into what vLLM collects after each step. One thread."""

    def __init__(self, shim: KeyedSchedulerShim, client_stats: ClientStats) -> None:
        self._shim = shim
        self._client_stats = client_stats
        self._skipped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._away = 0
        self._num_events = 0
        self._num_skipped = 0

    def note_failed_loads(self, reasons: Mapping[str, int]) -> None:
        """Count chunks whose load failed."""
        self._failed.update(reasons)

    def note_fallbacks(self, reasons: Mapping[str, int]) -> None:
        """Count workers that copy through shared memory themselves and should not have to."""
        self._fallbacks.update(reasons)

    def collect(self) -> OffloadingConnectorStats | None:
        """Return what happened since the last call; None = nothing, as after most steps."""
        if self._shim.num_events == self._num_events and not self._failed and not self._fallbacks:
            return None
        self._num_events = self._shim.num_events
        waits = self._shim.take_waits()
        away = self._new_away_misses()
        skipped = self._newly_skipped()
        if not (waits or away or skipped or self._failed or self._fallbacks):
            return None
        stats = OffloadingConnectorStats()
        for wait in waits:
            stats.observe_histogram(LOOKUP_WAIT, wait)
        if away:
            stats.increase_counter(AWAY_MISSES, away)
        for reason, count in skipped.items():
            stats.increase_counter(STORES_SKIPPED, count, (reason,))
        for reason, count in self._failed.items():
            stats.increase_counter(LOADS_FAILED, count, (reason,))
        for reason, count in self._fallbacks.items():
            stats.increase_counter(TRANSFER_FALLBACKS, count, (reason,))
        self._failed.clear()
        self._fallbacks.clear()
        return stats

    def _new_away_misses(self) -> int:
        total = self._client_stats.total(_AWAY_COUNTERS)
        new, self._away = total - self._away, total
        return new

    def _newly_skipped(self) -> Mapping[str, int]:
        skipped = self._shim.stats.skipped
        if skipped.total() == self._num_skipped:
            return {}
        self._num_skipped = skipped.total()
        total = Counter({reason.name.lower(): count for reason, count in skipped.items()})
        new, self._skipped = total - self._skipped, total
        return new
