from __future__ import annotations

from itertools import count

from kvtier_client.breaker import Breaker

DEADLINE_S = 0.05


class Missing:
    """A breaker whose calls miss one after the other, each by its deadline."""

    def __init__(self, threshold: int) -> None:
        self.breaker = Breaker(threshold, DEADLINE_S)
        self._times = count(1)

    def missed(self, call: str) -> bool:
        return self.breaker.missed(call, next(self._times) * DEADLINE_S)


def test_it_opens_at_the_third_missed_deadline_in_a_row_of_whatever_call() -> None:
    missing = Missing(3)
    breaker = missing.breaker
    assert [missing.missed(call) for call in ("Lookup", "Complete", "Lookup")] == [False, False, True]
    assert breaker.is_open
    assert not missing.missed("Lookup"), "it opens once"


def test_small_answers_in_between_do_not_hide_that_lookups_are_too_slow() -> None:
    missing = Missing(3)
    breaker = missing.breaker
    for opened in (False, False, True):
        assert missing.missed("Lookup") == opened
        breaker.answered("Complete")
    assert breaker.is_open


def test_an_answer_in_time_forgets_earlier_misses_of_its_kind() -> None:
    missing = Missing(3)
    breaker = missing.breaker
    for _ in range(10):
        assert not missing.missed("Complete")
        assert not missing.missed("Complete")
        assert not breaker.is_clean("Complete")
        breaker.answered("Complete")
        assert breaker.is_clean("Complete")


def test_a_late_answer_does_not_close_it() -> None:
    missing = Missing(1)
    breaker = missing.breaker
    missing.missed("Lookup")
    breaker.answered("Lookup")
    assert breaker.is_open


def test_after_a_probe_one_more_miss_opens_it_again_and_an_answer_clears_it() -> None:
    missing = Missing(3)
    breaker = missing.breaker
    for _ in range(3):
        missing.missed("Lookup")
    breaker.close()
    assert not breaker.is_open
    assert not missing.missed("Complete")
    assert missing.missed("Lookup")
    breaker.close()
    breaker.answered("Lookup")
    assert not missing.missed("Lookup")


def test_another_daemon_starts_with_a_clean_record() -> None:
    missing = Missing(2)
    breaker = missing.breaker
    missing.missed("Lookup")
    missing.missed("Lookup")
    breaker.reset()
    assert breaker.is_clean("Lookup")
    assert not missing.missed("Lookup")


def test_one_pause_of_the_daemon_is_one_miss_of_all_calls_that_were_on_their_way() -> None:
    breaker = Breaker(3, DEADLINE_S)
    for start in (1.0, 2.0):
        for late in range(8):
            assert not breaker.missed("Lookup", start + late / 1000)
            assert not breaker.missed("Complete", start + late / 1000)
    assert breaker.missed("Lookup", 3.0)
