"""Reset: another epoch, in which nothing stored before is there."""

from __future__ import annotations

import pytest

from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.stores import ItemStatus

from .engine import Slot, to_key, to_keys
from .rig import Rig

OK = ItemStatus.OK
GRANTED = StoreVerdict.GRANTED


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
    (slot,) = engine.grant(1)
    (credit,) = engine.credits(1)
    engine.reset()
    assert engine.write_part(slot) == OK
    assert engine.write_part(Slot(credit.slot_id, credit.generation, to_key(2))) == OK
    assert engine.hits([1, 2]) == other.hits([1, 2]) == []
    engine.finish("look")
    rig.assert_nothing_is_held()


def test_epochs_that_hold_nothing_are_forgotten() -> None:
    rig = Rig()
    engine, other = rig.engine(), rig.engine("other")
    for _ in range(10):
        engine.reset()
    assert len(rig.core.books.primary.spaces) == 2, "its own, and the other's"
    engine.store([1])
    (slot,) = engine.grant(2)
    for _ in range(10):
        engine.reset()
    assert len(rig.core.books.primary.spaces) == 3, "one holds a chunk and is being stored into"
    assert engine.write_part(slot) == OK
    other.reset("w")
    engine.reset("w")
    assert {space.name.epoch for space in rig.core.books.primary.spaces if not space.chunks} == {engine.epoch}
    rig.check()


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
