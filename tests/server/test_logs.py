from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from kvtier_server import logs
from kvtier_server.logs import REPEATS_PER_WINDOW, WINDOW_S, RepeatLimit


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def record(event: str) -> logging.LogRecord:
    return logging.LogRecord("kvtier", logging.INFO, __file__, 1, {"event": event}, None, None)


def test_without_a_terminal_a_line_is_a_json_object() -> None:
    stream = io.StringIO()
    logs.setup("info", "auto", stream)
    structlog.get_logger("kvtier.test").info("session opened", engine="e1", rank=3)
    (line,) = lines(stream)
    assert line.pop("timestamp")
    assert line == {"event": "session opened", "level": "info", "engine": "e1", "rank": 3}


def test_lines_of_libraries_come_in_the_same_form() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    logging.getLogger("grpc").warning("channel %s closed", 7)
    (line,) = lines(stream)
    assert (line["event"], line["level"]) == ("channel 7 closed", "warning")


def test_no_line_holds_a_key_a_prompt_or_raw_bytes() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    structlog.get_logger("kvtier.test").info(
        "lookup", keys=[b"secret"] * 3, prompt="secret", blob=b"secret", params_json=memoryview(b"secret")
    )
    assert "secret" not in stream.getvalue()
    assert lines(stream)[0]["keys"] == "<3 hidden>"


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    logs.setup("warning", "json", stream)
    structlog.get_logger("kvtier.test").info("quiet")
    structlog.get_logger("kvtier.test").warning("loud")
    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_a_second_setup_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.setup("info", "json", first)
    logs.setup("info", "json", second)
    structlog.get_logger("kvtier.test").info("once")
    assert first.getvalue() == ""
    assert len(lines(second)) == 1


def test_an_exception_is_written_with_its_traceback() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("kvtier.test").exception("handler failed")
    assert "ValueError: broken" in str(lines(stream)[0]["exception"])


def test_a_console_line_has_no_color_unless_it_goes_to_a_terminal() -> None:
    stream = io.StringIO()
    logs.setup("info", "console", stream)
    structlog.get_logger("kvtier.test").info("session opened", engine="e1")
    assert "session opened" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_an_event_that_repeats_is_written_a_few_times_and_then_counted() -> None:
    stream = io.StringIO()
    limit = logs.setup("info", "json", stream)
    logger = structlog.get_logger("kvtier.test")
    for _ in range(REPEATS_PER_WINDOW + 7):
        logger.info("deadline missed")
    logger.info("another event")
    events = [line["event"] for line in lines(stream)]
    assert events == ["deadline missed"] * REPEATS_PER_WINDOW + ["another event"]
    assert limit.flush() == {}, "the minute is not over"


def test_after_a_minute_the_next_line_says_how_many_were_held_back() -> None:
    clock = FakeClock()
    limit = RepeatLimit(clock)
    passed = [limit.filter(record("x")) for _ in range(REPEATS_PER_WINDOW + 5)]
    assert passed == [True] * REPEATS_PER_WINDOW + [False] * 5
    clock.now = WINDOW_S
    next_line = record("x")
    assert limit.filter(next_line)
    assert next_line.msg["held_back"] == 5  # type: ignore[index]
    assert limit.flush() == {}


def test_an_event_that_fell_silent_is_summed_up_by_flush_once() -> None:
    clock = FakeClock()
    limit = RepeatLimit(clock)
    for _ in range(REPEATS_PER_WINDOW + 5):
        limit.filter(record("x"))
    limit.filter(record("rare"))
    clock.now = WINDOW_S
    assert limit.flush() == {"x": 5}
    assert limit.flush() == {}


def test_event_names_without_end_do_not_fill_the_memory() -> None:
    limit = RepeatLimit(FakeClock())
    for number in range(logs.MAX_EVENTS_TRACKED * 2):
        assert limit.filter(record(f"event {number}"))
    assert len(limit._windows) == logs.MAX_EVENTS_TRACKED


def test_of_a_key_in_a_system_error_eight_digits_are_left() -> None:
    stream = io.StringIO()
    logs.setup("info", "json", stream)
    key = bytes(range(36)).hex()
    try:
        raise FileNotFoundError(2, "No such file", f"{key}.chunk")
    except FileNotFoundError as error:
        structlog.get_logger("kvtier.test").exception("read failed", why=str(error), lock="ab" * 16)
        logging.getLogger("kvtier_server.secondary").warning("a file could not be removed: %s", error)
    assert key[:10] not in stream.getvalue()
    first, second = lines(stream)
    for text in (first["why"], first["exception"], second["event"]):
        assert f"{key[:8]}.." in str(text)
    assert first["lock"] == "ab" * 16, "the name of a lock is no key"
