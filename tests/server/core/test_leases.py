"""Leases: pinned, renewed, released, expired, and what a repeat or a late word does."""

from __future__ import annotations

import sys
from typing import Any, SupportsIndex

import pytest

from kvtier_server.core.completions import MismatchReport
from kvtier_server.core.grants import NotResident
from kvtier_server.core.leases import LeaseKind
from kvtier_server.core.limits import Limits
from kvtier_server.core.lookups import Lookups
from kvtier_server.core.refused import BadRequest, Inflight, LeaseUnknown
from kvtier_server.core.stores import ItemStatus

from .engine import HIT, HIT_UNLEASED, MISS, PENDING, to_keys
from .rig import Rig
from .slots_in_memory import SECOND_NS, State

OK, ALREADY, UNKNOWN, EXPIRED = ItemStatus.OK, ItemStatus.ALREADY, ItemStatus.UNKNOWN, ItemStatus.EXPIRED


def test_a_leased_chunk_is_not_evicted() -> None:
    rig = Rig(16)
    engine = rig.engine()
    engine.store(range(4))
    engine.finish()
    engine.lookup(to_keys(range(4)), "reader", lease=1)
    engine.fill(range(10, 60))
    assert engine.hits(range(4)) == [0, 1, 2, 3]
    engine.release(1)
    engine.finish("reader")
    engine.finish("look")
    engine.fill(range(60, 90))
    assert engine.hits(range(4)) == []


def test_a_lookup_lease_ends_with_its_time_unless_it_is_renewed() -> None:  # L1
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    engine.lookup(to_keys([1]), lease=1)
    engine.lookup(to_keys([2]), lease=2)
    rig.tick(20)
    assert engine.renew(1, 77) == [True, False]
    rig.tick(20)
    assert engine.renew(1, 2) == [True, False]
    assert rig.core.books.counts["lease_expired:lookup"] == 1
    rig.tick(31)
    rig.assert_nothing_is_held()


def test_a_renewal_that_comes_before_the_tick_wins_over_the_expiry() -> None:  # L1
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    engine.lookup(to_keys([1]), lease=1)
    rig.clock.advance(31)  # over, but nobody has looked yet
    assert engine.renew(1) == [True]
    rig.tick()
    assert engine.renew(1) == [True]


def test_a_lease_without_any_time_to_live_ends_with_the_next_tick() -> None:  # L1
    rig = Rig(limits=Limits(lookup_lease_ns=0, copy_lease_ns=0))
    engine = rig.engine()
    engine.store([1])
    engine.lookup(to_keys([1]), lease=1)
    engine.prepare_load(to_keys([1]), 2)
    rig.tick()
    rig.assert_nothing_is_held()


def test_nothing_expires_at_once_whatever_the_clock_says_at_the_start() -> None:  # L2
    for start_ns in (0, 1, 10 * 365 * 86_400 * SECOND_NS):
        rig = Rig()
        rig.clock.now_ns = start_ns
        engine = rig.engine()
        engine.store([1])
        engine.lookup(to_keys([1]), lease=1)
        rig.tick()
        rig.tick(29)
        assert engine.renew(1) == [True], f"expired, started at {start_ns}"


def test_a_load_ends_with_the_last_ranks_report() -> None:
    rig = Rig()
    engine = rig.engine(world_size=2)
    engine.store([1])
    engine.lookup(to_keys([1]), lease=1)
    slots = engine.prepare_load(to_keys([1]), 2)
    assert engine.report_load(0, 2) == OK
    assert engine.report_load(0, 2) == ALREADY
    assert rig.core.books.leases.get(engine.scheduler.instance, 2) is not None
    assert engine.report_load(1, 2) == OK
    assert engine.report_load(1, 2) == ALREADY
    assert rig.core.books.leases.get(engine.scheduler.instance, 2) is None
    assert engine.read(slots[0]) in engine.may_read(slots[0].key)


def test_a_lookup_becomes_a_load_that_outlives_its_request() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store(range(4))
    engine.finish()
    keys = to_keys(range(4))
    slots = engine.leased(keys, engine.lookup(keys, "reader", lease=1))
    assert engine.start_load(1, 2, slots[:3]) == OK
    assert engine.start_load(1, 2, slots[:3]) == ALREADY
    engine.finish("reader")
    assert engine.renew(1) == [False]
    pinned = [chunk.key for chunk in rig.core.books.primary.by_slot.values() if chunk.pins > 0]
    rig.check()
    pinned = [chunk.key for chunk in rig.core.books.primary.by_slot.values() if chunk.pins > 0]
    assert sorted(pinned) == keys[:3]
    assert engine.report_load(0, 2) == OK
    assert engine.start_load(1, 2, slots[:3]) == ALREADY
    rig.assert_nothing_is_held()


def test_a_report_may_overtake_the_start_of_its_load() -> None:
    rig = Rig()
    engine = rig.engine(world_size=2)
    engine.store([1])
    keys = to_keys([1])
    slots = engine.leased(keys, engine.lookup(keys, lease=1))
    assert engine.report_load(1, 2) == UNKNOWN
    assert engine.start_load(1, 2, slots) == OK
    assert engine.report_load(1, 2) == ALREADY
    assert engine.report_load(0, 2) == OK
    engine.finish()
    rig.assert_nothing_is_held()


def test_a_load_that_expired_is_told_so_and_rests_on_its_fence() -> None:  # L1, R10
    rig = Rig(16)
    engine = rig.engine()
    engine.store([1])
    engine.finish()
    (slot,) = engine.prepare_load(to_keys([1]), 2, "reader")
    engine.finish("reader")
    rig.tick(301)
    assert engine.read(slot) in engine.may_read(slot.key), "nobody has taken the slot yet"
    engine.fill(range(10, 60))
    assert engine.read(slot, verify=False) is None, "the slot was rewritten: the fence says so"
    assert engine.report_load(0, 2) == EXPIRED
    assert engine.report_load(0, 2) == ALREADY


def test_all_keys_are_pinned_for_a_load_or_none() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    with pytest.raises(NotResident) as refusal:
        engine.prepare_load(to_keys([1, 2, 3]), 5)
    assert refusal.value.metadata["keys"] == to_keys([3])[0].hex()
    engine.finish()
    rig.assert_nothing_is_held()


def test_a_repeated_prepare_load_is_answered_as_the_first_time() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    first = engine.prepare_load(to_keys([1, 2]), 5)
    assert engine.prepare_load(to_keys([1, 2]), 5) == first
    with pytest.raises(LeaseUnknown):
        engine.prepare_load(to_keys([2]), 5)
    engine.report_load(0, 5)
    with pytest.raises(LeaseUnknown, match="ended"):
        engine.prepare_load(to_keys([1, 2]), 5)
    engine.finish()
    rig.assert_nothing_is_held()


def test_an_abort_after_a_leased_lookup_leaves_no_pin() -> None:  # R8
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    engine.lookup(to_keys([1, 2]), "aborted", lease=1)
    engine.lookup(to_keys([1]), "aborted", lease=2)
    engine.finish("aborted")
    engine.finish("aborted")
    rig.assert_nothing_is_held()
    engine.lookup(to_keys([1, 2]), "lost", lease=3)
    engine.die()
    rig.tick()
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("call", ["lookup", "load", "store", "credits"])
def test_a_release_without_having_seen_the_reply_leaves_nothing(call: str) -> None:  # R11
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    lease = 500
    match call:
        case "lookup":
            engine.lookup(to_keys([1, 2]), lease=lease)
        case "load":
            engine.prepare_load(to_keys([1, 2]), lease)
        case "store":
            engine.prepare_store(to_keys([3, 4]), lease=lease)
        case _:
            engine.credits(3, lease=lease)
    assert engine.release(lease)
    assert not engine.release(lease), "a second release finds nothing"
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("call", ["lookup", "load", "store", "credits"])
def test_a_grant_that_comes_after_its_release_is_void(call: str) -> None:  # R11, L1
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    lease = 500
    assert not engine.release(lease)
    match call:
        case "lookup":
            answer = engine.lookup(to_keys([1, 2]), lease=lease)
            assert (answer.statuses, answer.leased) == ([HIT_UNLEASED] * 2, [])
        case "load":
            with pytest.raises(LeaseUnknown):
                engine.prepare_load(to_keys([1, 2]), lease)
        case "store":
            assert engine.prepare_store(to_keys([3, 4]), lease=lease).slot_ids == []
        case _:
            assert engine.credits(3, lease=lease) == []
    rig.assert_nothing_is_held()
    rig.tick(61)
    assert engine.lookup(to_keys([1, 2]), lease=lease).leased == [(0, 2)], "the tombstone is gone"


def test_one_engine_pins_at_most_its_share() -> None:
    rig = Rig(32)
    engine = rig.engine("engine")
    engine.store(range(20))
    answer = engine.lookup(to_keys(range(20)), "r", lease=1)
    assert answer.statuses == [HIT] * 16 + [HIT_UNLEASED] * 4
    assert answer.leased == [(0, 16)]
    assert engine.lookup(to_keys([0]), "s", lease=2).statuses == [HIT_UNLEASED]
    with pytest.raises(Inflight, match=r"limits\.pin_share"):
        engine.prepare_load(to_keys([19]), 3)
    other = rig.engine("other")
    assert other.lookup(to_keys(range(12)), lease=4).leased == [(0, 12)], "another engine has its own share"
    engine.release(1)
    assert engine.lookup(to_keys([0]), "s", lease=5).statuses == [HIT]


def test_a_lease_covers_the_leading_run_and_no_more_than_asked() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([0, 1, 2, 4])
    keys = to_keys(range(6))
    answer = engine.lookup(keys, lease=1)
    assert answer.statuses == [HIT, HIT, HIT, MISS, HIT, MISS]
    assert answer.leased == [(0, 3)]
    assert engine.lookup(keys, lease=2, max_tokens=2 * 16 + 15).leased == [(0, 2)]
    assert engine.lookup(keys[1:], lease=3, first_chunks=[1], max_tokens=2 * 16).leased == [(0, 1)]
    assert engine.lookup(keys[3:], lease=4).leased == []


class Looked(list[None]):
    """A row of holes that counts how many of its entries are read."""

    num_read = 0

    def __getitem__(self, which: Any) -> Any:
        found = super().__getitem__(which)
        self.num_read += len(found) if isinstance(which, slice) else 1
        return found

    def index(self, value: None, start: SupportsIndex = 0, stop: SupportsIndex = sys.maxsize) -> int:
        found = super().index(value, start, stop)
        self.num_read += found - int(start) + 1
        return found


def test_the_runs_of_a_lease_are_found_in_one_walk_however_many_holes_there_are() -> None:
    found = Looked([None] * 1_000)
    assert Lookups._runs(found, [(0, 500), (500, 1_000)]) == ([], [])
    assert found.num_read <= 2 * len(found)


def test_a_repeated_lookup_replaces_its_lease() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([0, 1, 2])
    engine.lookup(to_keys([0, 1, 2]), lease=1)
    engine.lookup(to_keys([0]), lease=1)
    rig.check()
    assert engine.scheduler.instance.pinned_bytes == 4096


def test_a_pending_key_is_resolved_when_its_writer_is_done_pinned_under_the_lease() -> None:
    rig = Rig()
    writer, reader = rig.engine("writer"), rig.engine("reader")
    writer.store([0])
    keys = to_keys([0, 1])
    slots = writer.granted(keys[1:], writer.prepare_store(keys[1:]))
    answer = reader.lookup(keys, lease=9, wait_s=1)
    assert answer.statuses == [HIT, PENDING]
    assert answer.leased == [(0, 1)]
    rig.notices("")
    writer.write_and_report(slots)
    (resolved,) = rig.notices("resolved")
    assert (resolved.session_id, resolved.lease_id, resolved.key) == (reader.scheduler.id, 9, keys[1])
    assert (resolved.status, resolved.slot_id) == (HIT, slots[0].slot_id)
    rig.check()
    assert reader.scheduler.instance.pinned_bytes == 2 * 4096
    reader.finish()
    rig.assert_nothing_is_held()


def test_a_pending_key_is_a_miss_when_its_writer_dies_or_takes_too_long() -> None:
    rig = Rig()
    writer, reader = rig.engine("writer"), rig.engine("reader")
    writer.prepare_store(to_keys([1, 2]))
    reader.lookup(to_keys([1]), "a", lease=1, wait_s=0.05)
    reader.lookup(to_keys([2]), "b", lease=2, wait_s=60)
    rig.notices("")
    rig.tick(0.1)
    assert [(n.lease_id, n.status) for n in rig.notices("resolved")] == [(1, MISS)]
    writer.die()
    assert [(n.lease_id, n.status) for n in rig.notices("resolved")] == [(2, MISS)]
    reader.lookup(to_keys([1]), "a", lease=3, wait_s=1)
    assert rig.notices("resolved") == []


def test_a_wait_is_cut_to_the_daemons_limit() -> None:
    rig = Rig()
    writer, reader = rig.engine("writer"), rig.engine("reader")
    writer.prepare_store(to_keys([1]))
    reader.lookup(to_keys([1]), lease=1, wait_s=3_600)
    rig.tick(2)
    assert [notice.status for notice in rig.notices("resolved")] == [MISS]


def test_a_resolved_key_that_exceeds_the_share_is_not_pinned() -> None:
    rig = Rig(32)
    writer, reader = rig.engine("writer"), rig.engine("reader")
    slots = writer.granted(to_keys([99]), writer.prepare_store(to_keys([99])))
    reader.lookup(to_keys([99]), "waits", lease=1, wait_s=1)
    reader.store(range(16))
    reader.lookup(to_keys(range(16)), "pins", lease=2)
    rig.notices("")
    writer.write_and_report(slots)
    assert [notice.status for notice in rig.notices("resolved")] == [HIT_UNLEASED]
    rig.check()


def test_who_does_not_wait_gets_a_lease_up_to_the_pending_key() -> None:
    rig = Rig()
    writer, reader = rig.engine("writer"), rig.engine("reader")
    writer.store([0, 2])
    writer.prepare_store(to_keys([1]), "r2")
    answer = reader.lookup(to_keys([0, 1, 2]), lease=1)
    assert answer.statuses == [HIT, PENDING, HIT]
    assert answer.leased == [(0, 1)], "chunk 2 is of no use without chunk 1"
    assert reader.lookup(to_keys([1]), "s", lease=2).leased == []
    assert reader.renew(2) == [False], "a lease that holds nothing is none"


def test_a_reported_mismatch_is_hashed_and_a_corrupt_chunk_taken_out() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    good, bad = engine.prepare_load(to_keys([1, 2]), 5)
    rig.flip(bad.slot_id, bad.generation)
    assert engine.read(bad) is None
    complaints = [MismatchReport(slot.slot_id, slot.generation) for slot in (good, bad)]
    engine.report_load(0, 5, mismatches=complaints)
    assert rig.hash_asked() == [True, False]
    counts = rig.core.books.counts
    assert (counts["checksum:false_alarm"], counts["checksum:corrupt"]) == (1, 1)
    assert engine.hits([1, 2]) == [1]
    engine.finish()
    engine.finish("look")
    rig.assert_nothing_is_held()
    assert engine.read(bad, verify=False) is None, "a reader without verification fails too"
    assert engine.store([2], "again") == [1], "it can be stored anew, elsewhere"
    assert engine.prepare_load(to_keys([2]), 6)[0].slot_id != bad.slot_id


def test_the_slot_of_a_corrupt_chunk_is_free_again_when_all_that_mapped_the_pool_are_gone() -> None:
    rig = Rig()
    engine, bystander = rig.engine("engine"), rig.engine("bystander")
    engine.store([1])
    (bad,) = engine.prepare_load(to_keys([1]), 5)
    rig.flip(bad.slot_id, bad.generation)
    engine.report_load(0, 5, mismatches=[MismatchReport(bad.slot_id, bad.generation)])
    assert rig.hash_asked() == [False]
    for leaving in (engine, bystander):
        rig.tick(1)
        assert len(rig.core.books.quarantine) == 1, "a process that lives may be what wrote it"
        for process in leaving.processes:
            rig.locks.free(process.lock_file)
        leaving.cut_stream(leaving.processes[0])
    rig.engine("late")
    rig.tick(1)
    rig.assert_nothing_is_held()
    assert not len(rig.core.books.quarantine)
    assert rig.slots.generation(bad.slot_id) > bad.generation
    assert rig.slots.record(bad.slot_id).state is State.FREE


def test_the_slot_of_a_corrupt_chunk_that_nobody_can_have_written_waits_for_its_reader_only() -> None:
    rig = Rig(num_tiers=1)
    engine = rig.engine()
    engine.store([1])
    chunk = next(iter(rig.core.books.primary.by_slot.values()))
    rig.pump()  # a tier begins to read it
    for process in engine.processes:
        rig.locks.free(process.lock_file)
    engine.cut_stream(engine.processes[0])
    rig.tick(1)
    rig.core.books.condemn(chunk, owner=0)
    rig.tick(1)
    rig.check()
    assert rig.slots.record(chunk.slot_id).state is State.QUARANTINED
    rig.move()
    rig.assert_nothing_is_held()
    assert rig.slots.record(chunk.slot_id).state is State.FREE


def test_a_slot_that_many_complain_about_is_hashed_once_at_a_time() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1, 2])
    slots = engine.prepare_load(to_keys([1, 2]), 5)
    complaints = [MismatchReport(slot.slot_id, slot.generation) for slot in slots] * 500
    for lease in (5, 6, 7):
        engine.report_load(0, lease, mismatches=complaints)
    assert rig.hash_asked() == [True, True]
    engine.report_load(0, 8, mismatches=complaints[:1])
    assert rig.hash_asked() == [True], "the first hash is there, so it can be asked for again"


def test_a_complaint_about_an_older_generation_or_no_slot_at_all_is_passed_over() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    (slot,) = engine.prepare_load(to_keys([1]), 5)
    wrong = [MismatchReport(slot.slot_id, slot.generation - 1), MismatchReport(1 << 63, 1)]
    engine.report_load(0, 5, mismatches=wrong)
    assert rig.hash_asked() == []


def test_the_number_of_leases_is_limited() -> None:
    rig = Rig(limits=Limits(max_leases=2))
    engine = rig.engine()
    engine.store([1])
    assert [engine.lookup(to_keys([1]), lease=lease).statuses for lease in (1, 2, 3)] == [
        [HIT],
        [HIT],
        [HIT_UNLEASED],
    ]
    assert engine.prepare_store(to_keys([2])).slot_ids == []


def test_the_number_of_requests_is_limited_whether_they_have_leases_or_not() -> None:
    rig = Rig(limits=Limits(max_requests=3))
    engine = rig.engine()
    engine.store([1], "first")
    for number in range(10):
        engine.lookup(to_keys([1]), f"unleased-{number}")
    requests = engine.scheduler.instance.requests
    assert len(requests) == 3
    for lease in (1, 2, 3):
        engine.lookup(to_keys([1]), f"leased-{lease}", lease=lease)
    with pytest.raises(Inflight, match=r"limits\.requests_per_instance"):
        engine.lookup(to_keys([1]), "one more")
    assert engine.lookup(to_keys([1]), "leased-2").statuses == [HIT], "a known one goes on"
    engine.release(2)
    engine.lookup(to_keys([1]), "one more")
    assert len(requests) == 3
    assert requests.get("leased-2") is None


def test_leases_that_were_not_looked_at_expire_the_next_time() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    for lease in (1, 2, 3):
        engine.lookup(to_keys([1]), lease=lease)
    book = rig.core.books.leases
    now_ns = rig.clock.advance(31)
    assert next(book.expired(now_ns)).id == 1, "whatever becomes of it"
    assert [lease.id for lease in book.expired(now_ns)] == [2, 3]


def test_leases_are_counted_by_kind_and_the_oldest_is_known() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    book = rig.core.books.leases
    for lease in (1, 2, 3):
        engine.lookup(to_keys([1]), lease=lease)
        rig.tick(1)
    engine.prepare_load(to_keys([1]), 4)
    engine.release(1)
    engine.renew(2)
    oldest = book.oldest(LeaseKind.LOOKUP)
    assert (book.count(LeaseKind.LOOKUP), book.count(LeaseKind.LOAD), len(book)) == (2, 1, 3)
    assert oldest is not None
    assert oldest.id == 2
    assert book.oldest(LeaseKind.STORE) is None
    engine.die()
    assert (len(book), book.oldest(LeaseKind.LOOKUP)) == (0, None)


def test_ended_leases_do_not_pile_up_until_their_time() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    for lease in range(1_000, 6_000):
        engine.prepare_load(to_keys([1]), lease)
        engine.report_load(0, lease)
    assert len(rig.core.books.leases._expiry) < 2_000


def test_a_load_start_without_an_id_is_unknown() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    slots = engine.leased(to_keys([1]), engine.lookup(to_keys([1]), lease=1))
    assert engine.start_load(1, 0, slots) == UNKNOWN
    assert engine.start_load(1, 2, slots) == OK


def test_a_lease_id_of_zero_or_of_another_kind_is_refused() -> None:
    rig = Rig()
    engine = rig.engine()
    engine.store([1])
    with pytest.raises(BadRequest):
        engine.prepare_load(to_keys([1]), 0)
    engine.prepare_load(to_keys([1]), 7)
    with pytest.raises(LeaseUnknown):
        engine.lookup(to_keys([1]), lease=7)
    with pytest.raises(LeaseUnknown):
        engine.prepare_store(to_keys([2]), lease=7)
