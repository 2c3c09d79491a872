"""Adaptive replacement: recency and frequency, weighed by what was evicted too early.

Owns two recency lists, their ghosts (ids of evicted chunks) and the balance between them. Source:
N. Megiddo and D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", USENIX FAST 2003,
figure 4, whose names are in brackets.

    recent   [T1]  used once since it came in              ghosts [B1]
    frequent [T2]  used again, or back from a ghost list   ghosts [B2]

The paper takes one miss at a time: adapt, evict, insert. Here a store announces its chunks, evicts
in one call and inserts much later, so:

* `incoming` moves the target and takes the hit ghosts off their lists; such a chunk is remembered as
  *returning* until it is inserted, and then goes to `frequent`.
* The announced newcomers count as part of `recent` until they are inserted. Without them a large
  store would shrink `recent` to its target and take the rest from `frequent`, only to grow `recent`
  by the whole store a moment later. One chunk at a time, this is the paper's choice (but for its
  special rule for a hit in [B2] at |T1| = p, which is worth one victim).
* Pinned chunks count in the sizes but cannot go; where a list has nothing evictable the other gives.
* The target moves in whole chunks. On the Mooncake conversation trace that is as good as fractions
  or better (hit share at 2 % of the distinct blocks 0.0919 instead of 0.0891).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import compress

from kvtier_server.policies.base import CachePolicy, ChunkId, MayEvict
from kvtier_server.policies.recency import RecencyList

_OldestFirst = OrderedDict[ChunkId, None]


class ArcPolicy(CachePolicy):
    """Evict from `recent` while it is larger than its target, else from `frequent`.

    A hit among the ghosts of `recent` raises the target, one among those of `frequent` lowers it.
    With c = capacity, ghosts are forgotten, oldest first, until recent + its ghosts <= c and
    everything <= 2c, as far as that can be had by forgetting ghosts.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._recent = RecencyList()
        self._frequent = RecencyList()
        self._recent_ghosts = _OldestFirst()
        self._frequent_ghosts = _OldestFirst()
        self._returning = _OldestFirst()
        self._recent_target = 0
        self._num_newcomers = 0

    def set_capacity(self, capacity: int) -> None:
        super().set_capacity(capacity)
        self._recent_target = min(self._recent_target, capacity)
        self._forget_old_ghosts()

    def incoming(self, chunk_ids: Sequence[ChunkId]) -> None:
        num_newcomers = 0
        for chunk_id in chunk_ids:
            if chunk_id in self._returning or self._take_ghost(chunk_id):
                self._returning[chunk_id] = None
            else:
                num_newcomers += 1
        self._num_newcomers = num_newcomers
        self._forget_old_ghosts()

    def insert(self, chunk_id: ChunkId, stamp: int) -> None:
        self._add(chunk_id, stamp, pinned=False)

    def insert_pinned(self, chunk_id: ChunkId, stamp: int) -> None:
        self._add(chunk_id, stamp, pinned=True)

    def touch(self, chunk_ids: Sequence[ChunkId], stamps: Sequence[int]) -> None:
        assert len(chunk_ids) == len(stamps), f"{len(chunk_ids)} chunks, {len(stamps)} stamps"
        used_once = self._recent.held
        if used_once.isdisjoint(chunk_ids):
            self._frequent.touch(chunk_ids, stamps)
            return
        again = [chunk_id in used_once for chunk_id in chunk_ids]
        self._recent.move(compress(chunk_ids, again), compress(stamps, again), self._frequent)
        more = [not flag for flag in again]
        self._frequent.touch(compress(chunk_ids, more), compress(stamps, more))

    def pin(self, chunk_ids: Sequence[ChunkId]) -> None:
        recent, frequent = self._split(chunk_ids)
        self._recent.pin(recent)
        self._frequent.pin(frequent)

    def unpin(self, chunk_ids: Sequence[ChunkId]) -> None:
        recent, frequent = self._split(chunk_ids)
        self._recent.unpin(recent)
        self._frequent.unpin(frequent)

    def evict(self, count: int, may_evict: MayEvict | None = None) -> list[ChunkId]:
        victims: list[ChunkId] = []
        surplus = max(0, self._recent_surplus())
        # Recent down to its target, then frequent, then whatever of recent is left.
        for chunks, ghosts, most in (
            (self._recent, self._recent_ghosts, surplus),
            (self._frequent, self._frequent_ghosts, count),
            (self._recent, self._recent_ghosts, count),
        ):
            gone = chunks.pop_coldest(min(most, count - len(victims)), may_evict)
            ghosts.update(dict.fromkeys(gone))
            victims += gone
        self._forget_old_ghosts()
        return victims

    def remove(self, chunk_id: ChunkId) -> None:
        (self._recent if chunk_id in self._recent.held else self._frequent).remove(chunk_id)

    def coldest(self, count: int) -> list[ChunkId]:
        # As `evict` would go now. Each store moves the border a little, and so the next call's answer.
        surplus = min(max(0, self._recent_surplus()), count)
        named = self._recent.coldest(surplus)
        named += self._frequent.coldest(count - len(named))
        if len(named) < count:
            named += self._recent.coldest(surplus + count - len(named))[surplus:]
        return named

    def coldest_stamp(self) -> int | None:
        first, second = self._recent, self._frequent
        if self._recent_surplus() <= 0:
            first, second = second, first
        stamp = first.coldest_stamp()
        return second.coldest_stamp() if stamp is None else stamp

    def __len__(self) -> int:
        return self._recent.num_evictable + self._frequent.num_evictable

    def __contains__(self, chunk_id: ChunkId) -> bool:
        return self._recent.is_evictable(chunk_id) or self._frequent.is_evictable(chunk_id)

    @property
    def num_pinned(self) -> int:
        return self._recent.num_pinned + self._frequent.num_pinned

    @property
    def recent_target(self) -> int:
        """How many chunks `recent` should have [p]: 0 = all for frequency, capacity = all for recency."""
        return self._recent_target

    def _recent_surplus(self) -> int:
        # The first victim goes before the first newcomer comes, the second before the second, ...
        return len(self._recent) + max(0, self._num_newcomers - 1) - self._recent_target

    def _split(self, chunk_ids: Sequence[ChunkId]) -> tuple[Sequence[ChunkId], Sequence[ChunkId]]:
        used_once = self._recent.held
        if used_once.isdisjoint(chunk_ids):
            return (), chunk_ids
        recent = [chunk_id for chunk_id in chunk_ids if chunk_id in used_once]
        return recent, [chunk_id for chunk_id in chunk_ids if chunk_id not in used_once]

    def _add(self, chunk_id: ChunkId, stamp: int, *, pinned: bool) -> None:
        # Each list refuses its own chunks; here a chunk could come into one while it is in the other.
        held = chunk_id in self._recent.held or chunk_id in self._frequent.held
        assert not held, f"inserted twice: {chunk_id.hex()}"
        if chunk_id in self._returning:
            del self._returning[chunk_id]
            self._frequent.add(chunk_id, stamp, pinned=pinned)
        elif self._take_ghost(chunk_id):  # came unannounced
            self._frequent.add(chunk_id, stamp, pinned=pinned)
        else:
            self._num_newcomers = max(0, self._num_newcomers - 1)
            self._recent.add(chunk_id, stamp, pinned=pinned)
        self._forget_old_ghosts()

    def _take_ghost(self, chunk_id: ChunkId) -> bool:
        """Take a chunk off its ghost list, if it is on one, and move the target in that list's favour."""
        recent_ghosts, frequent_ghosts = self._recent_ghosts, self._frequent_ghosts
        if chunk_id in recent_ghosts:
            step = max(1, len(frequent_ghosts) // len(recent_ghosts))
            self._recent_target = min(self._capacity, self._recent_target + step)
            del recent_ghosts[chunk_id]
            return True
        if chunk_id in frequent_ghosts:
            step = max(1, len(recent_ghosts) // len(frequent_ghosts))
            self._recent_target = max(0, self._recent_target - step)
            del frequent_ghosts[chunk_id]
            return True
        return False

    def _forget_old_ghosts(self) -> None:
        # Runs for every insert, hence the plain loops.
        capacity, num_recent, num_frequent = self._capacity, len(self._recent), len(self._frequent)
        recent_ghosts, frequent_ghosts = self._recent_ghosts, self._frequent_ghosts
        room = 2 * capacity - num_recent - num_frequent
        # `room` is the smaller limit only when a capacity shrank below what is held.
        while recent_ghosts and len(recent_ghosts) > min(capacity - num_recent, room):
            recent_ghosts.popitem(last=False)
        while frequent_ghosts and len(frequent_ghosts) > room - len(recent_ghosts):
            frequent_ghosts.popitem(last=False)
        while len(self._returning) > self._capacity:  # announced, but never inserted
            self._returning.popitem(last=False)

    def check_integrity(self) -> None:
        self._recent.check_integrity()
        self._frequent.check_integrity()
        capacity, num_held = self._capacity, len(self._recent) + len(self._frequent)
        num_ghosts = len(self._recent_ghosts) + len(self._frequent_ghosts)
        places = (
            self._recent.held,
            self._frequent.held,
            self._recent_ghosts.keys(),
            self._frequent_ghosts.keys(),
            self._returning.keys(),
        )
        assert len(set().union(*places)) == sum(map(len, places)), "a chunk is in two places"
        assert 0 <= self._recent_target <= capacity, f"target {self._recent_target} of {capacity}"
        assert not self._recent_ghosts or len(self._recent) + len(self._recent_ghosts) <= capacity, (
            f"{len(self._recent)} recent + {len(self._recent_ghosts)} ghosts > {capacity}"
        )
        assert not num_ghosts or num_held + num_ghosts <= 2 * capacity, (
            f"{num_held} held + {num_ghosts} ghosts > 2 * {capacity}"
        )
        assert len(self._returning) <= capacity, f"{len(self._returning)} returning > {capacity}"
