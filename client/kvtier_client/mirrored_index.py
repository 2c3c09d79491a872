"""Which tiers hold which chunk, as events say. Owns no connection and no lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvtier.v1 import events_pb2 as pb

Space = tuple[str, str, int]
"""Namespace, tenant and epoch."""


class MirroredIndex:
    """Tiers by key, a bit for each tier. Events are operations on sets: one applied twice changes nothing."""

    def __init__(self) -> None:
        self._spaces: dict[Space, dict[bytes, int]] = {}
        self._bits: dict[str, int] = {"primary": 1}
        self._counts: dict[str, int] = {"primary": 0}

    def apply(self, events: Iterable[pb.OffloadingEvent]) -> None:
        """Apply events, in their order."""
        for event in events:
            if event.tier not in self._bits:
                self._bits[event.tier] = 1 << len(self._bits)
                self._counts[event.tier] = 0
            space = (event.namespace, event.tenant, event.epoch)
            if event.kind == pb.EVENT_KIND_STORED:
                self._store(space, event.tier, event.keys)
            elif event.kind == pb.EVENT_KIND_REMOVED:
                self._remove(space, event.tier, event.keys)
            elif event.kind == pb.EVENT_KIND_CLEARED:
                for cleared in [space for space in self._spaces if space[0] == event.namespace]:
                    self._remove(cleared, event.tier, list(self._spaces[cleared]))

    def _store(self, space: Space, tier: str, keys: Iterable[bytes]) -> None:
        bit = self._bits[tier]
        held = self._spaces.setdefault(space, {})
        for key in keys:
            before = held.get(key, 0)
            if not before & bit:
                held[key] = before | bit
                self._counts[tier] += 1

    def _remove(self, space: Space, tier: str, keys: Iterable[bytes]) -> None:
        bit = self._bits[tier]
        held = self._spaces.get(space, {})
        for key in keys:
            before = held.get(key, 0)
            if before == bit:
                del held[key]
            elif before & bit:
                held[key] = before & ~bit
            self._counts[tier] -= bool(before & bit)
        if not held:
            self._spaces.pop(space, None)

    def tiers_of(self, space: Space, key: bytes) -> tuple[str, ...]:
        """Name the tiers that hold a chunk, the pool first."""
        bits = self._spaces.get(space, {}).get(key, 0)
        return tuple(tier for tier, bit in self._bits.items() if bits & bit) if bits else ()

    def counts(self) -> dict[str, int]:
        """Count the chunks of each tier."""
        return dict(self._counts)

    def chunks(self) -> Iterator[tuple[str, str, str, int, bytes]]:
        """Yield (tier, namespace, tenant, epoch, key) of every chunk."""
        for space, held in self._spaces.items():
            for key, bits in held.items():
                for tier, bit in self._bits.items():
                    if bits & bit:
                        yield (tier, *space, key)
