"""What goes down to lower tiers and comes up again, in stories."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kvtier_server.core import books, promotions
from kvtier_server.core.books import LookupStatus
from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.limits import Limits
from kvtier_server.core.lower_tiers import CascadeWhen, TierRules
from kvtier_server.core.namespaces import Namespace
from kvtier_server.core.promotions import MAX_PROBES, SLICE_PROMOTIONS
from kvtier_server.primary.index import KeySpace
from kvtier_server.secondary.base import JobResult, Medium, Outcome, TierJob

from .engine import HIT, HIT_UNLEASED, MISS, PENDING, Engine, facts, to_key, to_keys
from .rig import Rig

POOL_UNITS = 64


@pytest.fixture
def rig() -> Rig:
    return Rig(POOL_UNITS, num_tiers=1)


def store_and_evict(rig: Rig, engine: Engine, numbers: range) -> None:
    """Have chunks stored, written below, and pushed out of the pool by others, which go nowhere."""
    engine.store(numbers, "before")
    engine.finish("before")
    rig.move()
    push_out(rig, engine)
    assert engine.hits(numbers) == []


def push_out(rig: Rig, engine: Engine) -> None:
    for tier in rig.tiers:
        tier.refuses = True
    engine.fill(range(1_000, 1_000 + POOL_UNITS))
    rig.pump()
    for tier in rig.tiers:
        tier.refuses = False


def resolved(rig: Rig) -> dict[bytes, int]:
    return {notice.key: notice.status for notice in rig.notices("resolved")}


def test_what_is_stored_goes_down_and_comes_up_pinned_for_whoever_waits(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(4))
    lease = engine.new_lease_id()
    answer = engine.lookup(to_keys(range(4)), lease=lease, wait_s=1)
    assert answer.statuses == [PENDING] * 4
    rig.move()
    notices = rig.notices("resolved")
    assert [notice.status for notice in notices] == [HIT] * 4
    assert {notice.lease_id for notice in notices} == {lease}
    assert engine.hits(range(4)) == [0, 1, 2, 3]
    assert rig.core.books.leases.get(engine.scheduler.instance, lease) is not None
    loaded = engine.load(range(4))
    assert None not in loaded
    rig.check()
    engine.finish()
    rig.tick()
    rig.assert_nothing_is_held()


def test_a_prefix_that_is_partly_in_the_pool_is_completed_from_below(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(4))
    engine.store([0, 1], "again")
    answer = engine.lookup(to_keys(range(6)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [HIT, HIT, PENDING, PENDING, MISS, MISS]
    assert answer.leased == [(0, 2)]


def test_what_lies_behind_a_gap_stays_below(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(4))
    rig.tiers[0].lose((engine.space, to_key(1)))
    answer = engine.lookup(to_keys(range(4)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING, MISS, MISS, MISS]


def test_who_does_not_wait_or_does_not_lease_brings_nothing_up(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(4))
    assert engine.lookup(to_keys(range(4)), lease=engine.new_lease_id()).statuses == [MISS] * 4
    assert engine.lookup(to_keys(range(4)), wait_s=1).statuses == [MISS] * 4
    assert not rig.tiers[0].running


def test_two_requests_wait_for_one_promotion(rig: Rig) -> None:
    engine, other = rig.engine("one"), rig.engine("two")
    store_and_evict(rig, engine, range(2))
    for each in (engine, other):
        answer = each.lookup(to_keys(range(2)), lease=each.new_lease_id(), wait_s=1)
        assert answer.statuses == [PENDING] * 2
    assert len(rig.tiers[0].running) == 1
    rig.move()
    assert len(rig.notices("resolved")) == 4


SHARE = POOL_UNITS // 8


def loading(rig: Rig) -> list[bytes]:
    return [chunk.key for running in rig.tiers[0].running for chunk in running.job.chunks]


def test_promotions_take_no_more_than_their_share_of_the_pool_and_the_rest_wait_their_turn(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(20))
    answer = engine.lookup(to_keys(range(20)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * 20
    assert loading(rig) == to_keys(range(SHARE))
    assert rig.core.books.primary.slabs.classes[4096].num_reserved == SHARE
    rig.move()
    assert resolved(rig) == dict.fromkeys(to_keys(range(20)), HIT)


def test_a_long_prompt_begins_to_come_up_in_slices_and_all_of_it_is_waited_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotions, "SLICE_PROMOTIONS", 3)
    engine = rig.engine()
    store_and_evict(rig, engine, range(20))
    answer = engine.lookup(to_keys(range(20)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * 20
    begun: list[int] = []
    while rig.core.below.is_behind:
        rig.check()
        begun.append(len(loading(rig)))
        rig.core.below.pump()
    assert begun == [3, 6]
    assert loading(rig) == to_keys(range(SHARE))
    rig.check()
    rig.move()
    assert resolved(rig) == dict.fromkeys(to_keys(range(20)), HIT)


def test_what_comes_up_in_slices_evicts_nothing_that_the_same_request_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(promotions, "SLICE_PROMOTIONS", 2)
    rig = Rig(POOL_UNITS, num_tiers=1, limits=Limits(promotion_share=1.0))
    engine = rig.engine()
    store_and_evict(rig, engine, range(8))
    engine.store(range(100, 100 + POOL_UNITS - 4))
    engine.lookup(to_keys(range(8)), lease=engine.new_lease_id(), wait_s=1)
    rig.pump()
    assert engine.hits(range(100, 100 + POOL_UNITS)) == list(range(100, 100 + POOL_UNITS - 4))
    rig.check()


def test_how_a_chunk_lies_in_its_slot_is_looked_up_once_for_all_keys_of_a_group(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(SHARE))
    asked = []
    digest = Namespace.geometry_digest

    def counted(namespace: Namespace) -> bytes | None:
        asked.append(namespace)
        return digest(namespace)

    monkeypatch.setattr(Namespace, "geometry_digest", counted)
    engine.lookup(to_keys(range(SHARE)), lease=engine.new_lease_id(), wait_s=1)
    assert len(loading(rig)) == SHARE
    assert len(asked) == 1


def test_what_waits_for_a_slot_and_is_not_waited_for_any_more_is_not_read(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(20))
    engine.lookup(to_keys(range(20)), "gone", lease=engine.new_lease_id(), wait_s=0.5)
    engine.lookup(to_keys(range(15, 20)), "stays", lease=engine.new_lease_id(), wait_s=1.5)
    rig.tick(1)
    rig.move()
    assert engine.hits(range(SHARE, 20)) == list(range(15, 20))
    assert rig.core.below.tiers[0].counts["promotion:late"] == 15 - SHARE
    rig.check()


@pytest.mark.parametrize("num_spare", [MAX_PROBES, 0])
def test_of_a_tier_whose_pace_nobody_knows_only_so_many_chunks_are_waited_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, num_spare: int
) -> None:
    monkeypatch.setattr(promotions, "MAX_QUEUED_UNPACED", 5)
    monkeypatch.setattr(promotions, "MAX_PROBES", num_spare)
    engine = rig.engine()
    store_and_evict(rig, engine, range(40))
    answer = engine.lookup(to_keys(range(30)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * (SHARE + 5) + [MISS] * (30 - SHARE - 5)
    assert rig.core.below.tiers[0].counts["promotion:no_slot"] == 30 - SHARE - 5
    rig.move()
    answer = engine.lookup(to_keys(range(30, 40)), "more", lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * 10
    rig.check()


class Unwalked(dict[Any, Any]):
    """What may be looked things up in, but not walked over."""

    def items(self) -> Any:
        raise AssertionError("all that wait were looked at, and none was due")

    __iter__ = keys = values = items


def test_a_tick_looks_at_nothing_that_waits_and_is_not_due(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(20))
    engine.lookup(to_keys(range(20)), "long", lease=engine.new_lease_id(), wait_s=2)
    engine.lookup(to_keys([0, 1]), "short", lease=engine.new_lease_id(), wait_s=0.5)
    books = rig.core.books
    waiters = books._waiters
    asked: list[bytes] = []
    is_awaited = books.is_awaited

    def counted(space: KeySpace, key: bytes) -> bool:
        asked.append(key)
        return is_awaited(space, key)

    monkeypatch.setattr(books, "is_awaited", counted)
    books._waiters = Unwalked(waiters)
    rig.tick(1)
    assert resolved(rig) == dict.fromkeys(to_keys([0, 1]), MISS), "once, to the one that waited shorter"
    assert asked == []
    rig.move()
    assert resolved(rig) == dict.fromkeys(to_keys(range(20)), HIT)


def test_waits_that_end_together_end_in_slices_and_each_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "STEP_WAITS", 1)
    monkeypatch.setattr(books, "SLICE_ITEMS", 1)
    engine = rig.engine()
    store_and_evict(rig, engine, range(6))
    for request in ("stays", "finishes"):
        engine.lookup(to_keys(range(6)), request, lease=engine.new_lease_id(), wait_s=1)
    rig.tiers[0].finish_all()  # is heard of between two slices
    rig.tick(1)
    first = rig.notices("resolved")
    assert 0 < len(first) < 12
    engine.finish("finishes")
    rig.core.below.collect(rig.clock.now_ns)
    while rig.core.books.settle():
        pass
    notices = [*first, *rig.notices("resolved")]
    staying = [notice for notice in notices if notice.lease_id == notices[0].lease_id]
    assert sorted(notice.key for notice in staying) == to_keys(range(6))
    assert {notice.status for notice in staying} == {HIT, MISS}
    rig.check()
    engine.finish("stays")
    rig.tick()
    rig.pump()
    rig.assert_nothing_is_held()


def test_loads_and_probes_that_take_too_long_are_given_up_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotions, "SLICE_ENDS", 2)
    rig = Rig(POOL_UNITS, num_tiers=1, shared_tiers=True)
    engine = rig.engine()
    store_and_evict(rig, engine, range(5))
    engine.lookup(to_keys(range(5)), "loads", lease=engine.new_lease_id(), wait_s=1)
    coming = rig.core.below.promotions
    engine.lookup(to_keys(range(100, 105)), "probes", lease=engine.new_lease_id(), wait_s=1)
    left = []
    for seconds in (1, 0, 0, 60, 0, 0):
        rig.tick(seconds)
        rig.check()
        left.append(coming.num_coming(lambda space: True))
    assert left == [8, 6, 5, 3, 1, 0]
    assert coming.probes_end_ns is None
    rig.move()
    engine.finish("loads")
    engine.finish("probes")
    rig.tick()
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("slice_items", [SLICE_PROMOTIONS, 3])
def test_what_a_slow_tier_would_not_get_to_in_time_is_a_miss_at_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, slice_items: int
) -> None:
    monkeypatch.setattr(promotions, "SLICE_PROMOTIONS", slice_items)
    engine = rig.engine()
    store_and_evict(rig, engine, range(40))
    engine.lookup(to_keys(range(1)), "first", lease=engine.new_lease_id(), wait_s=5)
    rig.tick(0.1)  # seconds for one chunk
    rig.move()
    answer = engine.lookup(to_keys(range(1, 30)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses[: SHARE + 2] == [PENDING] * (SHARE + 2)
    assert answer.statuses[SHARE + 3 :] == [MISS] * (29 - SHARE - 3)
    rig.move()


@pytest.mark.parametrize("slice_items", [SLICE_PROMOTIONS, 3])
def test_a_tier_that_refuses_leaves_nobody_waiting_for_a_turn(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, slice_items: int
) -> None:
    monkeypatch.setattr(promotions, "SLICE_PROMOTIONS", slice_items)
    engine = rig.engine()
    store_and_evict(rig, engine, range(20))
    rig.tiers[0].refuses = True
    answer = engine.lookup(to_keys(range(20)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [MISS] * 20
    rig.check()


def test_a_chunk_larger_than_the_share_comes_up_too_one_at_a_time() -> None:
    rig = Rig(4, num_tiers=1)
    engine = rig.engine()
    engine.store(range(2), "before")
    engine.finish("before")
    rig.move()
    rig.tiers[0].refuses = True
    engine.fill(range(1_000, 1_004))
    rig.pump()
    rig.tiers[0].refuses = False
    assert engine.lookup(to_keys(range(2)), lease=engine.new_lease_id(), wait_s=1).statuses == [PENDING] * 2
    assert loading(rig) == to_keys(range(1))
    rig.move()
    assert resolved(rig) == dict.fromkeys(to_keys(range(2)), HIT)


def test_what_came_up_is_pinned(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(4))
    engine.lookup(to_keys(range(4)), lease=engine.new_lease_id(), wait_s=1)
    rig.move()
    answer = engine.lookup(to_keys(range(16)), "r2", lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [HIT] * 4 + [MISS] * 12


@pytest.mark.parametrize("how", ["failed", "corrupt", "missing"])
def test_a_promotion_that_fails_is_a_miss_and_gives_its_slot_back(rig: Rig, how: str) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(2))
    engine.lookup(to_keys(range(2)), lease=engine.new_lease_id(), wait_s=1)
    rig.move(how)
    assert resolved(rig) == dict.fromkeys(to_keys(range(2)), MISS)
    assert rig.core.below.tiers[0].counts[f"promotion:{how}"] == 2
    engine.finish()
    rig.tick()
    rig.assert_nothing_is_held()
    assert engine.store(range(2), "computed") == [StoreVerdict.GRANTED] * 2


def test_of_a_promotion_that_fails_in_part_the_rest_arrives(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(3))
    engine.lookup(to_keys(range(3)), lease=engine.new_lease_id(), wait_s=1)
    for how in ("ok", "ok", "failed", "ok", "ok"):
        rig.tiers[0].step(0, how)
    rig.core.below.collect(rig.clock.now_ns)
    assert resolved(rig) == {to_key(0): HIT, to_key(1): MISS, to_key(2): HIT}
    rig.check()


def test_where_one_tier_fails_the_next_one_is_asked() -> None:
    rig = Rig(POOL_UNITS, num_tiers=2)
    engine = rig.engine()
    store_and_evict(rig, engine, range(2))
    engine.lookup(to_keys(range(2)), lease=engine.new_lease_id(), wait_s=1)
    rig.tiers[0].finish_all("corrupt")
    rig.core.below.collect(rig.clock.now_ns)
    assert resolved(rig) == {}, "they still wait"
    rig.move()
    assert resolved(rig) == dict.fromkeys(to_keys(range(2)), HIT)


def test_a_tier_that_takes_no_promotion_is_passed_over_once() -> None:
    rig = Rig(POOL_UNITS, num_tiers=2)
    engine = rig.engine()
    store_and_evict(rig, engine, range(2))
    rig.tiers[0].refuses = True
    engine.lookup(to_keys(range(2)), lease=engine.new_lease_id(), wait_s=1)
    assert sum(len(running.job.chunks) for running in rig.tiers[1].running) == 2
    rig.move()
    assert resolved(rig) == dict.fromkeys(to_keys(range(2)), HIT)


def test_a_request_waits_for_a_probe_no_longer_than_for_that() -> None:
    rig = Rig(POOL_UNITS, num_tiers=1, shared_tiers=True)
    engine = rig.engine()
    engine.lookup(to_keys(range(2)), lease=engine.new_lease_id(), wait_s=1)
    rig.tick(0.01)
    assert resolved(rig) == {}
    rig.tick(0.01)
    assert resolved(rig) == dict.fromkeys(to_keys(range(2)), MISS)
    assert rig.core.below.promotions.probes_end_ns is None
    assert engine.store(range(2), "computed") == [StoreVerdict.GRANTED] * 2, "as if nobody had asked"
    rig.move()
    assert engine.hits(range(2)) == [0, 1]
    engine.finish("computed")
    engine.finish()
    rig.tick()
    rig.assert_nothing_is_held()


def test_what_is_only_asked_for_evicts_nothing() -> None:
    rig = Rig(1_024, num_tiers=1, shared_tiers=True)
    engine = rig.engine()
    engine.fill(range(1_000, 2_024))
    rig.move()
    before = len(rig.resident())
    answer = engine.lookup(to_keys(range(500, 900)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * MAX_PROBES + [MISS] * (400 - MAX_PROBES)
    rig.move()
    assert len(rig.resident()) == before
    assert set(resolved(rig).values()) == {MISS}


def test_what_no_lower_tier_holds_is_evicted_last(rig: Rig) -> None:
    engine = rig.engine()
    for tier in rig.tiers:
        tier.refuses = True
    engine.store([0], "alone")
    engine.finish("alone")
    rig.pump()
    for tier in rig.tiers:
        tier.refuses = False
    engine.fill(range(100, 100 + POOL_UNITS - 1))
    rig.move()
    engine.fill(range(200, 210))
    assert engine.hits([0]) == [0], "it was used longest ago, and would be lost"
    assert engine.hits(range(100, 110)) == []


def test_a_use_of_what_the_pool_has_counts_below_too(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(3))
    rig.move()
    engine.lookup(to_keys(range(2)), "again", lease=engine.new_lease_id(), wait_s=1)
    rig.pump()
    _, keys, stamps = rig.tiers[0].touched[-1]
    assert list(keys) == to_keys(range(2))
    assert stamps[0] > stamps[1], "the head is to stay longest"


def test_a_lookup_that_has_waited_long_enough_misses_and_the_slot_is_free_when_the_io_is_over(
    rig: Rig,
) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(1))
    engine.lookup(to_keys(range(1)), lease=engine.new_lease_id(), wait_s=1)
    (running,) = rig.tiers[0].running
    rig.tiers[0].step()
    rig.tick(2)
    assert resolved(rig) == {to_key(0): MISS}
    assert engine.statuses([to_key(0)]) == [PENDING], "it is still being written"
    slots = {slot.slot_id for slot in engine.credits(POOL_UNITS)}
    assert running.job.chunks[0].offset // 4096 not in slots
    rig.check()
    rig.move()
    assert engine.statuses([to_key(0)]) == [HIT], "what comes late is kept"


def test_an_engine_that_dies_while_it_waits_leaves_the_chunk_to_the_others(rig: Rig) -> None:
    engine, other = rig.engine("one"), rig.engine("two")
    store_and_evict(rig, engine, range(1))
    engine.lookup(to_keys(range(1)), lease=engine.new_lease_id(), wait_s=1)
    engine.die()
    rig.tick()
    rig.move()
    assert other.hits(range(1)) == [0]
    rig.tick()
    rig.assert_nothing_is_held()


def test_a_chunk_that_is_stored_while_it_comes_up_is_kept_once(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(1))
    (credit,) = engine.credits(1)
    engine.lookup(to_keys(range(1)), lease=engine.new_lease_id(), wait_s=1)
    assert engine.prepare_store(to_keys(range(1)), "r2").verdicts == [StoreVerdict.PENDING]
    named = type(credit)(credit.slot_id, credit.generation, to_key(0))
    engine.announce([named])
    engine.write_and_report([named])
    assert resolved(rig) == {to_key(0): HIT}
    rig.move()
    assert resolved(rig) == {}
    assert engine.hits(range(1)) == [0]
    engine.finish()
    rig.tick()
    rig.assert_nothing_is_held()


def test_only_tiers_that_the_request_allows_are_asked(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(1))
    rig.tiers[0].medium = Medium.STORAGE
    for entries, status in (
        ([], MISS),
        ([{"medium": "CPU"}], MISS),
        ([{"medium": "STORAGE", "locality": "REMOTE"}], MISS),
        ([{"medium": "CPU"}, {"locality": "LOCAL"}], PENDING),
    ):
        params = json.dumps({"kv_load_tiers": entries}).encode()
        rig.core.books.request(engine.scheduler.instance, f"r{entries}", params)
        answer = engine.lookup([to_key(0)], f"r{entries}", lease=engine.new_lease_id(), wait_s=1)
        assert answer.statuses == [status], entries


@pytest.mark.parametrize("params", [b"", b"nonsense", b"[]", b'{"kv_load_tiers": 3}', b"[" * 60_000])
def test_a_filter_that_cannot_be_read_is_none(rig: Rig, params: bytes) -> None:
    request = rig.core.books.request(rig.engine().scheduler.instance, "r", params)
    assert request.may_load_from(Medium.STORAGE, rig.tiers[0].locality)


def test_what_is_being_written_below_is_not_evicted_and_what_waits_may_be() -> None:
    rig = Rig(POOL_UNITS, rules=[TierRules("disk", max_running_bytes=2 * 4096)])
    engine = rig.engine()
    engine.store(range(4))
    engine.finish()
    rig.pump()
    engine.fill(range(100, 100 + POOL_UNITS))
    assert len(set(engine.hits(range(4)))) == 2
    rig.check()
    rig.move()
    assert rig.core.below.tiers[0].counts["dropped:evicted"] >= 2
    assert sorted(key for _, key in rig.tiers[0].stored if key < to_key(4)) == to_keys(range(2))


def test_a_queue_that_is_full_drops_what_comes_and_says_so() -> None:
    rig = Rig(POOL_UNITS, rules=[TierRules("disk", max_queued_bytes=3 * 4096)])
    engine = rig.engine()
    engine.store(range(5))
    assert rig.core.below.tiers[0].counts["dropped:queue_full"] == 2
    rig.move()
    assert sorted(key for _, key in rig.tiers[0].stored) == to_keys(range(3))


def test_a_tier_that_is_read_only_is_given_nothing() -> None:
    rig = Rig(POOL_UNITS, rules=[TierRules("archive", cascade=CascadeWhen.NEVER)])
    engine = rig.engine()
    engine.store(range(4))
    rig.move()
    assert not rig.tiers[0].stored


def test_a_chunk_whose_bytes_went_bad_in_the_pool_is_not_passed_on(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(1))
    chunk = next(iter(rig.core.books.primary.by_slot.values()))
    rig.flip(chunk.slot_id, chunk.generation)
    rig.move()
    assert not rig.tiers[0].stored
    assert engine.hits(range(1)) == []
    assert rig.core.books.counts["checksum:corrupt"] == 1


def test_of_a_tier_that_others_store_into_a_prompt_waits_for_one_probe() -> None:
    rig = Rig(POOL_UNITS, num_tiers=1, shared_tiers=True)
    engine = rig.engine()
    store_and_evict(rig, engine, range(3))
    rig.tiers[0].hidden = {(engine.space, to_key(number)) for number in range(3)}
    answer = engine.lookup(to_keys(range(5)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * 5
    rig.move()
    assert resolved(rig) == {key: HIT if key < to_key(3) else MISS for key in to_keys(range(5))}


def test_a_load_that_hangs_is_waited_for_once_and_its_slot_is_the_tiers_until_it_ends(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(2))
    engine.lookup(to_keys(range(2)), lease=engine.new_lease_id(), wait_s=2)
    rig.tiers[0].step()
    rig.tick(2.1)
    assert engine.statuses(to_keys(range(2))) == [PENDING] * 2, "it may still come for others"
    rig.tick(8)
    assert resolved(rig) == dict.fromkeys(to_keys(range(2)), MISS)
    rig.check()
    assert rig.core.below.tiers[0].counts["promotion:late"] == 2
    rig.tiers[0].stored.clear()
    assert (
        engine.lookup(to_keys(range(2)), "r2", lease=engine.new_lease_id(), wait_s=1).statuses == [MISS] * 2
    )
    assert engine.store(range(2), "computed") == [StoreVerdict.GRANTED] * 2
    held = sum(size_class.num_reserved for size_class in rig.core.books.primary.slabs.classes.values())
    assert held == 2, "the tier may still be writing them"
    rig.move("failed")
    engine.finish()
    rig.tick()
    rig.assert_nothing_is_held()
    assert engine.hits(range(2)) == [0, 1]


def test_what_a_load_brings_too_late_is_dropped_whoever_is_left(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(1))
    engine.lookup(to_keys(range(1)), lease=engine.new_lease_id(), wait_s=2)
    rig.tick(10.1)
    engine.die()
    rig.tick()
    rig.move()
    rig.check()
    assert all(to_key(0) not in space.chunks for space in rig.core.books.primary.spaces)


def test_a_daemon_that_is_killed_while_a_chunk_comes_up_has_its_slot_back_at_once(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(1))
    engine.lookup(to_keys(range(1)), lease=engine.new_lease_id(), wait_s=1)
    rig.tiers[0].step()
    rig.restart_daemon()
    assert not len(rig.core.books.quarantine)
    rig.check()


def test_events_name_the_tier_and_the_cause(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(1))
    engine.lookup(to_keys(range(1)), lease=engine.new_lease_id(), wait_s=1)
    rig.move()
    rig.tiers[0].lose((engine.space, to_key(0)), "clear")
    rig.core.below.collect(rig.clock.now_ns)
    events = rig.core.books.events.since(1)
    assert events is not None
    told = [(event.kind, event.tier, event.reason) for event in events if to_key(0) in event.keys]
    assert told == [
        ("stored", "primary", "store"),
        ("stored", "tier0", "cascade"),
        ("removed", "primary", "evict"),
        ("stored", "primary", "promotion"),
        ("removed", "tier0", "clear"),
    ]


def test_equal_keys_of_another_layout_are_other_chunks(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(1))
    name = (engine.space, to_key(0))
    cells, checksums, _ = rig.tiers[0].stored[name]
    rig.tiers[0].stored[name] = (cells, checksums, b"other")
    engine.lookup(to_keys(range(1)), lease=engine.new_lease_id(), wait_s=1)
    rig.move()
    assert resolved(rig) == {to_key(0): LookupStatus.MISS}


def test_groups_of_a_hybrid_model_come_up_together(rig: Rig) -> None:
    engine = rig.engine("hybrid", facts("h", (2, 1), windows=(0, 32)))
    for group in (0, 1):
        engine.store(range(3), "before", group=group)
    engine.finish("before")
    rig.move()
    push_out(rig, rig.engine("small"))
    push_out(rig, rig.engine("large", facts("large", (2,))))
    keys = to_keys(range(3)) + to_keys(range(3), 1)
    answer = engine.lookup(keys, lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * 3 + [MISS, PENDING, PENDING], "the window needs the last two"
    rig.move()
    assert set(resolved(rig).values()) == {HIT}
    rig.check()


def test_a_store_tells_when_its_chunks_were_used_and_of_a_prompt_the_head_last(rig: Rig) -> None:
    engine = rig.engine()
    for request, numbers in (("older", range(4)), ("newer", range(10, 14))):
        engine.lookup(to_keys(numbers), request)
        engine.store(numbers, request)
    rig.pump()
    stamp_of = {chunk.key: chunk.stamp for running in rig.tiers[0].running for chunk in running.job.chunks}
    in_order = sorted(stamp_of, key=lambda key: -stamp_of[key])
    assert in_order == to_keys([10, 11, 12, 13, 0, 1, 2, 3])


def stored_below(rig: Rig) -> list[bytes]:
    return sorted(key for _, key in rig.tiers[0].stored)


def test_with_after_n_uses_a_chunk_goes_down_when_that_many_other_requests_have_used_it() -> None:
    rig = Rig(POOL_UNITS, rules=[TierRules("disk", cascade=CascadeWhen.USED, min_uses=2)])
    engine = rig.engine()
    engine.store(range(4), "first")
    for request in ("first", "second", "second"):
        engine.lookup(to_keys(range(4)), request, lease=engine.new_lease_id())
        rig.move()
    assert stored_below(rig) == [], "one other request has used them, whatever it asks how often"
    engine.lookup(to_keys(range(2)), "third", lease=engine.new_lease_id())
    rig.move()
    assert stored_below(rig) == to_keys(range(2))


def test_a_chunk_that_a_tier_could_not_take_is_offered_with_its_next_use() -> None:
    rig = Rig(POOL_UNITS, rules=[TierRules("disk", cascade=CascadeWhen.USED)])
    engine = rig.engine()
    engine.store(range(2), "first")
    for request, how in (("second", "failed"), ("third", "ok")):
        engine.lookup(to_keys(range(2)), request, lease=engine.new_lease_id())
        rig.move(how)
        assert stored_below(rig) == ([] if how == "failed" else to_keys(range(2)))


def test_what_came_up_was_used() -> None:
    rig = Rig(POOL_UNITS, rules=[TierRules("near"), TierRules("far", cascade=CascadeWhen.USED)])
    engine = rig.engine()
    store_and_evict(rig, engine, range(2))
    assert not rig.tiers[1].stored
    engine.lookup(to_keys(range(2)), "again", lease=engine.new_lease_id(), wait_s=1)
    rig.move()
    assert sorted(key for _, key in rig.tiers[1].stored) == to_keys(range(2))


CLEAN = POOL_UNITS // 4


def cold_rig() -> Rig:
    return Rig(POOL_UNITS, rules=[TierRules("disk", cascade=CascadeWhen.COLD, clean_share=0.25)])


def test_before_eviction_nothing_goes_down_while_the_pool_has_room() -> None:
    rig = cold_rig()
    engine = rig.engine()
    engine.fill(range(POOL_UNITS - CLEAN))
    rig.move()
    assert not rig.tiers[0].stored


def test_before_eviction_the_coldest_go_down_so_that_a_burst_of_stores_loses_none_of_them() -> None:
    rig = cold_rig()
    engine = rig.engine()
    for number in range(POOL_UNITS):
        engine.fill([number])
        rig.move()
    assert stored_below(rig) == to_keys(range(CLEAN))
    for tier in rig.tiers:
        tier.refuses = True
    engine.fill(range(1_000, 1_000 + CLEAN))
    assert engine.hits(range(POOL_UNITS)) == list(range(CLEAN, POOL_UNITS)), "only those went"
    rig.check()


def test_before_eviction_a_chunk_is_offered_again_when_its_io_failed_or_the_tier_let_it_go() -> None:
    rig = cold_rig()
    engine = rig.engine()
    engine.fill(range(POOL_UNITS))
    rig.move("failed")
    assert not rig.tiers[0].stored
    engine.fill([1_000])
    rig.move()
    stored = stored_below(rig)
    assert stored == to_keys(range(1, CLEAN + 1)), "chunk 0 went for the newcomer, and was lost"
    rig.tiers[0].lose((engine.space, to_key(5)))
    engine.fill([1_001])
    rig.move()
    assert stored_below(rig) == [key for key in to_keys(range(1, CLEAN + 2)) if key != to_key(5)]
    engine.fill([1_002])
    rig.move()
    assert stored_below(rig) == to_keys(range(1, CLEAN + 3)), "nothing that goes next is without a copy"


def test_what_is_below_and_could_not_be_pinned_is_worth_asking_for_again(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(40))
    most = POOL_UNITS // 2
    answer = engine.lookup(to_keys(range(50)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * most + [HIT_UNLEASED] * (40 - most) + [MISS] * 10
    assert set(answer.unwanted).isdisjoint(range(most, 40)), "it need not be stored either"


def two_tiers_that_have(numbers: range) -> tuple[Rig, Engine]:
    """A tier of this daemon's own, and one that others store into too; both have the chunks."""
    rig = Rig(POOL_UNITS, num_tiers=2)
    rig.tiers[1].is_shared = True
    engine = rig.engine()
    store_and_evict(rig, engine, numbers)
    rig.tiers[1].hidden = {(engine.space, key) for key in to_keys(numbers)}
    return rig, engine


def step_until(rig: Rig, tier: int, how: str = "ok") -> None:
    rig.tiers[tier].finish_all(how)
    rig.core.below.collect(rig.clock.now_ns)


def test_a_probe_after_a_failed_load_has_its_own_time_and_a_late_one_frees_nothing_of_others() -> None:
    rig, engine = two_tiers_that_have(range(1))
    engine.lookup(to_keys(range(1)), "first", lease=engine.new_lease_id(), wait_s=1)
    rig.tick(0.5)  # longer than a probe may take
    step_until(rig, 0, "failed")
    rig.check()
    assert rig.tiers[1].running, "the other tier is asked, although the load took so long"
    rig.tick(0.01)
    assert rig.core.below.promotions.num_coming(lambda space: True) == 1
    rig.tick(0.1)
    assert rig.core.below.promotions.num_coming(lambda space: True) == 0
    rig.check()
    engine.lookup(to_keys(range(1)), "second", lease=engine.new_lease_id(), wait_s=1)  # takes the slot anew
    step_until(rig, 1)
    rig.check()
    rig.move()
    assert engine.hits(range(1)) == [0]
    engine.finish("first")
    engine.finish("second")
    rig.tick(2)
    rig.assert_nothing_is_held()


def test_a_second_probe_that_hangs_is_given_up_like_the_first() -> None:
    rig = Rig(POOL_UNITS, num_tiers=2, shared_tiers=True)
    engine = rig.engine()
    store_and_evict(rig, engine, range(1))
    for tier in rig.tiers:
        tier.hidden = {(engine.space, to_key(0))}
    engine.lookup(to_keys(range(1)), lease=engine.new_lease_id(), wait_s=1)
    step_until(rig, 0)
    step_until(rig, 0, "missing")
    assert rig.tiers[1].running
    rig.tick(0.1)
    assert rig.core.below.promotions.num_coming(lambda space: True) == 0
    assert resolved(rig) == {to_key(0): MISS}


def test_a_tier_that_hangs_leaves_the_others_their_share_of_the_pool() -> None:
    rig = Rig(POOL_UNITS, num_tiers=2)
    engine = rig.engine()
    store_and_evict(rig, engine, range(2 * SHARE))
    for number in range(SHARE):
        rig.tiers[1].lose((engine.space, to_key(number)))
        rig.tiers[0].lose((engine.space, to_key(SHARE + number)))
    rig.core.below.collect(rig.clock.now_ns)
    engine.lookup(to_keys(range(SHARE)), "hangs", lease=engine.new_lease_id(), wait_s=1)
    rig.tick(60)
    answer = engine.lookup(to_keys(range(SHARE, 2 * SHARE)), "goes", lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * SHARE
    step_until(rig, 1)
    assert engine.hits(range(SHARE, 2 * SHARE)) == list(range(SHARE, 2 * SHARE))
    rig.move()
    rig.check()


def test_a_chunk_that_the_tier_let_go_before_the_core_looked_counts_as_not_held(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(1))
    rig.pump()
    rig.tiers[0].finish_all()
    rig.tiers[0].lose((engine.space, to_key(0)))
    rig.core.below.collect(rig.clock.now_ns)
    (chunk,) = rig.core.books.primary.by_slot.values()
    assert chunk.below == 0


def test_a_request_that_asks_anew_has_room_for_what_it_has_pinned(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(POOL_UNITS), "before")
    engine.finish("before")
    most = POOL_UNITS // 2
    keys = to_keys(range(most + 8))
    for _ in range(3):
        answer = engine.lookup(keys, "r", lease=engine.new_lease_id())
        assert answer.statuses == [HIT] * most + [HIT_UNLEASED] * 8
    other = engine.lookup(keys, "other", lease=engine.new_lease_id())
    assert other.statuses == [HIT_UNLEASED] * (most + 8), "it is no room for others"
    rig.check()


def raising(what: str) -> Callable[..., object]:
    def call(*_: object) -> object:
        raise RuntimeError(f"{what} has a bug")

    return call


@pytest.mark.parametrize(
    "what",
    ["lookup", "submit_store", "get_finished", "get_removed", "get_changes", "get_cleared", "touch", "stats"],
)
def test_a_tier_that_raises_is_passed_over_and_shown_to_be_out_of_order(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(POOL_UNITS, num_tiers=2)
    engine = rig.engine()
    broken, well = rig.core.below.tiers
    monkeypatch.setattr(rig.tiers[0], what, raising(what))
    engine.store(range(4))
    engine.lookup(to_keys(range(8)), "r", lease=engine.new_lease_id())
    for _ in range(3):
        rig.pump()
        for tier in rig.tiers:
            tier.finish_all()
        rig.core.below.collect(rig.clock.now_ns)
    assert well.counts["cascade:done"] == 4, "the other tier has its turn"
    problem = broken.tier.stats().problem
    assert f"{what} raised RuntimeError: {what} has a bug" in problem
    assert well.tier.stats().problem == ""
    monkeypatch.undo()
    broken.tier.stats()
    assert broken.tier.stats().problem == "", "it is in order again"
    rig.check()


def test_a_promotion_at_which_a_tier_raises_leaves_no_slot_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(4))
    monkeypatch.setattr(rig.tiers[0], "submit_load", raising("submit_load"))
    answer = engine.lookup(to_keys(range(4)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [MISS] * 4
    assert rig.core.below.tiers[0].counts["promotion:refused"] == 4
    engine.finish()
    rig.assert_nothing_is_held()
    monkeypatch.undo()
    assert (
        engine.lookup(to_keys(range(4)), "r2", lease=engine.new_lease_id(), wait_s=1).statuses
        == [PENDING] * 4
    )


def test_a_tier_that_raises_all_the_time_is_said_less_and_less_often(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rig.tiers[0], "get_finished", raising("get_finished"))
    for _ in range(100):
        rig.core.below.collect(rig.clock.now_ns)
    told = [record for record in caplog.records if "get_finished has a bug" in record.message]
    assert len(told) == 7, "the first, second, fourth ... 64th"


def test_the_end_of_a_job_at_which_its_tier_raised_is_passed_over(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tier = rig.engine(), rig.tiers[0]
    take = tier.submit_store

    def take_and_raise(job: TierJob) -> bool:
        take(job)
        raise RuntimeError("too late")

    monkeypatch.setattr(tier, "submit_store", take_and_raise)
    engine.store(range(2))
    rig.pump()
    assert rig.core.below.tiers[0].counts["dropped:refused"] == 2
    monkeypatch.undo()
    tier.running.clear()
    tier._finished.append(JobResult(1, (Outcome.DONE,) * 2))
    rig.core.below.collect(rig.clock.now_ns)
    rig.check()
