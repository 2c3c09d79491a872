from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from kvtier_server.metrics import (
    DIRECTIONS,
    MAX_TENANTS,
    PATHS,
    RELOAD_RESULTS,
    Metrics,
    largest_tenants,
)
from kvtier_server.stats import (
    EVICTION_REASONS,
    LEASE_KINDS,
    LOOKUP_RESULTS,
    SESSION_ENDS,
    SESSION_ROLES,
    STORE_REFUSALS,
    LeaseStats,
    SessionStats,
    StatsSnapshot,
    TierStats,
)

Sample = tuple[str, frozenset[tuple[str, str]]]

LOOKUP = "OffloadService/Lookup"


def make_metrics() -> Metrics:
    metrics = Metrics(version="1.2.3", limits={"limits.engines": 64})
    metrics.expect_rpc(LOOKUP)
    return metrics


def scrape(metrics: Metrics) -> dict[Sample, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def sample(name: str, /, **labels: str) -> Sample:
    return f"kvtier_{name}", frozenset(labels.items())


def test_before_anything_happens_every_label_set_is_there_at_0() -> None:
    samples = scrape(make_metrics())
    expected = [sample("lookup_tokens_total"), sample("loads_torn_total"), sample("quarantined_slots")]
    expected += [sample("lookup_keys_total", result=result) for result in LOOKUP_RESULTS]
    expected += [sample("store_refused_total", reason=reason) for reason in STORE_REFUSALS]
    expected += [sample("evictions_total", tier="primary", reason=reason) for reason in EVICTION_REASONS]
    expected += [sample("sessions_ended_total", reason=reason) for reason in SESSION_ENDS]
    expected += [sample("sessions", role=role) for role in SESSION_ROLES]
    expected += [sample("leases", kind=kind) for kind in LEASE_KINDS]
    expected += [sample("lease_oldest_age_seconds"), sample("credits"), sample("loop_lag_seconds")]
    expected += [
        sample("hit_tokens_total", tier="primary"),
        sample("checksum_failures_total", tier="primary"),
    ]
    expected += [sample("tier_capacity_bytes", tier="primary"), sample("tier_chunks", tier="primary")]
    for state in ("published", "reserved", "quarantined"):
        expected.append(sample("tier_used_bytes", tier="primary", state=state))
    for direction in DIRECTIONS:
        expected.append(sample("transfer_size_bytes_count", direction=direction))
        for path in PATHS:
            expected.append(sample("transfer_bytes_total", direction=direction, path=path))
            expected.append(sample("transfer_duration_seconds_count", direction=direction, path=path))
    expected.append(sample("rpc_duration_seconds_count", method=LOOKUP, code="OK"))
    expected += [sample("config_reloads_total", result=result) for result in RELOAD_RESULTS]
    assert {name: samples.get(name) for name in expected} == dict.fromkeys(expected, 0.0)


def test_the_build_and_the_limits_are_told() -> None:
    samples = scrape(make_metrics())
    (build,) = [dict(labels) for name, labels in samples if name == "kvtier_build_info"]
    assert build["version"] == "1.2.3"
    assert build.keys() == {"version", "python", "cuda"}
    assert samples[sample("limit", name="limits.engines")] == 64


def test_limits_that_change_and_reloads_are_what_the_next_scrape_shows() -> None:
    metrics = make_metrics()
    before = scrape(metrics)
    assert before[sample("config_last_reload_successful")] == 1
    assert before[sample("config_last_reload_success_timestamp_seconds")] > 0
    metrics.limits = {"limits.engines": 5}
    metrics.config_reloaded("applied", 1234.5)
    metrics.config_reloaded("failed", None)
    samples = scrape(metrics)
    assert samples[sample("limit", name="limits.engines")] == 5
    assert samples[sample("config_reloads_total", result="applied")] == 1
    assert samples[sample("config_reloads_total", result="failed")] == 1
    assert samples[sample("config_last_reload_successful")] == 0
    assert samples[sample("config_last_reload_success_timestamp_seconds")] == 1234.5


def test_a_published_snapshot_is_what_the_next_scrape_shows() -> None:
    metrics = make_metrics()
    metrics.publish(
        StatsSnapshot(
            start_time_s=1000.5,
            tiers=(
                TierStats(
                    "primary",
                    capacity_bytes=100,
                    used_bytes=40,
                    reserved_bytes=8,
                    chunks=5,
                    quarantined_slots=2,
                ),
                TierStats("disk", capacity_bytes=900),
            ),
            sessions=(
                SessionStats("e1", "scheduler", 0, "", "abc", "llama", 1.0),
                SessionStats("e1", "worker", 0, "", "abc", "llama", 1.0),
                SessionStats("e1", "worker", 1, "", "abc", "llama", 1.0),
            ),
            leases=(LeaseStats("lookup", 3, 2.5), LeaseStats("store", 1, 9.0)),
            lookup_keys={"hit": 7},
            evictions={"primary": {"evict": 4}, "disk": {"evict": 6}},
            checksum_failures={"disk": 1},
            tenant_used_bytes={"": 30, "team-a": 10},
        )
    )
    samples = scrape(metrics)
    assert samples[sample("start_time_seconds")] == 1000.5
    assert samples[sample("tier_used_bytes", tier="primary", state="published")] == 40
    assert samples[sample("tier_used_bytes", tier="primary", state="reserved")] == 8
    assert samples[sample("tier_capacity_bytes", tier="disk")] == 900
    assert samples[sample("quarantined_slots")] == 2
    assert samples[sample("sessions", role="worker")] == 2
    assert samples[sample("engine_info", engine="e1", model="llama", namespace="abc")] == 1
    assert samples[sample("leases", kind="lookup")] == 3
    assert samples[sample("leases", kind="load")] == 0
    assert samples[sample("lease_oldest_age_seconds")] == 9
    assert samples[sample("lookup_keys_total", result="hit")] == 7
    assert samples[sample("lookup_keys_total", result="miss")] == 0
    assert samples[sample("evictions_total", tier="disk", reason="evict")] == 6
    assert samples[sample("checksum_failures_total", tier="disk")] == 1
    assert samples[sample("tenant_used_bytes", tenant="default")] == 30


def test_an_rpc_is_counted_by_method_and_code() -> None:
    metrics = make_metrics()
    metrics.observe_rpc(LOOKUP, "OK", 0.0002)
    metrics.observe_rpc(LOOKUP, "OK", 7.0)
    metrics.observe_rpc(LOOKUP, "NOT_FOUND", 0.1)
    samples = scrape(metrics)
    assert samples[sample("rpc_duration_seconds_count", method=LOOKUP, code="OK")] == 2
    assert samples[sample("rpc_duration_seconds_bucket", method=LOOKUP, code="OK", le="0.0001")] == 0
    assert samples[sample("rpc_duration_seconds_bucket", method=LOOKUP, code="OK", le="5.0")] == 1
    assert samples[sample("rpc_duration_seconds_count", method=LOOKUP, code="NOT_FOUND")] == 1


def test_a_transfer_is_counted_in_bytes_time_and_size() -> None:
    metrics = make_metrics()
    metrics.observe_transfer("store", "shm", 1 << 20, 0.01)
    samples = scrape(metrics)
    assert samples[sample("transfer_bytes_total", direction="store", path="shm")] == 1 << 20
    assert samples[sample("transfer_bytes_total", direction="load", path="shm")] == 0
    assert samples[sample("transfer_duration_seconds_sum", direction="store", path="shm")] == 0.01
    assert samples[sample("transfer_size_bytes_count", direction="store")] == 1
    assert metrics.transfer_bytes() == {
        "store": {"shm": 1 << 20, "cuda_ipc": 0, "remote_host": 0},
        "load": {"shm": 0, "cuda_ipc": 0, "remote_host": 0},
    }


def test_of_many_tenants_the_largest_keep_a_series_and_no_byte_is_lost() -> None:
    used = {f"tenant-{number}": number for number in range(1, 101)}
    shown = largest_tenants(used)
    assert len(shown) == MAX_TENANTS + 1
    assert shown["tenant-100"] == 100
    assert "tenant-1" not in shown
    assert sum(shown.values()) == sum(used.values())


def test_tenants_that_share_a_label_are_summed() -> None:
    assert largest_tenants({"": 10, "default": 3, "team-a": 1}) == {"default": 13, "team-a": 1}
    metrics = make_metrics()
    metrics.publish(StatsSnapshot(quota_refused={"": 2, "default": 3}))
    assert scrape(metrics)[sample("quota_refused_total", tenant="default")] == 5


def test_labels_that_clients_choose_cannot_break_the_page() -> None:
    metrics = make_metrics()
    nasty = 'x"} 1\n# HELP y\\'
    metrics.publish(StatsSnapshot(sessions=(SessionStats(nasty, "worker", 0, "", "abc", nasty, 1.0),)))
    assert scrape(metrics)[sample("engine_info", engine=nasty, model=nasty, namespace="abc")] == 1


def test_every_metric_has_a_help_text_and_the_prefix() -> None:
    families = list(text_string_to_metric_families(make_metrics().render().decode()))
    assert all(family.name.startswith("kvtier_") and family.documentation for family in families)


def test_a_credit_is_held_for_long_without_being_stuck() -> None:
    metrics = make_metrics()
    metrics.publish(StatsSnapshot(leases=(LeaseStats("credit", 5, 5000.0), LeaseStats("load", 1, 3.0))))
    samples = scrape(metrics)
    assert samples[sample("lease_oldest_age_seconds")] == 3
    assert samples[sample("leases", kind="credit")] == 5


def test_only_what_a_tier_could_not_take_is_backpressure() -> None:
    metrics = make_metrics()
    dropped = {"queue_full": 1, "refused": 2, "evicted": 4, "cleared": 8, "unknown_shape": 16}
    disk = TierStats("disk", dropped=dropped, cascades={"done": 5})
    metrics.publish(StatsSnapshot(tiers=(TierStats("primary"), disk)))
    samples = scrape(metrics)
    assert samples[sample("backpressure_dropped_total", tier="disk")] == 7
    assert samples[sample("cascade_dropped_total", tier="disk", reason="cleared")] == 8
    assert samples[sample("cascades_total", tier="disk", result="done")] == 5
    assert samples[sample("cascades_total", tier="disk", result="failed")] == 0


def test_refusals_by_quota_are_told_by_tenant() -> None:
    metrics = make_metrics()
    metrics.publish(StatsSnapshot(quota_refused={"": 2, "team-a": 3}))
    samples = scrape(metrics)
    assert samples[sample("quota_refused_total", tenant="default")] == 2
    assert samples[sample("quota_refused_total", tenant="team-a")] == 3
