"""The reuse filter: stored when the Nth request computes it, bounded, once per request."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_server.admission import DEFAULT_MAX_TRACKED, ReuseFilter


def to_ids(numbers: list[int] | range) -> list[bytes]:
    return [number.to_bytes(8, "big") for number in numbers]


PROMPT = to_ids([1, 2, 3])


@pytest.mark.parametrize("threshold", [-1, 0, 1])
def test_without_a_threshold_everything_is_stored_and_nothing_remembered(threshold: int) -> None:
    reuse = ReuseFilter(threshold)
    assert reuse.wanted(PROMPT) == reuse.offer(PROMPT) == [True, True, True]
    assert reuse.num_tracked == 0


def test_a_client_that_offers_only_what_its_lookup_called_wanted_gets_its_second_request_stored() -> None:
    reuse = ReuseFilter(threshold=2)
    for request, wanted in ((1, False), (2, True)):
        answers = reuse.offer(PROMPT, request)  # Lookup of missing chunks
        assert answers == [wanted] * 3
        to_store = [chunk_id for chunk_id, answer in zip(PROMPT, answers, strict=True) if answer]
        assert reuse.offer(to_store, request) == [True] * len(to_store)  # PrepareStore


def test_one_request_counts_once_however_often_it_asks() -> None:
    reuse = ReuseFilter(threshold=2)
    for _ in range(5):
        assert reuse.offer(PROMPT, request=1) == [False] * 3
    assert reuse.wanted(PROMPT) == [False] * 3


def test_interleaved_requests_count_once_each() -> None:
    reuse = ReuseFilter(threshold=3)
    for request in (1, 2, 1, 2, 2, 1):
        assert reuse.offer(PROMPT, request) == [False] * 3
    assert reuse.offer(PROMPT, request=3) == [True] * 3


def test_chunks_that_were_generated_are_first_named_by_prepare_store_and_count_there() -> None:
    reuse = ReuseFilter(threshold=2)
    generated = to_ids([7])
    reuse.offer(PROMPT, request=1)
    assert reuse.offer(generated, request=1) == [False]
    assert reuse.offer(PROMPT + generated, request=2) == [True] * 4


def test_offers_of_unknown_requests_count_each() -> None:
    reuse = ReuseFilter(threshold=2)
    assert reuse.offer(PROMPT) == [False] * 3
    assert reuse.offer(PROMPT) == [True] * 3


def test_asking_what_is_wanted_counts_nothing() -> None:
    reuse = ReuseFilter(threshold=2)
    reuse.offer(PROMPT[:1], request=1)
    for _ in range(5):
        assert reuse.wanted(PROMPT) == [False] * 3
    assert reuse.num_tracked == 1
    assert reuse.offer(PROMPT, request=2) == [True, False, False]


def test_a_chunk_once_wanted_stays_wanted() -> None:
    reuse = ReuseFilter(threshold=2)
    for request in range(2):
        reuse.offer(PROMPT, request)
    assert reuse.wanted(PROMPT) == reuse.offer(PROMPT, request=9) == [True] * 3


def test_the_least_recently_offered_chunk_is_forgotten_first() -> None:
    reuse = ReuseFilter(threshold=2, max_tracked=3)
    one, two, three, four = to_ids([1, 2, 3, 4])
    for request, chunk_id in enumerate((one, two, three, one, four)):
        reuse.offer([chunk_id], request)
    assert reuse.num_tracked == 3
    assert reuse.offer([two], request=10) == [False]
    assert reuse.wanted([one]) == [True]


def test_the_head_of_a_prompt_longer_than_the_tracker_is_what_is_remembered() -> None:
    reuse = ReuseFilter(threshold=2, max_tracked=4)
    prompt = to_ids(range(10))
    assert reuse.offer(prompt, request=1) == [False] * 10
    assert reuse.num_tracked == 4
    assert reuse.offer(prompt[:4], request=2) == [True] * 4


def test_a_tracker_that_remembers_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tracked must be at least 1, got 0"):
        ReuseFilter(2, max_tracked=0)
    assert DEFAULT_MAX_TRACKED == 64_000


@given(
    threshold=st.integers(2, 4),
    offers=st.lists(st.tuples(st.lists(st.integers(0, 6), unique=True), st.none() | st.integers(0, 4))),
)
def test_a_chunk_is_stored_from_its_nth_request_on(
    threshold: int, offers: list[tuple[list[int], int | None]]
) -> None:
    reuse = ReuseFilter(threshold)
    counts: Counter[int] = Counter()
    seen: set[tuple[int, int]] = set()
    for numbers, request in offers:
        for number in numbers:
            if request is None or (number, request) not in seen:
                counts[number] += 1
            if request is not None:
                seen.add((number, request))
        expected = [counts[number] >= threshold for number in numbers]
        assert reuse.offer(to_ids(numbers), request) == expected
        assert reuse.wanted(to_ids(numbers)) == expected
