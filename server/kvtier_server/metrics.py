"""What Prometheus sees: every metric's name, help, labels and buckets.

State comes as a published StatsSnapshot and is read at the scrape; durations are observed as they happen. A
scrape never enters the core. No label holds a key, a request or a pid.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from kvtier_server.core.books import OTHER_TENANTS
from kvtier_server.core.events import KINDS
from kvtier_server.metric_families import by_name as _by_name
from kvtier_server.metric_families import counter as _counter
from kvtier_server.metric_families import gauge as _gauge
from kvtier_server.metrics_below import tiers_below
from kvtier_server.stats import (
    EVICTION_REASONS,
    LEASE_KINDS,
    LOOKUP_RESULTS,
    PRIMARY_TIER,
    SESSION_ENDS,
    SESSION_ROLES,
    STORE_REFUSALS,
    StatsSnapshot,
)

# A `_created` series beside each counter: nobody asks for it, and start_time_seconds says the same.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types here

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TENANTS = 32
"""Tenants with a series of their own; the smaller ones share `other`."""
DEFAULT_TENANT = "default"

RPC_BUCKETS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
TRANSFER_BUCKETS_S = (1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TRANSFER_BUCKETS_BYTES = tuple(float(4**power << 10) for power in range(3, 12))
"""64 KiB to 4 GiB in steps of four."""

RELOAD_RESULTS = ("applied", "unchanged", "needs_restart", "failed")
"""`needs_restart`: something has changed that cannot be applied, the rest was; `failed`: nothing was."""

TURN_S = 5e-4
"""After so much rendering of a scrape other threads get their turn."""

DIRECTIONS = ("store", "load")
SHM, CUDA_IPC, REMOTE_HOST = PATHS = ("shm", "cuda_ipc", "remote_host")
"""Who copied: the engine itself through the mapped pool, the daemon's process of a GPU, and that of shared
memory, which is the same path without a GPU."""


class Metrics:
    """The daemon's registry. All methods may be called from any thread; none waits for another.

    `limits` goes to kvtier_limit{name} as it is.
    """

    def __init__(
        self,
        *,
        version: str,
        limits: Mapping[str, float],
        tiers: Iterable[str] = (),
        cuda: str = "none",
    ) -> None:
        self.registry = CollectorRegistry()
        self._snapshot = StatsSnapshot()
        info = {"version": version, "python": platform.python_version(), "cuda": cuda}
        self.limits = dict(limits)
        """Configured limits by dotted path, in base units; replaced when they change."""
        self.registry.register(_StateCollector(self, info))
        self._rpc = Histogram(
            "kvtier_rpc_duration_seconds",
            "Time to answer an RPC, by method and gRPC status code.",
            ("method", "code"),
            buckets=RPC_BUCKETS_S,
            registry=self.registry,
        )
        self._rpc_children: dict[tuple[str, str], Histogram] = {}
        self._make_transfer_metrics()
        self._make_reload_metrics()
        self._make_cost_metrics()
        ProcessCollector(namespace="kvtier", registry=self.registry)  # files, memory, CPU: read in /proc
        self._promotion = Histogram(
            "kvtier_promotion_duration_seconds",
            "Time from the lookup until a chunk of a lower tier is in the pool.",
            ("tier",),
            buckets=TRANSFER_BUCKETS_S,
            registry=self.registry,
        )
        for tier in tiers:
            self._promotion.labels(tier)

    def _make_transfer_metrics(self) -> None:
        labels = ("direction", "path")
        self._copied = copied = Counter(
            "kvtier_transfer_bytes",
            "Bytes copied to and from the pool.",
            labels,
            registry=self.registry,
        )
        duration = Histogram(
            "kvtier_transfer_duration_seconds",
            "Time of one rank's copies of one job; the daemon's without waits in queues and for compute.",
            labels,
            buckets=TRANSFER_BUCKETS_S,
            registry=self.registry,
        )
        size = Histogram(
            "kvtier_transfer_size_bytes",
            "Bytes of one rank's copies of one job.",
            ("direction",),
            buckets=TRANSFER_BUCKETS_BYTES,
            registry=self.registry,
        )
        self._transfers = {
            (direction, path): (
                copied.labels(direction, path),
                duration.labels(direction, path),
                size.labels(direction),
            )
            for direction in DIRECTIONS
            for path in PATHS
        }

    def _make_reload_metrics(self) -> None:
        self._reloads = Counter(
            "kvtier_config_reloads", "Configurations read again.", ("result",), registry=self.registry
        )
        for result in RELOAD_RESULTS:
            self._reloads.labels(result)
        self._reload_ok = Gauge(
            "kvtier_config_last_reload_successful",
            "1 unless the configuration could not be read when it was last read.",
            registry=self.registry,
        )
        self._reload_ok.set(1)
        self._reload_time = Gauge(
            "kvtier_config_last_reload_success_timestamp_seconds",
            "Unix time at which a configuration was last read without a mistake; at first that of the start.",
            registry=self.registry,
        )
        self._reload_time.set_to_current_time()

    def config_reloaded(self, result: str, unix_time_s: float | None) -> None:
        """Count a reload; `result` is one of RELOAD_RESULTS, the time None if nothing was applied."""
        self._reloads.labels(result).inc()
        self._reload_ok.set(unix_time_s is not None)
        if unix_time_s is not None:
            self._reload_time.set(unix_time_s)

    def _make_cost_metrics(self) -> None:
        """What engines say their tokens cost: the difference is what kvtier saves, or does not."""
        costs = {
            "loaded_tokens": "Tokens that engines have loaded, as they report.",
            "load_seconds": "What requests waited for these, from asking to having them.",
            "computed_tokens": "Prompt tokens that engines have computed, as they report.",
            "compute_seconds": "What requests waited for these.",
        }
        self._costs = {
            name: Counter(f"kvtier_{name}", text, registry=self.registry) for name, text in costs.items()
        }

    @property
    def snapshot(self) -> StatsSnapshot:
        """The snapshot published last."""
        return self._snapshot

    def publish(self, snapshot: StatsSnapshot) -> None:
        """Replace what the next scrape shows. One assignment: cheap enough for every tick."""
        self._snapshot = snapshot

    def expect_rpc(self, method: str) -> None:
        """Have the series of an RPC, "OffloadService/Lookup", there at 0 before it is first called.

        Only OK: each further code would be 18 series per method that mostly stay 0.
        """
        self._rpc_children[method, "OK"] = self._rpc.labels(method, "OK")

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """Count one answered RPC. `code` is the name of the gRPC status, "OK" or "NOT_FOUND"."""
        child = self._rpc_children.get((method, code))
        if child is None:
            child = self._rpc_children[method, code] = self._rpc.labels(method, code)
        child.observe(seconds)

    def observe_transfer(self, direction: str, path: str, size_bytes: int, seconds: float) -> None:
        """Count one rank's copies of one job; `direction` and `path` are those of DIRECTIONS and PATHS."""
        copied, duration, size = self._transfers[direction, path]
        copied.inc(size_bytes)
        duration.observe(seconds)
        size.observe(size_bytes)

    def transfer_bytes(self) -> dict[str, dict[str, int]]:
        """Return the bytes copied so far, by direction, then by path."""
        copied: dict[str, dict[str, int]] = {direction: {} for direction in DIRECTIONS}
        for family in self._copied.collect():
            for sample in family.samples:
                copied[sample.labels["direction"]][sample.labels["path"]] = int(sample.value)
        return copied

    def observe_costs(
        self, loaded_tokens: int, load_s: float, computed_tokens: int, compute_s: float
    ) -> None:
        """Count what an engine's requests have loaded and computed, and waited for it."""
        values = (loaded_tokens, load_s, computed_tokens, compute_s)
        for counted, value in zip(self._costs.values(), values, strict=True):
            counted.inc(value)

    def observe_promotion(self, tier: str, seconds: float) -> None:
        """Count one chunk that came up."""
        self._promotion.labels(tier).observe(seconds)

    def render(self) -> bytes:
        """Return the text of a scrape."""
        return generate_latest(_InTurns(self.registry))


class _InTurns:
    """A registry that lets other threads in between families, every TURN_S.

    Rendering all of it takes some milliseconds, in which the loop's thread, and with it every answer to an
    engine, would wait for the interpreter's lock.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """The registry's families."""
        turn_ends = time.perf_counter() + TURN_S
        for family in self._registry.collect():
            yield family
            if time.perf_counter() > turn_ends:
                time.sleep(0)
                turn_ends = time.perf_counter() + TURN_S


class _StateCollector(Collector):
    """Turns the last snapshot into metrics. Each counter family begins with its known labels at 0."""

    def __init__(self, metrics: Metrics, info: dict[str, str]) -> None:
        self._metrics = metrics
        self._info = info

    def collect(self) -> Iterator[Metric]:
        snapshot = self._metrics.snapshot
        yield _gauge("build_info", "Versions.", tuple(self._info), {tuple(self._info.values()): 1})
        yield _gauge("limit", "Configured limits, in base units.", ("name",), _by_name(self._metrics.limits))
        yield from _process(snapshot)
        yield from _lookups(snapshot)
        yield from _tiers(snapshot)
        yield from _copies(snapshot)
        yield from tiers_below(snapshot)
        yield from _sessions(snapshot)
        yield from _events(snapshot)


def _process(snapshot: StatsSnapshot) -> Iterator[Metric]:
    yield _gauge("start_time_seconds", "Unix time of the daemon's start.", (), {(): snapshot.start_time_s})
    yield _gauge("loop_lag_seconds", "How late the daemon's last tick was.", (), {(): snapshot.loop_lag_s})


def _lookups(snapshot: StatsSnapshot) -> Iterator[Metric]:
    tiers = [tier.name for tier in snapshot.tiers]
    yield _counter(
        "lookup_keys", "Keys looked up.", ("result",), _by_name(snapshot.lookup_keys, LOOKUP_RESULTS)
    )
    yield _counter("lookup_tokens", "Tokens of the keys looked up.", (), {(): snapshot.lookup_tokens})
    yield _counter(
        "hit_tokens", "Tokens of the keys that were hits.", ("tier",), _by_name(snapshot.hit_tokens, tiers)
    )
    yield _counter(
        "store_refused",
        "Keys offered that got no slot.",
        ("reason",),
        _by_name(snapshot.store_refused, STORE_REFUSALS),
    )
    yield _counter("loads_torn", "Loads whose slot changed under the copy.", (), {(): snapshot.loads_torn})


def _tiers(snapshot: StatsSnapshot) -> Iterator[Metric]:
    tiers = snapshot.tiers
    names = [tier.name for tier in tiers]
    yield _gauge(
        "tier_capacity_bytes",
        "Bytes a tier may use.",
        ("tier",),
        {(t.name,): t.capacity_bytes for t in tiers},
    )
    used: dict[tuple[str, ...], float] = {}
    for tier in tiers:
        used[tier.name, "published"] = tier.used_bytes
        used[tier.name, "reserved"] = tier.reserved_bytes
        used[tier.name, "quarantined"] = tier.quarantined_bytes
    yield _gauge("tier_used_bytes", "Bytes of slots in use, by state.", ("tier", "state"), used)
    yield _gauge("tier_chunks", "Published chunks.", ("tier",), {(t.name,): t.chunks for t in tiers})
    evicted: dict[tuple[str, ...], float] = {(n, reason): 0 for n in names for reason in EVICTION_REASONS}
    for name, reasons in snapshot.evictions.items():
        evicted |= {(name, reason): count for reason, count in reasons.items()}
    yield _counter("evictions", "Chunks evicted or dropped.", ("tier", "reason"), evicted)
    yield _counter(
        "checksum_failures",
        "Chunks whose bytes did not match their checksum.",
        ("tier",),
        _by_name(snapshot.checksum_failures, names),
    )
    quarantined = sum(tier.quarantined_slots for tier in tiers if tier.name == PRIMARY_TIER)
    yield _gauge("quarantined_slots", "Slots that may not be reused yet.", (), {(): quarantined})
    yield _gauge(
        "tenant_used_bytes",
        f"Bytes in use by tenant; those past the {MAX_TENANTS} largest are `{OTHER_TENANTS}`.",
        ("tenant",),
        _by_name(largest_tenants(snapshot.tenant_used_bytes), [DEFAULT_TENANT]),
    )
    yield _counter(
        "quota_refused",
        "Keys that got no slot because of their tenant's quota.",
        ("tenant",),
        _by_name(
            by_label(snapshot.quota_refused),
            [DEFAULT_TENANT],
        ),
    )


def _copies(snapshot: StatsSnapshot) -> Iterator[Metric]:
    devices = snapshot.copy_devices
    yield _gauge(
        "pinned_bytes",
        "Bytes of the pool that a device's copy process has pinned.",
        ("device",),
        {(each.device,): each.pinned_bytes for each in devices},
    )
    serving: dict[tuple[str, ...], float] = {(each.device,): each.state == "serving" for each in devices}
    yield _gauge("copy_helper_up", "1 where a device's copy process serves.", ("device",), serving)
    yield _counter(
        "copy_helper_restarts",
        "How often a device's copy process was begun anew after one that had ended.",
        ("device",),
        {(each.device,): each.restarts for each in devices},
    )


def _sessions(snapshot: StatsSnapshot) -> Iterator[Metric]:
    roles = dict.fromkeys(SESSION_ROLES, 0)
    engines: dict[tuple[str, ...], float] = {}
    for session in snapshot.sessions:
        roles[session.role] = roles.get(session.role, 0) + 1
        engines[session.engine_id, session.model, session.namespace] = 1
    yield _gauge("sessions", "Open sessions.", ("role",), _by_name(roles))
    yield _gauge("engine_info", "Engines attached.", ("engine", "model", "namespace"), engines)
    yield _counter(
        "sessions_ended",
        "Sessions that ended.",
        ("reason",),
        _by_name(snapshot.sessions_ended, SESSION_ENDS),
    )
    counts = {lease.kind: lease.count for lease in snapshot.leases}
    yield _gauge("leases", "Leases held.", ("kind",), _by_name(counts, LEASE_KINDS))
    # Credits are held for as long as an engine lives, and are no sign of anything stuck.
    oldest = max((lease.oldest_age_s for lease in snapshot.leases if lease.kind != "credit"), default=0.0)
    yield _gauge(
        "lease_oldest_age_seconds", "Age of the oldest lease, those of credits left out.", (), {(): oldest}
    )
    yield _gauge("credits", "Slots reserved without a key.", (), {(): snapshot.credits})


def _events(snapshot: StatsSnapshot) -> Iterator[Metric]:
    yield _gauge("watchers", "Open streams of events, snapshots included.", (), {(): snapshot.watchers})
    yield _counter(
        "event_keys",
        "Chunks that came into a tier or left it, as events tell.",
        ("kind",),
        _by_name(snapshot.event_keys, KINDS),
    )
    yield _counter(
        "event_overflows",
        "Watchers that were told that they have missed events.",
        (),
        {(): snapshot.event_overflows},
    )


def largest_tenants(used_bytes: Mapping[str, int]) -> dict[str, int]:
    """Keep the largest MAX_TENANTS; sum the others, if there are any, under OTHER_TENANTS.

    The default tenant is called DEFAULT_TENANT, because an empty label value is no label at all; a tenant
    that has one of these names shares its series.
    """
    ranked = sorted(by_label(used_bytes).items(), key=lambda item: (-item[1], item[0]))
    kept = dict(ranked[:MAX_TENANTS])
    if len(ranked) > MAX_TENANTS:
        kept[OTHER_TENANTS] = kept.get(OTHER_TENANTS, 0) + sum(used for _, used in ranked[MAX_TENANTS:])
    return kept


def by_label(by_tenant: Mapping[str, int]) -> dict[str, int]:
    """Sum by what a tenant is called in a label."""
    summed: dict[str, int] = {}
    for tenant, count in by_tenant.items():
        label = tenant or DEFAULT_TENANT
        summed[label] = summed.get(label, 0) + count
    return summed
