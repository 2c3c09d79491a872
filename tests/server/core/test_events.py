"""The log of events: what it keeps, and what it says about the rest."""

from __future__ import annotations

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.events import EventLog

SPACE = SpaceName("namespace", "", 0)


def test_who_asks_for_events_that_are_gone_is_told_so() -> None:
    log = EventLog(max_events=3, max_keys=100)
    for number in range(5):
        log.record("stored", SPACE, "store", [b"%d" % number])
    assert [event.keys for event in log.since(3) or ()] == [(b"2",), (b"3",), (b"4",)]
    assert log.since(2) is None
    assert log.since(6) == []


def test_no_more_keys_are_kept_than_the_limit() -> None:
    log = EventLog(max_events=100, max_keys=10)
    for size in (4, 4, 4, 8, 2):
        log.record("removed", SPACE, "evict", [b"key"] * size)
    assert [len(event.keys) for event in log.since(4) or ()] == [8, 2]
    assert log.since(3) is None
    log.record("removed", SPACE, "evict", [b"key"] * 11)
    assert log.since(6) is None, "one event may be more than all that is kept"
    assert log.since(7) == []
