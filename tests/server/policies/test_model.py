"""Every policy against a naive model: any order of calls, the books checked after each."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvtier_server.policies.base import ChunkId
from kvtier_server.policies.loader import make_policy

# Few chunks, so that evicted ones come back; stamps far apart and close together.
NUMBERS = st.integers(0, 30)
STAMP_STEPS = st.sampled_from([1, 2, 50, 127, 128, 1000])


def to_id(number: int) -> ChunkId:
    return ChunkId(number.to_bytes(8, "big"))


@dataclass(slots=True)
class Held:
    stamp: int
    pinned: bool


class PolicyMachine(RuleBasedStateMachine):
    """What holds for any policy: who is held, who is evictable, how many victims."""

    policy_name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy(self.policy_name, 10)
        self.held: dict[ChunkId, Held] = {}
        self.clock = 1_000
        self.old_stamps: list[int] = []  # issued, never used: for what arrives late

    def issue(self, step: int) -> int:
        self.old_stamps.append(self.clock + 1)
        self.clock += 1 + step
        return self.clock

    def evictable(self) -> list[ChunkId]:
        return [chunk_id for chunk_id, chunk in self.held.items() if not chunk.pinned]

    def pinned(self) -> list[ChunkId]:
        return [chunk_id for chunk_id, chunk in self.held.items() if chunk.pinned]

    @rule(number=NUMBERS, step=STAMP_STEPS, late=st.booleans(), pinned=st.booleans())
    def insert(self, number: int, step: int, late: bool, pinned: bool) -> None:
        chunk_id = to_id(number)
        if chunk_id in self.held:
            return
        stamp = self.old_stamps.pop() if late and self.old_stamps else self.issue(step)
        (self.policy.insert_pinned if pinned else self.policy.insert)(chunk_id, stamp)
        self.held[chunk_id] = Held(stamp, pinned)

    @rule(numbers=st.lists(NUMBERS, unique=True, max_size=6))
    def incoming(self, numbers: list[int]) -> None:
        self.policy.incoming([to_id(n) for n in numbers if to_id(n) not in self.held])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), late=st.booleans())
    def touch(self, data: st.DataObject, late: bool) -> None:
        chunk_ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True, max_size=6))
        stamps = [
            self.old_stamps.pop() if late and self.old_stamps else self.issue(data.draw(STAMP_STEPS))
            for _ in chunk_ids
        ]
        self.policy.touch(chunk_ids, stamps)
        for chunk_id, stamp in zip(chunk_ids, stamps, strict=True):
            self.held[chunk_id].stamp = max(self.held[chunk_id].stamp, stamp)

    @precondition(lambda self: self.evictable())
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        chunk_ids = data.draw(st.lists(st.sampled_from(self.evictable()), unique=True))
        self.policy.pin(chunk_ids)
        for chunk_id in chunk_ids:
            self.held[chunk_id].pinned = True

    @precondition(lambda self: self.pinned())
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        chunk_ids = data.draw(st.lists(st.sampled_from(self.pinned()), unique=True))
        self.policy.unpin(chunk_ids)
        for chunk_id in chunk_ids:
            self.held[chunk_id].pinned = False

    @rule(count=st.integers(0, 8), excused=st.sets(NUMBERS))
    def evict(self, count: int, excused: set[int]) -> None:
        allowed = [c for c in self.evictable() if int.from_bytes(c, "big") not in excused]
        coldest = self.policy.coldest_stamp()
        victims = self.policy.evict(count, lambda c: int.from_bytes(c, "big") not in excused)
        assert len(victims) == len(set(victims)) == min(count, len(allowed))
        assert set(victims) <= set(allowed)
        if victims and not excused:
            assert self.held[victims[0]].stamp == coldest
        self.check_victims(victims, allowed)
        for victim in victims:
            del self.held[victim]

    def check_victims(self, victims: list[ChunkId], allowed: list[ChunkId]) -> None:
        """Say more about a policy whose order is known."""

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        chunk_id = data.draw(st.sampled_from(sorted(self.held)))
        self.policy.remove(chunk_id)
        del self.held[chunk_id]

    @rule(capacity=st.integers(0, 20))
    def set_capacity(self, capacity: int) -> None:
        self.policy.set_capacity(capacity)

    @invariant()
    def the_books_agree(self) -> None:
        self.policy.check_integrity()
        assert len(self.policy) == len(self.evictable())
        assert self.policy.num_pinned == len(self.pinned())
        assert all((chunk_id in self.policy) != chunk.pinned for chunk_id, chunk in self.held.items())
        coldest = self.policy.coldest_stamp()
        stamps = [self.held[chunk_id].stamp for chunk_id in self.evictable()]
        assert coldest in stamps if stamps else coldest is None


class LruMachine(PolicyMachine):
    """LRU is a list sorted by stamp."""

    def check_victims(self, victims: list[ChunkId], allowed: list[ChunkId]) -> None:
        assert victims == sorted(allowed, key=lambda c: self.held[c].stamp)[: len(victims)]


def test_any_order_of_calls_keeps_the_books(policy_name: str) -> None:
    machine = type("Machine", (PolicyMachine,), {"policy_name": policy_name})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=60))


def test_lru_evicts_like_a_list_sorted_by_stamp() -> None:
    run_state_machine_as_test(LruMachine, settings=settings(max_examples=60, stateful_step_count=60))
