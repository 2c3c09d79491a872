"""A key that another engine is storing: PENDING, then decided by an event."""

from __future__ import annotations

import grpc
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess
from tests.raw_engine import RawEngine, RawSession, to_key, to_keys

from kvtier.v1 import offload_pb2 as pb

HIT, PENDING, MISS = pb.LOOKUP_STATUS_HIT, pb.LOOKUP_STATUS_PENDING, pb.LOOKUP_STATUS_MISS
WAIT_MS = 2000
"""As long as the daemon lets anybody wait."""


@pytest.fixture
def writer(daemon: DaemonProcess, make_engine: MakeEngine) -> RawEngine:
    return make_engine(daemon).attach()


@pytest.fixture
def reader(daemon: DaemonProcess, make_engine: MakeEngine, writer: RawEngine) -> RawEngine:
    return make_engine(daemon, facts=writer.facts).attach()


def scheduler_of(engine: RawEngine) -> RawSession:
    assert engine.scheduler is not None
    return engine.scheduler


def next_resolved(engine: RawEngine) -> pb.Resolved:
    return scheduler_of(engine).wait_for("resolved").resolved


def test_a_pending_key_becomes_a_leased_hit_when_its_writer_reports(
    writer: RawEngine, reader: RawEngine
) -> None:
    granted = writer.prepare_store([to_key(1)])
    lease_id = reader.new_lease_id()
    found = reader.lookup([to_key(1)], lease_id=lease_id, pending_wait_ms=WAIT_MS)
    assert list(found.statuses) == [PENDING]
    writer.report_stores(granted.slot_ids, granted.generations, [to_key(1)])
    resolved = next_resolved(reader)
    assert (resolved.lease_id, resolved.key, resolved.status) == (lease_id, to_key(1), HIT)
    assert (resolved.slot_id, resolved.generation) == (granted.slot_ids[0], granted.generations[0])
    started = pb.LoadStart(lookup_lease_id=lease_id, load_lease_id=900, slot_ids=[resolved.slot_id])
    assert list(reader.complete(load_starts=[started]).load_starts) == [pb.COMPLETE_STATUS_OK]


def test_a_pending_key_becomes_a_miss_when_its_writer_fails(writer: RawEngine, reader: RawEngine) -> None:
    granted = writer.prepare_store([to_key(2)])
    reader.lookup([to_key(2)], lease_id=reader.new_lease_id(), pending_wait_ms=WAIT_MS)
    failed = pb.StoreReport(
        slot_ids=granted.slot_ids,
        generations=granted.generations,
        keys=[to_key(2)],
        checksums=[0],
        failed=[0],
    )
    writer.complete(writer.workers[0], store_reports=[failed])
    assert next_resolved(reader).status == MISS
    assert list(reader.lookup([to_key(2)]).statuses) == [MISS]


def test_a_pending_key_becomes_a_miss_when_its_writer_dies(
    daemon: DaemonProcess, make_engine: MakeEngine, reader: RawEngine
) -> None:
    dying = make_engine(daemon, facts=reader.facts).attach()
    dying.prepare_store([to_key(3)])
    reader.lookup([to_key(3)], lease_id=reader.new_lease_id(), pending_wait_ms=WAIT_MS)
    dying.workers[0].close()
    resolved = next_resolved(reader)
    assert (resolved.key, resolved.status) == (to_key(3), MISS)


def test_a_pending_key_becomes_a_miss_when_the_wait_is_over(writer: RawEngine, reader: RawEngine) -> None:
    writer.prepare_store([to_key(4)])
    reader.lookup([to_key(4)], lease_id=reader.new_lease_id(), pending_wait_ms=1)
    assert next_resolved(reader).status == MISS
    assert list(reader.lookup([to_key(4)]).statuses) == [PENDING]  # the store itself goes on


def test_a_credit_slot_is_pending_from_its_announcement_on(writer: RawEngine, reader: RawEngine) -> None:
    grant = writer.take_credits(1)
    assert list(reader.lookup([to_key(5)]).statuses) == [MISS]
    announced = pb.Announcement(slot_ids=grant.slot_ids, generations=grant.generations, keys=[to_key(5)])
    writer.complete(announcements=[announced])
    found = reader.lookup([to_key(5)], lease_id=reader.new_lease_id(), pending_wait_ms=WAIT_MS)
    assert list(found.statuses) == [PENDING]
    writer.report_stores(grant.slot_ids, grant.generations, [to_key(5)])
    assert next_resolved(reader).status == HIT


def test_who_does_not_ask_to_wait_gets_no_event(writer: RawEngine, reader: RawEngine) -> None:
    granted = writer.prepare_store(to_keys([6, 7]))
    reader.lookup([to_key(6)], lease_id=reader.new_lease_id())
    reader.lookup([to_key(7)], lease_id=reader.new_lease_id(), pending_wait_ms=WAIT_MS)
    writer.report_stores(granted.slot_ids, granted.generations, to_keys([6, 7]))
    assert next_resolved(reader).key == to_key(7)


def test_a_released_lease_waits_no_more(writer: RawEngine, reader: RawEngine) -> None:
    granted = writer.prepare_store(to_keys([8, 9]))
    for lease_id, key in ((601, to_key(8)), (602, to_key(9))):
        reader.lookup([key], lease_id=lease_id, pending_wait_ms=WAIT_MS)
    reader.complete(released_lease_ids=[601])
    writer.report_stores(granted.slot_ids, granted.generations, to_keys([8, 9]))
    assert next_resolved(reader).lease_id == 602


def test_as_many_events_at_once_as_a_call_has_keys_end_no_session_that_reads(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    writer = make_engine(daemon).attach()
    reader = make_engine(daemon, facts=writer.facts).attach()
    keys = to_keys(range(8192))
    assert set(writer.prepare_store(keys).verdicts) == {pb.STORE_VERDICT_GRANTED}
    reader.lookup(keys, lease_id=1, pending_wait_ms=WAIT_MS)
    writer.close()
    for _ in keys:
        assert next_resolved(reader).status == MISS


def test_a_session_that_is_ended_gets_its_last_events_first(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    engine = make_engine(daemon).attach()
    engine.workers[0].close()
    assert scheduler_of(engine).wait_for("ended").ended.reason == "INSTANCE_LOST"
    assert scheduler_of(engine).wait_for_end() is grpc.StatusCode.OK
