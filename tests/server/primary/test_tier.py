"""The primary tier as a policy sees it: what it is told, when, and that it is never asked for the pinned."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_ops.namespace import SpaceName
from kvtier_server.policies.base import ChunkId, MayEvict
from kvtier_server.policies.lru import LruPolicy
from kvtier_server.primary import tier as primary
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.primary.size_classes import SizeClass
from kvtier_server.primary.tier import PrimaryTier

from ..core.slots_in_memory import SlotsInMemory, State


class ListeningPolicy(LruPolicy):
    """Least recently used, and a list of what it was told."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.told: list[str] = []

    def incoming(self, chunk_ids: Sequence[ChunkId]) -> None:
        self.told.append(f"incoming {len(chunk_ids)}")

    def touch(self, chunk_ids: Sequence[ChunkId], stamps: Sequence[int]) -> None:
        self.told.append(f"touch {len(chunk_ids)}")
        super().touch(chunk_ids, stamps)

    def pin(self, chunk_ids: Sequence[ChunkId]) -> None:
        self.told.append(f"pin {len(chunk_ids)}")
        super().pin(chunk_ids)

    def unpin(self, chunk_ids: Sequence[ChunkId]) -> None:
        self.told.append(f"unpin {len(chunk_ids)}")
        super().unpin(chunk_ids)

    def evict(self, count: int, may_evict: MayEvict | None = None) -> list[ChunkId]:
        self.told.append(f"evict {count}")
        return super().evict(count, may_evict)


class Tier:
    """A tier of 16 one-unit slots with one key space."""

    def __init__(self) -> None:
        self.table = SlotsInMemory(16)
        self.removed: list[tuple[bytes, str]] = []
        self.tier = PrimaryTier(16 * 4096, self.table, ListeningPolicy, self._note_removed)
        self.tier.slabs.backed_bytes = 16 * 4096
        size_class = self.tier.slabs.size_class(4096)
        assert size_class is not None
        self.size_class: SizeClass = size_class
        self.space = self.tier.spaces.get_or_add(SpaceName("ns", "", 0))

    @property
    def policy(self) -> ListeningPolicy:
        policy = self.size_class.policy
        assert isinstance(policy, ListeningPolicy)
        return policy

    def _note_removed(self, space: KeySpace, keys: Sequence[bytes], reason: str) -> None:
        assert space is self.space
        self.removed.extend((key, reason) for key in keys)

    def store(self, number: int, user: object = None) -> Chunk | None:
        """Reserve and publish; None if there was no slot."""
        key = b"key%05d" % number
        reserved = self.tier.reserve(self.size_class, 1, 7, lambda: [self.space.chunk_id(key)], user)
        if not reserved.slot_ids:
            return None
        ((slot_id,), (generation,)) = (reserved.slot_ids, reserved.generations)
        stamp = self.tier.issue_stamps(1)
        return self.tier.publish(self.space, key, slot_id, generation, self.size_class, [0], stamp, user)

    def stored(self, *numbers: int) -> list[Chunk]:
        chunks = [self.store(number) for number in numbers]
        return [chunk for chunk in chunks if chunk is not None]


def test_a_pinned_chunk_is_never_a_victim() -> None:
    tier = Tier()
    chunks = tier.stored(*range(16))
    tier.tier.pin(chunks[:4])
    tier.stored(*range(100, 112))
    assert not any(chunk.dropped for chunk in chunks[:4])
    assert all(chunk.dropped for chunk in chunks[4:])
    tier.tier.unpin(chunks[:4])
    tier.stored(*range(200, 216))
    assert all(chunk.dropped for chunk in chunks)
    tier.tier.check_integrity()


def test_when_all_is_pinned_nothing_is_granted() -> None:
    tier = Tier()
    tier.tier.pin(tier.stored(*range(16)))
    assert tier.store(99) is None
    assert tier.removed == []
    tier.tier.check_integrity()


def test_a_chunk_that_was_pinned_and_unpinned_in_between_costs_the_policy_nothing() -> None:
    tier = Tier()
    chunks = tier.stored(0, 1, 2)
    tier.policy.told.clear()
    tier.tier.pin(chunks)
    tier.tier.unpin(chunks)
    tier.tier.settle()
    assert not tier.tier.has_unsettled
    assert tier.policy.told == []


def test_the_policy_is_in_step_before_it_is_asked_for_a_victim() -> None:
    tier = Tier()
    chunks = tier.stored(*range(16))
    tier.policy.told.clear()
    tier.tier.use("request", chunks[:1], [tier.tier.issue_stamps(1)])
    tier.tier.pin(chunks[1:3])
    assert tier.policy.told == [], "not before it is needed"
    tier.store(50)
    assert tier.policy.told == ["touch 1", "pin 2", "incoming 1", "evict 1"]
    assert [chunk.dropped for chunk in chunks[:4]] == [False, False, False, True]


@pytest.mark.parametrize("prefers_below", [False, True])
def test_a_request_whose_own_chunks_are_the_coldest_is_refused_after_so_many_of_them(
    monkeypatch: pytest.MonkeyPatch, prefers_below: bool
) -> None:
    monkeypatch.setattr(primary, "EXCUSED_OWN", 4)
    tier = Tier()
    tier.tier.prefers_below = prefers_below
    for number in range(12):
        tier.store(number, "endless")
    others = tier.stored(*range(100, 104))
    looked_at: list[ChunkId] = []
    of = tier.tier.spaces.of

    def counted(chunk_id: ChunkId) -> tuple[KeySpace, bytes]:
        looked_at.append(chunk_id)
        return of(chunk_id)

    monkeypatch.setattr(tier.tier.spaces, "of", counted)
    assert tier.store(200, "endless") is None
    assert len(looked_at) == 4 * (1 + prefers_below)
    assert tier.removed == []
    tier.tier.check_integrity()
    assert tier.store(201) is not None, "others have its chunks evicted"
    assert not any(chunk.dropped for chunk in others)


def test_what_is_kept_for_a_user_is_evicted_for_others_only() -> None:
    tier = Tier()
    chunks = tier.stored(*range(16))
    first = tier.tier.issue_stamps(2)
    tier.tier.use("somebody", chunks[:2], [first, first + 1])
    tier.tier.keep_for("request", chunks[:2])
    for number in range(100, 120):
        tier.store(number, "request")
    assert [chunk.dropped for chunk in chunks] == [False] * 2 + [True] * 14
    tier.stored(*range(200, 216))
    assert all(chunk.dropped for chunk in chunks)


def test_a_dropped_chunk_is_gone_at_once_and_its_slot_with_the_last_pin() -> None:
    tier = Tier()
    (chunk, other) = tier.stored(0, 1)
    tier.tier.pin([chunk])
    assert tier.tier.drop([chunk, chunk, other], "clear") == [chunk, other]
    assert not tier.space.chunks
    assert tier.removed == [(chunk.key, "clear"), (other.key, "clear")]
    assert tier.table.record(chunk.slot_id).state is State.PUBLISHED, "a load may be reading it"
    assert tier.table.record(other.slot_id).state is State.FREE
    assert tier.table.record(other.slot_id).generation > other.generation, "late readers fail"
    tier.tier.check_integrity()
    tier.tier.unpin([chunk])
    assert tier.table.record(chunk.slot_id).state is State.FREE
    tier.tier.check_integrity()


def test_a_condemned_slot_is_not_used_again_before_its_quarantine_and_its_last_pin_have_ended() -> None:
    tier = Tier()
    (chunk,) = tier.stored(0)
    tier.tier.pin([chunk])
    tier.tier.condemn(chunk, 0)
    tier.tier.condemn(chunk, 0)
    tier.tier.unpin([chunk])
    tier.tier.check_integrity()
    tier.stored(*range(1, 60))
    assert tier.table.record(chunk.slot_id).state is State.QUARANTINED
    assert tier.size_class.num_quarantined == 1
    assert tier.tier.drop([chunk], "clear") == []
    tier.tier.unpin([chunk])
    assert (tier.table.record(chunk.slot_id).state, tier.size_class.num_quarantined) == (State.FREE, 0)
    tier.tier.check_integrity()


def test_a_key_may_come_back_while_its_dropped_chunk_is_still_pinned() -> None:
    tier = Tier()
    (old,) = tier.stored(0)
    tier.tier.pin([old])
    tier.tier.drop([old], "clear")
    new = tier.store(0)
    assert new is not None
    assert new.slot_id != old.slot_id
    tier.tier.unpin([old])
    tier.tier.check_integrity()
    assert tier.space.chunks == {new.key: new}


@pytest.mark.parametrize("slot_id", [-1, 16, 1 << 60])
def test_a_number_that_is_no_slots_has_no_generation(slot_id: int) -> None:
    tier = Tier()
    assert tier.tier.generation(0) is None, "no slab is anybody's yet"
    tier.stored(0)
    assert tier.tier.generation(slot_id) is None
    assert tier.tier.generation(0) is not None


@given(
    st.lists(
        st.tuples(st.sampled_from(["store", "pin", "unpin", "use", "drop", "settle"]), st.integers(0, 20)),
        max_size=60,
    )
)
def test_states_pins_and_order_add_up_after_any_calls(calls: list[tuple[str, int]]) -> None:
    tier = Tier()
    pinned: list[Chunk] = []
    for call, number in calls:
        chunk = tier.space.chunks.get(b"key%05d" % number)
        match call:
            case "store" if chunk is None:
                tier.store(number, number % 3)
            case "pin" if chunk is not None:
                tier.tier.pin([chunk])
                pinned.append(chunk)
            case "unpin" if pinned:
                tier.tier.unpin([pinned.pop(number % len(pinned))])
            case "use" if chunk is not None:
                tier.tier.use(number % 3, [chunk, None], [tier.tier.issue_stamps(2), 0])
            case "drop" if chunk is not None:
                tier.tier.drop([chunk], "clear")
            case _:
                tier.tier.settle(1)
        assert not any(chunk.dropped for chunk in pinned if tier.space.chunks.get(chunk.key) is chunk)
        tier.tier.check_integrity()
    tier.tier.unpin(pinned)
    tier.tier.check_integrity()
    assert not any(chunk.pins for chunk in tier.tier.by_slot.values())
