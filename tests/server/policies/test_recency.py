"""The recency list: what its policies cannot see from outside."""

from __future__ import annotations

import pytest

from kvtier_server.policies.base import ChunkId
from kvtier_server.policies.recency import RecencyList


def to_ids(numbers: range) -> list[ChunkId]:
    return [ChunkId(number.to_bytes(8, "big")) for number in numbers]


def test_use_without_evictions_leaves_no_garbage_behind() -> None:
    chunks, chunk_ids = RecencyList(), to_ids(range(200))
    for stamp, chunk_id in enumerate(chunk_ids):
        chunks.add(chunk_id, stamp)
    hot, clock = chunk_ids[100:], 1_000
    for _ in range(5_000):
        chunks.touch(hot, range(clock, clock + 100))
        chunks.pin(hot)
        chunks.unpin(hot)
        clock += 1_000
    assert sum(map(len, chunks._buckets.values())) == 200
    assert len(chunks._buckets) <= 4
    assert len(chunks._buckets._order) <= 100
    assert chunks.pop_coldest(100) == chunk_ids[:100]
    chunks.check_integrity()


def test_moving_keeps_pins_and_the_later_of_the_two_stamps() -> None:
    chunks, other, (a, b, c) = RecencyList(), RecencyList(), to_ids(range(3))
    chunks.add(a, 500)
    chunks.add(b, 2, pinned=True)
    chunks.add(c, 3)
    chunks.move([a, b], [400, 600], other)
    assert (chunks.num_pinned, other.num_pinned) == (0, 1)
    other.unpin([b])
    assert other.pop_coldest(2) == [a, b]
    assert chunks.pop_coldest(2) == [c]
    chunks.check_integrity()
    other.check_integrity()


def test_one_stamp_for_two_chunks_is_refused_rather_than_losing_one() -> None:
    chunks, (a, b) = RecencyList(), to_ids(range(2))
    chunks.add(a, 7)
    with pytest.raises(AssertionError, match="stamp 7 given to two chunks"):
        chunks.add(b, 7)


def test_a_chunk_named_twice_in_a_batch_ends_at_its_later_stamp() -> None:
    chunks, (a, b) = RecencyList(), to_ids(range(2))
    chunks.add(a, 0)
    chunks.add(b, 1_000)
    chunks.touch([a, b, a, a], [1, 2_000, 2, 900])
    chunks.check_integrity()
    chunks.touch([a, b, a], [901, 3_000, 4_000])
    chunks.check_integrity()
    assert chunks.pop_coldest(2) == [b, a]
