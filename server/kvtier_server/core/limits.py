"""Limits of the core, one field each. Defaults and units are explained where the configuration is."""

from __future__ import annotations

from dataclasses import dataclass

SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What the core holds at most. Times in nanoseconds."""

    max_keys: int = 8_192
    max_params_bytes: int = 65_536
    max_engines: int = 64
    max_sessions: int = 1_024
    max_requests: int = 65_536
    """Unfinished requests remembered per instance; the oldest without a lease is forgotten first."""
    max_remembered_keys: int = 1_048_576
    """Keys of unfinished requests remembered per instance, for recency."""
    max_leases: int = 65_536
    """Leases per instance."""
    max_remembered: int = 65_536
    """Ended items (stores, loads) remembered per instance, so that a repeat is ALREADY."""
    max_events: int = 65_536
    """Events kept for replay."""
    max_event_keys: int = 1_048_576
    """Keys in all kept events together, about 100 MB."""
    max_keys_per_event: int = 1_024
    """So that each fits into a message."""
    lookup_lease_ns: int = 30 * SECOND_NS
    copy_lease_ns: int = 300 * SECOND_NS
    tombstone_ns: int = 60 * SECOND_NS
    max_promotion_ns: int = 10 * SECOND_NS
    max_pending_wait_ns: int = 2 * SECOND_NS
    pin_share: float = 0.5
    """Share of the pool one instance may have pinned, and another such share for its unfinished stores."""
    credit_share: float = 1 / 16
    """Share of the pool one instance may hold as credits."""
    promotion_share: float = 1 / 8
    """Share of the pool that promotions may have reserved at once."""
    min_credit_slots: int = 64
    """Credits an instance may hold in a small pool, but never more than a quarter of it."""
