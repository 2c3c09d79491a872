"""What an operator evicts is what was used longest ago, and nothing is taken out of a hand."""

from __future__ import annotations

import pytest

from kvtier_server.core.below import MAX_CLEARS
from kvtier_server.core.evicting import STEP_CHUNKS, CannotEvict, Eviction
from kvtier_server.core.refused import BadRequest, Inflight
from kvtier_server.secondary.base import EvictJob

from .engine import HIT, Engine, facts, to_keys
from .rig import Rig
from .test_clearing import finish, removals

SLOT = 4096


def evict(rig: Rig, num_bytes: int, tier: str = "") -> Eviction:
    """Evict, and do what tiers do meanwhile."""
    eviction = rig.core.evictions.begin(num_bytes, tier, lambda: None)
    for _ in eviction.pool:
        rig.check()
    finish(rig)
    return eviction


def counts(eviction: Eviction) -> tuple[int, int, int]:
    """Chunks and bytes that went, chunks that stay because something holds them; it must be over."""
    assert eviction.is_over
    return eviction.num_evicted, eviction.evicted_bytes, eviction.num_kept


def num_resident(rig: Rig, engine: Engine) -> int:
    """Count without a use, which would change what goes next."""
    return sum(space == engine.space for space, _ in rig.resident())


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_the_chunks_used_longest_ago_go_and_whole_slots_only(policy: str) -> None:
    rig = Rig(64, policy=policy)
    engine = rig.engine()
    for number in range(6):
        engine.store([number], f"r{number}")
        engine.finish(f"r{number}")
    assert counts(evict(rig, 2 * SLOT + 1)) == (3, 3 * SLOT, 0)
    assert engine.hits(range(6)) == [3, 4, 5]
    assert rig.core.books.counts["removed:admin"] == 3
    assert {(tier, reason) for tier, reason, _ in removals(rig)} == {("primary", "admin")}
    rig.assert_nothing_is_held()
    engine.store(range(3), "again")
    assert engine.hits(range(6)) == list(range(6))


def test_what_a_lease_holds_stays_and_is_counted() -> None:
    rig = Rig(64)
    engine = rig.engine()
    engine.store(range(5))
    lease = engine.new_lease_id()
    assert engine.lookup(to_keys(range(2)), lease=lease).statuses == [HIT] * 2
    assert counts(evict(rig, 1 << 40)) == (3, 3 * SLOT, 2)
    assert engine.hits(range(5)) == [0, 1]
    engine.release(lease)
    assert counts(evict(rig, 1)) == (1, SLOT, 0)


def test_what_a_copy_to_a_tier_reads_stays_until_it_is_over() -> None:
    rig = Rig(64, num_tiers=1)
    engine = rig.engine()
    engine.store(range(3))
    rig.pump()
    rig.tiers[0].step()
    assert counts(evict(rig, 1 << 40))[0] == 0
    rig.move()
    assert counts(evict(rig, 1 << 40)) == (3, 3 * SLOT, 0)
    assert len(rig.tiers[0].stored) == 3


def test_of_several_size_classes_the_coldest_chunk_of_all_goes_first() -> None:
    rig = Rig(128)
    small = rig.engine("small", facts("a", (1,)))
    large = rig.engine("large", facts("b", (2,)))
    small.store(range(3), "first")
    large.store(range(3), "second")
    small.store(range(3, 6), "third")
    for engine in (small, large):
        for request in ("first", "second", "third"):
            engine.finish(request)
    assert counts(evict(rig, 3 * SLOT))[0] == 3
    assert (num_resident(rig, small), num_resident(rig, large)) == (3, 3)
    assert counts(evict(rig, SLOT)) == (1, 2 * SLOT, 0), "a whole slot, though half of it would do"
    assert (num_resident(rig, small), num_resident(rig, large)) == (3, 2)


def test_a_large_eviction_goes_in_steps_and_what_comes_meanwhile_is_not_meant() -> None:
    rig = Rig(1_024)
    engine = rig.engine()
    for first in range(0, 512, 64):
        engine.store(range(first, first + 64), f"r{first}")
        engine.finish(f"r{first}")
    eviction = rig.core.evictions.begin(1 << 60, "primary", lambda: None)
    steps = []
    for number, _ in enumerate(eviction.pool):
        steps.append(eviction.num_evicted)
        if number == 0:
            engine.store(range(1_000, 1_010), "meanwhile")
            engine.finish("meanwhile")
    assert steps == list(range(STEP_CHUNKS, 512 + 1, STEP_CHUNKS))
    assert engine.hits(range(1_000, 1_010)) == list(range(1_000, 1_010))
    rig.check()


def test_a_chunk_pinned_between_two_steps_is_not_taken() -> None:
    rig = Rig(512)
    engine = rig.engine()
    for first in range(0, 256, 64):
        engine.store(range(first, first + 64), f"r{first}")
        engine.finish(f"r{first}")
    eviction = rig.core.evictions.begin(1 << 60, "", lambda: None)
    next(eviction.pool)
    held = engine.hits(range(256))[:5]
    answer = engine.lookup(to_keys(held), "holds", lease=engine.new_lease_id())
    assert answer.statuses == [HIT] * 5
    for _ in eviction.pool:
        rig.check()
    assert counts(eviction) == (251, 251 * SLOT, 5)
    assert engine.hits(range(256)) == held


def test_a_tier_below_evicts_and_says_when_it_is_over() -> None:
    rig = Rig(64, num_tiers=2)
    engine = rig.engine()
    engine.store(range(5))
    engine.finish()
    rig.move()
    ended: list[bool] = []
    eviction = rig.core.evictions.begin(2, "tier1", lambda: ended.append(True))
    assert (list(eviction.pool), eviction.is_over, ended) == ([], False, [])
    finish(rig)
    assert ended == [True]
    assert counts(eviction) == (2, 2, 0)
    assert (len(rig.tiers[0].stored), len(rig.tiers[1].stored)) == (5, 3)
    assert engine.hits(range(5)) == list(range(5)), "the pool keeps its own"
    assert [told for told in removals(rig) if told[1] == "admin"] == [("tier1", "admin", 2)]


def test_what_comes_into_a_tier_after_the_word_is_not_meant() -> None:
    rig = Rig(64, num_tiers=1)
    engine = rig.engine()
    engine.store(range(3))
    engine.finish()
    rig.move()
    held = rig.tiers[0].stats().used_bytes
    asked: list[int] = []
    submit = rig.tiers[0].submit_evict

    def note(job: EvictJob) -> bool:
        asked.append(job.num_bytes)
        return submit(job)

    rig.tiers[0].submit_evict = note  # type: ignore[method-assign]
    rig.core.evictions.begin(1 << 60, "tier0", lambda: None)
    assert asked == [held]


@pytest.mark.parametrize(
    ("num_bytes", "tier", "message"),
    [
        (0, "", "bytes: 0; say how much is to be freed"),
        (1, "disk", "there is no tier 'disk'; tiers are primary, tier0"),
    ],
)
def test_a_mistake_is_refused_before_anything_goes(num_bytes: int, tier: str, message: str) -> None:
    rig = Rig(64, num_tiers=1)
    engine = rig.engine()
    engine.store(range(2))
    with pytest.raises(BadRequest, match=message):
        evict(rig, num_bytes, tier)
    assert engine.hits(range(2)) == [0, 1]


def test_a_tier_without_an_order_is_refused_by_name_and_the_way_out_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(64, num_tiers=1)
    monkeypatch.setattr(rig.tiers[0], "can_evict", False)
    with pytest.raises(CannotEvict, match=r"'tier0' \(stepped\) does not evict .* kvtier admin clear"):
        evict(rig, 1, "tier0")


def test_more_evictions_than_may_wait_are_refused_and_the_others_end() -> None:
    rig = Rig(64, num_tiers=1)
    waiting = [rig.core.evictions.begin(1, "tier0", lambda: None) for _ in range(MAX_CLEARS)]
    with pytest.raises(Inflight, match="64 evictions wait for tier 'tier0'"):
        rig.core.evictions.begin(1, "tier0", lambda: None)
    finish(rig)
    assert all(eviction.is_over for eviction in waiting)
