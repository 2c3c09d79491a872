"""Counters of one client, by name.

Owns the names: a counter that is not listed here cannot be counted. Who exports them is the engine's choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock

COUNTERS = (
    "lookups",
    "lookup_keys",
    "hit_keys",
    "leased_keys",
    "away_misses",
    "breaker_misses",
    "deadline_misses",
    "refused_calls",
    "bad_replies",
    "breaker_opens",
    "attaches",
    "detaches",
    "drain_waits",
    "keeper_errors",
    "listener_errors",
    "params_dropped",
    "flushes",
    "flush_retries",
    "flush_dropped",
    "queued_dropped",
    "items_not_ok",
    "leases_renewed",
    "leases_lost",
    "rpc_attach",
    "rpc_complete",
    "rpc_describe",
    "rpc_lookup",
    "rpc_prepare_load",
    "rpc_prepare_store",
    "rpc_renew_leases",
    "rpc_reset",
    "rpc_touch",
)


class ClientStats:
    """Counts since the client was made. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)

    def add(self, name: str, count: int = 1) -> None:
        """Count one event, or `count` of them."""
        with self._lock:
            self._counts[name] += count

    def add_lookup(self, num_keys: int, num_hits: int, num_leased: int) -> None:
        """Count an answered lookup: one turn of the lock for the hot path."""
        with self._lock:
            counts = self._counts
            counts["lookups"] += 1
            counts["lookup_keys"] += num_keys
            counts["hit_keys"] += num_hits
            counts["leased_keys"] += num_leased

    def total(self, names: Iterable[str]) -> int:
        """Return the sum of some counters. May miss what is counted meanwhile."""
        return sum([self._counts[name] for name in names])

    def snapshot(self) -> dict[str, int]:
        """Return a copy of all counters, consistent among themselves."""
        with self._lock:
            return dict(self._counts)
