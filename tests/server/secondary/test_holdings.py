"""What a tier holds, walked while it changes, against a set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import Change
from kvtier_server.secondary.holdings import Holdings, Name

SPACE = SpaceName("n" * 32, "", 1)


def name(number: int) -> Name:
    return SPACE, number.to_bytes(8, "big")


def apply(changes: list[Change], mirror: set[Name]) -> None:
    for change in changes:
        (mirror.add if change.is_held else mirror.discard)((change.space, change.key))


Step = st.tuples(st.sampled_from(["toggle", "toggle", "toggle", "take", "walk"]), st.integers(0, 15))


@given(st.lists(Step, max_size=20), st.lists(Step, max_size=60), st.integers(1, 4))
def test_a_walk_and_the_changes_taken_since_it_began_are_what_is_held(
    before: list[tuple[str, int]], meanwhile: list[tuple[str, int]], slice_items: int
) -> None:
    holdings, places = Holdings(), dict[int, int]()
    taken: list[Change] = []

    def do(what: str, number: int) -> None:
        if what == "toggle" and number in places:
            holdings.remove(places.pop(number), "evict")
        elif what == "toggle":
            places[number] = holdings.add(name(number), "cascade")
        elif what == "take":
            changes = holdings.get_changes(number)
            assert changes is not None
            taken.extend(changes)

    for step in before:
        do(*step)
    taken.clear()  # what was taken before the walk is no event of it
    seen: set[Name] = set()
    place: int | None = 0
    for what, number in [*meanwhile, *[("walk", 0)] * 40]:
        if what != "walk":
            do(what, number)
        elif place is not None:
            names, place = holdings.chunks_from(place, slice_items)
            seen |= set(names)
    assert place is None
    do("take", 1_000)
    apply(taken, seen)
    assert seen == {name(number) for number in places}


def test_changes_that_nobody_takes_are_dropped_and_it_is_said_once() -> None:
    holdings = Holdings(max_changes=3)
    for number in range(5):
        holdings.add(name(number), "cascade")
    assert holdings.get_changes(10) is None
    changes = holdings.get_changes(10)
    assert changes is not None
    assert [change.key for change in changes] == [name(4)[1]]
    assert holdings.get_changes(10) == []
    assert holdings.chunks_from(0, 10) == ([name(number) for number in range(5)], None)
