"""What a tier knows of its chunks: in which order they go, each once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary import index as index_module
from kvtier_server.secondary.holdings import Name
from kvtier_server.secondary.index import Index

SPACE = SpaceName("n" * 64, "", 1)
OTHER = SpaceName("m" * 64, "", 1)


def name(number: int, space: SpaceName = SPACE) -> Name:
    return space, number.to_bytes(8, "big")


def filled(count: int) -> Index:
    index = Index()
    for number in range(count):
        index.add(name(number), 1, is_own=True, stamp=number)
    return index


def evict(index: Index, num_bytes: int) -> list[Name]:
    victims = index.victims(num_bytes)
    for victim in victims:
        assert index.remove(victim)
    return victims


def test_the_chunk_used_longest_ago_goes_first_wherever_it_was_stored() -> None:
    index = filled(4)
    index.add(name(9, OTHER), 1, is_own=True, stamp=2)
    index.touch(SPACE, [name(0)[1], name(1)[1]], [12, 11])
    assert evict(index, 5) == [name(2), name(9, OTHER), name(3), name(1), name(0)]


def known(index: Index) -> set[Name]:
    """What the index says that it has, by name."""
    spaces = {space for space, _ in index.names()}
    names = [(space, number.to_bytes(8, "big")) for space in spaces for number in range(100)]
    return {each for each in names if index.knows(each[0], [each[1]])[0]}


def listed(index: Index) -> set[Name]:
    names, end = index.holdings.chunks_from(0, 1_000)
    assert end is None
    assert len(set(names)) == len(names)
    return set(names)


def test_what_is_found_written_down_replaced_and_forgotten_is_told_once_and_listed() -> None:
    index = Index()
    index.add_if_new(name(1), 1, is_own=False)
    index.add_if_new(name(1), 1, is_own=False)
    index.restore(name(1), 1, is_own=True)
    index.restore(name(2), 1, is_own=False)
    index.add(name(2), 1, is_own=False, stamp=3)
    index.add_if_new(name(3, OTHER), 1, is_own=False)
    index.limit_others(1)
    index.remove(name(1), "corrupt")
    changes = index.holdings.get_changes(100)
    assert changes is not None
    assert [(change.is_held, change.key[-1], change.reason) for change in changes] == [
        (True, 1, "found"),
        (True, 2, "found"),
        (True, 3, "found"),
        (False, 2, "forgotten"),
        (False, 1, "corrupt"),
    ]
    assert listed(index) == known(index) == {name(3, OTHER)}


def test_a_victim_is_named_once_also_when_places_are_swept_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "STALE_PLACES", 0)
    index = filled(20)
    for number in range(10, 20):
        index.remove(name(number))
    taken = index.victims(3)
    index.sweep()
    assert taken == [name(0), name(1), name(2)]
    assert index.victims(3) == [name(3), name(4), name(5)]


def test_a_victim_that_was_stored_again_meanwhile_is_not_put_back_twice() -> None:
    index = filled(3)
    (victim,) = index.victims(1)
    index.remove(victim)
    index.add(victim, 1, is_own=True, stamp=7)
    index.keep([victim])
    assert evict(index, 10) == [name(1), name(2), name(0)]


def test_what_cannot_be_removed_is_where_it_was() -> None:
    index = filled(3)
    index.keep(index.victims(2))
    assert index.victims(3) == [name(0), name(1), name(2)]


def test_uses_that_nobody_settles_take_a_bounded_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_TOUCHED_KEYS", 10)
    index = filled(8)
    for stamp in range(100, 200):
        index.touch(SPACE, [name(stamp % 8)[1]] * 2, [stamp] * 2)
    # The last ten keys: five uses.
    assert evict(index, 3) == [name(0), name(1), name(2)]


Step = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 9)),
    st.tuples(st.just("use"), st.integers(0, 9)),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.tuples(st.just("evict"), st.integers(1, 3)),
    st.tuples(st.just("keep"), st.integers(1, 3)),
    st.tuples(st.just("sweep"), st.just(0)),
)


@given(st.lists(Step, max_size=60))
def test_the_order_is_that_of_a_list_sorted_by_last_use(steps: list[tuple[str, int]]) -> None:
    index, model = Index(), dict[int, int]()
    for stamp, (what, number) in enumerate(steps):
        key = name(number)[1]
        if what == "add":
            index.add(name(number), 1, is_own=True, stamp=stamp)
            model[number] = stamp
        elif what == "use":
            index.touch(SPACE, [key], [stamp])
            if number in model:
                model[number] = stamp
        elif what == "remove":
            assert index.remove(name(number)) == (model.pop(number, None) is not None)
        elif what == "sweep":
            index.settle()
            index.sweep()
        else:
            oldest = sorted(model, key=lambda other: model[other])[:number]
            victims = index.victims(number)
            assert victims == [name(each) for each in oldest]
            if what == "evict":
                for each in oldest:
                    assert index.remove(name(each))
                    del model[each]
            else:
                index.keep(victims)
    assert len(index) == index.own_bytes == len(model)
    assert listed(index) == known(index)
    assert index.names() == [name(each) for each in sorted(model, key=lambda other: model[other])]
