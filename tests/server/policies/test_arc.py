"""What ARC promises beyond the contract: it resists scans and learns from what it evicted too early."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from kvtier_server.policies.arc import ArcPolicy
from kvtier_server.policies.base import CachePolicy, ChunkId
from kvtier_server.policies.lru import LruPolicy


def to_id(number: int) -> ChunkId:
    return ChunkId(number.to_bytes(8, "big"))


class Cache:
    """A cache of single chunks around a policy, calling it as the daemon does."""

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.resident: set[ChunkId] = set()
        self.clock = count()

    def use(self, numbers: Iterable[int]) -> int:
        """Use chunks one after another, storing what is missing; return the hits."""
        hits = 0
        for chunk_id in map(to_id, numbers):
            if chunk_id in self.resident:
                hits += 1
                self.policy.touch([chunk_id], [next(self.clock)])
            else:
                self.store([chunk_id])
            self.policy.check_integrity()
        return hits

    def store(self, chunk_ids: list[ChunkId]) -> None:
        self.policy.incoming(chunk_ids)
        short = len(self.resident) + len(chunk_ids) - self.policy.capacity
        self.resident.difference_update(self.policy.evict(max(0, short)))
        for chunk_id in chunk_ids:
            self.policy.insert(chunk_id, next(self.clock))
            self.resident.add(chunk_id)


WORKING_SET = range(50)
SCAN = range(1_000, 2_000)


def test_a_scan_leaves_the_working_set_alone() -> None:
    arc, lru = Cache(ArcPolicy(100)), Cache(LruPolicy(100))
    for cache in (arc, lru):
        cache.use(WORKING_SET)
        cache.use(WORKING_SET)
        cache.use(SCAN)
    assert arc.use(WORKING_SET) == 50
    assert lru.use(WORKING_SET) == 0


def test_a_scan_in_one_large_store_leaves_the_working_set_alone() -> None:
    policy = ArcPolicy(100)
    cache = Cache(policy)
    cache.use(WORKING_SET)
    cache.use(WORKING_SET)
    for start in range(0, 1_000, 40):
        cache.store([to_id(number) for number in SCAN[start : start + 40]])
        policy.check_integrity()
    assert cache.use(WORKING_SET) == 50


def test_a_store_takes_from_the_list_that_it_will_grow() -> None:
    policy = ArcPolicy(4)
    cache = Cache(policy)
    cache.use([8, 9, 8, 9, 1, 2, 3, 1])  # recent: 3, at its target; frequent: 8, 9, 1
    newcomers = [to_id(number) for number in (100, 101, 102)]
    policy.incoming(newcomers)
    assert policy.evict(3) == [to_id(3), to_id(8), to_id(9)]


class PaperArc:
    """Figure 4 of the paper, literally; steps in whole chunks, no special rule for |T1| = p."""

    def __init__(self, capacity: int) -> None:
        self.c, self.p = capacity, 0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def use(self, x: int) -> bool:
        t1, t2, b1, b2, c = self.t1, self.t2, self.b1, self.b2, self.c
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
            return True
        if x in b1:
            self.p = min(c, self.p + max(1, len(b2) // len(b1)))
            self.replace()
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            self.p = max(0, self.p - max(1, len(b1) // len(b2)))
            self.replace()
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    self.replace()
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                self.replace()
            t1.append(x)
        return False

    def replace(self) -> None:
        if self.t1 and len(self.t1) > self.p:
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))


@given(capacity=st.integers(1, 6), numbers=st.lists(st.integers(0, 14), max_size=200))
def test_one_chunk_at_a_time_it_is_the_arc_of_the_paper(capacity: int, numbers: list[int]) -> None:
    policy, paper = ArcPolicy(capacity), PaperArc(capacity)
    cache = Cache(policy)
    for number in numbers:
        assert cache.use([number]) == paper.use(number)
        assert cache.resident == {to_id(n) for n in paper.t1 + paper.t2}
        assert policy.recent_target == paper.p


def test_chunks_that_come_back_too_late_make_room_for_recency() -> None:
    policy = ArcPolicy(100)
    cache = Cache(policy)
    cache.use(WORKING_SET)
    cache.use(WORKING_SET)
    assert policy.recent_target == 0
    # 70 chunks in turn, with room for 50: each is a ghost when it is used again.
    for _ in range(2):
        cache.use(range(100, 170))
    assert policy.recent_target > 0
    target = policy.recent_target
    cache.use(WORKING_SET)  # evicted meanwhile: frequency was worth something after all
    assert policy.recent_target < target


def test_a_chunk_back_from_the_ghosts_is_frequent_at_once() -> None:
    cache = Cache(ArcPolicy(4))
    cache.use([8, 9, 8, 9])  # frequent: without them the ghosts of a full recent list are forgotten at once
    cache.use([1, 2, 3])  # 1 becomes a ghost
    cache.use([1])
    cache.use(range(100, 103))
    assert to_id(1) in cache.policy


def test_a_ghost_counts_once_however_often_its_store_is_tried() -> None:
    policy = ArcPolicy(4)
    cache = Cache(policy)
    cache.use([8, 9, 8, 9, 1, 2, 3])
    for _ in range(3):
        policy.incoming([to_id(1)])
    assert policy.recent_target == 1


def test_a_removed_chunk_leaves_no_ghost() -> None:
    policy = ArcPolicy(4)
    cache = Cache(policy)
    cache.use([8, 9, 8, 9, 1])
    policy.remove(to_id(1))
    policy.incoming([to_id(1)])
    assert policy.recent_target == 0


def test_the_other_list_gives_when_everything_in_the_preferred_one_is_pinned() -> None:
    policy = ArcPolicy(4)
    cache = Cache(policy)
    cache.use([8, 9, 8, 9, 1, 2])
    policy.pin([to_id(1), to_id(2)])
    assert policy.evict(3) == [to_id(8), to_id(9)]
    policy.unpin([to_id(1), to_id(2)])
    policy.pin([to_id(1)])
    assert policy.evict(3) == [to_id(2)]
    policy.check_integrity()


def test_a_chunk_used_again_while_pinned_is_frequent_when_its_pin_is_gone() -> None:
    policy = ArcPolicy(3)
    for stamp in range(3):
        policy.insert(to_id(stamp), stamp)
    policy.pin([to_id(0)])
    policy.touch([to_id(0)], [10])
    policy.unpin([to_id(0)])
    assert policy.evict(2) == [to_id(1), to_id(2)]
