from __future__ import annotations

from dataclasses import replace

import pytest

from kvtier_client.answers import SlotsForMisses
from kvtier_client.jobs import NO_SLOT
from kvtier_client.keyed_scheduler import NOTHING_TO_STORE, KeyedSchedulerShim, KeyStatus
from kvtier_client.requests import SkipReason

from .doubles import LATER_LEASE, LIMITS, POOL_ID, RecordingClient, session
from .test_requests import CHUNK, facts, keys
from .test_scheduler import Clock

HIT, PENDING, RETRY, MISS = KeyStatus.HIT, KeyStatus.PENDING, KeyStatus.RETRY, KeyStatus.MISS


class Engine:
    """A keyed shim with one group, an attached client and a clock of the test."""

    def __init__(self, *, hears_of_failures: bool = True, attached: bool = True) -> None:
        self.clock = Clock()
        self.client = RecordingClient(facts(0))
        self.shim = KeyedSchedulerShim(self.client, hears_of_failures=hears_of_failures, clock=self.clock)
        if attached:
            self.client.attach(session([4096]))

    def grant(self, count: int, first: int = 500) -> None:
        self.shim.on_credits(0, list(range(first, first + count)), [3] * count, LATER_LEASE)

    def ask(self, statuses: str, *, req_id: str = "r") -> None:
        """Add a request with one chunk a letter, give it slots to store into, and answer its lookup."""
        self.shim.add_request(req_id, [keys(len(statuses))])
        self.grant(len(statuses))
        self.client.lookups[-1].arrive(statuses)

    def looks_up(self, count: int, *, req_id: str = "r", first: int = 0) -> list[KeyStatus]:
        return [self.shim.lookup(req_id, key) for key in keys(count)[first:]]


# Lookup


def test_every_key_is_answered_from_one_lookup_however_often_it_is_asked_for() -> None:
    engine = Engine()
    engine.ask("HHMP")

    for _ in range(30):
        assert engine.looks_up(4) == [HIT, HIT, MISS, PENDING]
        engine.shim.end_step()
    assert len(engine.client.lookups) == 1


def test_until_the_answer_comes_every_key_is_to_be_asked_for_again() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(2)])
    engine.grant(2)

    assert engine.looks_up(2) == [RETRY, RETRY]
    engine.client.lookups[0].arrive("HM")
    assert engine.looks_up(2) == [RETRY, RETRY]  # the answers of one step go together
    engine.shim.end_step()
    assert engine.looks_up(2) == [HIT, MISS]


def test_no_answer_by_the_deadline_is_a_miss() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(2)])
    engine.clock.now += 0.051

    assert engine.looks_up(2) == [MISS, MISS]


def test_a_chunk_that_is_not_there_after_the_promotion_wait_is_a_miss() -> None:
    engine = Engine()
    engine.ask("P")
    assert engine.looks_up(1) == [PENDING]
    engine.shim.end_step()
    engine.clock.now += 2.1

    assert engine.looks_up(1) == [MISS]


def test_without_a_daemon_everything_misses_at_once() -> None:
    engine = Engine(attached=False)
    engine.shim.add_request("r", [keys(3)])
    engine.client.lookups[-1].fail("away")

    assert engine.looks_up(3) == [MISS, MISS, MISS]


def test_an_unknown_key_is_a_miss() -> None:
    engine = Engine()
    engine.ask("H")

    assert engine.shim.lookup("r", keys(9)[8]) is MISS


def test_all_requests_of_a_step_share_one_wait() -> None:
    engine = Engine()
    waited: list[float] = []
    for name in "abc":
        engine.shim.add_request(name, [keys(1)])
        lookup = engine.client.lookups[-1]

        def wait(timeout_s: float) -> bool:
            waited.append(timeout_s)
            engine.clock.now += timeout_s
            return False

        lookup.wait = wait  # type: ignore[method-assign]
    for name in "abc":
        engine.shim.begin_attempt(name, 0)

    assert waited[0] == pytest.approx(0.0005)
    assert sum(waited) == pytest.approx(0.0005)
    engine.shim.end_step()
    engine.shim.begin_attempt("a", 0)  # has waited its time
    assert waited[-1] == 0
    engine.shim.begin_attempt("b", 0)
    assert waited[-1] == pytest.approx(0.0005)


def test_chunks_behind_what_the_device_has_are_asked_for_from_there() -> None:
    engine = Engine()
    engine.ask("MMHH")
    engine.client.lookups[0].arrive("MMHH", leased=[])

    assert not engine.shim.begin_attempt("r", 2 * CHUNK)
    assert engine.client.lookups[1].first_chunks == (2,)


def test_where_the_request_begins_follows_from_the_first_key_that_is_asked_for() -> None:
    engine = Engine()
    engine.ask("MMHH")
    engine.client.lookups[0].arrive("MMHH", leased=[])

    assert engine.looks_up(4, first=2) == [RETRY, RETRY]
    assert engine.client.lookups[1].first_chunks == (2,)


# Slots to store into


def test_slots_for_what_is_missing_come_with_the_answer() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(3)])
    assert engine.client.lookups[-1].slots_for_misses == [SlotsForMisses(group=0, at_most=3, spare=0)]
    engine.client.lookups[-1].arrive("HMM", slots=[7, 8])

    assert engine.looks_up(3) == [HIT, MISS, MISS]
    assert engine.shim.prepare_store("r", keys(3)).slot_ids == (7, 8)
    engine.shim.end_step()
    assert engine.client.told.asked_credits == []
    assert engine.client.told.returned == []


def test_a_key_that_is_named_twice_takes_one_slot() -> None:
    engine = Engine()
    engine.ask("MM")
    engine.grant(1, first=600)
    first, second = keys(2)
    store = engine.shim.prepare_store("r", [first, first, second])

    assert store.keys == (first, second)
    assert sorted([*store.slot_ids, *engine.client.told.returned]) == [500, 501, 600]
    assert len(engine.client.told.returned) == 1


def test_slots_that_come_before_the_shim_has_heard_of_the_session_go_back() -> None:
    engine = Engine(attached=False)
    engine.shim.add_request("r", [keys(2)])
    engine.client.lookups[-1].arrive("MM", slots=[7, 8])
    engine.shim.begin_attempt("r", 0)
    engine.shim.on_credits(0, [9], [3], LATER_LEASE)

    assert engine.client.told.returned == [7, 8, 9]
    engine.client.attach(session([4096]))
    engine.shim.end_step()
    assert engine.client.told.asked_credits == [(0, 2)]


def test_slots_of_an_answer_from_before_a_reset_go_back() -> None:
    engine = Engine()
    engine.shim.add_request("r", [keys(1)])
    lookup = engine.client.lookups[-1]
    lookup.arrive("M", slots=[7])
    engine.shim.add_request("later", [keys(1)])
    engine.shim.reset()

    assert lookup.cancelled  # which gives back what the answer grants


def test_a_request_waits_once_for_slots_that_are_on_their_way() -> None:
    engine = asking_for_slots()
    engine.shim.add_request("r", [keys(3)])
    engine.client.lookups[-1].arrive("MMM")  # there were none to come along

    assert engine.looks_up(3) == [RETRY] * 3
    engine.grant(4)
    engine.shim.end_step()
    assert engine.looks_up(3) == [MISS] * 3
    assert engine.shim.prepare_store("r", keys(3)).slot_ids == (500, 501, 502)


def test_slots_that_are_kept_for_decoded_chunks_are_left_to_them() -> None:
    engine = asking_for_slots()
    engine.grant(4)
    engine.client.told.asked_credits.clear()
    engine.shim.add_request("r", [keys(3)])
    assert engine.client.lookups[-1].slots_for_misses == [SlotsForMisses(group=0, at_most=3, spare=0)]
    engine.client.lookups[-1].arrive("MMM", slots=[7, 8, 9])

    engine.looks_up(3)
    assert len(engine.shim.prepare_store("r", keys(3)).slot_ids) == 3
    engine.shim.end_step()
    assert engine.client.told.asked_credits == []


def asking_for_slots() -> Engine:
    """An engine that has stored two decoded chunks into nothing, and asks for slots for the next ones."""
    engine = Engine()
    engine.shim.add_request("decoding", [keys(9)[7:7]])
    engine.shim.prepare_store("decoding", keys(9)[7:])
    engine.shim.end_step()
    assert engine.client.told.asked_credits == [(0, 4)]
    return engine


def test_slots_that_do_not_come_hold_a_request_no_longer_than_an_answer_would() -> None:
    engine = asking_for_slots()
    engine.shim.add_request("r", [keys(3)])
    engine.client.lookups[-1].arrive("MMM")
    assert engine.looks_up(3) == [RETRY] * 3
    engine.shim.end_step()
    engine.clock.now += 0.051

    assert engine.looks_up(3) == [MISS] * 3


def test_requests_that_begin_together_ask_for_slots_of_their_own() -> None:
    engine = Engine()
    for name in "ab":
        engine.shim.add_request(name, [keys(3)])
    assert [lookup.slots_for_misses[0].spare for lookup in engine.client.lookups] == [0, 0]
    engine.client.lookups[0].arrive("MMM", slots=[1, 2, 3])
    engine.client.lookups[1].arrive("MMM", slots=[4, 5, 6])

    for name in "ab":
        engine.looks_up(3, req_id=name)
    engine.shim.add_request("c", [keys(3)])
    assert engine.client.lookups[-1].slots_for_misses[0].spare == 0  # the others need them
    assert len(engine.shim.prepare_store("a", keys(3)).keys) == 3


# Loads


def test_a_load_names_the_slots_in_the_order_of_its_keys_and_takes_the_pins_along() -> None:
    engine = Engine()
    engine.ask("HHHM")
    engine.looks_up(4)

    load = engine.shim.prepare_load("r", [keys(4)[2], keys(4)[1]])

    assert load.pool_id == POOL_ID
    assert load.slot_ids == (102, 101)
    assert load.generations == (7, 7)
    assert engine.client.told.started_loads[-1][1:] == (load.lease_id, [102, 101])


def test_a_chunk_that_is_not_pinned_becomes_a_load_that_fails() -> None:
    engine = Engine()
    engine.ask("HM")
    engine.looks_up(2)

    assert engine.shim.prepare_load("r", keys(2)).slot_ids == (100, NO_SLOT)


def test_what_failed_to_load_misses_for_that_request_only() -> None:
    engine = Engine()
    engine.ask("HH")
    engine.looks_up(2)
    engine.shim.prepare_load("r", keys(2))
    engine.shim.load_finished("r", keys(2), {keys(2)[0]})
    engine.shim.end_step()
    assert engine.looks_up(2) == [RETRY, RETRY]
    engine.client.lookups[-1].arrive("HH")
    engine.shim.end_step()

    assert engine.looks_up(2) == [MISS, HIT]
    engine.ask("HH", req_id="other")
    assert engine.looks_up(2, req_id="other") == [HIT, HIT]


def test_an_engine_that_hears_of_no_failures_does_not_load_the_same_chunks_twice_for_a_request() -> None:
    engine = Engine(hears_of_failures=False)
    engine.ask("HH")
    engine.looks_up(2)
    engine.shim.prepare_load("r", keys(2))
    engine.shim.load_finished("r", keys(2), ())
    engine.shim.end_step()
    engine.looks_up(2)
    engine.client.lookups[-1].arrive("HH")
    engine.shim.end_step()

    assert engine.looks_up(2) == [MISS, MISS]


# Stores


def test_only_what_the_daemon_lacks_is_stored_and_in_the_order_of_the_keys() -> None:
    engine = Engine()
    engine.ask("HMPMM")
    engine.looks_up(5)

    store = engine.shim.prepare_store("r", keys(5))

    assert store.keys == (keys(5)[1], keys(5)[3], keys(5)[4])
    assert store.slot_ids == (500, 501, 502)
    assert engine.shim.stats.skipped[SkipReason.RESIDENT] == 2


def test_what_finds_no_slot_is_given_up_from_the_end() -> None:
    engine = Engine()
    engine.ask("MMM")
    engine.looks_up(3)
    engine.shim.prepare_store("r", [])
    engine.client.told.returned.clear()
    engine.shim.on_credits_wanted(2)

    assert engine.shim.prepare_store("r", keys(3)).keys == (keys(3)[0],)
    assert engine.shim.stats.skipped[SkipReason.NO_CREDITS] == 2


def test_a_chunk_that_this_engine_stored_lately_is_not_stored_again() -> None:
    engine = Engine()
    engine.ask("M")
    engine.looks_up(1)
    engine.shim.prepare_store("r", keys(1))
    engine.shim.store_finished(keys(1))
    engine.grant(1, first=600)

    assert engine.shim.prepare_store("r", keys(1)) is NOTHING_TO_STORE
    assert engine.shim.stats.skipped[SkipReason.RECENT] == 1


def test_chunks_that_became_known_after_the_lookup_are_stored_on_suspicion() -> None:
    engine = Engine()
    engine.ask("M")
    engine.looks_up(1)
    engine.grant(1, first=600)

    assert engine.shim.prepare_store("r", keys(3)[2:]).keys == (keys(3)[2],)


def test_a_finished_request_leaves_nothing_behind() -> None:
    engine = Engine()
    engine.client.attach(session([4096], limits=replace(LIMITS, lookup_lease_ms=1000)))
    engine.ask("HM")
    engine.looks_up(2)
    lease_id = engine.client.lookups[-1].lease_id
    engine.shim.finish("r")

    assert not engine.shim.has_request("r")
    assert lease_id in engine.client.told.released
    assert "r" in engine.client.told.finished
