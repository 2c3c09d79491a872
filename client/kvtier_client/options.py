"""Who a client is, and what it may cost the engine: identity, deadlines and bounds.

Owns the checks of what the engine configures: a wrong value raises ValueError when it is made, never later.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from kvtier_client.tls import TlsFiles
from kvtier_ops.namespace import MAX_WORLD_SIZE


class Role(Enum):
    """Which half of an engine a client serves."""

    SCHEDULER = "scheduler"
    """Asks: lookups, leases, announcements. One per engine instance."""
    WORKER = "worker"
    """Copies: one per rank; maps the pool and reports its own stores and loads."""


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Names one process of one start of an engine.

    `engine_id` survives restarts of the engine. `instance_nonce` is random per start and the same in all its
    processes (`new_instance_nonce`). The scheduler's rank is 0.
    """

    engine_id: str
    instance_nonce: int
    role: Role
    rank: int = 0
    world_size: int = 1
    tenant: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.engine_id.encode()) <= 128:
            raise ValueError(f"engine_id must have 1 to 128 bytes, not {len(self.engine_id.encode())}")
        if not 0 < self.instance_nonce < 1 << 64:
            raise ValueError(
                f"instance_nonce must be a 64-bit number other than 0, not {self.instance_nonce}; "
                "make one per start of the engine: kvtier_client.new_instance_nonce()"
            )
        if not 1 <= self.world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size must be 1 to {MAX_WORLD_SIZE}, not {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be 0 to {self.world_size - 1} (world_size - 1), not {self.rank}")
        if self.role is Role.SCHEDULER and self.rank:
            raise ValueError(f"the scheduler's rank is 0, not {self.rank}")
        if len(self.tenant.encode()) > 64:
            raise ValueError(f"tenant must have at most 64 bytes, not {len(self.tenant.encode())}")


def new_instance_nonce() -> int:
    """Return a nonce for one start of an engine; hand the same to all its processes."""
    return secrets.randbits(64) or 1


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What one client may cost. Times in milliseconds.

    `lookup_wait_ms` and `promotion_wait_ms` are kept here for the scheduler shim, which waits; the client
    itself waits for answers only.
    """

    lookup_wait_ms: float = 0.5
    """How long a scheduler step waits for an asynchronous lookup before it goes on without."""
    lookup_deadline_ms: float = 50
    """No answer to a lookup by then is a miss, and one missed deadline for the breaker."""
    prepare_deadline_ms: float = 100
    """The same for every other call an engine makes."""
    promotion_wait_ms: int = 2000
    """How long a PENDING key is worth waiting for."""
    attach_deadline_ms: float = 5000
    """Background only: opening a session takes the daemon a look at lock files and maybe a registration."""
    drain_timeout_ms: float = 1000
    """Background only: how long one question to `ClientListener.drain` may take; it is asked again."""
    breaker_threshold: int = 3
    """Deadlines missed in a row that open the breaker."""
    reconnect_min_ms: float = 100
    reconnect_max_ms: float = 1000
    """Bounds of the pause between two attempts to attach, and between two probes of an open breaker."""
    max_seen_requests: int = 65_536
    """Requests whose parameters are known to be with the daemon; beyond it the oldest are sent again."""
    max_queued_entries: int = 262_144
    """Slots, keys and ids waiting for Complete. Beyond it the daemon has not listened for so long that the
    session is given up, which ends its leases for certain."""

    trace_context: Callable[[], str] | None = None
    """Tells the `traceparent` of what the calling thread does, "" = nothing; asked once a call."""
    tls: TlsFiles | None = None
    """Certificates for an address of TCP; a unix socket needs none."""

    def __post_init__(self) -> None:
        for name in (
            "lookup_deadline_ms",
            "prepare_deadline_ms",
            "attach_deadline_ms",
            "drain_timeout_ms",
            "reconnect_min_ms",
            "breaker_threshold",
            "max_seen_requests",
            "max_queued_entries",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"ClientOptions.{name} must be more than 0, not {getattr(self, name)}")
        for name in ("lookup_wait_ms", "promotion_wait_ms"):
            if getattr(self, name) < 0:
                raise ValueError(f"ClientOptions.{name} must not be negative, but is {getattr(self, name)}")
        if self.reconnect_max_ms < self.reconnect_min_ms:
            raise ValueError(
                f"ClientOptions.reconnect_max_ms ({self.reconnect_max_ms}) must not be less than "
                f"reconnect_min_ms ({self.reconnect_min_ms})"
            )
