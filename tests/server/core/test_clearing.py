"""What an operator clears is gone from the pool and the tiers, and nothing is taken out of a hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvtier_server.core.below import MAX_CLEARS
from kvtier_server.core.clearing import CannotClear, Clearing
from kvtier_server.core.refused import BadRequest, Inflight

from .engine import HIT, MISS, PENDING, facts, to_keys
from .rig import Rig
from .test_below import push_out, resolved, store_and_evict


@pytest.fixture
def rig() -> Rig:
    return Rig(64, num_tiers=2)


def clear(rig: Rig, tier: str = "", namespace: str = "", tenant: str | None = None) -> Clearing:
    """Clear, and do what tiers do meanwhile."""
    clearing = rig.core.clearings.begin(namespace, tenant, tier, lambda: None)
    for _ in clearing.pool:
        rig.check()
    finish(rig)
    return clearing


def finish(rig: Rig) -> None:
    for tier in rig.tiers:
        while tier.clearing:
            tier.finish_clear()
    rig.core.below.collect(rig.clock.now_ns)
    rig.check()


def counts(clearing: Clearing) -> dict[str, tuple[int, int]]:
    """Removed and kept by tier; all must be over."""
    assert clearing.is_over
    return {tier.tier: (tier.num_removed, tier.num_kept) for tier in clearing.tiers}


def removals(rig: Rig) -> list[tuple[str, str, int]]:
    events = rig.core.books.events.since(1)
    assert events is not None
    return [(event.tier, event.reason, len(event.keys)) for event in events if event.kind == "removed"]


def test_everything_goes_from_the_pool_and_every_tier_and_events_say_so(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(5))
    engine.finish()
    rig.move()
    clearing = clear(rig)
    assert counts(clearing) == {"primary": (5, 0), "tier0": (5, 0), "tier1": (5, 0)}
    assert clearing.tiers[0].removed_bytes == 5 * 4096
    told = removals(rig)
    assert sorted(set(told)) == [("primary", "clear", 5), ("tier0", "clear", 5), ("tier1", "clear", 5)]
    assert engine.hits(range(5)) == []
    assert rig.core.books.counts["removed:clear"] == 5
    assert rig.core.below.tiers[0].counts["removed:clear"] == 5
    rig.assert_nothing_is_held()
    engine.store(range(5), "again")
    assert engine.hits(range(5)) == [0, 1, 2, 3, 4]


def test_what_a_lease_holds_stays_and_is_counted(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(5))
    rig.move()
    lease = engine.new_lease_id()
    assert engine.lookup(to_keys(range(2)), lease=lease).statuses == [HIT] * 2
    assert counts(clear(rig, "primary")) == {"primary": (3, 2)}
    assert engine.hits(range(5)) == [0, 1]
    engine.release(lease)
    assert counts(clear(rig, "primary")) == {"primary": (2, 0)}


def test_what_is_being_written_down_is_held_and_is_gone_from_the_tier_in_the_end(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(3))
    rig.pump()
    rig.tiers[0].step()  # in the middle of the first chunk
    clearing = rig.core.clearings.begin("", None, "", lambda: None)
    for _ in clearing.pool:
        pass
    assert (clearing.tiers[0].num_removed, clearing.tiers[0].num_kept) == (0, 3)
    assert not any(tier.clearing for tier in rig.tiers), "what is under way would undo it"
    rig.move()
    finish(rig)
    assert counts(clearing) == {"primary": (0, 3), "tier0": (3, 0), "tier1": (3, 0)}
    assert not any(tier.stored for tier in rig.tiers)


def test_what_waits_to_go_down_does_not_any_more_and_what_comes_later_does(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(3))
    clearing = clear(rig, "tier0")
    engine.store(range(3, 5), "later")
    rig.move()
    assert counts(clearing) == {"tier0": (0, 0)}
    assert {key for _, key in rig.tiers[0].stored} == set(to_keys(range(3, 5)))
    assert {key for _, key in rig.tiers[1].stored} == set(to_keys(range(5)))
    assert rig.core.below.tiers[0].counts["dropped:cleared"] == 3


def test_what_comes_up_to_somebody_comes(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(2))
    rig.tiers[1].refuses = True
    answer = engine.lookup(to_keys(range(2)), lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [PENDING] * 2
    clearing = clear(rig, "primary")
    assert counts(clearing)["primary"][1] == 2
    rig.move()
    assert resolved(rig) == dict.fromkeys(to_keys(range(2)), HIT)
    rig.check()


def test_tenant_and_namespace_narrow_it(rig: Rig) -> None:
    mine = rig.engine("a", tenant="mine")
    yours = rig.engine("b", tenant="yours")
    other = rig.engine("c", facts("other"), tenant="mine")
    for engine in (mine, yours, other):
        engine.store(range(2))
        engine.finish()
    rig.move()
    digest = mine.namespace.digest()
    assert counts(clear(rig, namespace=digest[:12], tenant="mine")) == {
        "primary": (2, 0),
        "tier0": (2, 0),
        "tier1": (2, 0),
    }
    assert (mine.hits(range(2)), yours.hits(range(2)), other.hits(range(2))) == ([], [0, 1], [0, 1])
    assert counts(clear(rig, "tier1", tenant="mine")) == {"tier1": (2, 0)}
    assert counts(clear(rig, "primary", namespace=digest)) == {"primary": (2, 0)}
    assert other.hits(range(2)) == [0, 1]


@pytest.mark.parametrize(
    ("tier", "namespace", "message"),
    [
        ("disk", "", "there is no tier 'disk'; tiers are primary, tier0, tier1"),
        ("", "zz", "no namespace of the pool begins with 'zz'"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_dropped(
    rig: Rig, tier: str, namespace: str, message: str
) -> None:
    engine = rig.engine()
    engine.store(range(2))
    with pytest.raises(BadRequest, match=message):
        clear(rig, tier, namespace)
    assert engine.hits(range(2)) == [0, 1]


def test_a_beginning_of_two_namespaces_is_refused_with_both(rig: Rig) -> None:
    engines = [rig.engine(f"e{number}", facts(f"model-{number}")) for number in range(17)]
    digests = sorted(engine.namespace.digest() for engine in engines)
    shared = next(a[0] for a, b in pairwise(digests) if a[0] == b[0])
    with pytest.raises(BadRequest, match="write more digits"):
        clear(rig, namespace=shared)


def test_a_namespace_that_only_a_tier_may_know_is_named_by_all_its_digits(rig: Rig) -> None:
    assert set(counts(clear(rig, namespace="0" * 32)).values()) == {(0, 0)}


def test_a_tier_that_cannot_remove_is_refused_by_name_and_left_out_of_all(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.tiers[0], "can_clear", False)
    engine = rig.engine()
    engine.store(range(2))
    rig.move()
    with pytest.raises(CannotClear, match="'tier0' has no way to remove chunks"):
        clear(rig, "tier0")
    clearing = clear(rig)
    assert counts(clearing) == {"primary": (2, 0), "tier0": (0, 0), "tier1": (2, 0)}
    assert [bool(tier.problem) for tier in clearing.tiers] == [False, True, False]


def test_more_clearings_than_may_wait_are_refused_and_the_others_end(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(3))
    rig.pump()
    waiting = [rig.core.clearings.begin("", None, "tier0", lambda: None) for _ in range(MAX_CLEARS)]
    with pytest.raises(Inflight, match="64 clearings wait for tier tier0"):
        rig.core.clearings.begin("", None, "tier0", lambda: None)
    assert not any(clearing.is_over for clearing in waiting)
    rig.move()
    finish(rig)
    assert all(clearing.is_over for clearing in waiting)
    assert counts(clear(rig, "tier0")) == {"tier0": (0, 0)}


def test_a_large_pool_is_cleared_in_slices() -> None:
    rig = Rig(2_048)
    engine = rig.engine()
    for first in range(0, 1_024, 64):
        engine.store(range(first, first + 64), f"r{first}")
        engine.finish(f"r{first}")
    clearing = rig.core.clearings.begin("", None, "", lambda: None)
    removed = [clearing.tiers[0].num_removed for _ in clearing.pool]
    assert removed == [256, 512, 768, 1_024]
    push_out(rig, engine)
    rig.check()


def test_what_is_being_cleared_below_neither_comes_up_nor_goes_down_meanwhile(rig: Rig) -> None:
    engine = rig.engine()
    store_and_evict(rig, engine, range(3))
    clearing = rig.core.clearings.begin("", None, "", lambda: None)
    for _ in clearing.pool:
        pass
    answer = engine.lookup(to_keys(range(3)), "early", lease=engine.new_lease_id(), wait_s=1)
    assert answer.statuses == [MISS] * 3
    engine.store(range(10, 12), "late")
    rig.pump()
    assert not any(tier.running for tier in rig.tiers)
    finish(rig)
    assert clearing.is_over
    assert engine.hits(range(12)) == [10, 11]
    engine.store(range(20, 22), "later")
    rig.move()
    assert len(rig.tiers[0].stored) == 2, "and then it does again"


def test_a_pool_that_is_cleared_is_cleared_before_the_tiers_begin(rig: Rig) -> None:
    engine = rig.engine()
    engine.store(range(3))
    engine.finish()
    rig.move()
    clearing = rig.core.clearings.begin("", None, "", lambda: None)
    assert not any(tier.clearing for tier in rig.tiers)
    for _ in clearing.pool:
        pass
    assert all(tier.clearing for tier in rig.tiers)
    finish(rig)


def test_clearings_whose_chunks_have_all_left_the_queue_keep_nobody_waiting(rig: Rig) -> None:
    engine = rig.engine()
    for number in range(MAX_CLEARS + 1):
        engine.store([number], f"r{number}")
        engine.finish(f"r{number}")
        clear(rig)
        rig.pump()
