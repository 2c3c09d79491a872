"""What is remembered of unfinished requests, and how it is forgotten."""

from __future__ import annotations

from itertools import count

from kvtier_server.core.requests import Request, Requests

from .engine import to_key, to_keys


def remembered(request: Request, numbers: range) -> list[int]:
    return [number for number in numbers if request.stamp_of(to_key(number)) is not None]


def test_a_call_has_as_many_keys_forgotten_as_it_brings_those_of_the_oldest_calls() -> None:
    requests = Requests(max_requests=8, max_keys=12, next_serial=count().__next__)
    long, short = requests.get_or_add("long"), requests.get_or_add("short")
    for first in (0, 4, 8):
        requests.add_run(long, to_keys(range(first, first + 4)), range(first, first + 4))
    assert remembered(long, range(12)) == list(range(12))
    requests.add_run(short, to_keys(range(20, 23)), range(20, 23))
    assert remembered(long, range(12)) == list(range(4, 12)), "not half of all that is known"
    assert long.num_keys + short.num_keys == 11
    requests.add_run(long, to_keys(range(30, 34)), range(30, 34))
    assert remembered(long, range(40)) == [*range(8, 12), *range(30, 34)]
    requests.add_run(short, to_keys(range(40, 52)), range(40, 52))
    assert remembered(long, range(60)) == []
    assert remembered(short, range(60)) == list(range(40, 52))


def test_a_finished_request_leaves_its_room_to_others() -> None:
    requests = Requests(max_requests=8, max_keys=8, next_serial=count().__next__)
    for name in ("first", "second"):
        requests.add_run(requests.get_or_add(name), to_keys(range(4)), range(4))
    requests.pop("first")
    again = requests.get_or_add("first")
    requests.add_run(again, to_keys(range(4)), range(4))
    second = requests.get("second")
    assert second is not None
    assert remembered(second, range(4)) == remembered(again, range(4)) == [0, 1, 2, 3]
    requests.forget_keys()
    requests.add_run(again, to_keys(range(8)), range(8))
    assert remembered(again, range(8)) == list(range(8))
    assert remembered(second, range(4)) == []
