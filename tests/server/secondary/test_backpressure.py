from __future__ import annotations

from kvtier_server.secondary.backpressure import FIRST_PAUSE_S, LONGEST_PAUSE_S, MIB, TRIP_AFTER, Backpressure


def tripped(now: float = 0.0) -> Backpressure:
    pressure = Backpressure(MIB)
    assert [pressure.failed(now) for _ in range(TRIP_AFTER)] == [False] * (TRIP_AFTER - 1) + [True]
    return pressure


def test_what_waits_is_bounded_by_bytes_and_an_empty_queue_takes_any_size() -> None:
    pressure = Backpressure(MIB)
    assert pressure.admits(2 * MIB, 0.0)
    pressure.queued(MIB // 2)
    assert pressure.admits(MIB // 2, 0.0)
    assert not pressure.admits(MIB // 2 + 1, 0.0)
    pressure.left(MIB // 2)
    assert pressure.admits(2 * MIB, 0.0)


def test_what_waits_is_bounded_by_the_time_it_would_take() -> None:
    pressure = Backpressure(1 << 40)
    pressure.queued(9 * MIB)
    pressure.written(MIB, 1.0)
    assert pressure.admits(MIB, 0.0)
    assert not pressure.admits(2 * MIB, 0.0)


def test_the_average_follows_a_disk_that_becomes_slow() -> None:
    pressure = Backpressure(1 << 40)
    pressure.written(MIB, 0.001)
    for _ in range(100):
        pressure.written(MIB, 1.0)
    assert 0.9 < pressure.seconds_per_mib <= 1.0


def test_after_failures_in_a_row_it_is_tried_once_after_each_pause_which_grows() -> None:
    pressure, now, pause = tripped(), 0.0, FIRST_PAUSE_S
    for _ in range(8):
        assert not pressure.admits(1, now + 0.99 * pause)
        now += pause
        assert pressure.admits(1, now)
        assert not pressure.admits(1, now), "one trial at a time"
        pressure.failed(now)
        pause = min(2 * pause, LONGEST_PAUSE_S)
    now += pause
    assert pressure.admits_trial(now)
    pressure.worked()
    assert not pressure.is_tripped
    assert pressure.admits(1, now)


def test_a_trial_that_does_not_come_about_is_no_end_of_trials() -> None:
    pressure = tripped()
    assert pressure.admits(1, FIRST_PAUSE_S)
    pressure.undecided()
    assert pressure.admits(1, FIRST_PAUSE_S)


def test_an_io_that_works_forgets_failures_before_it() -> None:
    pressure = Backpressure(MIB)
    for _ in range(10 * TRIP_AFTER):
        pressure.failed(0.0)
        pressure.worked()
    assert not pressure.is_tripped
