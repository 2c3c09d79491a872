"""The mirror's index: events as operations on sets."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvtier.v1 import events_pb2 as pb
from kvtier_client.mirrored_index import MirroredIndex

TIERS = ("primary", "disk", "bucket")
SPACES = (("a", "", 1), ("a", "t", 1), ("b", "", 2))
KINDS = st.sampled_from(
    [pb.EVENT_KIND_STORED] * 4
    + [pb.EVENT_KIND_REMOVED] * 3
    + [pb.EVENT_KIND_CLEARED, pb.EVENT_KIND_UNSPECIFIED]
)
EVENTS = st.lists(
    st.builds(
        lambda kind, space, tier, keys: pb.OffloadingEvent(
            kind=kind, namespace=space[0], tenant=space[1], epoch=space[2], tier=tier, keys=keys
        ),
        KINDS,
        st.sampled_from(SPACES),
        st.sampled_from(TIERS),
        st.lists(st.sampled_from([b"1", b"2", b"3"])),
    )
)


def model_of(events: Sequence[pb.OffloadingEvent]) -> set[tuple[str, str, str, int, bytes]]:
    chunks: set[tuple[str, str, str, int, bytes]] = set()
    for event in events:
        named = {(event.tier, event.namespace, event.tenant, event.epoch, key) for key in event.keys}
        if event.kind == pb.EVENT_KIND_STORED:
            chunks |= named
        elif event.kind == pb.EVENT_KIND_REMOVED:
            chunks -= named
        elif event.kind == pb.EVENT_KIND_CLEARED:
            chunks = {chunk for chunk in chunks if chunk[:2] != (event.tier, event.namespace)}
    return chunks


@given(EVENTS)
def test_it_is_the_set_that_the_events_make(events: list[pb.OffloadingEvent]) -> None:
    index = MirroredIndex()
    index.apply(events)
    model = model_of(events)
    assert sorted(index.chunks()) == sorted(model)
    for tier, count in index.counts().items():
        assert count == sum(chunk[0] == tier for chunk in model)
    for space in SPACES:
        for key in (b"1", b"2", b"3", b"4"):
            assert set(index.tiers_of(space, key)) == {tier for tier in TIERS if (tier, *space, key) in model}


@given(EVENTS, EVENTS)
def test_what_was_applied_already_may_be_applied_again(
    before: list[pb.OffloadingEvent], events: list[pb.OffloadingEvent]
) -> None:
    """A snapshot may have seen what the events after it tell: their last word on a chunk counts."""
    once, twice = MirroredIndex(), MirroredIndex()
    once.apply([*before, *events])
    twice.apply([*before, *events, *events])
    assert set(once.chunks()) == set(twice.chunks())


def test_the_pool_is_named_first() -> None:
    index = MirroredIndex()
    for tier in ("disk", "primary"):
        index.apply(
            [pb.OffloadingEvent(kind=pb.EVENT_KIND_STORED, namespace="a", epoch=1, tier=tier, keys=[b"1"])]
        )
    assert index.tiers_of(("a", "", 1), b"1") == ("primary", "disk")
