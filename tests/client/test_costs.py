from __future__ import annotations

import pytest

from kvtier_client.costs import Costs, TokenCosts


def test_a_request_without_hits_computes_from_the_answer_to_the_end_of_its_step() -> None:
    costs = Costs(offers_ahead=False)
    costs.begin("r", 100)
    costs.asks("r", 1.0)
    costs.asks("r", 1.5)
    costs.answered("r", 16, 2.0)
    costs.computed("r", 64)
    costs.end_step(5.0)
    assert costs.take(5.0) == TokenCosts(0, 0.0, 48, 3.0)


def test_what_is_offered_ahead_is_computed_when_the_next_step_ends() -> None:
    costs = Costs(offers_ahead=True)
    costs.begin("r", 100)
    costs.asks("r", 1.0)
    costs.answered("r", 0, 1.0)
    costs.computed("r", 64)
    costs.end_step(1.1)
    assert costs.take(1.1) is None
    costs.computed("r", 96)
    costs.end_step(2.0)
    assert costs.take(2.0) == TokenCosts(0, 0.0, 96, 1.0)


def test_the_end_of_a_request_ends_what_it_computes() -> None:
    costs = Costs(offers_ahead=True)
    costs.begin("r", 64)
    costs.asks("r", 0.0)
    costs.answered("r", 0, 1.0)
    costs.computed("r", 64)
    costs.end("r", 3.0)
    costs.end_step(9.0)
    assert costs.take(9.0) == TokenCosts(0, 0.0, 64, 2.0)


def test_a_load_costs_from_the_first_question_to_its_end_and_the_rest_is_computed() -> None:
    costs = Costs(offers_ahead=False)
    costs.begin("r", 100)
    costs.asks("r", 1.0)
    costs.asks("r", 3.0)
    costs.answered("r", 16, 3.0)
    costs.loading("r", 32)
    costs.loaded("r", 4.5, ok=True)
    costs.computed("r", 80)
    costs.end_step(5.0)
    assert costs.take(5.0) == TokenCosts(32, 3.5, 32, 0.5)


def test_a_request_that_found_no_room_waits_for_that_and_not_for_its_load() -> None:
    costs = Costs(offers_ahead=False)
    costs.begin("r", 100)
    for asked in (1.0, 2.0, 3.0):
        costs.asks("r", asked)
        costs.answered("r", 0, asked)
    costs.loading("r", 32)
    costs.loaded("r", 3.5, ok=True)
    assert costs.take(5.0) == TokenCosts(32, 0.5, 0, 0.0)


def test_chunks_on_their_way_up_are_waited_for() -> None:
    costs = Costs(offers_ahead=False)
    costs.begin("r", 100)
    for asked in (1.0, 2.0):
        costs.asks("r", asked)
        costs.answered("r", 0, asked)
        costs.waits("r")
    costs.asks("r", 3.0)
    costs.answered("r", 0, 3.0)
    costs.loading("r", 32)
    costs.loaded("r", 3.5, ok=True)
    assert costs.take(5.0) == TokenCosts(32, 2.5, 0, 0.0)


def test_a_failed_load_brings_nothing_and_its_tokens_are_computed() -> None:
    costs = Costs(offers_ahead=False)
    costs.begin("r", 100)
    costs.asks("r", 1.0)
    costs.answered("r", 0, 1.0)
    costs.loading("r", 48)
    costs.loaded("r", 2.0, ok=False)
    costs.computed("r", 48)
    costs.end_step(4.0)
    assert costs.take(4.0) == TokenCosts(0, 0.0, 48, 2.0)


def test_tokens_beyond_the_prompt_and_tokens_offered_again_do_not_count() -> None:
    costs = Costs(offers_ahead=False)
    costs.begin("r", 64)
    costs.asks("r", 0.0)
    costs.answered("r", 0, 0.0)
    for end, until in ((1.0, 64), (2.0, 64), (3.0, 80)):
        costs.computed("r", until)
        costs.end_step(end)
    assert costs.take(9.0) == TokenCosts(0, 0.0, 64, 1.0)


def test_reports_are_a_second_apart_and_lose_nothing() -> None:
    costs = Costs(offers_ahead=False)
    taken = []
    for number in range(20):
        now = number / 10
        costs.begin(f"r{number}", 16)
        costs.asks(f"r{number}", now)
        costs.answered(f"r{number}", 0, now)
        costs.computed(f"r{number}", 16)
        costs.end(f"r{number}", now + 0.05)
        if (told := costs.take(now)) is not None:
            taken.append(told)
    assert len(taken) == 2
    taken.append(costs.take(5.0) or TokenCosts())
    assert sum(told.computed_tokens for told in taken) == 20 * 16
    assert sum(told.compute_s for told in taken) == pytest.approx(20 * 0.05)


def test_a_request_that_is_gone_is_no_trouble() -> None:
    costs = Costs()
    costs.begin("r", 16)
    costs.end("r", 1.0)
    costs.loaded("r", 2.0, ok=True)
    costs.end("r", 2.0)
    assert costs.take(2.0) is None
