"""Calls of an attached engine that cannot be done, and what they say."""

from __future__ import annotations

import functools

import grpc
import pytest
from google.protobuf.message import Message
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, wait_until
from tests.raw_engine import PART_BYTES, Failure, RawEngine, failure_of, refusal, to_key, to_keys

from kvtier.v1 import offload_pb2 as pb

HIT, HIT_UNLEASED = pb.LOOKUP_STATUS_HIT, pb.LOOKUP_STATUS_HIT_UNLEASED
PENDING, MISS = pb.LOOKUP_STATUS_PENDING, pb.LOOKUP_STATUS_MISS
GRANTED, RESIDENT = pb.STORE_VERDICT_GRANTED, pb.STORE_VERDICT_RESIDENT
NOT_FOUND, EXHAUSTED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def test_a_miss_is_an_answer_and_no_error(engine: RawEngine) -> None:
    assert list(engine.lookup(to_keys([1, 2])).statuses) == [MISS, MISS]


def test_what_all_parts_were_reported_of_is_hit_and_loaded_from_the_granted_slots(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    engine = make_engine(daemon, world_size=2).attach()
    granted = engine.prepare_store(to_keys([1, 2]))
    engine.report_stores(granted.slot_ids, granted.generations, to_keys([1, 2]), rank=0)
    assert list(engine.lookup(to_keys([1, 2])).statuses) == [PENDING, PENDING]
    engine.report_stores(granted.slot_ids, granted.generations, to_keys([1, 2]), rank=1)
    found = engine.lookup(to_keys([1, 2, 3]), lease_id=engine.new_lease_id())
    assert list(found.statuses) == [HIT, HIT, MISS]
    assert [(run.first, run.count) for run in found.leased] == [(0, 2)]
    assert list(found.slot_ids) == list(granted.slot_ids)
    loaded = engine.prepare_load(to_keys([2, 1]))
    assert list(loaded.slot_ids) == list(reversed(granted.slot_ids))
    assert list(loaded.generations) == list(reversed(granted.generations))


def test_a_mismatch_is_no_mismatch_where_no_checksum_was_recorded(
    daemon: DaemonProcess, engine: RawEngine
) -> None:
    keys = to_keys([1, 2])
    granted = engine.prepare_store(keys)
    report = pb.StoreReport(
        slot_ids=granted.slot_ids, generations=granted.generations, keys=keys, checksums=[0, 7]
    )  # 0: none was computed
    engine.complete(engine.workers[0], store_reports=[report])
    quarantined = daemon.status().tiers[0].quarantined_slots
    mismatches = [
        pb.Mismatch(slot_id=slot_id, generation=generation, checksum=5)
        for slot_id, generation in zip(granted.slot_ids, granted.generations, strict=True)
    ]
    engine.complete(engine.workers[0], load_reports=[pb.LoadReport(lease_id=99, mismatches=mismatches)])
    wait_until(lambda: list(engine.lookup(keys).statuses)[1] == MISS, "the second chunk is really corrupt")
    assert list(engine.lookup(keys).statuses) == [HIT, MISS]
    assert daemon.status().tiers[0].quarantined_slots == quarantined + 1


def test_a_load_of_keys_that_are_not_resident_names_them(engine: RawEngine) -> None:
    engine.store([to_key(1)])
    failed = refusal(lambda: engine.prepare_load(to_keys([1, 2, 3])))
    assert (failed.code, failed.reason) == (FAILED_PRECONDITION, "NOT_RESIDENT")
    assert failed.metadata["keys"] == f"{to_key(2).hex()},{to_key(3).hex()}"


def test_every_slot_of_a_complete_has_its_answer_in_its_place_however_many_there_are(
    engine: RawEngine,
) -> None:
    granted = engine.take_credits(2)
    slot_ids, generations = [1 << 40] * 1_300, [1] * 1_300
    for place, slot_id, generation in zip((700, 1_100), granted.slot_ids, granted.generations, strict=True):
        slot_ids[place], generations[place] = slot_id, generation
    columns = {"slot_ids": slot_ids, "generations": generations}
    reply = engine.complete(
        announcements=[pb.Announcement(request_id="r", keys=to_keys([1]) * 1_300, **columns)],
        credit_returns=[pb.CreditReturn(slot_ids=slot_ids[:701], generations=generations[:701])],
    )
    statuses = reply.announcements[0].statuses
    known = [place for place, status in enumerate(statuses) if status == pb.COMPLETE_STATUS_OK]
    assert known == [700, 1_100]
    assert list(reply.credit_returns[0].statuses) == [pb.COMPLETE_STATUS_UNKNOWN] * 701, "one was announced"


def test_nothing_is_leased_before_all_workers_are_attached(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    engine = make_engine(daemon, world_size=3)
    engine.attach_scheduler()
    engine.attach_worker(1)
    for call in (
        lambda: engine.lookup([to_key(1)], lease_id=1),
        lambda: engine.prepare_load([to_key(1)]),
        lambda: engine.prepare_store([to_key(1)]),
        lambda: engine.take_credits(1),
    ):
        failed = refusal(call)
        assert (failed.code, failed.reason) == (FAILED_PRECONDITION, "WORKERS_MISSING")
        assert failed.metadata == {"ranks": "0,2"}
    assert list(engine.lookup([to_key(1)]).statuses) == [MISS]  # to look is free


def requests_with(session_id: str) -> list[tuple[str, Message]]:
    """Every unary call that names a session."""
    named = pb.RequestContext(request_id="request")
    keys = [to_key(1)]
    return [
        ("Lookup", pb.LookupRequest(session_id=session_id, context=named, keys=keys)),
        ("PrepareLoad", pb.PrepareLoadRequest(session_id=session_id, context=named, keys=keys, lease_id=1)),
        ("PrepareStore", pb.PrepareStoreRequest(session_id=session_id, context=named, keys=keys, lease_id=1)),
        ("Complete", pb.CompleteRequest(session_id=session_id)),
        ("RenewLeases", pb.RenewLeasesRequest(session_id=session_id)),
        ("Touch", pb.TouchRequest(session_id=session_id, context=named, keys=keys)),
        ("FinishRequest", pb.FinishRequestRequest(session_id=session_id)),
        ("Reset", pb.ResetRequest(session_id=session_id)),
    ]  # fmt: skip


def assert_session_unknown(engine: RawEngine, session_id: str, boot_id: str) -> None:
    for method, request in requests_with(session_id):
        path = f"/kvtier.v1.OffloadService/{method}"
        failed = refusal(functools.partial(engine.send_bytes, path, request.SerializeToString()))
        assert (failed.code, failed.reason) == (NOT_FOUND, "SESSION_UNKNOWN"), method
        assert failed.trailers["kvtier-boot-id"] == boot_id


@pytest.mark.parametrize("session_id", ["", "0123456789abcdef-0123456789abcdef", "\N{SNOWMAN}"])
def test_a_session_of_another_boot_is_unknown_to_every_call(engine: RawEngine, session_id: str) -> None:
    assert_session_unknown(engine, session_id, engine.describe().boot_id)


def test_a_session_that_has_ended_is_unknown(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon).attach()
    assert engine.scheduler is not None
    engine.scheduler.close()
    wait_until(
        lambda: engine.engine_id not in {session.engine_id for session in daemon.status().sessions},
        "the session ends with its stream",
    )
    assert_session_unknown(engine, engine.session_id, engine.describe().boot_id)


def test_with_one_session_all_of_an_instance_end(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon, world_size=2).attach()
    engine.workers[1].close()
    for session in (engine.scheduler, engine.workers[0]):
        assert session is not None
        assert session.wait_for("ended").ended.reason == "INSTANCE_LOST"
        assert session.wait_for_end() is grpc.StatusCode.OK


# -- Leases --


def test_a_load_under_a_lease_that_holds_something_else_is_refused(engine: RawEngine) -> None:
    engine.store(to_keys([1, 2]))
    engine.prepare_load([to_key(1)], lease_id=500)
    assert list(engine.prepare_load([to_key(1)], lease_id=500).slot_ids)  # a repeat is answered
    failed = refusal(lambda: engine.prepare_load([to_key(2)], lease_id=500))
    assert (failed.code, failed.reason) == (NOT_FOUND, "LEASE_UNKNOWN")


def test_a_load_that_was_released_before_it_was_granted_is_refused(engine: RawEngine) -> None:
    engine.store([to_key(1)])
    assert list(engine.complete(released_lease_ids=[501]).released_leases) == [pb.COMPLETE_STATUS_UNKNOWN]
    failed = refusal(lambda: engine.prepare_load([to_key(1)], lease_id=501))
    assert (failed.code, failed.reason) == (NOT_FOUND, "LEASE_UNKNOWN")


def test_an_unknown_lease_in_complete_is_a_status_of_its_item(engine: RawEngine) -> None:
    loads = [pb.LoadReport(lease_id=12345)]
    reply = engine.complete(engine.workers[0], load_reports=loads)
    assert list(reply.load_reports) == [pb.COMPLETE_STATUS_UNKNOWN]
    started = engine.complete(load_starts=[pb.LoadStart(lookup_lease_id=9, load_lease_id=10, slot_ids=[1])])
    assert list(started.load_starts) == [pb.COMPLETE_STATUS_UNKNOWN]


def test_a_store_reported_twice_is_already_done(engine: RawEngine) -> None:
    granted = engine.prepare_store([to_key(1)])
    report = functools.partial(engine.report_stores, granted.slot_ids, granted.generations, [to_key(1)])
    assert not list(report().store_reports[0].statuses)  # all OK
    assert list(report().store_reports[0].statuses) == [pb.COMPLETE_STATUS_ALREADY]


def test_a_store_of_a_generation_that_is_over_publishes_nothing(engine: RawEngine) -> None:
    granted = engine.prepare_store([to_key(1)])
    reply = engine.report_stores(granted.slot_ids, [granted.generations[0] - 1], [to_key(1)])
    assert list(reply.store_reports[0].statuses) == [pb.COMPLETE_STATUS_STALE_GENERATION]
    assert list(engine.lookup([to_key(1)]).statuses) == [PENDING]


def test_the_end_of_a_session_frees_what_its_instance_held(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    engine.store(to_keys(range(8)))
    engine.lookup(to_keys(range(8)), lease_id=engine.new_lease_id())
    engine.prepare_load(to_keys(range(4)))
    engine.prepare_store(to_keys(range(8, 12)))
    engine.take_credits(4)
    assert sorted(lease.count for lease in daemon.status().leases) == [1, 1, 1, 1]
    assert daemon.status().tiers[0].pinned_chunks == 8
    engine.close()
    wait_until(lambda: not any(lease.count for lease in daemon.status().leases), "all leases end")
    wait_until(lambda: daemon.status().tiers[0].pinned_chunks == 0, "the pins go")
    tier = daemon.status().tiers[0]
    assert (tier.chunks, tier.reserved_slots) == (8, 0)
    wait_until(lambda: not daemon.status().tiers[0].quarantined_slots, "slots of a closed process are free")


# -- Shares and refusals per key --


def test_an_instance_that_would_pin_more_than_its_share_is_refused(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes=64 * PART_BYTES * 4)
    engine = make_engine(daemon).attach()
    keys = to_keys(range(192))
    engine.store(keys[:96])
    engine.store(keys[96:])
    engine.prepare_load(keys[:128])  # half of the pool's 256 slots
    failed = refusal(lambda: engine.prepare_load([keys[128]]))
    assert (failed.code, failed.reason) == (EXHAUSTED, "INFLIGHT")
    assert "limits.pin_share" in failed.message
    found = engine.lookup([keys[130]], lease_id=engine.new_lease_id())
    assert list(found.statuses) == [HIT_UNLEASED]
    assert not found.leased


def test_each_key_that_gets_no_slot_is_told_why(engine: RawEngine) -> None:
    engine.store([to_key(1)])
    engine.prepare_store([to_key(2)])
    verdicts = engine.prepare_store(to_keys([1, 2, 3])).verdicts
    assert list(verdicts) == [RESIDENT, pb.STORE_VERDICT_PENDING, GRANTED]


def test_stores_beyond_the_share_of_an_instance_are_told_so_per_key(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    engine = make_engine(start_daemon(pool_bytes="1MiB")).attach()
    verdicts = list(engine.prepare_store(to_keys(range(200))).verdicts)
    assert verdicts == [GRANTED] * 128 + [pb.STORE_VERDICT_INFLIGHT] * 72


def test_a_full_pool_refuses_keys_and_says_full(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon(pool_bytes="1MiB")
    for _ in range(2):  # two instances, each with its half of the pool reserved
        assert set(make_engine(daemon).attach().prepare_store(to_keys(range(128))).verdicts) == {GRANTED}
    late = make_engine(daemon).attach()
    assert list(late.prepare_store(to_keys([1, 2])).verdicts) == [pb.STORE_VERDICT_FULL] * 2
    assert daemon.status().store_refused["full"] == 2


def test_the_reuse_filter_refuses_a_key_the_first_time(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    engine = make_engine(start_daemon(config="[admission]\nstore_threshold = 2\n")).attach()
    assert list(engine.prepare_store([to_key(1)], request_id="1").verdicts) == [pb.STORE_VERDICT_FILTERED]
    assert list(engine.prepare_store([to_key(1)], request_id="2").verdicts) == [GRANTED]


def test_what_was_evicted_is_a_miss_and_told_to_its_instance(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    engine = make_engine(start_daemon(pool_bytes="1MiB")).attach()
    engine.store(to_keys(range(128)), request_id="1")
    engine.store(to_keys(range(128, 256)), request_id="2")
    evicted = engine.store(to_keys(range(256, 266)), request_id="3").evicted_keys
    assert len(evicted) == 10
    assert set(evicted) <= set(to_keys(range(128)))
    assert set(engine.lookup(list(evicted)).statuses) == {MISS}


# -- Others --


def test_a_key_of_another_tenant_is_a_miss(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    ours = make_engine(daemon, tenant="ours").attach()
    theirs = make_engine(daemon, tenant="theirs", facts=ours.facts).attach()
    ours.store([to_key(1)])
    assert list(theirs.lookup([to_key(1)]).statuses) == [MISS]
    assert list(ours.lookup([to_key(1)]).statuses) == [HIT]


def test_two_engines_of_one_namespace_share_chunks_whatever_they_call_their_requests(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    first = make_engine(daemon).attach()
    second = make_engine(daemon, facts=first.facts).attach()
    granted = first.store([to_key(1)], request_id="same")
    second.store([to_key(2)], request_id="same")
    assert list(second.lookup(to_keys([1, 2]), request_id="same").statuses) == [HIT, HIT]
    second.stub.FinishRequest(
        pb.FinishRequestRequest(session_id=second.session_id, request_ids=["same"]), timeout=WAIT_S
    )
    assert list(first.prepare_load([to_key(1)], request_id="same").slot_ids) == list(granted.slot_ids)


def test_a_reset_hides_what_was_stored_from_its_engine_alone(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    first = make_engine(daemon).attach()
    second = make_engine(daemon, facts=first.facts).attach()
    first.store([to_key(1)])

    def reset(engine: RawEngine, weights_id: str) -> int:
        request = pb.ResetRequest(session_id=engine.session_id, weights_id=weights_id)
        return engine.stub.Reset(request, timeout=WAIT_S).epoch

    reset(first, "")
    assert list(first.lookup([to_key(1)]).statuses) == [MISS]
    assert list(second.lookup([to_key(1)]).statuses) == [HIT]
    assert reset(first, "weights-2") == reset(second, "weights-2")
    first.store([to_key(2)])
    assert list(second.lookup([to_key(2)]).statuses) == [HIT]
    assert reset(first, "") != reset(second, "")


def test_calls_beyond_the_limit_at_once_are_refused_and_the_daemon_goes_on(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    """Short calls do not overlap in the daemon; long ones do, and those that fail, for a moment."""
    engine = make_engine(start_daemon(config="[limits]\nunary_calls = 1\n")).attach()
    wrong = pb.LookupRequest(session_id="none", keys=[to_key(1)])

    refused: list[Failure] = []

    def calls_overlap() -> bool:
        calls = [engine.stub.Lookup.future(wrong, timeout=WAIT_S) for _ in range(64)]
        failures = [failure_of(error) for error in (call.exception() for call in calls) if error is not None]
        assert len(failures) == 64
        assert {failed.reason for failed in failures} <= {"SESSION_UNKNOWN", "LIMIT_UNARY_CALLS"}
        refused.extend(failed for failed in failures if failed.reason == "LIMIT_UNARY_CALLS")
        return bool(refused)

    wait_until(calls_overlap, "two calls overlap")
    failed = refused[0]
    assert failed.code is EXHAUSTED
    assert failed.retry_seconds is not None
    assert "limits.unary_calls" in failed.message
    engine.store([to_key(1)])
