"""Least recently used goes first.

Owns nothing of its own: one `RecencyList` is the whole policy. Because a request's head has its
largest stamp, a prefix goes tail first and no cached chunk ever follows a hole.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvtier_server.policies.base import CachePolicy, ChunkId, MayEvict
from kvtier_server.policies.recency import RecencyList


class LruPolicy(CachePolicy):
    """Evict the chunk whose last use is longest ago. The baseline that others must beat."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._chunks = RecencyList()

    def insert(self, chunk_id: ChunkId, stamp: int) -> None:
        self._chunks.add(chunk_id, stamp)

    def insert_pinned(self, chunk_id: ChunkId, stamp: int) -> None:
        self._chunks.add(chunk_id, stamp, pinned=True)

    def touch(self, chunk_ids: Sequence[ChunkId], stamps: Sequence[int]) -> None:
        self._chunks.touch(chunk_ids, stamps)

    def pin(self, chunk_ids: Sequence[ChunkId]) -> None:
        self._chunks.pin(chunk_ids)

    def unpin(self, chunk_ids: Sequence[ChunkId]) -> None:
        self._chunks.unpin(chunk_ids)

    def evict(self, count: int, may_evict: MayEvict | None = None) -> list[ChunkId]:
        return self._chunks.pop_coldest(count, may_evict)

    def remove(self, chunk_id: ChunkId) -> None:
        self._chunks.remove(chunk_id)

    def coldest(self, count: int) -> list[ChunkId]:
        return self._chunks.coldest(count)

    def coldest_stamp(self) -> int | None:
        return self._chunks.coldest_stamp()

    def __len__(self) -> int:
        return self._chunks.num_evictable

    def __contains__(self, chunk_id: ChunkId) -> bool:
        return self._chunks.is_evictable(chunk_id)

    @property
    def num_pinned(self) -> int:
        return self._chunks.num_pinned

    def check_integrity(self) -> None:
        self._chunks.check_integrity()
