"""What every policy promises, whatever it evicts first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvtier_server.policies.base import CachePolicy, ChunkId

Make = Callable[[int], CachePolicy]


def to_ids(numbers: range | list[int]) -> list[ChunkId]:
    return [ChunkId(number.to_bytes(8, "big")) for number in numbers]


def filled(make: Make, count: int, capacity: int | None = None) -> tuple[CachePolicy, list[ChunkId]]:
    """Make a policy that holds `count` chunks, used once each, in the order of the list."""
    policy, chunk_ids = make(capacity or count), to_ids(range(count))
    for stamp, chunk_id in enumerate(chunk_ids):
        policy.insert(chunk_id, stamp)
    return policy, chunk_ids


def test_an_empty_policy_has_no_victims_and_no_coldest_stamp(make: Make) -> None:
    policy = make(4)
    assert policy.evict(3) == []
    assert policy.coldest_stamp() is None
    assert len(policy) == policy.num_pinned == 0
    policy.check_integrity()


def test_chunks_used_once_go_in_the_order_of_their_stamps_not_of_their_arrival(make: Make) -> None:
    policy, chunk_ids = make(6), to_ids(range(6))
    for stamp in (3, 5, 0, 4, 1, 2):
        policy.insert(chunk_ids[stamp], stamp)
    assert policy.evict(6) == chunk_ids


def test_a_prefix_is_evicted_from_its_end(make: Make) -> None:
    policy, prefix = make(300), to_ids(range(300))
    for position in reversed(range(300)):
        policy.insert(prefix[position], 1000 - position)
    assert policy.evict(200) == prefix[:99:-1]


def test_a_victim_is_gone(make: Make) -> None:
    policy, chunk_ids = filled(make, 5)
    (victim,) = policy.evict(1)
    assert victim not in policy
    assert len(policy) == 4
    assert victim not in policy.evict(4)
    policy.check_integrity()
    assert set(chunk_ids) > {victim}


def test_evict_gives_what_there_is_when_asked_for_more(make: Make) -> None:
    policy, chunk_ids = filled(make, 5)
    policy.pin(chunk_ids[:2])
    assert sorted(policy.evict(10)) == chunk_ids[2:]
    assert policy.evict(1) == []
    policy.check_integrity()


def test_evicting_none_changes_nothing(make: Make) -> None:
    policy, _ = filled(make, 5)
    assert policy.evict(0) == []
    assert len(policy) == 5


def test_coldest_stamp_is_the_stamp_of_the_next_victim(make: Make) -> None:
    policy, chunk_ids = filled(make, 400, capacity=100)
    policy.touch(chunk_ids[:200:3], range(1000, 1000 + len(chunk_ids[:200:3])))
    stamps = dict(zip(chunk_ids, range(400), strict=True))
    stamps.update(zip(chunk_ids[:200:3], range(1000, 2000), strict=False))
    for _ in range(400):
        coldest = policy.coldest_stamp()
        assert [stamps[victim] for victim in policy.evict(1)] == [coldest]
    assert policy.coldest_stamp() is None


def test_a_pinned_chunk_is_held_but_not_evictable(make: Make) -> None:
    policy, chunk_ids = filled(make, 3)
    policy.pin(chunk_ids[:1])
    assert chunk_ids[0] not in policy
    assert (len(policy), policy.num_pinned) == (2, 1)
    assert policy.evict(3) == chunk_ids[1:]
    policy.unpin(chunk_ids[:1])
    assert policy.evict(3) == chunk_ids[:1]


def test_a_chunk_inserted_pinned_waits_for_its_unpin(make: Make) -> None:
    policy, (early, late) = make(2), to_ids([1, 2])
    policy.insert_pinned(early, 1)
    policy.insert(late, 2)
    assert policy.evict(0) == []
    policy.unpin([early])
    assert policy.evict(2) == [early, late]


def test_unpin_puts_a_chunk_back_by_its_time_of_use_not_at_the_hot_end(make: Make) -> None:
    policy, chunk_ids = filled(make, 10)
    policy.pin(chunk_ids[2:5])
    policy.unpin(chunk_ids[2:5])
    assert policy.evict(10) == chunk_ids


def test_a_chunk_touched_while_pinned_comes_back_at_its_new_time(make: Make) -> None:
    policy, chunk_ids = filled(make, 6)
    policy.pin(chunk_ids)
    policy.touch(chunk_ids[::-1], range(100, 106))
    policy.unpin(chunk_ids)
    assert policy.evict(6) == chunk_ids[::-1]


def test_a_batch_may_be_touched_head_first_or_tail_first(make: Make) -> None:
    for step in (1, -1):
        policy, chunk_ids = filled(make, 6)
        policy.touch(chunk_ids[::step], range(106, 100, -1)[::step])
        assert policy.evict(6) == chunk_ids[::-1]


def test_a_late_touch_does_not_make_a_chunk_older(make: Make) -> None:
    policy, chunk_ids = filled(make, 3)
    policy.touch(chunk_ids, [10, 30, 20])
    policy.touch(chunk_ids, [9, 8, 7])
    assert policy.evict(3) == [chunk_ids[0], chunk_ids[2], chunk_ids[1]]


def test_excused_chunks_stay_where_they_are(make: Make) -> None:
    policy, chunk_ids = filled(make, 300)
    excused = set(chunk_ids[:150:2])
    assert policy.evict(300, lambda chunk_id: chunk_id not in excused) == [
        chunk_id for chunk_id in chunk_ids if chunk_id not in excused
    ]
    policy.check_integrity()
    assert policy.evict(300) == chunk_ids[:150:2]


def test_who_is_told_to_look_no_further_stops_and_loses_no_chunk(make: Make) -> None:
    policy, chunk_ids = filled(make, 300)
    asked: list[ChunkId] = []

    def may_evict(chunk_id: ChunkId) -> bool | None:
        asked.append(chunk_id)
        return {0: True, 1: False}.get(len(asked) - 1)

    assert policy.evict(300, may_evict) == chunk_ids[:1]
    assert asked[:3] == chunk_ids[:3]
    assert len(asked) < 10, "it may have several lists to look at"
    policy.check_integrity()
    assert policy.evict(300) == chunk_ids[1:]


def test_a_raising_may_evict_loses_no_chunk(make: Make) -> None:
    policy, _ = filled(make, 5)

    def refuse(chunk_id: ChunkId) -> bool:
        raise OSError(chunk_id.hex())

    with pytest.raises(OSError, match="0000"):
        policy.evict(2, refuse)
    policy.check_integrity()
    assert len(policy.evict(5)) == 5


def test_evictions_never_walk_past_pinned_chunks(make: Make) -> None:
    policy, chunk_ids = filled(make, 30_100)
    policy.pin(chunk_ids[:30_000])
    asked: list[ChunkId] = []

    def may_evict(chunk_id: ChunkId) -> bool:
        asked.append(chunk_id)
        return True

    assert policy.evict(64, may_evict) == asked == chunk_ids[30_000:30_064]


def test_a_removed_chunk_is_gone_whether_pinned_or_not(make: Make) -> None:
    policy, chunk_ids = filled(make, 3)
    policy.pin(chunk_ids[:1])
    policy.remove(chunk_ids[0])
    policy.remove(chunk_ids[1])
    policy.check_integrity()
    assert (len(policy), policy.num_pinned) == (1, 0)
    assert policy.evict(3) == chunk_ids[2:]


def test_a_chunk_may_come_back_after_it_was_evicted_or_removed(make: Make) -> None:
    policy, chunk_ids = filled(make, 2)
    policy.evict(1)
    policy.remove(chunk_ids[1])
    policy.incoming(chunk_ids)
    for stamp, chunk_id in enumerate(chunk_ids, start=10):
        policy.insert(chunk_id, stamp)
    policy.check_integrity()
    assert sorted(policy.evict(2)) == chunk_ids


def test_an_announced_chunk_need_not_arrive(make: Make) -> None:
    policy, chunk_ids = filled(make, 4)
    policy.evict(2)
    for _ in range(3):
        policy.incoming(chunk_ids[:2])
        policy.check_integrity()
    assert sorted(policy.evict(4)) == chunk_ids[2:]


def test_capacity_never_evicts_by_itself(make: Make) -> None:
    policy, _ = filled(make, 8)
    policy.evict(2)
    for capacity in (3, 0, 20):
        policy.set_capacity(capacity)
        assert policy.capacity == capacity
        assert len(policy) == 6
        policy.check_integrity()
    assert len(policy.evict(8)) == 6


def test_a_policy_without_slots_still_keeps_its_books(make: Make) -> None:
    policy, chunk_ids = make(0), to_ids(range(3))
    for stamp, chunk_id in enumerate(chunk_ids):
        policy.incoming([chunk_id])
        policy.insert(chunk_id, stamp)
        assert policy.evict(1) == [chunk_id]
        policy.check_integrity()


def test_the_callers_bugs_are_found(make: Make) -> None:
    policy, chunk_ids = filled(make, 3)
    bug = (AssertionError, KeyError)
    with pytest.raises(bug):
        policy.insert(chunk_ids[0], 50)
    policy.touch(chunk_ids[:1], [51])  # wherever a second use puts it
    with pytest.raises(bug):
        policy.insert_pinned(chunk_ids[0], 52)
    policy.pin(chunk_ids[1:2])
    with pytest.raises(bug):
        policy.pin(chunk_ids[1:2])
    with pytest.raises(bug):
        policy.unpin(chunk_ids[2:])
    for call in (policy.pin, policy.unpin):
        with pytest.raises(bug):
            call(to_ids([99]))
    with pytest.raises(bug):
        policy.remove(to_ids([99])[0])
    with pytest.raises((*bug, ValueError)):
        policy.touch(chunk_ids, [60])


def test_the_coldest_are_those_that_are_evicted_next_and_they_stay(make: Make) -> None:
    policy, chunk_ids = filled(make, 400, capacity=100)
    policy.touch(chunk_ids[:200:3], range(1000, 1000 + len(chunk_ids[:200:3])))
    policy.pin(chunk_ids[1:300:7])
    for count in (0, 1, 3, 40, 150, 400):
        named = policy.coldest(count)
        assert policy.coldest(count) == named
        assert policy.evict(count) == named
    assert policy.coldest(1) == []
