from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_server.units import (
    DURATION_UNITS,
    SIZE_UNITS,
    UnitError,
    exact_bytes,
    exact_duration,
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_duration,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4GiB", 4 << 30),
        ("1.5MiB", 3 << 19),
        (" 64 KiB ", 65536),
        ("10GB", 10**10),
        ("0.5KiB", 512),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [("250ms", 250_000_000), ("1.5s", 1_500_000_000), ("5min", 300 * 10**9), ("0", 0)],
)
def test_a_duration_is_read_as_nanoseconds(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    ("text", "meant"),
    [("4G", '"4GiB"'), ("4gib", '"4GiB"'), ("7m", '"7MiB"'), ("1.5mb", '"1.5MB"'), ("1b", '"1B"')],
)
def test_a_slip_in_the_unit_of_a_size_is_named_with_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(UnitError, match=meant):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("30sec", '"30s"'), ("2m", '"2min"'), ("1H", '"1h"'), ("5MS", '"5ms"')]
)
def test_a_slip_in_the_unit_of_a_duration_is_named_with_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(UnitError, match=meant):
        parse_duration(text)


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1e9", "4 Gi B", "0x10", "nan", "inf", "1,5GiB", "٤GiB", "4GiB\n5"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UnitError, match="is not a size"):
        parse_bytes(text)


def test_a_size_that_is_no_whole_number_of_bytes_is_refused() -> None:
    with pytest.raises(UnitError, match="whole number"):
        parse_bytes("0.3B")


def test_a_bare_number_is_no_duration() -> None:
    with pytest.raises(UnitError, match="has no unit"):
        parse_duration("30")


@given(st.integers(0, 1 << 40), st.sampled_from(sorted(SIZE_UNITS)))
def test_every_whole_number_of_every_unit_is_read_exactly(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit}") == number * SIZE_UNITS[unit]


@given(st.text(max_size=12))
def test_any_text_is_either_a_number_or_refused_with_a_message(text: str) -> None:
    for parse, units in ((parse_bytes, SIZE_UNITS), (parse_duration, DURATION_UNITS)):
        problem = ""
        try:
            assert 0 <= parse(text) < 10**18 * max(units.values())
        except UnitError as error:
            problem = str(error)
        assert not problem or repr(text) in problem


@given(st.integers(0, 1 << 50))
def test_what_is_written_exactly_is_read_as_the_same(number: int) -> None:
    assert parse_bytes(exact_bytes(number)) == number
    assert parse_duration(exact_duration(number)) == number


def test_the_largest_unit_that_leaves_a_whole_number_is_written() -> None:
    assert [exact_bytes(size) for size in (0, 1500, 4 << 30, 3 << 29)] == ["0B", "1500B", "4GiB", "1536MiB"]
    assert [exact_duration(ns) for ns in (0, 1_500_000_000, 300 * 10**9)] == ["0s", "1500ms", "5min"]


def test_sizes_and_times_are_written_for_people() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1536, 4 << 30, 3 << 40)] == [
        "0B",
        "1023B",
        "1.5KiB",
        "4GiB",
        "3TiB",
    ]
    assert [format_seconds(s) for s in (0.44, 5, 95, 7260, 200000)] == [
        "0.4s",
        "5s",
        "1m35s",
        "2h01m",
        "2d07h",
    ]
