"""What every eviction policy promises.

Owns the interface between whoever holds the chunks (the primary tier) and whoever orders them for
eviction. Owns no policy, no slot and no clock: stamps come from outside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NewType

ChunkId = NewType("ChunkId", bytes)
"""Key-space tag + OffloadKey: unique over namespaces, tenants and epochs."""

MayEvict = Callable[[ChunkId], bool | None]
"""Says whether a chunk may go. None: no, and too many were passed over already to look at further ones."""


class CachePolicy(ABC):
    """Order of eviction over the chunks of one size class.

    A chunk is *held* from its insert until it is evicted or removed. A held chunk is either
    evictable or pinned; pinned ones are in no order, so evictions never walk past them. The caller
    counts pins and reports only the first and the last.

    Stamps say when a chunk was last used. They are unique integers, larger = later. They are issued
    in order but may arrive late: a request takes its stamps at its lookup and its stores are
    published long after, so a stamp may be older than the newest one that the policy has seen.
    Within one request the head has the largest stamp, so a prefix is evicted from its end.

    One store, in the order of the calls: `incoming(all keys)`, `evict(slots that are missing)`, and
    once the bytes are there `insert` or `insert_pinned` per chunk. A store that fails is not reported.

    Calls come from one thread. Breaking a precondition (a chunk inserted twice, pinned twice, or
    never inserted) is the caller's bug: AssertionError, or KeyError for an unknown chunk, and the
    policy may be left half way. `pin`, `unpin` and `touch` are on the path of every lookup: O(1) per
    chunk.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty. `capacity`: slots of this size class, >= 0."""
        assert capacity >= 0, f"capacity must not be negative: {capacity}"
        self._capacity = capacity

    @property
    def capacity(self) -> int:
        """Slots of this size class: a hint for sizing, never a reason to evict by itself."""
        return self._capacity

    def set_capacity(self, capacity: int) -> None:
        """Note that slabs moved. Evicts nothing: the caller asks for victims when it needs slots."""
        assert capacity >= 0, f"capacity must not be negative: {capacity}"
        self._capacity = capacity

    # Not abstract on purpose: most policies learn nothing from a chunk that is not there yet.
    def incoming(self, chunk_ids: Sequence[ChunkId]) -> None:  # noqa: B027
        """Announce the chunks about to be stored, once per store and right before its `evict`.

        Called even if no victim is needed. It promises nothing: an announced chunk may never be
        inserted, and a chunk may be inserted unannounced (a restart, a promotion).
        """

    @abstractmethod
    def insert(self, chunk_id: ChunkId, stamp: int) -> None:
        """Hold a chunk that was just published and that nobody pins."""

    @abstractmethod
    def insert_pinned(self, chunk_id: ChunkId, stamp: int) -> None:
        """Hold a chunk that was published while somebody already pins it."""

    @abstractmethod
    def touch(self, chunk_ids: Sequence[ChunkId], stamps: Sequence[int]) -> None:
        """Count one use of each chunk, pinned or not; at most once per request.

        A stamp older than the chunk's own is a use like any other but leaves its time of use alone.
        """

    @abstractmethod
    def pin(self, chunk_ids: Sequence[ChunkId]) -> None:
        """Take evictable chunks out of the order (their first pin)."""

    @abstractmethod
    def unpin(self, chunk_ids: Sequence[ChunkId]) -> None:
        """Put pinned chunks back (their last pin is gone) by their time of use, not at the hot end."""

    @abstractmethod
    def evict(self, count: int, may_evict: MayEvict | None = None) -> list[ChunkId]:
        """Let go of `count` chunks, the next victim first; fewer only if no more are evictable.

        `may_evict` excuses chunks from this call only (those of the request that needs the room).
        It is asked once per candidate, must not call back, and costs O(1) per excused chunk. From its first
        None on fewer victims are right, whatever else is evictable.
        """

    @abstractmethod
    def remove(self, chunk_id: ChunkId) -> None:
        """Let go of a chunk, pinned or not, that was dropped rather than evicted: it leaves no trace."""

    def coldest(self, count: int) -> list[ChunkId]:
        """Name up to `count` evictable chunks that would go soon, about in the order of eviction.

        They stay. What is named is copied to a lower tier in time; a wrong guess costs that copy, and of a
        policy that guesses nothing a tier with `cascade = "cold"` gets nothing.
        """
        return []

    @abstractmethod
    def coldest_stamp(self) -> int | None:
        """Return the stamp of the next victim, to compare size classes; None if nothing is evictable."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of evictable chunks."""

    @abstractmethod
    def __contains__(self, chunk_id: ChunkId) -> bool:
        """Return whether the chunk is held and evictable."""

    @property
    @abstractmethod
    def num_pinned(self) -> int:
        """Number of chunks that are held and pinned."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Assert that the books agree with one another. O(chunks): for tests and `kvtier doctor`."""
