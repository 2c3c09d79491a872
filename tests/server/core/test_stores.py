"""Stores: who gets a slot, when a chunk becomes visible, and that what is refused is said."""

from __future__ import annotations

import pytest

from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.instances import WorkersMissing
from kvtier_server.core.limits import Limits
from kvtier_server.core.refused import BadRequest, LeaseUnknown
from kvtier_server.core.stores import ItemStatus

from .rig import HIT, MISS, PENDING, Engine, Rig, Slot, facts, to_key, to_keys

OK, ALREADY, UNKNOWN, EXPIRED, STALE = ItemStatus
GRANTED, RESIDENT, WAIT, FILTERED, _, FULL, INFLIGHT = StoreVerdict


def grant(engine: Engine, *numbers: int, request: str = "r", lease: int = 0) -> list[Slot]:
    keys = to_keys(numbers)
    return engine.granted(keys, engine.prepare_store(keys, request, lease=lease))


def report(engine: Engine, slot: Slot, rank: int = 0, *, failed: bool = False) -> ItemStatus:
    """Write one rank's part and report it."""
    cells = engine.content(slot.key)
    engine.write(slot, rank, cells)
    if not failed:
        engine.note_written(slot, rank, cells)
    return engine.report_store(rank, slot, cells, failed=failed)


# ----- becoming visible


def test_a_chunk_is_visible_when_every_rank_has_reported_its_part() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = grant(engine, 1)
    assert engine.statuses(to_keys([1])) == [PENDING]
    assert report(engine, slot, 0) == OK
    assert engine.statuses(to_keys([1])) == [PENDING]
    assert report(engine, slot, 1) == OK
    assert engine.statuses(to_keys([1])) == [HIT]
    assert None not in engine.load([1])


def test_one_failed_part_ends_the_store_unpublished_when_all_have_reported() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = grant(engine, 1)
    assert report(engine, slot, 0, failed=True) == OK
    assert len(rig.core.books.reservations) == 1, "rank 1 may still be writing"
    assert report(engine, slot, 1) == OK
    assert engine.statuses(to_keys([1])) == [MISS]
    engine.finish("look")
    rig.assert_nothing_is_held()


def test_parts_reported_under_different_keys_are_no_chunk() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (credit,) = engine.credits(1)
    report(engine, Slot(credit.slot_id, credit.generation, to_key(1)), 0)
    report(engine, Slot(credit.slot_id, credit.generation, to_key(2)), 1)
    assert engine.statuses(to_keys([1, 2])) == [MISS, MISS]
    rig.assert_nothing_is_held()


def test_a_repeated_report_is_told_so() -> None:  # L1
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = grant(engine, 1)
    assert report(engine, slot, 0) == OK
    cells = engine.content(slot.key)
    assert engine.report_store(0, slot, cells) == ALREADY
    assert report(engine, slot, 1) == OK
    assert engine.report_store(0, slot, cells) == ALREADY
    assert engine.report_store(1, slot, cells) == ALREADY
    rig.check()


def test_a_report_of_another_generation_publishes_nothing() -> None:
    rig = Rig()
    engine = rig.engine()
    (slot,) = grant(engine, 1)
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
    (slot,) = grant(owner, 1)
    assert thief.report_store(0, slot, thief.content(slot.key)) == UNKNOWN
    assert thief.announce([slot]) == [UNKNOWN]
    assert thief.return_credits([slot]) == [UNKNOWN]
    assert report(owner, slot) == OK


def test_a_rank_reports_its_own_part_and_a_scheduler_none() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = grant(engine, 1)
    columns = ([slot.slot_id], [slot.generation], [slot.key], [1])
    with pytest.raises(BadRequest, match="own part"):
        rig.core.completions.report_store(engine.worker(0), 1, *columns, set())
    with pytest.raises(BadRequest, match="scheduler"):
        rig.core.completions.report_store(engine.scheduler, 0, *columns, set())
    equal = Rig()
    engine = equal.engine(world_size=2)
    (slot,) = grant(engine, 1)
    with pytest.raises(BadRequest, match="only rank 0"):
        equal.core.completions.report_store(engine.worker(1), 1, *columns, set())


def test_an_expired_store_is_not_published_and_its_slot_waits_for_its_writers() -> None:  # L1
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    (slot,) = grant(engine, 1)
    report(engine, slot, 0)
    rig.tick(301)
    assert len(rig.core.books.reservations) == 1, "no slot is freed during a copy"
    assert report(engine, slot, 1) == EXPIRED
    assert engine.statuses(to_keys([1])) == [MISS]
    rig.assert_nothing_is_held()
    assert engine.report_store(1, slot, engine.content(slot.key)) == ALREADY


def test_of_two_writers_of_one_key_the_second_is_dropped() -> None:
    rig = Rig()
    one, two = rig.engine("one"), rig.engine("two")
    (first,), (second,) = one.credits(1), two.credits(1)
    first, second = (Slot(slot.slot_id, slot.generation, to_key(1)) for slot in (first, second))
    assert report(two, second) == OK
    assert report(one, first) == OK
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
    report(one, first, failed=True)
    assert rig.notices("resolved") == []
    report(two, second)
    assert [notice.status for notice in rig.notices("resolved")] == [HIT]


# ----- verdicts


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
    grant(one, 2)
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
    report(engine, one)
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


# ----- credits


def test_credits_are_slots_ahead_within_a_share_and_half_of_what_can_be_had() -> None:
    rig = Rig(64)
    engine = rig.engine()
    assert len(engine.credits(40)) == 16, "at most 16 in a small pool"
    assert engine.credits(1) == []
    small = Rig(16).engine()
    assert len(small.credits(40)) == 4, "at most a quarter"
    full = Rig(32, limits=Limits(pin_share=1.0))
    engine = full.engine()
    engine.prepare_store(to_keys(range(28)))
    assert len(engine.credits(40)) == 2, "half of the four that are left"


def test_a_credit_becomes_a_chunk_whichever_comes_first_announcement_or_report() -> None:
    rig = Rig()
    engine, other = rig.engine(), rig.engine("other")
    first, second = engine.credits(2)
    first = Slot(first.slot_id, first.generation, to_key(1))
    second = Slot(second.slot_id, second.generation, to_key(2))
    assert engine.announce([first]) == [OK]
    assert other.statuses(to_keys([1])) == [PENDING]
    assert other.prepare_store(to_keys([1])).verdicts == [WAIT]
    assert report(engine, first) == OK
    assert report(engine, second) == OK
    assert engine.announce([second]) == [OK]
    assert other.hits([1, 2]) == [1, 2]
    rig.assert_nothing_is_held()


def test_returned_credits_are_free_again_and_a_repeat_is_told_so() -> None:
    rig = Rig()
    engine = rig.engine()
    slots = engine.credits(3)
    assert engine.return_credits(slots) == [OK] * 3
    assert engine.return_credits(slots) == [ALREADY] * 3
    rig.assert_nothing_is_held()


def test_a_credit_that_was_handed_out_cannot_be_returned() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    announced, half = engine.credits(2)
    announced = Slot(announced.slot_id, announced.generation, to_key(1))
    half = Slot(half.slot_id, half.generation, to_key(2))
    engine.announce([announced])
    report(engine, half, 0)
    assert engine.return_credits([announced, half]) == [UNKNOWN, UNKNOWN]
    for slot, rank in ((announced, 0), (announced, 1), (half, 1)):
        report(engine, slot, rank)
    assert engine.hits([1, 2]) == [1, 2]
    rig.assert_nothing_is_held()


def test_credits_never_expire() -> None:
    rig = Rig()
    engine = rig.engine()
    (slot,) = engine.credits(1)
    rig.tick(86_400)
    assert report(engine, Slot(slot.slot_id, slot.generation, to_key(1))) == OK
    assert engine.hits([1]) == [1]


def test_a_released_store_keeps_what_was_handed_out() -> None:
    rig = Rig()
    engine = rig.engine()
    handed_out, _ = grant(engine, 1, 2, lease=9)
    engine.announce([handed_out])
    assert engine.release(9)
    assert len(rig.core.books.reservations) == 1
    assert report(engine, handed_out) == OK
    assert engine.hits([1, 2]) == [1]
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("key", [b"", b"1234", b"x" * 129, to_key(1, group=1), to_key(1, group=7)])
def test_a_credit_named_by_a_key_that_cannot_be_in_it_is_not_published(key: bytes) -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts("two groups", (2, 1)))
    announced, unannounced = engine.credits(2)
    slot = Slot(announced.slot_id, announced.generation, key)
    engine.announce([slot])
    for credit in (announced, unannounced):
        status = engine.report_store(0, Slot(credit.slot_id, credit.generation, key), b"12345678")
        assert status == OK, "the part is over"
    assert not rig.resident()
    rig.assert_nothing_is_held()


def test_credits_come_without_keys_and_within_bounds() -> None:
    engine = Rig().engine()
    grants = engine.rig.core.grants
    for keys, asked in ((to_keys([1]), [(0, 1)]), ([], [(1, 1)]), ([], [(0, 0)]), ([], [(-1, 1)])):
        with pytest.raises(BadRequest):
            grants.prepare_store(engine.scheduler, engine.request("r"), keys, asked, 5, 0)
    with pytest.raises(BadRequest):
        grants.prepare_store(engine.scheduler, engine.request("r"), [], [(0, 1)], 0, 0)
    (slot,) = engine.credits(1, lease=6)
    with pytest.raises(LeaseUnknown):
        engine.prepare_load(to_keys([1]), 6)
    assert slot.generation == 1


def test_no_credits_before_all_workers_are_attached() -> None:
    rig = Rig()
    engine = Engine(rig, "engine", facts())
    engine.attach_process(engine.processes[0])
    with pytest.raises(WorkersMissing):
        engine.credits(1)


# ----- Reset


def test_after_a_reset_nothing_stored_before_is_hit_and_others_keep_theirs() -> None:  # C4
    rig = Rig()
    one, two = rig.engine("one"), rig.engine("two")
    one.store([1, 2])
    one.lookup(to_keys([1]), "waits", lease=5)
    one.reset()
    assert one.hits([1, 2]) == []
    assert one.renew(5) == [False]
    assert two.hits([1, 2]) == [1, 2]
    assert one.store([1], "new weights") == [GRANTED]
    assert two.hits([1, 2]) == [1, 2]
    assert None not in one.load([1], "l") + two.load([1], "l")
    two.reset()
    assert two.hits([1, 2], "after") == []
    assert one.hits([1], "after") == [1]


def test_engines_that_reset_to_the_same_weights_share_again() -> None:  # C4
    rig = Rig()
    one, two, third = rig.engine("one"), rig.engine("two"), rig.engine("third")
    one.reset("step-7")
    one.store([1])
    assert two.hits([1]) == []
    two.reset("step-7")
    third.reset("step-8")
    assert two.hits([1]) == [1]
    assert third.hits([1]) == []
    assert None not in two.load([1])


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_a_request_that_spans_a_reset_stores_its_keys_anew(policy: str) -> None:
    rig = Rig(policy=policy)
    engine = rig.engine()
    engine.lookup(to_keys([1, 2]), "r")
    engine.store([1, 2], "r")
    engine.reset()
    engine.lookup(to_keys([1, 2]), "r")
    assert engine.store([1, 2], "r") == [GRANTED, GRANTED]
    rig.check()


def test_what_is_being_stored_during_a_reset_ends_unpublished_in_both_epochs() -> None:  # C4
    rig = Rig()
    engine, other = rig.engine(), rig.engine("other")
    (slot,) = grant(engine, 1)
    (credit,) = engine.credits(1)
    engine.reset()
    assert report(engine, slot) == OK
    assert report(engine, Slot(credit.slot_id, credit.generation, to_key(2))) == OK
    assert engine.hits([1, 2]) == other.hits([1, 2]) == []
    engine.finish("look")
    rig.assert_nothing_is_held()


def test_an_engine_that_attaches_again_stays_in_its_epoch() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    engine.reset()
    engine.store([2])
    engine.attach_process(engine.processes[0])
    engine.attach_process(engine.processes[1], promise=True)
    assert engine.hits([1, 2]) == [2]
    rig.restart_daemon()
    engine.attach(promise=True)
    assert engine.hits([1, 2]) == [2]


# ----- order and events


def test_a_prefix_is_evicted_from_its_end() -> None:
    rig = Rig(16)
    engine = rig.engine()
    engine.lookup(to_keys(range(16)), "prompt")
    engine.store(range(16), "prompt")
    engine.finish("prompt")
    engine.store(range(100, 104), "next")
    assert engine.hits(range(16)) == list(range(12))


def test_a_second_look_of_the_same_request_is_no_second_use() -> None:
    rig = Rig(16)
    engine = rig.engine()
    engine.fill(range(16))
    engine.lookup(to_keys([3]), "waits")
    for number in (0, 1, 2, *range(4, 16)):
        engine.touch(to_keys([number]), f"t{number}")
    for _ in range(3):
        engine.lookup(to_keys([3]), "waits")
        engine.touch(to_keys([3]), "waits")
    engine.fill([20])
    assert engine.hits(range(16)) == [0, 1, 2, *range(4, 16)]


def test_what_happened_to_chunks_is_recorded_in_ascending_sequence() -> None:
    rig = Rig(16, limits=Limits(max_events=40))
    engine = rig.engine()
    engine.fill(range(20))
    events = rig.core.books.events.since(1)
    assert events is not None
    assert [event.sequence for event in events] == list(range(1, 25))
    assert [event.kind for event in events].count("removed") == 4
    stored = [event.keys[0] for event in events if event.kind == "stored"]
    assert stored == to_keys(range(20))
    removed = [event for event in events if event.kind == "removed"]
    assert [event.keys[0] for event in removed] == to_keys(range(4))
    assert {(event.tier, event.reason, event.space) for event in removed} == {
        ("primary", "evict", engine.space)
    }
    engine.fill(range(20, 30))
    assert rig.core.books.events.since(1) is None, "they are gone, and it is said"
    assert rig.core.books.events.since(40) is not None
