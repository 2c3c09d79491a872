"""A pool and one tier below it in a plain loop over a request trace: no daemon, no bytes, no clock.

Owns what a daemon with these two capacities must serve on the same trace, request by request, when whatever
is to go down has gone down before the next request comes. The pool is a policy of ours, as in
`plain_replay.py`; in the tier the chunk used longest ago goes first, by the stamps of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier_server.policies.base import ChunkId
from kvtier_server.policies.loader import make_policy
from kvtier_server.primary.tier import EXCUSED_CHUNKS, EXCUSED_PER_VICTIM


@dataclass(slots=True)
class Served:
    """What one request, or all of them, got: from the pool, from the tier, and what was evicted for it."""

    input_chunks: int = 0
    pool_hits: int = 0
    tier_hits: int = 0

    @property
    def hits(self) -> int:
        """Chunks that were not computed."""
        return self.pool_hits + self.tier_hits

    @property
    def hit_share(self) -> float:
        """Share of input chunks that were hits."""
        return self.hits / max(self.input_chunks, 1)

    def add(self, other: Served) -> None:
        """Count another request."""
        self.input_chunks += other.input_chunks
        self.pool_hits += other.pool_hits
        self.tier_hits += other.tier_hits


class PlainTiers:
    """A pool of `pool_chunks` over a tier of `tier_chunks`; both start empty."""

    def __init__(self, pool_chunks: int, tier_chunks: int, policy: str = "lru") -> None:
        self.pool: set[ChunkId] = set()
        self.tier: set[ChunkId] = set()
        self.evictions = 0
        """From the pool and from the tier together."""
        self._pool_chunks = pool_chunks
        self._tier_chunks = tier_chunks
        self._policy = make_policy(policy, pool_chunks)
        self._tier_policy = make_policy("lru", tier_chunks)
        self._stamp = 0

    def serve(self, numbers: Sequence[int]) -> Served:
        """Look up, load, compute and store one request."""
        chunk_ids = [ChunkId(number.to_bytes(8, "big")) for number in numbers]
        # One run of stamps for the request, the head's the largest: its tail is its coldest part everywhere.
        stamps = {chunk_id: self._stamp + len(chunk_ids) - i for i, chunk_id in enumerate(chunk_ids)}
        self._stamp += len(chunk_ids)
        run = self._leading_run(chunk_ids)
        self._use(run, stamps)
        coming = [chunk_id for chunk_id in run if chunk_id not in self.pool]
        self._evict_for(len(coming), set())
        self._publish(coming, stamps)
        self._policy.pin(coming)
        missing = [chunk_id for chunk_id in chunk_ids[len(run) :] if chunk_id not in self.pool]
        num_granted = self._evict_for(len(missing), set(chunk_ids))
        stored = missing[:num_granted]
        self._publish(stored, stamps)
        self._policy.unpin(run)
        self._send_down(stored, stamps)
        return Served(len(chunk_ids), len(run) - len(coming), len(coming))

    def _leading_run(self, chunk_ids: Sequence[ChunkId]) -> list[ChunkId]:
        run: list[ChunkId] = []
        for chunk_id in chunk_ids:
            if chunk_id not in self.pool and chunk_id not in self.tier:
                break
            run.append(chunk_id)
        return run

    def _use(self, run: Sequence[ChunkId], stamps: dict[ChunkId, int]) -> None:
        """Note the use of the leading run, tail first, in both; what the pool has of it is pinned."""
        here = [chunk_id for chunk_id in run if chunk_id in self.pool]
        self._policy.touch(here[::-1], [stamps[chunk_id] for chunk_id in here[::-1]])
        self._policy.pin(here)
        below = [chunk_id for chunk_id in run if chunk_id in self.tier]
        self._tier_policy.touch(below, [stamps[chunk_id] for chunk_id in below])

    def _evict_for(self, count: int, own: set[ChunkId]) -> int:
        """Make room in the pool, never by what the request itself uses; returns how many then fit.

        Some of the coldest that are not in the tier are passed over, as long as others are.
        """
        short = len(self.pool) + count - self._pool_chunks
        if short <= 0:
            return count
        spared = EXCUSED_CHUNKS + EXCUSED_PER_VICTIM * short

        def may_evict(chunk_id: ChunkId) -> bool:
            nonlocal spared
            if chunk_id in own:
                return False
            if chunk_id in self.tier or spared <= 0:
                return True
            spared -= 1
            return False

        victims = self._policy.evict(short, may_evict)
        if len(victims) < short:
            spared = 0
            victims += self._policy.evict(short - len(victims), may_evict)
        self.pool.difference_update(victims)
        self.evictions += len(victims)
        return count - (short - len(victims))

    def _publish(self, chunk_ids: Sequence[ChunkId], stamps: dict[ChunkId, int]) -> None:
        for chunk_id in chunk_ids:
            self._policy.insert(chunk_id, stamps[chunk_id])
            self.pool.add(chunk_id)

    def _send_down(self, chunk_ids: Sequence[ChunkId], stamps: dict[ChunkId, int]) -> None:
        for chunk_id in chunk_ids:
            if chunk_id in self.tier:
                continue
            if len(self.tier) >= self._tier_chunks:
                self.tier.difference_update(self._tier_policy.evict(1))
                self.evictions += 1
            self._tier_policy.insert(chunk_id, stamps[chunk_id])
            self.tier.add(chunk_id)
