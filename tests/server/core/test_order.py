"""The order of eviction as requests make it, and the events that tell of it."""

from __future__ import annotations

from kvtier_server.core.limits import Limits

from .engine import to_keys
from .rig import Rig


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
    for number in range(20):
        engine.fill([number])
        rig.core.books.events.since(1)  # what is not read may become one event with what follows
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
    for number in range(20, 30):
        engine.fill([number])
        rig.core.books.events.since(1)
    assert rig.core.books.events.since(1) is None, "they are gone, and it is said"
    assert rig.core.books.events.since(40) is not None
