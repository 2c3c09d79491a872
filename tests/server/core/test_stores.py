"""Stores: who gets a slot, when a chunk becomes visible, and that what is refused is said."""

from __future__ import annotations

import pytest

from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.limits import Limits
from kvtier_server.core.refused import BadRequest
from kvtier_server.core.stores import ItemStatus

from .engine import HIT, MISS, PENDING, Slot, facts, to_key, to_keys
from .rig import Rig

OK, ALREADY, UNKNOWN, EXPIRED, STALE = ItemStatus
GRANTED, RESIDENT, WAIT, FILTERED, _, FULL, INFLIGHT = StoreVerdict


def test_a_chunk_is_visible_when_every_rank_has_reported_its_part() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = engine.grant(1)
    assert engine.statuses(to_keys([1])) == [PENDING]
    assert engine.write_part(slot, 0) == OK
    assert engine.statuses(to_keys([1])) == [PENDING]
    assert engine.write_part(slot, 1) == OK
    assert engine.statuses(to_keys([1])) == [HIT]
    assert None not in engine.load([1])


def test_one_failed_part_ends_the_store_unpublished_when_all_have_reported() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = engine.grant(1)
    assert engine.write_part(slot, 0, failed=True) == OK
    assert len(rig.core.books.reservations) == 1, "rank 1 may still be writing"
    assert engine.write_part(slot, 1) == OK
    assert engine.statuses(to_keys([1])) == [MISS]
    engine.finish("look")
    rig.assert_nothing_is_held()


def test_parts_reported_under_different_keys_are_no_chunk() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (credit,) = engine.credits(1)
    engine.write_part(Slot(credit.slot_id, credit.generation, to_key(1)), 0)
    engine.write_part(Slot(credit.slot_id, credit.generation, to_key(2)), 1)
    assert engine.statuses(to_keys([1, 2])) == [MISS, MISS]
    rig.assert_nothing_is_held()


def test_a_repeated_report_is_told_so() -> None:  # L1
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = engine.grant(1)
    assert engine.write_part(slot, 0) == OK
    cells = engine.content(slot.key)
    assert engine.report_store(0, slot, cells) == ALREADY
    assert engine.write_part(slot, 1) == OK
    assert engine.report_store(0, slot, cells) == ALREADY
    assert engine.report_store(1, slot, cells) == ALREADY
    rig.check()


def test_a_report_of_another_generation_publishes_nothing() -> None:
    rig = Rig()
    engine = rig.engine()
    (slot,) = engine.grant(1)
    cells = engine.content(slot.key)
    older = Slot(slot.slot_id, slot.generation - 1, slot.key)
    newer = Slot(slot.slot_id, slot.generation + 1, slot.key)
    assert engine.report_store(0, older, cells) == STALE
    assert engine.report_store(0, newer, cells) == UNKNOWN
    assert engine.statuses(to_keys([1])) == [PENDING]


@pytest.mark.parametrize("slot_id", [-1, 64, 1 << 40, (1 << 64) - 1])
def test_a_report_on_no_slot_at_all_is_unknown(slot_id: int) -> None:
    engine = Rig().engine()
    engine.store([1])
    assert engine.report_store(0, Slot(slot_id, 1, to_key(1)), engine.content(to_key(1))) == UNKNOWN


def test_the_slots_of_another_engine_cannot_be_reported_announced_or_returned() -> None:
    rig = Rig()
    owner, thief = rig.engine("owner"), rig.engine("thief")
    (slot,) = owner.grant(1)
    assert thief.report_store(0, slot, thief.content(slot.key)) == UNKNOWN
    assert thief.announce([slot]) == [UNKNOWN]
    assert thief.return_credits([slot]) == [UNKNOWN]
    assert owner.write_part(slot) == OK


def test_a_rank_reports_its_own_part_and_a_scheduler_none() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = engine.grant(1)
    columns = ([slot.slot_id], [slot.generation], [slot.key], [1])
    with pytest.raises(BadRequest, match="own part"):
        rig.core.completions.report_store(engine.worker(0), 1, *columns, set())
    with pytest.raises(BadRequest, match="scheduler"):
        rig.core.completions.report_store(engine.scheduler, 0, *columns, set())
    equal = Rig()
    engine = equal.engine(world_size=2)
    (slot,) = engine.grant(1)
    with pytest.raises(BadRequest, match="only rank 0"):
        equal.core.completions.report_store(engine.worker(1), 1, *columns, set())


def test_an_expired_store_is_not_published_and_its_slot_waits_for_its_writers() -> None:  # L1
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = engine.grant(1)
    engine.write_part(slot, 0)
    rig.tick(301)
    assert len(rig.core.books.reservations) == 1, "no slot is freed during a copy"
    assert engine.write_part(slot, 1) == EXPIRED
    assert engine.statuses(to_keys([1])) == [MISS]
    rig.assert_nothing_is_held()
    assert engine.report_store(1, slot, engine.content(slot.key)) == ALREADY


def test_slots_of_an_expired_store_that_nobody_was_given_come_back_with_its_release() -> None:  # L1
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    untouched, half, announced = engine.grant(1, 2, 3, lease=9)
    engine.write_part(half, 0)
    engine.announce([announced])
    rig.tick(301)
    assert len(rig.core.books.reservations) == 3, "whether they were handed out, the scheduler has to say"
    assert engine.prepare_store([untouched.key], lease=9).verdicts == [INFLIGHT], "nothing is granted anew"
    assert engine.release(9)
    assert {r.slot_id for r in rig.core.books.reservations} == {half.slot_id, announced.slot_id}
    assert engine.write_part(half, 1) == EXPIRED
    assert [engine.write_part(announced, rank) for rank in (0, 1)] == [EXPIRED, EXPIRED]
    assert not engine.release(9), "it has ended"
    rig.assert_nothing_is_held()


def test_of_two_writers_of_one_key_the_second_is_dropped() -> None:
    rig = Rig()
    one, two = rig.engine("one"), rig.engine("two")
    (first,), (second,) = one.credits(1), two.credits(1)
    first, second = (Slot(slot.slot_id, slot.generation, to_key(1)) for slot in (first, second))
    assert two.write_part(second) == OK
    assert one.write_part(first) == OK
    assert rig.core.books.counts["store:dropped"] == 1
    assert one.prepare_load(to_keys([1]), 50)[0].slot_id == second.slot_id
    one.report_load(0, 50)
    rig.assert_nothing_is_held()


def test_one_failed_writer_does_not_end_the_wait_for_another() -> None:
    rig = Rig()
    one, two, reader = rig.engine("one"), rig.engine("two"), rig.engine("reader")
    (first,), (second,) = one.credits(1), two.credits(1)
    first, second = (Slot(slot.slot_id, slot.generation, to_key(1)) for slot in (first, second))
    one.announce([first])
    two.announce([second])
    reader.lookup(to_keys([1]), lease=1, wait_s=1)
    rig.notices("")
    one.write_part(first, failed=True)
    assert rig.notices("resolved") == []
    two.write_part(second)
    assert [notice.status for notice in rig.notices("resolved")] == [HIT]


def test_every_refused_key_is_reported_and_nothing_claims_to_be_stored_that_is_not() -> None:  # O1
    rig = Rig(16)
    engine = rig.engine()
    stored: set[int] = set()
    for prompt in range(30):
        numbers = range(prompt * 5, prompt * 5 + 5)
        keys = to_keys(numbers)
        answer = engine.prepare_store(keys, f"prompt-{prompt}")
        assert len(answer.verdicts) == len(keys)
        slots = engine.granted(keys, answer)
        gone = {number for number in stored if to_key(number) in answer.evicted}
        statuses = engine.write_and_report(slots)
        assert statuses == [OK] * len(slots)
        granted = {number for number, v in zip(numbers, answer.verdicts, strict=True) if v == GRANTED}
        stored = stored - gone | granted
        assert set(engine.hits(range(150), f"look-{prompt}")) == stored
        engine.finish(f"prompt-{prompt}")
        engine.finish(f"look-{prompt}")
        rig.check()


def test_a_leading_part_is_granted_when_not_all_fit() -> None:
    rig = Rig(16, limits=Limits(pin_share=1.0))
    engine = rig.engine()
    engine.store(range(4), "old")
    engine.lookup(to_keys(range(4)), "old", lease=1)
    verdicts = engine.prepare_store(to_keys(range(10, 26)), "new").verdicts
    assert verdicts == [GRANTED] * 12 + [FULL] * 4


def test_a_store_never_evicts_what_its_own_request_stored_or_hit() -> None:
    rig = Rig(16)
    engine = rig.engine()
    engine.fill(range(8))
    engine.lookup(to_keys(range(8)), "long")
    verdicts = engine.store(range(8, 40), "long")
    assert verdicts == [GRANTED] * 8 + [FULL] * 24
    assert engine.hits(range(40)) == list(range(16))


def test_a_key_called_resident_does_not_make_room_for_the_rest_of_the_call() -> None:
    rig = Rig(16)
    engine = rig.engine()
    engine.fill(range(16))
    for number in range(1, 16):  # 0 is the coldest now
        engine.touch(to_keys([number]), f"t{number}")
    answer = engine.prepare_store(to_keys([0, 20, 21]), "new")
    assert answer.verdicts == [RESIDENT, GRANTED, GRANTED]
    assert to_key(0) not in answer.evicted
    assert engine.hits([0]) == [0]


def test_what_another_engine_is_storing_is_pending_and_what_is_there_is_resident() -> None:
    rig = Rig()
    one, two = rig.engine("one"), rig.engine("two")
    one.store([1])
    one.grant(2)
    assert two.prepare_store(to_keys([1, 2, 3])).verdicts == [RESIDENT, WAIT, GRANTED]


def test_a_key_named_twice_in_a_call_gets_one_slot() -> None:
    rig = Rig(policy="arc")
    engine = rig.engine()
    keys = to_keys([1, 2, 1])
    answer = engine.prepare_store(keys, lease=9)
    assert answer.verdicts == [GRANTED, GRANTED, WAIT]
    engine.write_and_report(engine.granted(keys, answer))
    assert engine.lookup(keys, "twice", lease=1).leased == [(0, 3)]
    engine.touch(keys, "touched")
    engine.prepare_load(keys, 2)
    engine.report_load(0, 2)
    engine.finish("twice")
    rig.assert_nothing_is_held()


def test_unfinished_stores_are_limited_to_a_share() -> None:
    rig = Rig(32)
    engine = rig.engine()
    verdicts = engine.prepare_store(to_keys(range(20))).verdicts
    assert verdicts == [GRANTED] * 16 + [INFLIGHT] * 4
    assert rig.engine("other").prepare_store(to_keys(range(30, 34))).verdicts == [GRANTED] * 4


def test_a_repeated_prepare_store_is_answered_from_what_it_holds() -> None:
    rig = Rig()
    engine = rig.engine()
    keys = to_keys([1, 2])
    first = engine.prepare_store(keys, lease=9)
    again = engine.prepare_store(keys, lease=9)
    assert (again.verdicts, again.slot_ids) == (first.verdicts, first.slot_ids)
    one, _ = engine.granted(keys, first)
    engine.write_part(one)
    assert engine.prepare_store(keys, lease=9).verdicts == [RESIDENT, GRANTED]
    assert len(rig.core.books.reservations) == 1
    engine.credits(3, lease=10)
    held = len(rig.core.books.reservations)
    assert len(engine.credits(3, lease=10)) == 3
    assert len(rig.core.books.reservations) == held


def test_the_reuse_filter_stores_what_a_second_request_computes() -> None:
    rig = Rig(reuse_threshold=2)
    engine = rig.engine()
    answer = engine.lookup(to_keys([1, 2]), "first")
    assert answer.unwanted == [0, 1]
    assert engine.prepare_store(to_keys([1, 2]), "first").verdicts == [FILTERED, FILTERED]
    engine.finish("first")
    assert engine.lookup(to_keys([1, 3]), "second").unwanted == [1]
    assert engine.prepare_store(to_keys([1, 3]), "second").verdicts == [GRANTED, FILTERED]


def test_keys_out_of_bounds_are_named() -> None:
    engine = Rig().engine()
    for keys, field in (
        ([b"1234"], "keys[0]"),
        ([to_key(1), b"x" * 129], "keys[1]"),
        (to_keys([1]) * 8_193, "keys"),
    ):
        with pytest.raises(BadRequest) as refusal:
            engine.prepare_store(keys)
        assert refusal.value.metadata["field"] == field
    with pytest.raises(BadRequest):
        engine.lookup([])


def test_nothing_is_granted_where_no_memory_is_backed_yet() -> None:
    rig = Rig(64, backed_units=0)
    engine = rig.engine()
    assert engine.prepare_store(to_keys(range(4))).verdicts == [FULL] * 4
    rig.back(16)
    assert engine.prepare_store(to_keys(range(20))).verdicts == [GRANTED] * 16 + [FULL] * 4
    rig.check()
