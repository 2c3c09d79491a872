from __future__ import annotations

from kvtier_client.patience import TRY_EVERY, Patience

BUDGET_S = 0.0005


def usually(took_s: float) -> Patience:
    patience = Patience()
    for _ in range(20):
        patience.note(took_s)
    return patience


def test_the_first_answers_are_waited_for() -> None:
    assert Patience().is_worth(0.0, BUDGET_S)


def test_answers_that_come_in_time_are_waited_for() -> None:
    assert usually(0.0004).is_worth(0.0, BUDGET_S)


def test_where_answers_take_longer_only_one_lookup_in_many_is_waited_for() -> None:
    patience = usually(0.001)

    tried = [patience.is_worth(0.0, BUDGET_S) for _ in range(2 * TRY_EVERY)]
    assert tried.count(True) == 2


def test_an_answer_that_must_be_about_to_come_is_waited_for() -> None:
    assert usually(0.001).is_worth(0.0007, BUDGET_S)


def test_a_daemon_that_has_become_faster_is_waited_for_again() -> None:
    patience = usually(0.001)
    for _ in range(8):
        patience.note(0.0002)

    assert patience.is_worth(0.0, BUDGET_S)


def test_nobody_waits_without_time_to_wait() -> None:
    assert not Patience().is_worth(0.0, 0.0)
