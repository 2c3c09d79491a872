"""Every metric of the daemon: what operators' dashboards and alerts rest on.

Owns the list. A test compares a daemon's page with it, both ways; a name or a label that changes is a line
here and one in the changelog. Names as Prometheus stores them, without prefix and without `_bucket`.
"""

from __future__ import annotations

from typing import NamedTuple


class Contract(NamedTuple):
    """One metric. `needs_tiers`: it has samples only where there are tiers below the pool."""

    kind: str
    labels: tuple[str, ...] = ()
    needs_tiers: bool = False
    needs_device: bool = False
    """It has samples only where the daemon copies for an engine itself."""
    appears_later: bool = False
    """It has samples only once there is something to tell."""


PROMISED = {
    "build_info": Contract("gauge", ("version", "python", "cuda")),
    "engine_info": Contract("gauge", ("engine", "model", "namespace"), appears_later=True),
    "start_time_seconds": Contract("gauge"),
    "loop_lag_seconds": Contract("gauge"),
    "lookup_keys_total": Contract("counter", ("result",)),
    "lookup_tokens_total": Contract("counter"),
    "hit_tokens_total": Contract("counter", ("tier",)),
    "rpc_duration_seconds": Contract("histogram", ("method", "code")),
    "transfer_bytes_total": Contract("counter", ("direction", "path")),
    "transfer_duration_seconds": Contract("histogram", ("direction", "path")),
    "transfer_size_bytes": Contract("histogram", ("direction",)),
    "tier_capacity_bytes": Contract("gauge", ("tier",)),
    "tier_used_bytes": Contract("gauge", ("tier", "state")),
    "tier_chunks": Contract("gauge", ("tier",)),
    "evictions_total": Contract("counter", ("tier", "reason")),
    "store_refused_total": Contract("counter", ("reason",)),
    "backpressure_dropped_total": Contract("counter", ("tier",), needs_tiers=True),
    "leases": Contract("gauge", ("kind",)),
    "lease_oldest_age_seconds": Contract("gauge"),
    "credits": Contract("gauge"),
    "sessions": Contract("gauge", ("role",)),
    "sessions_ended_total": Contract("counter", ("reason",)),
    "checksum_failures_total": Contract("counter", ("tier",)),
    "loads_torn_total": Contract("counter"),
    "io_errors_total": Contract("counter", ("tier", "errno")),
    "quarantined_slots": Contract("gauge"),
    "promotions_total": Contract("counter", ("tier", "result"), needs_tiers=True),
    "promotion_duration_seconds": Contract("histogram", ("tier",), needs_tiers=True),
    "cascade_bytes_total": Contract("counter", ("tier",), needs_tiers=True),
    "tenant_used_bytes": Contract("gauge", ("tenant",)),
    "quota_refused_total": Contract("counter", ("tenant",)),
}
"""Promised to users: never renamed, no label added or dropped, without a line in the changelog."""

MORE = {
    "limit": Contract("gauge", ("name",)),
    "loaded_tokens_total": Contract("counter"),
    "load_seconds_total": Contract("counter"),
    "computed_tokens_total": Contract("counter"),
    "compute_seconds_total": Contract("counter"),
    "cascades_total": Contract("counter", ("tier", "result"), needs_tiers=True),
    "cascade_dropped_total": Contract("counter", ("tier", "reason"), needs_tiers=True),
    "promotion_bytes_total": Contract("counter", ("tier",), needs_tiers=True),
    "tier_refused_total": Contract("counter", ("tier", "reason"), needs_tiers=True),
    "tier_queued_bytes": Contract("gauge", ("tier",), needs_tiers=True),
    "tier_io_failures_total": Contract("counter", ("tier",), needs_tiers=True),
    "tier_healthy": Contract("gauge", ("tier",), needs_tiers=True),
    "tier_disk_size_bytes": Contract("gauge", ("tier",), needs_tiers=True),
    "tier_disk_free_bytes": Contract("gauge", ("tier",), needs_tiers=True),
    "tier_disk_reserve_bytes": Contract("gauge", ("tier",), needs_tiers=True),
    "tier_disk_daily_budget_bytes": Contract("gauge", ("tier",), needs_tiers=True),
    "pinned_bytes": Contract("gauge", ("device",), needs_device=True),
    "copy_helper_up": Contract("gauge", ("device",), needs_device=True),
    "copy_helper_restarts_total": Contract("counter", ("device",), needs_device=True),
    "watchers": Contract("gauge"),
    "event_keys_total": Contract("counter", ("kind",)),
    "event_overflows_total": Contract("counter"),
    "config_reloads_total": Contract("counter", ("result",)),
    "config_last_reload_successful": Contract("gauge"),
    "config_last_reload_success_timestamp_seconds": Contract("gauge"),
    "process_open_fds": Contract("gauge"),
    "process_max_fds": Contract("gauge"),
    "process_cpu_seconds_total": Contract("counter"),
    "process_resident_memory_bytes": Contract("gauge"),
    "process_virtual_memory_bytes": Contract("gauge"),
    "process_start_time_seconds": Contract("gauge"),
}
"""Beside them."""

METRICS = PROMISED | MORE
PREFIX = "kvtier_"


def series_names(name: str) -> list[str]:
    """Return the names under which Prometheus stores a metric of METRICS."""
    suffixes = ("_bucket", "_sum", "_count") if METRICS[name].kind == "histogram" else ("",)
    return [PREFIX + name + suffix for suffix in suffixes]
