from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_client.answers import LookupAnswer
from kvtier_client.context import ReqContext
from kvtier_client.requests import (
    Asked,
    ChunkRef,
    ChunkStatus,
    RequestState,
    SkipReason,
    SlotRef,
    max_offload_tokens,
)
from kvtier_ops.namespace import GroupFacts, NamespaceFacts

from .doubles import ManualLookup

TOKENS = 16
BLOCKS_PER_CHUNK = 2
CHUNK = TOKENS * BLOCKS_PER_CHUNK
NULL = 0


def facts(*windows: int, blocks_per_chunk: int = BLOCKS_PER_CHUNK) -> NamespaceFacts:
    return NamespaceFacts(
        model="model",
        weights_id="weights",
        kv_dtype="float32",
        hash_algorithm="sha256",
        tokens_per_hash=TOKENS,
        blocks_per_chunk=blocks_per_chunk,
        kv_cache_layout="LBHNC",
        groups=tuple(GroupFacts(TOKENS, 4096, window) for window in windows),
    )


def keys(count: int, group: int = 0) -> list[bytes]:
    return [b"%032d%04d" % (chunk, group) for chunk in range(count)]


def request(
    *counts: int, windows: Sequence[int] = (), max_lookup_tokens: int | None = None, cap: object = None
) -> RequestState:
    params = None if cap is None else {"max_offload_tokens": cap}
    return RequestState.build(
        ReqContext("r", params),
        facts(*(windows or [0] * len(counts))),
        [keys(count, group) for group, count in enumerate(counts)],
        max_lookup_tokens,
    )


def answer(state: RequestState, statuses: str, firsts: Sequence[int] = (), **options: Sequence[int]) -> None:
    """Let the daemon answer one letter a key, group after group, from these chunks on."""
    firsts = tuple(firsts) or (0,) * len(state.groups)
    counts = tuple(len(chunks.keys) - first for chunks, first in zip(state.groups, firsts, strict=True))
    pending = ManualLookup([], 9, firsts)
    pending.arrive(statuses, **options)
    state.take_answer(Asked(pending, firsts, counts, 0, 0.0, False), pending.answer())


def offered(state: RequestState, tokens: int, *tables: Sequence[int]) -> list[tuple[int, int]]:
    return [(ref.group, ref.chunk) for ref, reason in state.offer(tokens, tables, NULL) if reason is None]


def skipped(state: RequestState, tokens: int, *tables: Sequence[int]) -> list[tuple[int, SkipReason]]:
    return [(ref.chunk, reason) for ref, reason in state.offer(tokens, tables, NULL) if reason is not None]


# max_offload_tokens


@pytest.mark.parametrize("raw", [0, 1, 64, 10**12])
def test_a_plain_int_of_at_least_zero_caps_the_stored_tokens(raw: int) -> None:
    assert max_offload_tokens({"max_offload_tokens": raw}, "r") == raw


@pytest.mark.parametrize("raw", [True, False, -1, 5.0, "5", None, [5], float("nan")])
def test_anything_else_is_no_cap_and_is_warned_about_once(
    raw: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert max_offload_tokens({"max_offload_tokens": raw}, "request-5") is None

    assert len(caplog.records) == 1
    assert "request-5" in caplog.text
    assert "max_offload_tokens" in caplog.text


def test_a_missing_cap_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert max_offload_tokens(None, "r") is None
    assert max_offload_tokens({"other": 1}, "r") is None
    assert not caplog.records


# What can be loaded


def test_the_leading_run_of_pinned_chunks_can_be_loaded() -> None:
    state = request(4)
    answer(state, "HHMH")

    assert state.pinned_tokens(0) == 2 * CHUNK


def test_a_hit_that_is_not_leased_cannot_be_loaded() -> None:
    state = request(4)
    answer(state, "HHHH", leased=[0, 1])

    assert state.pinned_tokens(0) == 2 * CHUNK
    assert state.hoped_tokens(0, ChunkStatus.HIT) == 4 * CHUNK


def test_a_status_from_the_future_is_a_miss() -> None:
    state = request(2)
    pending = ManualLookup([], 9, (0,))
    asked = Asked(pending, (0,), (2,), 0, 0.0, False)
    missing = state.take_answer(
        asked, LookupAnswer([1, 77], lease_id=9, leased_runs=((0, 1),), slot_ids=[3], generations=[4])
    )

    assert missing == [ChunkRef(0, 1)]
    assert state.groups[0].pinned == [SlotRef(3, 4), None]


def test_chunks_before_the_computed_tokens_need_no_pin() -> None:
    state = request(4)
    answer(state, "MHHH")

    assert state.pinned_tokens(0) == 0
    assert state.pinned_tokens(CHUNK) == 4 * CHUNK


def test_a_chunk_in_which_the_computed_tokens_end_needs_a_pin() -> None:
    state = request(4)
    answer(state, "MHHH")

    assert state.pinned_tokens(CHUNK - TOKENS) == 0
    assert state.pinned_tokens(CHUNK + TOKENS) == 4 * CHUNK


def test_no_more_than_max_lookup_tokens_can_be_loaded() -> None:
    state = request(4, max_lookup_tokens=3 * CHUNK - 1)
    answer(state, "HHHH")

    assert state.pinned_tokens(0) == 2 * CHUNK


def test_all_groups_must_agree_on_the_prefix() -> None:
    # A window of one chunk: of the second group only the last chunk before the boundary is needed.
    state = request(4, 4, windows=(0, CHUNK))
    answer(state, "HHHH" + "MHHM")

    assert state.pinned_tokens(0) == 3 * CHUNK


def test_a_failed_chunk_misses_although_the_daemon_has_it() -> None:
    state = request(3)
    answer(state, "HHH")
    state.mark_failed([state.groups[0].keys[1]])
    assert state.pinned_tokens(0) == CHUNK

    answer(state, "HHH")
    assert state.pinned_tokens(0) == CHUNK


def test_a_chunk_that_arrives_later_extends_the_prefix() -> None:
    state = request(3)
    answer(state, "HPH")
    assert state.pinned_tokens(0) == CHUNK

    state.resolve(state.groups[0].keys[1], ChunkStatus.HIT, SlotRef(5, 1))
    assert state.pinned_tokens(0) == 3 * CHUNK


def test_what_could_be_loaded_is_worked_out_once_until_a_chunk_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worked_out = 0
    prefix = RequestState._prefix

    def counted(
        state: RequestState, present: Sequence[Sequence[object | None]], num_computed_tokens: int
    ) -> int:
        nonlocal worked_out
        worked_out += 1
        return prefix(state, present, num_computed_tokens)

    monkeypatch.setattr(RequestState, "_prefix", counted)
    state = request(4)
    answer(state, "HPUM", leased=[0])
    hopes = [(), (ChunkStatus.PENDING,), (ChunkStatus.PENDING, ChunkStatus.HIT_UNLEASED)]
    for _ in range(3):
        assert [state.hoped_tokens(0, *also) // CHUNK for also in hopes] == [1, 2, 3]
        assert state.pinned_tokens(0) == CHUNK
    assert worked_out == 3

    state.mark_failed([state.groups[0].keys[2]])
    assert [state.hoped_tokens(0, *also) // CHUNK for also in hopes] == [1, 2, 2]


def test_letting_go_of_pins_changes_what_is_known_only_where_there_are_any() -> None:
    state = request(2, 1)
    answer(state, "MHM")
    version = state.version
    assert state.drop_pins() == 9
    assert state.version > version
    assert state.pinned_tokens(0) == 0

    version = state.version
    assert state.drop_pins() == 0
    assert state.version == version


def test_a_chunk_whose_key_became_known_after_the_first_event_is_found_by_its_event() -> None:
    state = request(2, 1)
    answer(state, "PPP")
    state.resolve(state.groups[1].keys[0], ChunkStatus.MISS, None)
    state.extend(0, [b"later"])
    answer(state, "PPPM")

    state.resolve(b"later", ChunkStatus.HIT, SlotRef(5, 1))
    assert state.groups[0].pinned == [None, None, SlotRef(5, 1)]
    state.resolve(b"nobody's", ChunkStatus.HIT, SlotRef(6, 1))
    assert state.groups[1].pinned == [None]


def test_the_events_of_a_long_prompt_do_not_scan_its_keys_each() -> None:
    compared = 0

    class CountedKey(bytes):
        __hash__ = bytes.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return super().__eq__(other)

    num_keys = 256
    state = request(0)
    state.extend(0, [CountedKey(key) for key in keys(num_keys)])
    answer(state, "P" * num_keys)
    for chunk, key in enumerate(keys(num_keys)):
        state.resolve(CountedKey(key), ChunkStatus.HIT, SlotRef(chunk, 1))

    assert state.pinned_tokens(0) == num_keys * CHUNK
    assert compared <= 8 * num_keys


def test_more_keys_than_one_call_takes_are_cut_to_the_leading_tokens_of_all_groups() -> None:
    state = request(100, 100)

    assert state.ask_range(0, max_keys=40) == [(0, 20), (0, 20)]
    assert state.ask_range(50 * CHUNK, max_keys=40) == [(50, 70), (50, 70)]
    assert state.ask_range(90 * CHUNK, max_keys=40) == [(90, 100), (90, 100)]


@given(st.data())
def test_asking_stays_within_the_limit_and_begins_at_the_computed_tokens(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    computed = data.draw(st.integers(0, 70 * CHUNK))
    max_keys = data.draw(st.integers(1, 100))
    state = request(*counts)

    ranges = state.ask_range(computed, max_keys)

    assert sum(end - first for first, end in ranges) <= max_keys
    for (first, end), count in zip(ranges, counts, strict=True):
        assert first == min(computed // CHUNK, count)
        assert first <= end <= count


# What to store


def test_each_chunk_is_offered_once_when_it_is_full() -> None:
    state = request(4)
    table = list(range(1, 9))

    assert offered(state, CHUNK + TOKENS, table) == [(0, 0)]
    assert offered(state, CHUNK + TOKENS, table) == []
    assert offered(state, 3 * CHUNK, table) == [(0, 1), (0, 2)]
    assert offered(state, 9 * CHUNK, table) == [(0, 3)]


def test_keys_learned_later_are_offered_later() -> None:
    state = request(1)
    assert offered(state, 3 * CHUNK, [1, 2, 3, 4, 5, 6]) == [(0, 0)]

    state.extend(0, keys(3)[1:])
    assert offered(state, 3 * CHUNK, [1, 2, 3, 4, 5, 6]) == [(0, 1), (0, 2)]


def test_the_daemons_answer_says_what_is_worth_storing() -> None:
    state = request(6)
    answer(state, "HUPMMM", unwanted=[4])

    assert skipped(state, 6 * CHUNK, list(range(1, 13))) == [
        (0, SkipReason.RESIDENT),
        (1, SkipReason.RESIDENT),
        (2, SkipReason.RESIDENT),
        (4, SkipReason.UNWANTED),
    ]


def test_nothing_beyond_max_offload_tokens_is_stored() -> None:
    state = request(4, cap=2 * CHUNK + TOKENS)

    assert offered(state, 3 * CHUNK, list(range(1, 9))) == [(0, 0), (0, 1)]
    assert skipped(state, 4 * CHUNK, list(range(1, 9))) == [(3, SkipReason.CAPPED)]


def test_a_cap_of_zero_stores_nothing() -> None:
    assert offered(request(2, cap=0), 2 * CHUNK, [1, 2, 3, 4]) == []


def test_a_chunk_with_a_null_block_is_not_stored() -> None:
    state = request(3, windows=(CHUNK,))

    assert skipped(state, 3 * CHUNK, [NULL, NULL, NULL, 4, 5, 6]) == [
        (0, SkipReason.INCOMPLETE),
        (1, SkipReason.INCOMPLETE),
    ]


def test_a_chunk_whose_blocks_are_not_all_in_the_table_is_not_stored() -> None:
    assert skipped(request(2), 2 * CHUNK, [1, 2, 3]) == [(1, SkipReason.INCOMPLETE)]


def test_a_failed_load_is_stored_again_once_it_is_computed() -> None:
    state = request(3)
    answer(state, "HHM")
    assert offered(state, 3 * CHUNK, [1, 2, 3, 4, 5, 6]) == [(0, 2)]

    state.mark_failed([state.groups[0].keys[1]])
    assert offered(state, 3 * CHUNK, [1, 2, 3, 4, 5, 6]) == [(0, 1), (0, 2)]


@given(st.data())
def test_over_any_steps_every_full_chunk_is_decided_on_exactly_once(data: st.DataObject) -> None:
    total = data.draw(st.integers(0, 12))
    cap = data.draw(st.none() | st.integers(0, 14 * CHUNK))
    state = request(total, total, windows=(0, 3 * TOKENS), cap=cap)
    steps = sorted(data.draw(st.lists(st.integers(0, 13 * CHUNK), max_size=8)))
    decided: list[ChunkRef] = []
    for tokens in steps:
        # What a sliding window leaves: blocks that the next token cannot see are null.
        blocks = tokens // TOKENS
        first_seen = max(0, tokens - 3 * TOKENS + 1) // TOKENS
        full = list(range(1, blocks + 1))
        window = [NULL] * first_seen + full[first_seen:]
        for ref, reason in state.offer(tokens, [full, window], NULL):
            decided.append(ref)
            if reason is None:
                table = window if ref.group else full
                assert NULL not in state.blocks_of(ref, table)
                assert len(state.blocks_of(ref, table)) == BLOCKS_PER_CHUNK
                assert cap is None or (ref.chunk + 1) * CHUNK <= cap
    last = min(steps[-1] // CHUNK, total) if steps else 0
    assert sorted(decided) == [ChunkRef(group, chunk) for group in (0, 1) for chunk in range(last)]
