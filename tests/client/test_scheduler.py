from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_client.answers import LookupStatus, SlotsForMisses
from kvtier_client.jobs import NO_SLOT, LoadJob, StoreJob
from kvtier_client.requests import SkipReason
from kvtier_client.scheduler import SchedulerShim

from .builders import wait_for_child
from .doubles import LATER_LEASE, LIMITS, POOL_ID, RecordingClient, Told, session
from .test_requests import CHUNK, TOKENS, facts, keys

TABLE = list(range(1, 201))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """A shim with one group (unless said otherwise), an attached client and a clock of the test."""

    def __init__(self, *windows: int, blocks_per_chunk: int = 2, attached: bool = True) -> None:
        windows = windows or (0,)
        self.clock = Clock()
        self.client = RecordingClient(facts(*windows, blocks_per_chunk=blocks_per_chunk))
        self.shim = SchedulerShim(self.client, clock=self.clock)
        if attached:
            self.client.attach(session([4096] * len(windows)))

    def grant(self, count: int, group: int = 0, first: int = 500) -> None:
        self.shim.on_credits(group, list(range(first, first + count)), [3] * count, LATER_LEASE)

    def ask(self, statuses: str, *, req_id: str = "r", **options: Sequence[int]) -> None:
        """Add a request with one chunk a letter, and answer its lookup."""
        self.shim.add_request(req_id, [keys(len(statuses))])
        self.client.lookups[-1].arrive(statuses, **options)

    @property
    def told(self) -> Told:
        return self.client.told


# Lookup


def test_a_request_is_looked_up_once_however_often_it_is_asked_for() -> None:
    engine = Engine()
    engine.ask("HHH")

    assert [engine.shim.lookup("r", 0) for _ in range(300)] == [3 * CHUNK] * 300
    assert len(engine.client.lookups) == 1


def test_an_answer_on_its_way_is_asked_for_again_and_then_used() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(2)])

    assert engine.shim.lookup("r", 0) is None
    engine.client.lookups[0].arrive("HH")
    assert engine.shim.lookup("r", 0) == 2 * CHUNK


def test_no_answer_by_the_deadline_is_a_miss() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(2)])
    engine.clock.now += 0.049
    assert engine.shim.lookup("r", 0) is None
    engine.clock.now += 0.001

    assert engine.shim.lookup("r", 0) == 0
    assert len(engine.client.lookups) == 1


@pytest.mark.parametrize("reason", ["away", "deadline", "workers_missing", "breaker_open"])
def test_a_lookup_that_failed_is_a_miss_and_is_asked_again_later(reason: str) -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(2)])
    engine.client.lookups[0].fail(reason)

    assert engine.shim.lookup("r", 0) == 0
    assert len(engine.client.lookups) == 1
    engine.clock.now += 0.06
    assert engine.shim.lookup("r", 0) == 0
    assert len(engine.client.lookups) == 2


def test_what_is_computed_already_is_not_counted() -> None:
    engine = Engine()
    engine.ask("HHH")

    assert engine.shim.lookup("r", CHUNK) == 2 * CHUNK
    assert engine.shim.lookup("r", CHUNK + TOKENS) == 2 * CHUNK - TOKENS


def test_a_request_that_may_load_nothing_is_asked_about_without_a_lease() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(3)], max_lookup_tokens=0)

    assert engine.shim.lookup("r", 0) == 0
    assert engine.client.lookups[0].lease_id == 0


def test_a_request_without_full_chunks_costs_no_lookup() -> None:
    engine = Engine()
    engine.shim.add_request("r", [[]])

    assert engine.shim.lookup("r", 0) == 0
    assert engine.client.lookups == []


def test_a_lease_that_is_not_valid_any_more_is_asked_for_anew_once() -> None:
    engine = Engine()
    engine.ask("HH")
    assert engine.shim.lookup("r", 0) == 2 * CHUNK
    lease_id = engine.client.lookups[0].lease_id
    engine.client.expired.add(lease_id)

    assert engine.shim.lookup("r", 0) is None
    assert engine.shim.lookup("r", 0) is None
    assert len(engine.client.lookups) == 2
    assert engine.told.released == [lease_id]
    engine.client.lookups[1].arrive("HM")
    assert engine.shim.lookup("r", 0) == CHUNK


def test_an_answer_whose_lease_is_gone_when_it_is_read_is_a_miss() -> None:
    engine = Engine()
    engine.ask("HH")
    engine.client.expired.add(engine.client.lookups[0].lease_id)

    assert engine.shim.lookup("r", 0) == 0


def test_what_could_not_be_pinned_when_the_request_came_is_asked_for_when_it_is_its_turn() -> None:
    engine = Engine()
    engine.ask("HU")
    engine.clock.now += 60.0
    assert engine.shim.lookup("r", 0) is None
    engine.client.lookups[1].arrive("HH")
    assert engine.shim.lookup("r", 0) == 2 * CHUNK
    assert engine.told.released == [engine.client.lookups[0].lease_id]


def test_room_for_pins_is_waited_for_as_long_as_for_an_answer_and_then_a_miss() -> None:
    engine = Engine()
    engine.ask("HU")
    began = engine.clock.now
    while engine.shim.lookup("r", 0) is None:
        engine.clock.now += 0.001
        engine.client.lookups[-1].arrive("HU")
        assert engine.clock.now < began + 0.06
    assert engine.shim.lookup("r", 0) == CHUNK
    assert engine.clock.now == pytest.approx(began + 0.05, abs=0.002)
    assert 3 <= len(engine.client.lookups) <= 6


def test_where_the_device_has_what_could_not_be_pinned_nobody_waits() -> None:
    engine = Engine()
    engine.ask("HU")
    assert engine.shim.lookup("r", 2 * CHUNK) == 0


def test_what_cannot_be_pinned_is_asked_for_ever_more_seldom() -> None:
    engine = Engine()
    engine.ask("HU")
    for _ in range(1000):
        engine.clock.now += 0.001
        engine.shim.lookup("r", 0)
        engine.client.lookups[-1].arrive("HU")

    assert len(engine.client.lookups) < 12


def test_what_stays_pending_is_waited_for_once() -> None:
    engine = Engine()
    engine.ask("P")
    began = engine.clock.now
    while engine.shim.lookup("r", 0) is None:
        engine.clock.now += 0.01
        engine.client.lookups[-1].arrive("P")
        assert engine.clock.now < began + 2.1

    assert engine.clock.now == pytest.approx(began + 2.0, abs=0.05)
    engine.clock.now += 10.0
    engine.shim.lookup("r", 0)
    engine.client.lookups[-1].arrive("P")
    assert engine.shim.lookup("r", 0) == 0


def test_a_request_that_lives_through_a_reset_stores_nothing_of_the_old_weights() -> None:
    engine = Engine()
    engine.ask("MM", slots=[1, 2])
    engine.shim.lookup("r", 0)
    engine.shim.reset("weights-2")
    engine.grant(2, first=600)

    assert engine.shim.prepare_store("r", 2 * CHUNK, [TABLE]) is None
    assert engine.shim.stats.skipped[SkipReason.RESET] == 2


def test_the_misses_of_a_waiting_request_are_refreshed_in_the_background() -> None:
    engine = Engine()
    engine.ask("HM")
    assert engine.shim.lookup("r", 0) == CHUNK
    engine.clock.now += 0.051

    assert engine.shim.lookup("r", 0) == CHUNK  # the old answer stands until the new one is there
    assert len(engine.client.lookups) == 2
    engine.client.lookups[1].arrive("HH")
    assert engine.shim.lookup("r", 0) == 2 * CHUNK


def test_a_refresh_that_fails_leaves_what_was_pinned() -> None:
    engine = Engine()
    engine.ask("HM")
    engine.shim.lookup("r", 0)
    engine.clock.now += 0.051
    engine.shim.lookup("r", 0)
    engine.client.lookups[1].fail("deadline")

    assert engine.shim.lookup("r", 0) == CHUNK
    assert engine.told.released == []


def test_refreshes_become_rarer_while_nothing_changes() -> None:
    engine = Engine()
    engine.ask("M")
    for _ in range(1000):
        engine.shim.lookup("r", 0)
        engine.client.lookups[-1].arrive("M")
        engine.clock.now += 0.01

    assert len(engine.client.lookups) <= 12  # 10 s: 50, 100, 200 ... ms, then every 2 s


def test_a_request_with_everything_pinned_is_never_refreshed() -> None:
    engine = Engine()
    engine.ask("HH")
    for _ in range(100):
        engine.shim.lookup("r", 0)
        engine.clock.now += 1.0

    assert len(engine.client.lookups) == 1


def test_chunks_behind_a_gap_that_the_device_has_are_asked_for_from_there() -> None:
    engine = Engine()
    engine.ask("MHH", leased=[])
    assert engine.shim.lookup("r", 0) == 0

    assert engine.shim.lookup("r", CHUNK) is None
    assert engine.client.lookups[1].first_chunks == (1,)
    engine.client.lookups[1].arrive("HH")
    assert engine.shim.lookup("r", CHUNK) == 2 * CHUNK


def test_tokens_that_the_device_has_lost_again_are_asked_for() -> None:
    engine = Engine()
    engine.ask("MHH", leased=[])
    engine.shim.lookup("r", CHUNK)
    engine.client.lookups[1].arrive("HH")
    assert engine.shim.lookup("r", CHUNK) == 2 * CHUNK

    assert engine.shim.lookup("r", 0) is None
    assert engine.client.lookups[2].first_chunks == (0,)


# Chunks on their way


def test_a_pending_chunk_is_waited_for_until_it_arrives() -> None:
    engine = Engine()
    engine.ask("HPH")
    assert engine.shim.lookup("r", 0) is None

    lease_id = engine.client.lookups[0].lease_id
    engine.shim.on_resolved(lease_id, keys(3)[1], LookupStatus.HIT, 900, 4)
    assert engine.shim.lookup("r", 0) == 3 * CHUNK


def test_a_pending_chunk_that_does_not_come_is_a_miss_at_promotion_wait() -> None:
    engine = Engine()
    engine.ask("HP")
    engine.clock.now += 1.999
    assert engine.shim.lookup("r", 0) is None
    engine.clock.now += 0.002

    assert engine.shim.lookup("r", 0) == CHUNK


def test_a_pending_chunk_that_helps_nobody_is_not_waited_for() -> None:
    engine = Engine()
    engine.ask("HMP")

    assert engine.shim.lookup("r", 0) == CHUNK


def test_a_chunk_decided_before_the_answer_was_read_counts() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(2)])
    assert engine.shim.lookup("r", 0) is None
    lookup = engine.client.lookups[0]
    engine.shim.on_resolved(lookup.lease_id, keys(2)[1], LookupStatus.HIT, 900, 4)
    assert engine.shim.lookup("r", 0) is None  # the event has been read, the answer has not

    lookup.arrive("HP")
    assert engine.shim.lookup("r", 0) == 2 * CHUNK
    assert engine.shim.prepare_load("r", 0, 2 * CHUNK, [[1, 2, 3, 4]]).slot_ids == (100, 900)


def test_a_pending_chunk_that_resolves_to_a_miss_ends_the_wait() -> None:
    engine = Engine()
    engine.ask("HP")
    lease_id = engine.client.lookups[0].lease_id
    assert engine.shim.lookup("r", 0) is None

    engine.shim.on_resolved(lease_id, keys(2)[1], LookupStatus.MISS, 0, 0)
    assert engine.shim.lookup("r", 0) == CHUNK


# Loads


def test_a_load_uses_the_pins_of_the_lookup_and_gives_the_rest_back() -> None:
    engine = Engine()
    engine.ask("HHHH")
    engine.shim.lookup("r", 0)
    lookup_lease = engine.client.lookups[0].lease_id

    job = engine.shim.prepare_load("r", CHUNK, 2 * CHUNK, [[21, 22, 23, 24]])

    assert job.slot_ids == (101, 102)
    assert job.generations == (7, 7)
    assert job.keys == tuple(keys(4)[1:3])
    assert (job.block_ids, job.group_sizes, job.block_indices) == ((21, 22, 23, 24), (4,), (2,))
    assert engine.told.started_loads == [(lookup_lease, job.load_lease_id, [101, 102])]
    assert engine.told.order == ["start_load", "release"]


def test_a_load_may_start_inside_a_chunk() -> None:
    engine = Engine(blocks_per_chunk=4)
    engine.shim.add_request("r", [keys(3)])
    engine.client.lookups[0].arrive("HHH")
    assert engine.shim.lookup("r", 6 * TOKENS) == 6 * TOKENS

    job = engine.shim.prepare_load("r", 6 * TOKENS, 6 * TOKENS, [[1, 2, 3, 4, 5, 6]])

    assert job.block_indices == (6,)
    assert job.slot_ids == (101, 102)
    copies = job.plan(4)
    assert [(copy.first_block, copy.block_ids) for copy in copies] == [(2, (1, 2)), (0, (3, 4, 5, 6))]


def test_a_sliding_window_group_loads_its_last_window_only() -> None:
    engine = Engine(0, CHUNK)
    engine.shim.add_request("r", [keys(3, 0), keys(3, 1)])
    engine.client.lookups[0].arrive("HHH" + "MMH")
    assert engine.shim.lookup("r", 0) == 3 * CHUNK

    job = engine.shim.prepare_load("r", 0, 3 * CHUNK, [[1, 2, 3, 4, 5, 6], [9, 10]])

    assert job.block_indices == (0, 4)
    assert job.group_sizes == (6, 2)
    assert job.slot_ids == (100, 101, 102, 105)


def test_a_load_of_what_is_not_pinned_is_a_job_that_fails() -> None:
    engine = Engine()
    engine.ask("HM")
    engine.shim.lookup("r", 0)

    job = engine.shim.prepare_load("r", 0, 2 * CHUNK, [[1, 2, 3, 4]])

    assert job.slot_ids == (100, NO_SLOT)
    assert engine.told.started_loads[0][2] == [100]


def test_after_a_load_the_next_attempt_asks_anew() -> None:
    engine = Engine()
    engine.ask("HH")
    engine.shim.lookup("r", 0)
    engine.shim.prepare_load("r", 0, 2 * CHUNK, [[1, 2, 3, 4]])

    assert engine.shim.lookup("r", 0) is None
    assert len(engine.client.lookups) == 2


def test_what_failed_to_load_is_not_loaded_again_by_this_request() -> None:
    engine = Engine()
    engine.ask("HH")
    engine.shim.lookup("r", 0)
    job = engine.shim.prepare_load("r", 0, 2 * CHUNK, [[1, 2, 3, 4]])
    engine.shim.load_finished(job.job_id, ok=False, failed_keys={job.keys[0]})

    assert engine.shim.lookup("r", 0) is None
    engine.client.lookups[1].arrive("HH")
    assert engine.shim.lookup("r", 0) == 0
    assert engine.shim.stats.failed_loads == 1


def test_a_load_may_end_after_its_request() -> None:
    engine = Engine()
    engine.ask("HH")
    engine.shim.lookup("r", 0)
    job = engine.shim.prepare_load("r", 0, 2 * CHUNK, [[1, 2, 3, 4]])
    engine.shim.finish("r")

    engine.shim.load_finished(job.job_id, ok=False)
    assert engine.told.finished == ["r"]


# Stores


def test_missing_chunks_are_stored_into_credits_and_announced() -> None:
    engine = Engine()
    engine.ask("HMM")
    engine.shim.lookup("r", 0)
    engine.grant(8)

    job = engine.shim.prepare_store("r", 3 * CHUNK, [TABLE])

    assert isinstance(job, StoreJob)
    assert job.keys == tuple(keys(3)[1:])
    assert (job.slot_ids, job.generations) == ((500, 501), (3, 3))
    assert (job.block_ids, job.group_sizes, job.block_indices) == ((3, 4, 5, 6), (4,), (2,))
    assert engine.told.announced == [("r", [500, 501], [3, 3], keys(3)[1:])]


def test_chunks_between_that_are_not_stored_leave_no_gap_in_the_job() -> None:
    engine = Engine()
    engine.ask("MHM")
    engine.shim.lookup("r", 0)
    engine.grant(8)

    job = engine.shim.prepare_store("r", 3 * CHUNK, [TABLE])

    assert job is not None
    assert [copy.block_ids for copy in job.plan(2)] == [(1, 2), (5, 6)]


def test_out_of_credits_the_leading_chunks_are_stored_and_the_rest_is_given_up() -> None:
    engine = Engine()
    engine.ask("MMMM")
    engine.shim.lookup("r", 0)
    engine.grant(3)

    job = engine.shim.prepare_store("r", 4 * CHUNK, [TABLE])
    assert job is not None
    assert job.keys == tuple(keys(4)[:3])
    assert engine.shim.stats.skipped == {SkipReason.NO_CREDITS: 1}
    engine.grant(3, first=600)
    assert engine.shim.prepare_store("r", 4 * CHUNK, [TABLE]) is None


def test_without_a_daemon_nothing_is_stored() -> None:
    engine = Engine(attached=False)
    engine.shim.add_request("r", [keys(2)])
    engine.client.lookups[0].fail("away")

    assert engine.shim.prepare_store("r", 2 * CHUNK, [TABLE]) is None
    assert engine.shim.stats.skipped == {SkipReason.AWAY: 2}


def test_a_chunk_that_another_request_just_stored_is_not_stored_twice() -> None:
    engine = Engine()
    engine.grant(8)
    engine.ask("MM", req_id="a")
    engine.ask("MM", req_id="b")
    assert engine.shim.prepare_store("a", 2 * CHUNK, [TABLE]) is not None

    assert engine.shim.prepare_store("b", 2 * CHUNK, [TABLE]) is None
    assert engine.shim.stats.skipped == {SkipReason.RECENT: 2}


def test_a_chunk_that_the_daemon_misses_after_its_store_ended_is_stored_again() -> None:
    engine = Engine()
    engine.grant(8)
    engine.ask("M", req_id="a")
    job = engine.shim.prepare_store("a", CHUNK, [TABLE])
    assert job is not None
    engine.shim.store_finished(job.job_id)
    engine.clock.now += 1.0
    engine.ask("M", req_id="b")

    assert engine.shim.prepare_store("b", CHUNK, [TABLE]) is not None


def test_a_request_that_computes_holds_no_pins() -> None:
    engine = Engine()
    engine.ask("HM")
    engine.shim.lookup("r", 0)
    engine.shim.prepare_store("r", 2 * CHUNK, [TABLE])

    assert engine.told.released == [engine.client.lookups[0].lease_id]


def test_keys_of_decoded_chunks_are_stored_without_a_lookup() -> None:
    engine = Engine()
    engine.grant(8)
    engine.ask("H")
    engine.shim.lookup("r", 0)
    engine.shim.extend_keys("r", 0, keys(2)[1:])

    job = engine.shim.prepare_store("r", 2 * CHUNK, [TABLE])
    assert job is not None
    assert job.keys == (keys(2)[1],)


@given(st.data())
def test_a_store_job_names_each_chunks_own_blocks(data: st.DataObject) -> None:
    blocks_per_chunk = data.draw(st.integers(1, 4))
    statuses = data.draw(st.text(alphabet="HMPU", min_size=1, max_size=12))
    num_credits = data.draw(st.integers(0, 12))
    engine = Engine(blocks_per_chunk=blocks_per_chunk)
    engine.ask(statuses)
    engine.shim.lookup("r", 0)
    engine.grant(num_credits)

    job = engine.shim.prepare_store("r", len(statuses) * blocks_per_chunk * TOKENS, [TABLE])

    missing = [chunk for chunk, letter in enumerate(statuses) if letter == "M"][:num_credits]
    if job is None:
        assert not missing
        return
    assert job.keys == tuple(keys(len(statuses))[chunk] for chunk in missing)
    for copy, chunk in zip(job.plan(blocks_per_chunk), missing, strict=True):
        first = chunk * blocks_per_chunk
        assert copy.block_ids == tuple(TABLE[first : first + blocks_per_chunk])
        assert copy.first_block == 0


# Credits


def test_the_slots_for_what_a_prompt_lacks_are_wished_for_with_its_lookup() -> None:
    engine = Engine()
    engine.grant(1)
    engine.ask("HMMM")

    assert engine.client.lookups[0].slots_for_misses == [SlotsForMisses(group=0, at_most=4, spare=1)]


def test_what_did_not_come_with_the_answer_is_asked_for_after_a_while() -> None:
    engine = Engine()
    engine.ask("HMMM", slots=[1])
    engine.shim.lookup("r", 0)
    engine.shim.end_step()
    assert engine.told.asked_credits == []  # the daemon had no more a moment ago
    engine.clock.now += 0.1
    engine.shim.end_step()

    assert engine.told.asked_credits == [(0, 2)]


def test_a_request_whose_stores_are_capped_wishes_for_no_more_than_that() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(4)], {"max_offload_tokens": 2 * CHUNK})
    assert [wish.at_most for wish in engine.client.lookups[-1].slots_for_misses] == [2]
    engine.shim.add_request("nothing", [keys(4)], {"max_offload_tokens": 0})
    assert engine.client.lookups[-1].slots_for_misses == []


def test_steps_without_news_send_nothing_but_an_empty_flush() -> None:
    engine = Engine()
    for _ in range(100):
        engine.shim.end_step()

    assert engine.told.asked_credits == []
    assert engine.told.returned == []
    assert engine.told.order == []


def test_after_five_seconds_without_stores_the_credits_go_back() -> None:
    engine = Engine()
    engine.grant(4)
    engine.clock.now += 5.0
    engine.shim.end_step()

    assert sorted(engine.told.returned) == [500, 501, 502, 503]


def test_credits_that_the_daemon_wants_go_back_without_a_step() -> None:
    engine = Engine()
    engine.grant(4)
    engine.shim.on_credits_wanted(3)

    assert len(engine.told.returned) == 3
    assert engine.told.flushes == 1


def test_a_daemon_that_drains_gets_all_credits_back() -> None:
    engine = Engine()
    engine.grant(4)
    engine.shim.on_draining(10_000)

    assert len(engine.told.returned) == 4


# The end of things


def test_a_finished_request_gives_its_lease_back() -> None:
    engine = Engine()
    engine.ask("HH")
    engine.shim.lookup("r", 0)
    engine.shim.finish("r")

    assert engine.told.released == [engine.client.lookups[0].lease_id]
    assert engine.told.finished == ["r"]


def test_a_request_that_finishes_before_its_answer_wants_it_no_more() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(2)])
    engine.shim.finish("r")

    assert engine.client.lookups[0].cancelled


def test_when_the_daemon_is_gone_every_pin_and_credit_is_void() -> None:
    engine = Engine()
    engine.grant(4)
    engine.ask("HM")
    assert engine.shim.lookup("r", 0) == CHUNK
    engine.client.detach()

    assert engine.shim.lookup("r", 0) is None  # asked anew; the real client answers at once
    engine.client.lookups[-1].fail("away")
    assert engine.shim.lookup("r", 0) == 0
    assert engine.shim.prepare_store("r", 2 * CHUNK, [TABLE]) is None
    assert engine.told.released == []


def test_a_load_that_is_prepared_after_the_session_ended_has_no_slots() -> None:
    engine = Engine()
    engine.ask("H")
    assert engine.shim.lookup("r", 0) == CHUNK
    engine.client.detach()
    engine.client.attach(replace(session(), pool_id=POOL_ID + 1))

    job = engine.shim.prepare_load("r", 0, CHUNK, [[1, 2]])
    assert set(job.slot_ids) == {NO_SLOT}
    assert engine.told.started_loads == []


def test_a_job_names_the_pool_of_its_slots() -> None:
    engine = Engine()
    engine.grant(4)
    engine.ask("HM")
    engine.shim.lookup("r", 0)
    load = engine.shim.prepare_load("r", 0, CHUNK, [[1, 2]])
    store = engine.shim.prepare_store("r", 2 * CHUNK, [TABLE])
    assert store is not None
    assert (load.pool_id, store.pool_id) == (POOL_ID, POOL_ID)

    engine.client.detach()
    engine.client.attach(replace(session(), pool_id=POOL_ID + 1))
    engine.ask("M", req_id="s")
    engine.grant(4)
    store = engine.shim.prepare_store("s", CHUNK, [TABLE])
    assert store is not None
    assert store.pool_id == POOL_ID + 1


def test_in_the_child_of_a_fork_there_are_no_pins_and_no_credits() -> None:
    engine = Engine()
    engine.grant(4)
    engine.ask("HM")
    assert engine.shim.lookup("r", 0) == CHUNK
    with engine.shim._credits._lock:  # as one of the client's threads may at the fork
        child = os.fork()
        if not child:
            status = 1
            try:
                job = engine.shim.prepare_load("r", 0, CHUNK, [[1, 2]])
                assert set(job.slot_ids) == {NO_SLOT}
                assert engine.shim.prepare_store("r", 2 * CHUNK, [TABLE]) is None
                engine.shim.end_step()
                engine.shim.finish("r")
                status = 0
            finally:
                os._exit(status)
    assert wait_for_child(child) == 0
    assert engine.shim.prepare_store("r", 2 * CHUNK, [TABLE]) is not None


def test_the_child_of_a_fork_ends_its_parents_requests_whoever_held_the_credits() -> None:
    engine = Engine()
    engine.grant(4)
    engine.ask("MM")
    assert engine.shim.lookup("r", 0) == 0
    with engine.shim._credits._lock:  # as one of the client's threads may at the fork
        child = os.fork()
        if not child:
            status = 1
            try:
                engine.shim.finish("r")
                status = 0
            finally:
                os._exit(status)
    assert wait_for_child(child, timeout_s=5) == 0


def test_credits_asked_for_before_a_reset_go_back_when_they_come() -> None:
    engine = Engine()
    early, late = engine.client.new_lease_id(), engine.client.new_lease_id
    assert engine.shim.reset("weights-2")
    engine.shim.on_credits(0, [8], [3], late())
    engine.shim.on_credits(0, [7], [3], early)

    assert engine.told.returned == [7]
    engine.ask("MM")
    store = engine.shim.prepare_store("r", 2 * CHUNK, [TABLE])
    assert store is not None
    assert store.slot_ids == (8,)


def test_a_reset_voids_everything_that_was_known() -> None:
    engine = Engine()
    engine.grant(4)
    engine.ask("HM")
    engine.shim.lookup("r", 0)

    assert engine.shim.reset("weights-2")
    assert engine.client.resets == ["weights-2"]
    assert engine.told.order == ["release", "return_credits", "reset"]
    assert engine.shim.lookup("r", 0) is None


def test_jobs_travel_pickled() -> None:
    engine = Engine()
    engine.grant(4)
    engine.ask("HM")
    engine.shim.lookup("r", 0)
    load = engine.shim.prepare_load("r", 0, CHUNK, [[1, 2]])
    store = engine.shim.prepare_store("r", 2 * CHUNK, [TABLE])

    for job in (load, store):
        assert pickle.loads(pickle.dumps(job)) == job
    assert isinstance(load, LoadJob)


def test_the_limits_of_the_session_bound_what_is_asked() -> None:
    engine = Engine(attached=False)
    limits = replace(LIMITS, max_keys=8, max_credit_bytes=3 * 4096)
    engine.client.attach(session(limits=limits))
    engine.shim.add_request("r", [keys(20)])

    assert len(engine.client.lookups[0].keys) == 8
    engine.client.lookups[0].arrive("M" * 8)
    engine.shim.lookup("r", 0)
    engine.clock.now += 0.1
    engine.shim.end_step()
    assert engine.told.asked_credits == [(0, 3)]
