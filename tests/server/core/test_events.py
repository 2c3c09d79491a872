"""The log of events: what it keeps, what it says about the rest, and what a snapshot makes of it."""

from __future__ import annotations

import pytest

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.events import REMOVED, STORED, EventLog
from kvtier_server.core.index_walk import IndexWalk
from kvtier_server.core.limits import Limits
from kvtier_server.secondary.base import SecondaryTier
from kvtier_server.secondary.holdings import Holdings

from .engine import facts, to_key, to_keys
from .rig import Rig
from .watcher import Watcher

SPACE = SpaceName("namespace", "", 0)
OTHER = SpaceName("other", "", 0)


def names(numbers: range) -> list[bytes]:
    return [b"%d" % number for number in numbers]


def test_who_asks_for_events_that_are_gone_is_told_so() -> None:
    log = EventLog(max_events=3, max_keys=100)
    for number in range(5):
        log.record(STORED, SPACE, "store", [b"%d" % number])
        assert log.next_sequence == number + 2
    assert [event.keys for event in log.since(3) or ()] == [(b"2",), (b"3",), (b"4",)]
    assert log.since(2) is None
    assert log.since(6) == []


def test_no_more_keys_are_kept_than_the_limit() -> None:
    log = EventLog(max_events=100, max_keys=10)
    for size, space in ((4, SPACE), (4, OTHER), (4, SPACE), (8, OTHER), (2, SPACE)):
        log.record(REMOVED, space, "evict", [b"key"] * size)
    assert [len(event.keys) for event in log.since(4) or ()] == [8, 2]
    assert log.since(3) is None
    log.record(REMOVED, OTHER, "evict", [b"key"] * 11)
    assert [len(event.keys) for event in log.since(log.oldest) or ()] == [1]


def test_what_follows_one_another_is_one_event_until_somebody_reads_it() -> None:
    log = EventLog(max_events=100, max_keys=100)
    log.record(STORED, SPACE, "store", [b"1"])
    log.record(STORED, SpaceName("namespace", "", 0), "store", [b"2"])
    assert log.next_sequence == 2
    log.record(STORED, SPACE, "store", [b"3"])
    log.record(STORED, SPACE, "promotion", [b"4"])
    log.record(STORED, OTHER, "promotion", [b"5"])
    log.record(REMOVED, OTHER, "promotion", [b"5"])
    log.record(REMOVED, OTHER, "promotion", [b"6"], "tier0")
    events = log.since(1)
    assert events is not None
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.keys for event in events] == [(b"1", b"2"), (b"3",), (b"4",), (b"5",), (b"5",), (b"6",)]
    assert log.num_recorded == {STORED: 5, REMOVED: 2}


def test_no_event_has_more_keys_than_a_message_may_have() -> None:
    log = EventLog(max_events=100, max_keys=100, max_keys_per_event=4)
    log.record(STORED, SPACE, "store", names(range(3)))
    log.record(STORED, SPACE, "store", names(range(3, 10)))
    events = log.since(1)
    assert events is not None
    assert [event.keys for event in events] == [
        tuple(names(range(4))),
        tuple(names(range(4, 8))),
        tuple(names(range(8, 10))),
    ]


def test_a_gap_is_seen_also_by_who_has_read_everything() -> None:
    log = EventLog(max_events=100, max_keys=100)
    log.record(STORED, SPACE, "store", [b"1"])
    position = log.next_sequence
    log.forget_all()
    assert not log.keeps(position)
    assert log.keeps(log.next_sequence)


def test_whoever_watches_from_the_first_event_of_a_warm_daemon_is_told_that_it_is_not_all() -> None:
    rig = Rig(16)
    rig.engine().store(range(3))
    rig.restart_daemon()
    assert rig.core.books.events.since(1) is None


def test_a_snapshot_of_one_namespace_has_nothing_of_the_others() -> None:
    rig = Rig(32, num_tiers=1)
    first, second = rig.engine("one", facts("a")), rig.engine("two", facts("b"))
    first.store(range(3))
    second.store(range(4))
    rig.move()
    wanted = first.space.namespace
    walk = IndexWalk(rig.core.books, rig.core.below, lambda space: space.namespace == wanted, 2)
    seen = [
        (tier, space, key) for rows in walk.steps() for (tier, space), keys in rows.items() for key in keys
    ]
    assert sorted(seen) == sorted(
        (tier, first.space, key) for tier in ("primary", "tier0") for key in to_keys(range(3))
    )


def test_a_snapshot_whose_events_are_gone_ends_and_says_so() -> None:
    rig = Rig(32, limits=Limits(max_events=2))
    engine = rig.engine()
    engine.store(range(8))
    walk = IndexWalk(rig.core.books, rig.core.below, lambda _: True, 1)
    steps = walk.steps()
    next(steps)
    for number in range(20, 24):
        engine.store([number])
        rig.core.books.events.since(1)
    assert len(list(steps)) <= 1
    assert walk.is_lost


def test_a_tier_that_cannot_say_what_it_holds_is_named_and_nothing_of_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(16, num_tiers=2)
    tier = rig.tiers[1]
    tier.can_list = False
    monkeypatch.setattr(type(tier), "get_changes", _never)
    rig.tiers[0].get_changes = rig.tiers[0].holdings.get_changes  # type: ignore[method-assign]
    engine = rig.engine()
    engine.store(range(3))
    rig.move()
    tier.lose((engine.space, to_key(1)))
    rig.core.below.collect(rig.clock.now_ns)
    walk = IndexWalk(rig.core.books, rig.core.below, lambda _: True, 50)
    assert {tier for rows in walk.steps() for tier, _ in rows} == {"primary", "tier0"}
    assert walk.unlisted_tiers == ["tier1"]
    assert {event.tier for event in rig.core.books.events.since(1) or ()} == {"primary", "tier0"}


def _never(self: SecondaryTier, max_changes: int) -> None:
    raise AssertionError("it was asked all the same")


def test_a_tier_that_changes_faster_than_it_is_heard_leaves_a_gap_and_not_a_wrong_mirror() -> None:
    rig = Rig(16, num_tiers=1)
    watcher = Watcher(rig)
    engine = rig.engine()
    watcher.check()
    rig.tiers[0].holdings = Holdings(max_changes=2)
    engine.store(range(5))
    position = rig.core.books.events.next_sequence
    rig.move()
    assert rig.core.books.events.since(position) is None
    rig.core.below.take_changes()
    walk = IndexWalk(rig.core.books, rig.core.below, lambda _: True, 50)
    assert sum(len(keys) for rows in walk.steps() for keys in rows.values()) == 10
