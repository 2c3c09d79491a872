"""The health of each tier below the pool, under a name of its own in grpc.health.v1.

Owns the names. A tier that is not in order is NOT_SERVING there, and the daemon as a whole is degraded, never
down: it serves from the pool.
"""

from __future__ import annotations

from collections.abc import Iterable

from grpc_health.v1 import health, health_pb2

from kvtier_server.stats import TierStats

PREFIX = "kvtier.tier."

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def in_order(tier: TierStats) -> bool:
    """Tell whether a tier works."""
    return tier.health == "ok"


class TierHealth:
    """Tells the health service what changes."""

    def __init__(self, servicer: health.aio.HealthServicer) -> None:
        self._servicer = servicer
        self._told: dict[str, bool] = {}

    async def tell(self, tiers: Iterable[TierStats]) -> None:
        """Take over the state of the tiers below the pool."""
        for tier in tiers:
            if self._told.get(tier.name) != in_order(tier):
                self._told[tier.name] = in_order(tier)
                status = _SERVING if in_order(tier) else _NOT_SERVING
                await self._servicer.set(PREFIX + tier.name, status)
