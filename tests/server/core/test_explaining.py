"""Why a key hits or misses: every way a key can be, told as it is, and nothing changed by asking."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvtier_server.core.explaining import KeyExplanation
from kvtier_server.core.limits import Limits
from kvtier_server.core.refused import BadRequest

from .engine import MISS, PENDING, Engine, facts, to_keys
from .rig import Rig
from .test_below import store_and_evict
from .test_evicting import evict


def explain(rig: Rig, engine: Engine, numbers: Sequence[int] = (1,)) -> list[KeyExplanation]:
    digest = engine.namespace.digest()
    asked = rig.core.explainer.begin(digest[:12], engine.tenant, to_keys(numbers), rig.clock.now_ns)
    for _ in asked.steps:
        rig.check()
    return asked.keys


def verdict(rig: Rig, engine: Engine) -> str:
    (told,) = explain(rig, engine)
    return str(told.verdict)


def details(rig: Rig, engine: Engine) -> str:
    (told,) = explain(rig, engine)
    return "\n".join(told.details)


def test_a_key_that_nobody_named_was_never_seen() -> None:
    rig = Rig(64)
    engine = rig.engine()
    assert verdict(rig, engine) == "never seen"
    assert details(rig, engine) == (
        "primary: not resident\nno event of it: the log of events has everything since the daemon's start"
    )


def test_a_resident_chunk_is_told_with_its_slot_its_pins_and_when_it_came() -> None:
    rig = Rig(64)
    engine = rig.engine()
    rig.tick()
    engine.store([1])
    rig.tick(12.5)
    (slot_id,) = rig.resident().values()
    engine.lookup(to_keys([1]), lease=engine.new_lease_id())
    assert verdict(rig, engine) == "resident"
    generation = rig.slots.record(slot_id).generation
    assert details(rig, engine).splitlines() == [
        f"primary: resident in slot {slot_id}, published, generation {generation}, pinned 1 times",
        "primary: stored (store) 12.5 s ago",
    ]


def test_a_store_under_way_is_pending_and_names_its_engine() -> None:
    rig = Rig(64)
    engine, other = rig.engine("writer"), rig.engine("reader")
    engine.prepare_store(to_keys([1]))
    rig.tick(3)
    assert verdict(rig, other) == "pending"
    assert "pending: engine 'writer' has been storing it for 3.0 s" in details(rig, other)
    rig.tick(400)
    assert "longer than its lease: it will not be published" in details(rig, other)


def test_what_a_dead_engine_was_writing_is_quarantined_with_its_name() -> None:
    rig = Rig(64)
    engine, other = rig.engine("writer"), rig.engine("reader")
    engine.prepare_store(to_keys([1]))
    engine.die(locks_freed=False)
    assert verdict(rig, other) == "quarantined"
    assert "engine 'writer' ended while it wrote it; the slot waits for its processes" in details(rig, other)
    for process in engine.processes:
        rig.locks.free(process.lock_file)
    rig.tick()
    assert verdict(rig, other) == "never seen"


def test_a_chunk_that_rotted_is_quarantined_and_says_so() -> None:
    rig = Rig(64)
    engine = rig.engine()
    engine.store([1])
    chunk = next(iter(rig.core.books.primary.by_slot.values()))
    rig.core.books.primary.condemn(chunk, owner=0)
    assert verdict(rig, engine) == "quarantined"
    assert "primary: removed (corrupt) 0.0 s ago" in details(rig, engine)


def test_a_filtered_chunk_says_how_often_it_was_offered_and_asking_is_no_offer() -> None:
    rig = Rig(64, reuse_threshold=3)
    engine = rig.engine()
    for number in range(2):
        engine.lookup(to_keys([1]), f"r{number}")
        for _ in range(3):
            assert verdict(rig, engine) == "filtered"
    assert "admission: offered 2 times, stored from 3 on" in details(rig, engine)
    engine.lookup(to_keys([1]), "r3")
    assert verdict(rig, engine) == "wanted"


def test_asking_is_no_use() -> None:
    rig = Rig(64)
    engine = rig.engine()
    for number in (1, 2):
        engine.store([number], f"r{number}")
        engine.finish(f"r{number}")
    explain(rig, engine, [1])
    evict(rig, 1)
    assert verdict(rig, engine) == "evicted", "it was the coldest before it was asked about"


def test_what_went_is_told_with_the_reason_and_the_time() -> None:
    rig = Rig(64)
    engine = rig.engine()
    engine.store([1])
    engine.finish()
    evict(rig, 1)
    rig.tick(60)
    assert verdict(rig, engine) == "evicted"
    assert "primary: removed (admin) 60.0 s ago" in details(rig, engine)
    engine.store([1], "again")
    engine.finish("again")
    for _ in rig.core.clearings.begin("", None, "primary", lambda: None).pool:
        pass
    assert verdict(rig, engine) == "dropped"
    assert "primary: removed (clear) 0.0 s ago" in details(rig, engine)
    assert "admin" not in details(rig, engine), "the last one counts"


def test_a_log_that_has_forgotten_says_how_far_back_it_goes() -> None:
    rig = Rig(64, limits=Limits(max_events=3))
    engine = rig.engine()
    rig.tick()
    for number in range(5):
        engine.store([number], f"r{number}")
        rig.tick(10)
    (told,) = explain(rig, engine, [77])
    assert told.verdict == "never seen"
    assert told.details[-1] == "no event of it: the log of events goes back 30.0 s"


def test_a_log_that_was_cut_does_not_claim_to_know_all() -> None:
    rig = Rig(64)
    engine = rig.engine()
    rig.core.books.events.forget_all()
    (told,) = explain(rig, engine, [77])
    assert told.details[-1] == "no event of it: the log of events was cut, and nothing has happened since"


def test_a_chunk_of_a_lower_tier_is_resident_there_and_pending_on_its_way_up() -> None:
    rig = Rig(64, num_tiers=2)
    engine = rig.engine()
    store_and_evict(rig, engine, range(1, 2))
    assert verdict(rig, engine) == "resident"
    lines = details(rig, engine).splitlines()
    assert lines[:3] == ["primary: not resident", "tier0: has it", "tier1: has it"]
    assert engine.lookup(to_keys([1]), lease=engine.new_lease_id(), wait_s=1).statuses == [PENDING]
    assert "pending: tier tier0 is to bring it up: it is being read" in details(rig, engine)
    rig.move()
    assert "primary: stored (promotion) 0.0 s ago" in details(rig, engine)


def test_a_shared_tier_does_not_claim_to_know() -> None:
    rig = Rig(64, num_tiers=1, shared_tiers=True)
    engine = rig.engine()
    assert verdict(rig, engine) == "never seen"
    assert "tier0: may have it, others store there too; a lookup asks" in details(rig, engine)


def test_a_request_is_told_where_its_hits_end_and_why() -> None:
    rig = Rig(64)
    engine = rig.engine()
    engine.store(range(4))
    digest = engine.namespace.digest()
    asked = rig.core.explainer.begin(digest, "", to_keys([0, 1, 9, 3, 0]), rig.clock.now_ns)
    for _ in asked.steps:
        pass
    assert asked.num_leading_hits == 2
    assert asked.verdict == "never seen"
    assert [str(key.verdict) for key in asked.keys] == [
        "resident",
        "resident",
        "never seen",
        "resident",
        "resident",
    ]


def test_what_a_reset_has_made_unreachable_is_stale_and_no_hit() -> None:
    rig = Rig(64)
    engine = rig.engine()
    engine.store([1])
    engine.finish()
    engine.reset()
    assert engine.hits([1]) == []
    assert verdict(rig, engine) == "stale"
    assert "; of epoch 0, in which no engine is any more" in details(rig, engine)
    engine.store([1], "again")
    assert verdict(rig, engine) == "resident"
    assert details(rig, engine).count("primary: resident in slot") == 2
    engine.die()
    rig.tick()
    assert verdict(rig, engine) == "resident", "nobody is attached, so it depends on who comes"


def test_the_chunk_of_another_tenant_is_another_chunk() -> None:
    rig = Rig(64)
    engine, other = rig.engine("a", tenant="mine"), rig.engine("b", tenant="yours")
    engine.store([1])
    assert (verdict(rig, engine), verdict(rig, other)) == ("resident", "never seen")
    assert other.statuses(to_keys([1])) == [MISS]


@pytest.mark.parametrize(
    ("namespace", "tenant", "key", "message"),
    [
        ("", "", b"12345", "namespace: none is given; there are "),
        ("zz", "", b"12345", "namespace: no namespace of the pool begins with 'zz'; there are "),
        ("0" * 32, "", b"12345", "namespace: no namespace of the pool begins with '000"),
        (facts().digest(), "nobody", b"12345", "tenant: .* 'nobody'; there are ''"),
        (facts().digest(), "", b"1234", r"keys\[0\]: 4 bytes; 5 to 128 are allowed"),
    ],
)
def test_a_mistake_is_refused_with_the_field_and_what_there_is(
    namespace: str, tenant: str, key: bytes, message: str
) -> None:
    rig = Rig(64)
    rig.engine()
    with pytest.raises(BadRequest, match=message):
        rig.core.explainer.begin(namespace, tenant, [key], rig.clock.now_ns)


def test_a_namespace_that_only_a_tier_may_know_is_asked_for_there() -> None:
    rig = Rig(64, num_tiers=1)
    asked = rig.core.explainer.begin("0" * 32, "", to_keys([1]), rig.clock.now_ns)
    for _ in asked.steps:
        pass
    assert asked.verdict == "never seen"
    assert asked.keys[0].details[0].startswith("namespace: the pool has nothing of it")
