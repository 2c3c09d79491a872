"""Who is attached, who may replace whom, and what the end of a session leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts
from kvtier_server.core.instances import (
    RankTaken,
    SessionUnknown,
    TooManyEngines,
    TooManySessions,
    WorkersMissing,
)
from kvtier_server.core.limits import Limits
from kvtier_server.core.namespaces import Geometry, GeometryMismatch
from kvtier_server.core.refused import BadRequest, Draining
from kvtier_server.core.tiering import DoesNotFit

from .engine import HIT, MISS, Engine, facts, to_keys
from .rig import Rig

DAY_S = 86_400


def test_nothing_is_leased_before_all_workers_are_attached() -> None:
    rig = Rig()
    engine = Engine(rig, "engine", facts(num_parts=2), world_size=2)
    scheduler, first, second = engine.processes
    engine.attach_process(scheduler)
    engine.attach_process(first)
    with pytest.raises(WorkersMissing) as refusal:
        engine.lookup(to_keys([1]), lease=1)
    assert refusal.value.metadata == {"ranks": "1"}
    assert engine.lookup(to_keys([1])).statuses == [MISS], "a look without a lease needs no workers"
    engine.attach_process(second)
    told = [notice.ranks for notice in rig.notices("workers_changed")]
    assert told == [(0, 1), (1,), ()]
    assert engine.store([1]) == [1]


def test_a_living_process_keeps_its_seat() -> None:
    rig = Rig()
    engine = rig.engine("engine")
    twin = Engine(rig, "engine", facts())
    with pytest.raises(RankTaken) as refusal:
        twin.attach()
    assert refusal.value.metadata["lock"] == engine.processes[0].lock_file
    assert engine.is_attached


def test_a_seat_of_another_tenant_is_taken_whoever_names_its_lock_until_its_process_is_gone() -> None:
    rig = Rig()
    engine = rig.engine("engine")
    other = Engine(rig, "engine", facts(), tenant="other")
    for process, held in zip(other.processes, engine.processes, strict=True):
        process.lock_file = held.lock_file
    with pytest.raises(RankTaken) as refusal:
        other.attach()
    assert "lock" not in refusal.value.metadata
    assert engine.is_attached
    other.start()
    for process in engine.processes:
        rig.locks.free(process.lock_file)
    other.attach()
    assert other.is_attached


def test_a_restarted_engine_takes_the_seats_of_its_dead_processes_although_their_streams_look_open() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    engine.prepare_store(to_keys([3]))
    dead = engine.processes
    engine.start()
    for process in dead:
        rig.locks.free(process.lock_file)
    engine.attach()
    assert engine.hits([1, 2, 3]) == [1, 2]
    engine.finish("look")
    rig.tick()
    rig.check()
    assert not len(rig.core.books.reservations)


def test_the_sessions_of_an_instance_share_their_fate() -> None:
    rig = Rig()
    engine = rig.engine(world_size=2, namespace=facts(num_parts=2))
    rig.notices("")
    engine.cut_stream(engine.processes[2])
    reasons = {notice.session_id: notice.reason for notice in rig.notices("ended")}
    sessions = [process.previous_session for process in engine.processes]
    assert [reasons[session] for session in sessions] == ["INSTANCE_LOST", "INSTANCE_LOST", "STREAM_ENDED"]
    for session in sessions:
        with pytest.raises(SessionUnknown):
            rig.core.books.instances.session(session)


def test_a_process_that_attaches_again_keeps_its_slots_quarantined_unless_it_promises_that_no_copy_runs() -> (
    None
):
    rig = Rig()
    engine = rig.engine()
    engine.prepare_store(to_keys([1, 2]))
    engine.attach_process(engine.processes[0])  # its stream broke, and so the worker's session ends too
    engine.attach_process(engine.processes[1])
    rig.tick()
    assert len(rig.core.books.quarantine) == 2
    engine.attach_process(engine.processes[1], promise=True)
    rig.tick()
    assert len(rig.core.books.quarantine) == 0
    rig.check()


def test_a_process_whose_lock_nobody_holds_is_refused() -> None:
    rig = Rig()
    engine = Engine(rig, "engine", facts())
    for process in engine.processes:
        rig.locks.free(process.lock_file)
        with pytest.raises(BadRequest, match="nobody holds") as refusal:
            engine.attach_process(process)
        assert refusal.value.metadata["field"] == "lock_file"
    assert not rig.core.namespaces


@pytest.mark.parametrize("call", ["lookup", "lease", "load", "store", "credits", "renew", "touch", "reset"])
def test_a_worker_makes_no_call_of_the_schedulers(call: str) -> None:
    rig = Rig()
    engine = Engine(rig, "engine", facts())
    engine.attach_process(engine.processes[1])  # alone, in epoch 0, whatever the engine's epoch is
    engine.processes[0].session = engine.processes[1].session
    calls: dict[str, Callable[[], object]] = {
        "lookup": lambda: engine.lookup(to_keys([1])),
        "lease": lambda: engine.lookup(to_keys([1]), lease=1),
        "load": lambda: engine.prepare_load(to_keys([1]), 1),
        "store": lambda: engine.prepare_store(to_keys([1])),
        "credits": lambda: engine.credits(1),
        "renew": lambda: engine.renew(1),
        "touch": lambda: engine.touch(to_keys([1])),
        "reset": engine.reset,
    }
    with pytest.raises(BadRequest, match="scheduler") as refusal:
        calls[call]()
    assert refusal.value.metadata["field"] == "session_id"


def test_slots_of_several_writers_wait_for_all_of_them() -> None:
    rig = Rig()
    engine = rig.engine(world_size=2, namespace=facts(num_parts=2))
    engine.prepare_store(to_keys([1]))
    engine.cut_stream(engine.processes[0])
    rig.locks.free(engine.processes[1].lock_file)
    rig.tick()
    assert len(rig.core.books.quarantine) == 1, "rank 1 may still be writing its part"
    rig.locks.free(engine.processes[2].lock_file)
    rig.tick()
    rig.assert_nothing_is_held()


def test_a_zombie_writes_into_quarantined_slots_only() -> None:
    rig = Rig(16)
    engine = rig.engine()
    (slot,) = engine.granted(to_keys([1]), engine.prepare_store(to_keys([1])))
    engine.die(locks_freed=False)
    other = rig.engine("other")
    other.fill(range(2, 30))
    engine.write(slot, 0, engine.content(slot.key))
    rig.check()
    assert other.hits([1]) == []
    assert len(other.hits(range(2, 30))) > 0


def test_an_idle_engine_is_attached_after_seven_days_and_its_first_load_works() -> None:  # R5
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2, 3])
    for _ in range(7 * 24):
        rig.tick(3_600)
    assert engine.is_attached
    assert None not in engine.load([1, 2, 3])


def test_a_session_of_another_boot_is_unknown() -> None:  # R3
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    session = engine.scheduler.id
    rig.restart_daemon()
    with pytest.raises(SessionUnknown):
        rig.core.books.instances.session(session)
    engine.attach(promise=True)
    assert engine.hits([1]) == [1]
    assert engine.scheduler.id != session


def test_what_was_being_written_when_the_daemon_died_waits_for_its_writers() -> None:  # R2, R9
    rig = Rig(16)
    engine = rig.engine()
    engine.store([1])
    (slot,) = engine.granted(to_keys([2]), engine.prepare_store(to_keys([2])))
    rig.restart_daemon()
    other = rig.engine("other")
    other.fill(range(3, 40))
    engine.write(slot, 0, engine.content(slot.key))
    rig.check()
    assert other.hits([2]) == []
    engine.attach(promise=True)
    rig.tick()
    assert len(rig.core.books.quarantine) == 0
    rig.check()


def test_a_quarantine_of_an_earlier_daemon_waits_for_nobody_who_has_no_pool_mapped() -> None:
    rig = Rig(16)
    engine = rig.engine()
    engine.prepare_store(to_keys([1, 2]))
    late = Engine(rig, "late", facts())  # has its locks, and was about to attach
    mapped = rig.engine("mapped")
    rig.restart_daemon()
    engine.die()
    rig.tick()
    assert len(rig.core.books.quarantine) == 2, "each of the others might be the writer"
    late.attach()
    mapped.attach()
    assert len(rig.core.books.quarantine) == 2, "a worker that has the pool mapped has promised nothing"
    mapped.attach_process(mapped.processes[1], promise=True)
    rig.assert_nothing_is_held()


def store_much(rig: Rig, engine: Engine) -> int:
    """Reserve so many slots that their end takes several slices. Returns how many."""
    for first in range(0, 10_000, 5_000):
        engine.prepare_store(to_keys(range(first, first + 5_000)), f"r{first}")
    return len(rig.core.books.reservations)


def test_the_end_of_an_engine_with_many_slots_is_seen_at_once_and_done_in_slices() -> None:
    rig = Rig(10_000, limits=Limits(pin_share=1.0))
    engine = rig.engine()
    assert store_much(rig, engine) == 10_000
    engine.cut_stream(engine.processes[0])
    books = rig.core.books
    assert not books.instances.sessions
    assert 0 < len(books.quarantine) < 5_000
    while books.settle():
        rig.core.books.primary.check_integrity()
    assert (len(books.quarantine), len(books.reservations)) == (10_000, 0)
    rig.locks.free(engine.processes[1].lock_file)
    rig.tick()
    assert 0 < len(books.quarantine) < 10_000
    rig.assert_nothing_is_held()
    assert not list(books.primary.spaces)


def test_leases_may_expire_while_their_engine_is_being_taken_apart() -> None:
    rig = Rig(4_096, limits=Limits(pin_share=1.0))
    engine = rig.engine()
    for first in range(0, 2_048, 256):  # a slice ends between the last slot of a lease and the lease itself
        engine.prepare_store(to_keys(range(first, first + 256)), f"r{first}")
    engine.die()
    assert len(rig.core.books.reservations) == 1_024
    rig.tick(301)
    rig.assert_nothing_is_held()


def test_a_promise_frees_also_the_slots_that_are_not_quarantined_yet() -> None:
    rig = Rig(10_000, limits=Limits(pin_share=1.0))
    engine = rig.engine()
    store_much(rig, engine)
    engine.cut_stream(engine.processes[0])
    engine.attach(promise=True)
    rig.assert_nothing_is_held()
    assert engine.is_attached
    assert store_much(rig, engine) == 10_000


def test_equal_request_ids_of_two_engines_are_two_requests() -> None:  # C3
    rig = Rig()
    one = rig.engine("one", facts("a"))
    two = rig.engine("two", facts("b"))
    one.store([1, 2], "request-7")
    two.lookup(to_keys([1]), "request-7", lease=5)
    one.lookup(to_keys([1, 2]), "request-7", lease=5)
    assert two.hits([1, 2], "request-7") == []
    two.finish("request-7")
    assert one.renew(5) == [True]
    assert None not in one.load([1, 2], "request-7")


def test_equal_keys_of_two_tenants_never_meet() -> None:
    rig = Rig()
    ours = rig.engine("ours", tenant="a")
    theirs = rig.engine("theirs", tenant="b")
    ours.store([1])
    assert theirs.hits([1]) == []
    assert theirs.store([1]) == [1], "granted: it is not resident for this tenant"
    assert ours.may_read(to_keys([1])[0]).isdisjoint(theirs.may_read(to_keys([1])[0]))
    assert None not in ours.load([1]) + theirs.load([1])


BASE = NamespaceFacts(
    "model", "w0", "bfloat16", "sha256", 16, 1, "NHD", (GroupFacts(16, 4096, 0, ("l0", "l1")),)
)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"weights_id": "w1"},
        {"kv_dtype": "float8"},
        {"hash_algorithm": "xxhash"},
        {"tokens_per_hash": 32},
        {"blocks_per_chunk": 2},
        {"kv_cache_layout": "HND"},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"prefill_context_parallel_size": 2},
        {"decode_context_parallel_size": 2},
        {"extra": {"lora": "x"}},
        {"groups": (GroupFacts(8, 4096, 0, ("l0", "l1")),)},
        {"groups": (GroupFacts(16, 8192, 0, ("l0", "l1")),)},
        {"groups": (GroupFacts(16, 4096, 64, ("l0", "l1")),)},
        {"groups": (GroupFacts(16, 4096, 0, ("l1", "l0")),)},
    ],
    ids=",".join,
)
def test_namespaces_that_differ_in_one_fact_share_nothing(change: dict[str, object]) -> None:  # C2
    rig = Rig()
    one = rig.engine("one", BASE)
    one.store([1])
    # `dataclasses.replace` has no type for a dict of any fields.
    other = Engine(rig, "two", replace(BASE, **change))  # type: ignore[arg-type]
    page = other.namespace.groups[0].part_bytes // other.namespace.blocks_per_chunk
    other.geometry = ((TensorLayout("keys", page // 2), TensorLayout("values", page // 2)),)
    other.attach()
    assert other.hits([1]) == []


GEOMETRIES: list[tuple[Geometry, str]] = [
    ((), "geometry: number of groups"),
    (((TensorLayout("keys", 4096),),), "geometry[0]: number of tensors"),
    (((TensorLayout("keys", 2048), TensorLayout("values", 1024)),), "geometry[0]: bytes of a part"),
    (((TensorLayout("keys", 1024), TensorLayout("values", 3072)),), "geometry[0].tensors[0].page_bytes"),
    (((TensorLayout("keys", 2048), TensorLayout("v", 2048)),), "geometry[0].tensors[1].name"),
]


@pytest.mark.parametrize(("geometry", "field"), GEOMETRIES, ids=[field for _, field in GEOMETRIES])
def test_another_geometry_is_refused_by_the_field_that_differs(geometry: Geometry, field: str) -> None:  # C1
    rig = Rig()
    rig.engine("one").store([1])
    other = Engine(rig, "two", facts())
    other.geometry = geometry
    other.attach_process(other.processes[0])
    with pytest.raises(GeometryMismatch) as refusal:
        other.attach_process(other.processes[1])
    assert refusal.value.metadata["field"] == field
    assert refusal.value.metadata["registered"] != refusal.value.metadata["given"]
    assert not other.is_attached
    rig.check()


def test_ranks_that_hold_equal_bytes_lay_them_out_alike() -> None:  # C1
    rig = Rig()
    engine = Engine(rig, "engine", facts(num_parts=1), world_size=2)
    engine.attach_process(engine.processes[0])
    engine.attach_process(engine.processes[1])
    right = engine.geometry
    engine.geometry = ((TensorLayout("values", 2048), TensorLayout("keys", 2048)),)
    with pytest.raises(GeometryMismatch):
        engine.attach_process(engine.processes[2])
    engine.geometry = right
    engine.attach_process(engine.processes[2])
    assert engine.store([1]) == [1]


def test_a_geometry_is_forgotten_with_the_last_chunk_and_engine_of_its_namespace() -> None:
    rig = Rig()
    first = rig.engine()
    first.die()
    changed = Engine(rig, "engine", facts())
    changed.geometry = ((TensorLayout("fused", 4096),),)
    changed.attach()
    assert changed.is_attached


def test_a_geometry_outlives_the_daemon_however_often_another_one_is_tried() -> None:  # C1
    rig = Rig()
    rig.engine("one").store([1])
    rig.restart_daemon()
    for name in ("two", "three"):
        other = Engine(rig, name, facts())
        other.geometry = ((TensorLayout("fused", 4096),),)
        with pytest.raises(GeometryMismatch):
            other.attach_process(other.processes[1])
    same = rig.engine("four")
    assert same.hits([1]) == [1]


def test_refused_sessions_leave_no_size_classes_behind() -> None:
    rig = Rig()
    rig.engine("one")
    before = set(rig.core.books.primary.slabs.classes)
    for parts in range(2, 6):
        wide = Engine(rig, "two", facts("two", (parts,)))
        wide.geometry = ()
        with pytest.raises(GeometryMismatch):
            wide.attach_process(wide.processes[1])
    assert set(rig.core.books.primary.slabs.classes) == before


def test_what_contradicts_its_own_instance_is_refused() -> None:
    rig = Rig()
    engine = Engine(rig, "engine", facts(), world_size=2)
    engine.attach_process(engine.processes[0])
    for field, wrong in (("tenant", "other"), ("world_size", 1), ("namespace", facts("other"))):
        right = getattr(engine, field)
        setattr(engine, field, wrong)
        with pytest.raises(BadRequest) as refusal:
            engine.attach_process(engine.processes[1])
        assert refusal.value.metadata["field"] == field
        setattr(engine, field, right)


def test_as_many_parts_as_ranks_or_one() -> None:
    rig = Rig()
    engine = Engine(rig, "engine", facts(num_parts=2), world_size=3)
    with pytest.raises(BadRequest, match="num_parts"):
        engine.attach()


def test_engines_and_sessions_are_limited() -> None:
    rig = Rig(limits=Limits(max_engines=2, max_sessions=5))
    rig.engine("one")
    rig.engine("two")
    with pytest.raises(TooManyEngines):
        rig.engine("three")
    wide = Engine(rig, "two", facts(), world_size=2)
    with pytest.raises(RankTaken):
        wide.attach()
    rig = Rig(limits=Limits(max_sessions=2))
    rig.engine("one")
    with pytest.raises(TooManySessions):
        rig.engine("two")


def test_a_chunk_that_the_pool_cannot_hold_is_refused_and_harms_nobody() -> None:
    rig = Rig(32)
    engine = rig.engine("small")
    with pytest.raises(DoesNotFit, match="--pool-bytes"):
        rig.engine("huge", facts("huge", (33,)))
    assert engine.store([1, 2]) == [1, 1]
    with pytest.raises(DoesNotFit):
        rig.engine("larger than a slab", facts("large", (31,)))
    rig.check()


def test_a_draining_daemon_lets_copies_end_and_grants_nothing_new() -> None:
    rig = Rig()
    engine = rig.engine()
    slots = engine.granted(to_keys([1]), engine.prepare_store(to_keys([1])))
    rig.core.books.draining = True
    for call in (
        lambda: engine.prepare_store(to_keys([2])),
        lambda: engine.lookup(to_keys([1]), lease=9),
        lambda: engine.prepare_load(to_keys([1]), 10),
        lambda: Engine(rig, "late", facts()).attach(),
    ):
        with pytest.raises(Draining):
            call()
    engine.write_and_report(slots)
    assert engine.statuses(to_keys([1])) == [HIT]
