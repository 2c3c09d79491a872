"""Several KV-cache groups: what a lease covers of a sliding window, and size classes that share a pool."""

from __future__ import annotations

import pytest

from kvtier_ops.namespace import NamespaceFacts
from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.limits import Limits
from kvtier_server.core.refused import BadRequest

from .engine import HIT, HIT_UNLEASED, MISS, PENDING, Engine, facts, to_keys
from .rig import Rig

GRANTED, FULL = StoreVerdict.GRANTED, StoreVerdict.FULL
HYBRID = facts("hybrid", (1, 1), windows=(0, 32))
"""Full attention, and a window of 32 tokens: two chunks and what the next token sees of a third."""


def both(*numbers: int) -> list[bytes]:
    return to_keys(numbers, 0) + to_keys(numbers, 1)


def store(engine: Engine, full: range, windowed: range) -> None:
    keys = to_keys(full, 0) + to_keys(windowed, 1)
    engine.write_and_report(engine.granted(keys, engine.prepare_store(keys)))


def test_a_window_group_leases_only_its_last_window() -> None:
    rig = Rig()
    engine = rig.engine(namespace=HYBRID)
    store(engine, range(8), range(8))
    answer = engine.lookup(both(*range(8)), lease=1)
    assert answer.statuses == [HIT] * 16
    assert answer.leased == [(0, 8), (8 + 6, 2)]
    assert [slot.key for slot in engine.leased(both(*range(8)), answer)] == to_keys(range(8)) + to_keys(
        [6, 7], 1
    )


def test_chunks_that_fell_out_of_the_window_are_not_missed() -> None:
    rig = Rig()
    engine = rig.engine(namespace=HYBRID)
    store(engine, range(8), range(5, 8))
    answer = engine.lookup(both(*range(8)), lease=1)
    assert answer.statuses == [HIT] * 8 + [MISS] * 5 + [HIT] * 3
    assert answer.leased == [(0, 8), (14, 2)]


def test_the_prefix_ends_where_the_window_is_whole() -> None:
    rig = Rig()
    engine = rig.engine(namespace=HYBRID)
    store(engine, range(8), range(5))
    assert engine.lookup(both(*range(8)), lease=1).leased == [(0, 5), (8 + 3, 2)]


def test_the_lookup_may_start_in_the_middle_of_the_request() -> None:
    rig = Rig()
    engine = rig.engine(namespace=HYBRID)
    store(engine, range(8), range(8))
    keys = to_keys(range(3, 8)) + to_keys(range(5, 8), 1)
    assert engine.lookup(keys, lease=1, first_chunks=[3, 5]).leased == [(0, 5), (5 + 1, 2)]
    with pytest.raises(BadRequest, match="first_chunks"):
        engine.lookup(keys, lease=2, first_chunks=[3])


def test_several_groups_are_leased_wholly_or_not_at_all() -> None:
    rig = Rig(32)
    engine = rig.engine(namespace=HYBRID)
    for first in range(0, 16, 4):
        store(engine, range(first, first + 4), range(14, 14))
    store(engine, range(0), range(14, 16))
    answer = engine.lookup(both(*range(16)), lease=1)
    assert answer.leased == []
    assert answer.statuses[:16] == [HIT_UNLEASED] * 16
    assert engine.lookup(both(*range(16)), lease=2, max_tokens=0).leased == []


def test_a_pending_chunk_counts_as_there_for_who_waits_and_as_a_hole_for_who_does_not() -> None:
    rig = Rig()
    engine = rig.engine(namespace=HYBRID)
    store(engine, range(8), range(7))
    keys = both(*range(8))
    last = engine.granted(to_keys([7], 1), engine.prepare_store(to_keys([7], 1)))
    answer = engine.lookup(keys, "waits", lease=1, wait_s=1)
    assert answer.statuses[-1] == PENDING
    assert answer.leased == [(0, 8), (8 + 6, 1)]
    assert engine.lookup(keys, "does not", lease=2).leased == [(0, 7), (8 + 5, 2)]
    rig.notices("")
    engine.write_and_report(last)
    assert [(notice.lease_id, notice.status) for notice in rig.notices("resolved")] == [(1, HIT)]


def test_keys_are_given_group_by_group() -> None:
    engine = Rig().engine(namespace=HYBRID)
    for keys in (to_keys([1], 1) + to_keys([1], 0), to_keys([1], 2)):
        with pytest.raises(BadRequest, match="group"):
            engine.lookup(keys)


def test_once_a_group_is_full_its_later_keys_are_and_the_other_group_has_its_own_room() -> None:
    rig = Rig(48, limits=Limits(pin_share=1.0))
    engine = rig.engine(namespace=facts("two sizes", (2, 1)))
    keys = to_keys(range(12)) + to_keys(range(4), 1)
    verdicts = engine.prepare_store(keys, "r").verdicts
    assert verdicts == [GRANTED] * 12 + [GRANTED] * 4
    more = engine.prepare_store(to_keys(range(20, 40)), "s").verdicts
    assert more == sorted(more), "granted first, refused after"
    rig.check()


# Size classes that share a pool.

SMALL, LARGE = facts("small", (1,)), facts("large", (4,))


def test_a_class_that_is_alone_gets_every_byte() -> None:
    rig = Rig(64)
    engine = rig.engine(namespace=SMALL)
    engine.fill(range(64))
    assert len(engine.hits(range(64))) == 64


def test_a_class_without_room_takes_the_coldest_slab_and_leaves_one_to_a_living_engine() -> None:
    rig = Rig(64)
    small, large = rig.engine("small", SMALL), rig.engine("large", LARGE)
    small.fill(range(64))
    rig.notices("")
    large.fill(range(100))
    rig.check()
    counts = {slot_bytes: len(c.slabs) for slot_bytes, c in rig.core.books.primary.slabs.classes.items()}
    assert counts[4096 * 4] >= 1
    assert counts[4096] >= 1
    reasons = {event.reason for event in rig.core.books.events.since(1) or () if event.kind == "removed"}
    assert "slab_move" in reasons
    assert small.hits(range(64)), "its youngest chunks are still there"


def test_a_slab_with_pinned_or_reserved_slots_is_not_taken() -> None:
    rig = Rig(64, limits=Limits(pin_share=1.0))
    small, large = rig.engine("small", SMALL), rig.engine("large", LARGE)
    small.fill(range(64))
    small.lookup(to_keys(range(64)), "pins", lease=1)
    assert large.store([1]) == [FULL]
    assert len(small.hits(range(64))) == 64
    small.release(1)
    rig.check()
    assert large.store([1], "again") == [GRANTED]


def test_a_request_does_not_lose_one_group_to_make_room_for_another() -> None:
    rig = Rig(64)
    hybrid = rig.engine(namespace=facts("two sizes", (1, 4)))
    filler = rig.engine("small", SMALL)
    filler.fill(range(48))
    keys = to_keys(range(4))
    hybrid.write_and_report(hybrid.granted(keys, hybrid.prepare_store(keys, "r")))
    verdicts = hybrid.prepare_store(keys + to_keys(range(4), 1), "r").verdicts
    assert verdicts[:4] == [StoreVerdict.RESIDENT] * 4
    assert hybrid.hits(range(4)) == [0, 1, 2, 3]
    rig.check()


def test_chunks_that_go_with_a_slab_are_named_in_the_answer_that_took_it() -> None:
    rig = Rig(64)
    hybrid = rig.engine(namespace=facts("two sizes", (1, 4)))
    hybrid.fill(range(64))
    before = rig.resident()
    answer = hybrid.prepare_store(to_keys([1], 1), "large")
    gone = {key for _, key in before.keys() - rig.resident().keys()}
    assert gone
    assert gone == set(answer.evicted)


def test_a_reader_of_a_slab_that_changed_hands_fails() -> None:  # R10
    rig = Rig(64)
    small, large = rig.engine("small", SMALL), rig.engine("large", LARGE)
    small.fill(range(64))
    slots = small.prepare_load(to_keys(range(32)), 5)
    rig.tick(301)
    small.touch(to_keys(range(32, 64)), "later")  # so that the slabs of the others are the coldest
    large.fill(range(30))
    moved = [slot for slot in slots if small.read(slot, verify=False) is None]
    assert moved
    assert all(small.read(slot, verify=False) in (None, *small.may_read(slot.key)) for slot in slots)


def test_a_class_of_an_engine_that_left_can_lose_its_last_slab() -> None:
    rig = Rig(16)
    small = rig.engine("small", SMALL)
    small.fill(range(16))
    small.die()
    large = rig.engine("large", LARGE)
    large.fill(range(4))
    assert len(large.hits(range(4))) == 4
    rig.check()


def test_a_full_file_system_costs_capacity_and_nothing_else() -> None:  # D6
    rig = Rig(64)
    engine = rig.engine(namespace=SMALL)
    engine.fill(range(10))
    rig.slots.is_full = True
    engine.fill(range(10, 40))
    rig.check()
    assert len(engine.hits(range(40))) == 16, "the one slab that has records"
    rig.slots.is_full = False
    engine.fill(range(40, 60))
    assert len(engine.hits(range(60))) > 16


@pytest.mark.parametrize("namespace", [SMALL, LARGE, HYBRID], ids=lambda namespace: namespace.model)
def test_nothing_is_left_of_an_engine_but_its_chunks(namespace: NamespaceFacts) -> None:
    rig = Rig()
    for round_number in range(3):
        engine = rig.engine(namespace=namespace)
        engine.store(range(4), f"r{round_number}")
        engine.lookup(to_keys(range(4)), lease=1)
        engine.credits(2)
        engine.die()
        rig.tick()
        rig.assert_nothing_is_held()
