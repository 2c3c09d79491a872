from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier_client.credits import IDLE_RETURN_S, WINDOW_STEPS, Credit, CreditBook

SLOT = 4096


def book(max_slots: int = 1000, groups: int = 1) -> CreditBook:
    made = CreditBook()
    made.open([SLOT] * groups, max_slots * SLOT, pool_id=1, now=0.0)
    return made


def step(made: CreditBook, count: int, now: float = 0.0) -> None:
    made.take(0, count, now)
    made.end_step(now)


def test_a_new_book_asks_for_nothing() -> None:
    assert book().shortfall(now=0.0) == []


def test_twice_the_largest_step_is_asked_for_once() -> None:
    made = book()
    step(made, 8)
    step(made, 3)

    assert made.shortfall(now=0.0) == [(0, 16)]
    assert made.shortfall(now=0.0) == []


def test_a_step_is_forgotten_after_a_hundred_others() -> None:
    made = book()
    step(made, 50)
    for _ in range(WINDOW_STEPS):
        step(made, 4)

    assert made.shortfall(now=0.0) == [(0, 8)]


def test_steps_without_stores_do_not_forget_the_demand() -> None:
    made = book()
    step(made, 8)
    for _ in range(10 * WINDOW_STEPS):
        made.end_step(0.0)

    assert made.shortfall(now=0.0) == [(0, 16)]


def test_a_small_gap_is_not_worth_an_rpc() -> None:
    made = book()
    step(made, 8)
    made.shortfall(now=0.0)
    made.grant(0, list(range(16)), [1] * 16, 5, now=0.0)

    step(made, 3)
    assert made.shortfall(now=1.0) == []
    step(made, 1)
    assert made.shortfall(now=1.0) == [(0, 4)]


def test_a_short_grant_is_not_asked_again_at_once() -> None:
    made = book()
    step(made, 8)
    made.shortfall(now=0.0)
    made.grant(0, [1, 2], [1, 1], 5, now=0.0)

    assert made.shortfall(now=0.05) == []
    assert made.shortfall(now=0.2) == [(0, 14)]


def test_a_request_without_a_reply_is_repeated_after_a_while() -> None:
    made = book()
    step(made, 8)
    made.shortfall(now=0.0)

    assert made.shortfall(now=0.5) == []
    assert made.shortfall(now=1.5) == [(0, 16)]


def test_the_daemons_limit_is_shared_among_the_groups() -> None:
    made = book(max_slots=12, groups=2)
    made.take(0, 8, now=0.0)
    made.take(1, 16, now=0.0)
    made.end_step(0.0)

    assert made.shortfall(now=0.0) == [(0, 4), (1, 8)]


def test_what_requests_will_store_adds_up_until_they_have_stored_it() -> None:
    made = book()
    made.expect(0, 20, now=0.0)
    made.expect(0, 12, now=0.0)
    assert made.shortfall(now=0.0) == [(0, 32)]
    made.grant(0, list(range(32)), [1] * 32, 5, now=0.0)
    step(made, 4)
    made.expect(0, -32, now=0.0)

    assert len(made.surplus(now=0.0)) == 12  # down to twice the target of 8


def test_slots_are_awaited_while_they_are_needed_and_on_their_way() -> None:
    made = book()
    made.expect(0, 2, now=0.0)
    assert not made.awaits(now=0.0, patience_s=0.05)  # nobody has asked
    made.shortfall(now=0.0)

    assert made.awaits(now=0.04, patience_s=0.05)
    assert not made.awaits(now=0.06, patience_s=0.05)
    made.grant(0, [1], [1], 5, now=0.04)
    assert not made.awaits(now=0.04, patience_s=0.05)  # the daemon had no more


def test_credits_are_used_in_the_order_they_came() -> None:
    made = book()
    made.grant(0, [5, 6], [1, 1], 5, now=0.0)
    made.grant(0, [7], [1], 5, now=1.0)

    assert [credit.slot_id for credit in made.take(0, 2, now=1.0)] == [5, 6]
    assert [credit.slot_id for credit in made.take(0, 2, now=1.0)] == [7]


def test_after_five_seconds_without_stores_everything_goes_back() -> None:
    made = book()
    step(made, 8)
    made.grant(0, list(range(16)), [1] * 16, 5, now=0.0)

    assert made.surplus(now=IDLE_RETURN_S - 0.1) == []
    assert len(made.surplus(now=IDLE_RETURN_S)) == 16
    assert made.shortfall(now=IDLE_RETURN_S) == []


def test_a_credit_that_is_wanted_never_gets_too_old() -> None:
    made = book()
    made.grant(0, [1, 2], [1, 1], 5, now=0.0)
    made.expect(0, 2, now=86_400.0)

    assert made.surplus(now=86_400.0) == []
    assert [credit.slot_id for credit in made.take(0, 2, now=86_400.0)] == [1, 2]


def test_a_credit_names_the_pool_of_its_session() -> None:
    made = book()
    made.grant(0, [1], [1], 5, now=0.0)
    assert [credit.pool_id for credit in made.take(0, 1, now=0.0)] == [1]
    made.void()
    made.open([SLOT], 1000 * SLOT, pool_id=2, now=1.0)
    made.grant(0, [1], [1], 6, now=1.0)

    assert [credit.pool_id for credit in made.take(0, 1, now=1.0)] == [2]


def test_what_the_daemon_wants_back_is_not_asked_for_again_at_once() -> None:
    made = book()
    step(made, 8)
    made.grant(0, list(range(16)), [1] * 16, 5, now=0.0)

    assert len(made.give_back(10, now=1.0)) == 10
    assert made.shortfall(now=1.1) == []
    assert made.held(0) == 6


@pytest.mark.parametrize("order", [(6, 7), (7, 6)])
def test_after_a_reset_credits_that_were_on_their_way_go_back_whichever_reply_comes_first(
    order: tuple[int, int],
) -> None:
    made = book()
    step(made, 4)
    made.shortfall(now=0.0)
    made.grant(0, [1, 2], [1, 1], 5, now=0.0)
    made.shortfall(now=1.0)

    assert [credit.slot_id for credit in made.reset(first_lease_id=7)] == [2, 1]
    assert made.shortfall(now=1.0) == [(0, 8)]
    replies = {6: 3, 7: 4}  # lease id -> slot: the first was asked for before the reset
    for lease_id in order:
        back = made.grant(0, [replies[lease_id]], [1], lease_id, now=1.0)
        assert [credit.slot_id for credit in back] == ([3] if lease_id == 6 else [])
    assert [credit.slot_id for credit in made.take(0, 9, now=1.0)] == [4]


def test_a_voided_book_has_nothing_and_gives_back_what_comes() -> None:
    made = book()
    step(made, 8)
    made.grant(0, [1], [1], 5, now=0.0)
    made.void()
    back = made.grant(0, [2], [1], 5, now=0.0) + made.add(0, [3], [1], 5, needed=1, now=0.0)

    assert [credit.slot_id for credit in back] == [2, 3]
    assert made.take(0, 1, now=0.0) == []
    assert made.shortfall(now=0.0) == []
    assert made.held(0) == 0


def test_the_demand_outlives_a_session() -> None:
    made = book()
    step(made, 8)
    made.void()
    made.open([SLOT], 1000 * SLOT, pool_id=1, now=1.0)

    assert made.shortfall(now=1.0) == [(0, 16)]


class CreditBooks(RuleBasedStateMachine):
    """Every slot that was granted is either held or came out exactly once; the limit is never asked past."""

    MAX_SLOTS = 64

    def __init__(self) -> None:
        super().__init__()
        self.book = CreditBook()
        self.now = 0.0
        self.expected = [0, 0]
        self.next_slot = 0
        self.inside: set[int] = set()
        self.asked: list[tuple[int, int, int]] = []
        self.lease_id = 1
        self.reset_at = 0

    @initialize()
    def open(self) -> None:
        self.book.open([SLOT, 2 * SLOT], self.MAX_SLOTS * SLOT, pool_id=1, now=0.0)

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.2, 1.5, 6.0, 120.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(group=st.integers(0, 1), count=st.integers(0, 40))
    def take(self, group: int, count: int) -> None:
        taken = self.book.take(group, count, self.now)
        assert len(taken) <= count
        self._leave(taken)

    @rule(group=st.integers(0, 1), count=st.integers(0, 40))
    def expect(self, group: int, count: int) -> None:
        self.book.expect(group, count - self.expected[group], self.now)
        self.expected[group] = count

    @rule()
    def end_step(self) -> None:
        self.book.end_step(self.now)

    @rule()
    def ask(self) -> None:
        for group, count in self.book.shortfall(self.now):
            assert count > 0
            assert (self.book.held(group) + count) * SLOT * (group + 1) <= self.MAX_SLOTS * SLOT
            self.asked.append((self.lease_id, group, count))
            self.lease_id += 1

    @precondition(lambda self: self.asked)
    @rule(share=st.floats(0, 1), data=st.data())
    def grant(self, share: float, data: st.DataObject) -> None:
        reply = data.draw(st.sampled_from(self.asked))
        self.asked.remove(reply)
        lease_id, group, count = reply
        slots = list(range(self.next_slot, self.next_slot + int(count * share)))
        self.next_slot += len(slots)
        self.inside.update(slots)
        back = self.book.grant(group, slots, [1] * len(slots), lease_id, self.now)
        assert [credit.slot_id for credit in back] == (slots if lease_id < self.reset_at else [])
        self._leave(back)

    @rule()
    def reset(self) -> None:
        self.reset_at = self.lease_id
        self._leave(self.book.reset(self.lease_id))
        assert not self.inside

    @rule()
    def give_surplus_back(self) -> None:
        self._leave(self.book.surplus(self.now))

    @rule(count=st.integers(0, 20))
    def give_back(self, count: int) -> None:
        back = self.book.give_back(count, self.now)
        assert len(back) <= count
        self._leave(back)

    @invariant()
    def every_credit_is_accounted_for(self) -> None:
        assert self.book.held(0) + self.book.held(1) == len(self.inside)

    def _leave(self, gone: list[Credit]) -> None:
        slots = [credit.slot_id for credit in gone]
        assert set(slots) <= self.inside
        assert len(set(slots)) == len(slots)
        self.inside -= set(slots)


TestCreditBooks = CreditBooks.TestCase
