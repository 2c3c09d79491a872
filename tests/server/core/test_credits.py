"""Credits: slots ahead of the keys, and how they become chunks or are given back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvtier_server.core import books, endings, grants
from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.instances import WorkersMissing
from kvtier_server.core.limits import Limits
from kvtier_server.core.refused import BadRequest, LeaseUnknown
from kvtier_server.core.stores import ItemStatus

from .engine import PENDING, Engine, Slot, facts, to_key, to_keys
from .rig import Rig

OK, ALREADY, UNKNOWN = ItemStatus.OK, ItemStatus.ALREADY, ItemStatus.UNKNOWN
WAIT = StoreVerdict.PENDING


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


def test_one_call_is_given_a_slice_of_credits_and_the_next_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants, "SLICE_ITEMS", 5)
    engine = Rig(256).engine(namespace=facts("two sizes", (2, 1)))
    keys = [*to_keys(range(4), group=0), *to_keys(range(4), group=1)]
    slots = engine.slots_for_misses(keys, (0, 4, 0), (1, 4, 0))
    assert [len(slots[group]) for group in (0, 1)] == [4, 1]
    assert len(engine.credits(8, group=1)) == 5
    assert len(engine.credits(2, group=1)) == 2


def test_a_credit_becomes_a_chunk_whichever_comes_first_announcement_or_report() -> None:
    rig = Rig()
    engine, other = rig.engine(), rig.engine("other")
    first, second = engine.credits(2)
    first = Slot(first.slot_id, first.generation, to_key(1))
    second = Slot(second.slot_id, second.generation, to_key(2))
    assert engine.announce([first]) == [OK]
    assert other.statuses(to_keys([1])) == [PENDING]
    assert other.prepare_store(to_keys([1])).verdicts == [WAIT]
    assert engine.write_part(first) == OK
    assert engine.write_part(second) == OK
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


@pytest.mark.parametrize("how", ["returned", "released", "failed"])
def test_slots_that_end_unused_are_written_down_as_free_all_at_once(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig()
    engine = rig.engine()
    slots = engine.credits(8, lease=9)
    written: list[int] = []
    free = rig.slots.free

    def counted(slot_ids: Sequence[int]) -> None:
        written.append(len(slot_ids))
        free(slot_ids)

    monkeypatch.setattr(rig.slots, "free", counted)
    match how:
        case "returned":
            assert engine.return_credits([*slots, slots[0]]) == [OK] * 8 + [ALREADY]
        case "released":
            assert engine.release(9)
        case _:
            columns = ([slot.slot_id for slot in slots], [slot.generation for slot in slots])
            report = rig.core.completions.report_store
            assert report(engine.worker(), 0, *columns, to_keys(range(8)), [1] * 8, set(range(8))) == [OK] * 8
    assert written == [8]
    rig.assert_nothing_is_held()


def test_a_released_lease_of_many_slots_is_void_at_once_and_its_slots_are_freed_in_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endings, "STEP_SLOTS", 2)
    monkeypatch.setattr(books, "SLICE_ITEMS", 1)
    rig = Rig()
    engine = rig.engine()
    slots = engine.grant(*range(8), lease=9)
    assert engine.release(9)
    assert len(rig.core.books.reservations) == 6
    assert engine.prepare_store(to_keys(range(8)), lease=9).verdicts == [StoreVerdict.INFLIGHT] * 8
    handed_out = next(slot for slot in slots if rig.core.books.reservations.get(slot.slot_id))
    assert engine.write_part(handed_out) == OK, "what is reported meanwhile counts"
    while rig.core.books.settle():
        pass
    assert len(rig.resident()) == 1
    rig.assert_nothing_is_held()


def test_a_credit_that_was_handed_out_cannot_be_returned() -> None:
    rig = Rig()
    engine = rig.engine(namespace=facts(num_parts=2), world_size=2)
    announced, half = engine.credits(2)
    announced = Slot(announced.slot_id, announced.generation, to_key(1))
    half = Slot(half.slot_id, half.generation, to_key(2))
    engine.announce([announced])
    engine.write_part(half, 0)
    assert engine.return_credits([announced, half]) == [UNKNOWN, UNKNOWN]
    for slot, rank in ((announced, 0), (announced, 1), (half, 1)):
        engine.write_part(slot, rank)
    assert engine.hits([1, 2]) == [1, 2]
    rig.assert_nothing_is_held()


def test_credits_never_expire() -> None:
    rig = Rig()
    engine = rig.engine()
    (slot,) = engine.credits(1)
    rig.tick(86_400)
    assert engine.write_part(Slot(slot.slot_id, slot.generation, to_key(1))) == OK
    assert engine.hits([1]) == [1]


def test_a_released_store_keeps_what_was_handed_out() -> None:
    rig = Rig()
    engine = rig.engine()
    handed_out, _ = engine.grant(1, 2, lease=9)
    engine.announce([handed_out])
    assert engine.release(9)
    assert len(rig.core.books.reservations) == 1
    assert engine.write_part(handed_out) == OK
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


def test_a_lookup_brings_a_slot_for_every_missing_key_that_the_engine_has_none_for() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    engine.prepare_store(to_keys([2]))  # on its way: nobody need store it again
    keys = to_keys(range(1, 7))

    assert len(engine.slots_for_misses(keys, (0, 100, 0))[0]) == 4
    assert len(engine.slots_for_misses(keys, (0, 100, 3))[0]) == 1
    assert len(engine.slots_for_misses(keys, (0, 2, 0))[0]) == 2
    assert engine.slots_for_misses(keys, (0, 100, 4)) == {}
    assert engine.slots_for_misses(keys, (0, 2, 2)) == {}


def test_a_lookup_brings_no_slots_for_what_would_be_refused() -> None:
    engine = Rig(reuse_threshold=2).engine()
    keys = to_keys([1, 2, 3])

    assert engine.slots_for_misses(keys, (0, 100, 0), request="first") == {}
    assert len(engine.slots_for_misses(keys, (0, 100, 0), request="second")[0]) == 3


def test_a_lookup_brings_slots_by_group_and_the_same_ones_when_it_is_repeated() -> None:
    engine = Rig().engine(namespace=facts("two sizes", (2, 1)))
    keys = [*to_keys([1, 2, 3], group=0), *to_keys([1, 2], group=1)]
    lease = engine.new_lease_id()
    slots = engine.slots_for_misses(keys, (0, 9, 0), (1, 9, 0), lease=lease)

    assert [len(slots[group]) for group in (0, 1)] == [3, 2]
    assert engine.slots_for_misses(keys, (0, 9, 0), (1, 9, 0), lease=lease) == slots


def test_wishes_are_checked_before_anything_is_looked_up() -> None:
    engine = Rig().engine()
    for wishes, lease in (([(1, 1, 0)], 5), ([(0, 1, 0), (0, 1, 0)], 5)):
        with pytest.raises(BadRequest, match=r"slots_for_misses\.group"):
            engine.slots_for_misses(to_keys([1]), *wishes, lease=lease)
    engine.lookup(to_keys([1]), lease=7, wait_s=1)
    engine.prepare_store(to_keys([2]), lease=8)
    with pytest.raises(LeaseUnknown):
        engine.slots_for_misses(to_keys([1]), (0, 1, 0), lease=8)
