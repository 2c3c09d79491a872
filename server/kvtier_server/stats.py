"""The daemon's state as numbers: what status, metrics and the debug page show, at one instant.

The tick of the daemon makes one StatsSnapshot and publishes it; scrapes and status calls read the last
one, so that none of them enters the core. Owns shapes and the words that stand in labels; counts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvtier_server.secondary.base import TierDisk

LOOKUP_RESULTS = ("hit", "hit_unleased", "pending", "miss")
STORE_REFUSALS = ("resident", "pending", "filtered", "quota", "full", "inflight")
EVICTION_REASONS = ("evict", "slab_move", "corrupt", "missing", "clear", "admin")
"""`evict` is the policy's choice, `admin` likewise, when an operator asks for it; the others are drops."""
SESSION_ENDS = ("closed", "replaced", "instance_lost", "draining", "slow_reader")
SESSION_ROLES = ("scheduler", "worker")
LEASE_KINDS = ("lookup", "load", "store", "credit")
PRIMARY_TIER = "primary"
PROMOTION_RESULTS = ("done", "missing", "corrupt", "failed", "no_slot", "refused", "probe_late", "late")
"""`no_slot`: the share of the pool for promotions was taken; `refused`: the tier had too much to do;
`probe_late`: a request went on before it was known whether the chunk is there; `late`: before it was."""
CASCADE_RESULTS = ("done", "corrupt", "failed", "refused")
"""Of chunks that a tier was given to write; `refused`: it found no room, or them not worth it."""
DROP_REASONS = ("queue_full", "evicted", "refused", "unknown_shape", "cleared")
"""Why a chunk did not go down: too many waited, it left the pool first, the tier had too much to do."""

BACKPRESSURE_REASONS = ("queue_full", "evicted", "refused")
"""Those of them that say that a tier could not keep up."""

PHASE_STARTING = "starting"
PHASE_SERVING = "serving"
PHASE_DEGRADED = "degraded"
PHASE_DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The pool's file."""

    path: str = ""
    name: str = ""
    data_bytes: int = 0
    backed_bytes: int = 0
    policy: str = ""


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier. Of the slots' bytes, `used_bytes` hold published chunks."""

    name: str
    capacity_bytes: int = 0
    usable_bytes: int = 0
    used_bytes: int = 0
    reserved_bytes: int = 0
    quarantined_bytes: int = 0
    chunks: int = 0
    free_slots: int = 0
    reserved_slots: int = 0
    quarantined_slots: int = 0
    pinned_chunks: int = 0
    health: str = "ok"
    queued_bytes: int = 0
    """Below the pool: chunks that wait to be written there, or are."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Chunks that did not go down, by reason."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Chunks that the tier itself did not take, by its own words."""
    cascades: Mapping[str, int] = field(default_factory=dict)
    """Chunks that were to go down, by outcome."""
    cascade_bytes: int = 0
    promotions: Mapping[str, int] = field(default_factory=dict)
    """Chunks that were to come up, by outcome."""
    promotion_bytes: int = 0
    io_errors: Mapping[str, int] = field(default_factory=dict)
    """I/O that failed, by the names of IO_ERRNOS."""
    disk: TierDisk | None = None
    """Where the tier lies on a file system and has looked at it."""


@dataclass(frozen=True, slots=True)
class SessionStats:
    """One open session; pins and credits are those of its instance."""

    engine_id: str
    role: str
    rank: int
    tenant: str
    namespace: str
    """First 12 digits of the digest."""
    model: str
    age_s: float
    pinned_chunks: int = 0
    credits: int = 0
    path: str = ""
    """How a worker's bytes move: "shm" where it copies itself, else who copies for it; "" for a scheduler."""


@dataclass(frozen=True, slots=True)
class CopyDeviceStats:
    """The copy process of one device."""

    device: str
    """UUID of the GPU in hex; "host" = shared memory in place of one."""
    state: str
    """"serving", "starting", "unused", or why there is none."""
    restarts: int = 0
    memories: int = 0
    """Registrations that are open."""
    jobs: int = 0
    """Copies under way."""
    pinned_bytes: int = 0
    problem: str = ""
    """What makes copies slower than they could be."""


@dataclass(frozen=True, slots=True)
class LeaseStats:
    """The leases of one kind."""

    kind: str
    count: int = 0
    oldest_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StatsSnapshot:
    """Everything at one instant. Mappings count since the start of the daemon, by the words above.

    Who makes it hands the mappings over: they must not change afterwards.
    """

    boot_id: str = ""
    version: str = ""
    phase: str = PHASE_STARTING
    start_time_s: float = 0.0
    """Unix time."""
    uptime_s: float = 0.0
    loop_lag_s: float = 0.0
    """How late the last tick was."""
    pool: PoolStats = PoolStats()
    tiers: tuple[TierStats, ...] = (TierStats(PRIMARY_TIER),)
    """The pool first."""
    sessions: tuple[SessionStats, ...] = ()
    leases: tuple[LeaseStats, ...] = ()
    copy_devices: tuple[CopyDeviceStats, ...] = ()
    lookup_keys: Mapping[str, int] = field(default_factory=dict)
    lookup_tokens: int = 0
    hit_tokens: Mapping[str, int] = field(default_factory=dict)
    """By tier."""
    evictions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By tier, then by reason."""
    store_refused: Mapping[str, int] = field(default_factory=dict)
    sessions_ended: Mapping[str, int] = field(default_factory=dict)
    checksum_failures: Mapping[str, int] = field(default_factory=dict)
    """By tier."""
    loads_torn: int = 0
    credits: int = 0
    """Slots reserved without a key, over all instances."""
    tenant_used_bytes: Mapping[str, int] = field(default_factory=dict)
    transfer_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Bytes copied between engines and the pool, by direction, then by path."""
    watchers: int = 0
    """Open streams of EventsService."""
    event_keys: Mapping[str, int] = field(default_factory=dict)
    """Keys in events, by kind."""
    event_overflows: int = 0
    quota_refused: Mapping[str, int] = field(default_factory=dict)
    """Keys that a tenant's quota kept out, by tenant."""

    def evictions_by_reason(self) -> dict[str, int]:
        """Sum the evictions of all tiers, as GetStatusResponse wants them."""
        totals: dict[str, int] = {}
        for reasons in self.evictions.values():
            for reason, count in reasons.items():
                totals[reason] = totals.get(reason, 0) + count
        return totals


@dataclass(frozen=True, slots=True)
class DaemonState:
    """What the health pages need to know, asked fresh on each request."""

    phase: str
    tick_age_s: float
    """Time since the daemon's loop last came round."""
