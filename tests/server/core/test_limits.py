"""Limits that change while engines are attached: nothing is taken away, what comes goes by the new ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtier_server.core.instances import TooManyEngines
from kvtier_server.core.limits import SECOND_NS

from .engine import HIT, HIT_UNLEASED, Engine, facts, to_keys
from .rig import Rig


@pytest.fixture
def rig() -> Rig:
    return Rig(64)


def change(rig: Rig, **limits: float) -> None:
    rig.core.books.set_limits(replace(rig.core.books.limits, **limits))  # type: ignore[arg-type]
    rig.check()


def test_an_attached_engine_keeps_the_lease_time_it_was_told(rig: Rig) -> None:
    old = rig.engine("old")
    old.store(range(2))
    change(rig, lookup_lease_ns=5 * SECOND_NS)
    new = rig.engine("new")
    leases = [(engine, engine.new_lease_id()) for engine in (old, new)]
    for engine, lease in leases:
        assert engine.lookup(to_keys(range(2)), lease=lease).statuses == [HIT] * 2
    rig.tick(6)
    instances = {lease.instance.engine_id for lease in rig.core.books.leases}
    assert instances == {"old"}
    old.renew(leases[0][1])
    rig.tick(29)
    assert len(rig.core.books.leases) == 1, "renewing goes by it too"


def test_what_an_engine_was_told_holds_for_its_sessions_that_come_later(rig: Rig) -> None:
    engine = Engine(rig, "engine", facts())
    first = engine.attach_process(engine.processes[0])
    change(rig, lookup_lease_ns=5 * SECOND_NS)
    second = engine.attach_process(engine.processes[1])
    assert first.instance is second.instance
    assert second.instance.lookup_lease_ns == 30 * SECOND_NS


def test_a_smaller_share_takes_nothing_back_and_grants_nothing_more(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(20))
    assert engine.lookup(to_keys(range(10)), "one", lease=engine.new_lease_id()).statuses == [HIT] * 10
    change(rig, pin_share=1 / 64)
    beyond = engine.lookup(to_keys(range(10, 20)), "two", lease=engine.new_lease_id())
    assert beyond.statuses == [HIT_UNLEASED] * 10
    engine.finish("one")
    assert engine.lookup(to_keys([11]), "three", lease=engine.new_lease_id()).statuses == [HIT]
    rig.check()


def test_fewer_engines_than_are_attached_end_none_of_them(rig: Rig) -> None:
    engines = [rig.engine(f"e{number}") for number in range(3)]
    change(rig, max_engines=1)
    assert all(engine.is_attached for engine in engines)
    with pytest.raises(TooManyEngines, match="3 engines are attached, the limit"):
        rig.engine("more")
    change(rig, max_engines=4)
    assert rig.engine("more").is_attached


def test_a_threshold_that_changes_counts_from_the_next_offer_on(rig: Rig) -> None:
    engine = rig.engine()
    keys, reuse = to_keys([1]), rig.core.books.filter
    reuse.threshold = 2
    assert engine.lookup(keys, "one").unwanted == [0]
    reuse.threshold = 3
    assert engine.lookup(keys, "two").unwanted == [0]
    assert engine.lookup(keys, "three").unwanted == []
    reuse.threshold = 0
    assert engine.lookup(to_keys([2]), "four").unwanted == []
