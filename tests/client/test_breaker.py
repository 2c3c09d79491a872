from __future__ import annotations

from kvtier_client.breaker import Breaker


def test_it_opens_at_the_third_missed_deadline_in_a_row_of_whatever_call() -> None:
    breaker = Breaker(3)
    assert [breaker.missed(call) for call in ("Lookup", "Complete", "Lookup")] == [False, False, True]
    assert breaker.is_open
    assert not breaker.missed("Lookup"), "it opens once"


def test_small_answers_in_between_do_not_hide_that_lookups_are_too_slow() -> None:
    breaker = Breaker(3)
    for opened in (False, False, True):
        assert breaker.missed("Lookup") == opened
        breaker.answered("Complete")
    assert breaker.is_open


def test_an_answer_in_time_forgets_earlier_misses_of_its_kind() -> None:
    breaker = Breaker(3)
    for _ in range(10):
        assert not breaker.missed("Complete")
        assert not breaker.missed("Complete")
        assert not breaker.is_clean("Complete")
        breaker.answered("Complete")
        assert breaker.is_clean("Complete")


def test_a_late_answer_does_not_close_it() -> None:
    breaker = Breaker(1)
    breaker.missed("Lookup")
    breaker.answered("Lookup")
    assert breaker.is_open


def test_after_a_probe_one_more_miss_opens_it_again_and_an_answer_clears_it() -> None:
    breaker = Breaker(3)
    for _ in range(3):
        breaker.missed("Lookup")
    breaker.close()
    assert not breaker.is_open
    assert not breaker.missed("Complete")
    assert breaker.missed("Lookup")
    breaker.close()
    breaker.answered("Lookup")
    assert not breaker.missed("Lookup")


def test_another_daemon_starts_with_a_clean_record() -> None:
    breaker = Breaker(2)
    breaker.missed("Lookup")
    breaker.missed("Lookup")
    breaker.reset()
    assert breaker.is_clean("Lookup")
    assert not breaker.missed("Lookup")
