"""How the daemon speaks to its operator: one line per event on stderr, for a person or as JSON.

Owns the format, the rate limit and the rule that no line holds a key or a prompt. What is worth a line is
decided where it happens: `structlog.get_logger().info("session opened", engine=...)`.

    event        what happened: a word for what the daemon does, a sentence of a tier or a library
    level        debug, info, warning, error
    timestamp    UTC, ISO 8601, microseconds
    held_back    lines of this event that the last minute had beyond REPEATS_PER_WINDOW
    exception    a trace, where there is one
    others       say themselves: boot, session, engine, role, rank, namespace (12 digits), tier, slot, method,
                 reason (as in errors), why and fix (for people)
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor

REPEATS_PER_WINDOW = 20
"""Lines of one event in a window, enough for the ranks of one engine; the others are only counted."""
WINDOW_S = 60.0
MAX_EVENTS_TRACKED = 1024
"""Event names are constants in the code, so this is never reached unless somebody formats one."""

PAYLOAD_FIELDS = frozenset({"key", "keys", "evicted_keys", "prompt", "token_ids", "params", "params_json"})
"""Fields that would hold what users wrote, or names made from it."""

KEY_DIGITS = 8
"""So many of a key's hexadecimal digits may stand in a line."""

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class RepeatLimit(logging.Filter):
    """Lets the first lines of an event through and counts the rest of the minute.

    What was held back is said by `flush`, which the daemon calls from its tick, or by the event's next line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[str, _Window] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether this line may be written; adds `held_back` to a line that ends a silence."""
        event = _event_of(record)
        now = self._clock()
        with self._lock:
            window = self._windows.get(event)
            if window is None or now - window.start_s >= WINDOW_S:
                held_back = window.held_back if window else 0
                if window is None and len(self._windows) >= MAX_EVENTS_TRACKED:
                    return True
                self._windows[event] = window = _Window(now)
                if held_back and isinstance(record.msg, dict):
                    record.msg["held_back"] = held_back
            window.lines += 1
            if window.lines <= REPEATS_PER_WINDOW:
                return True
            window.held_back += 1
            return False

    def flush(self) -> dict[str, int]:
        """Forget windows that are over; return how many lines of which events they held back."""
        now = self._clock()
        with self._lock:
            over = [event for event, window in self._windows.items() if now - window.start_s >= WINDOW_S]
            windows = {event: self._windows.pop(event) for event in over}
        return {event: window.held_back for event, window in windows.items() if window.held_back}


class _Window:
    __slots__ = ("held_back", "lines", "start_s")

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.lines = 0
        self.held_back = 0


def _event_of(record: logging.LogRecord) -> str:
    # Lines of structlog carry their event in a dict; lines of libraries have the template as the message.
    return str(record.msg.get("event")) if isinstance(record.msg, dict) else str(record.msg)


class LineHandler(logging.StreamHandler[TextIO]):
    """The handler that `setup` owns, so that a second setup replaces it and leaves those of others alone."""


def hide_payload(_: object, __: str, event: EventDict) -> EventDict:
    """Replace keys, prompts and raw bytes by their size."""
    for name, value in event.items():
        if name in PAYLOAD_FIELDS or isinstance(value, bytes | bytearray | memoryview):
            event[name] = f"<{len(value)} hidden>" if hasattr(value, "__len__") else "<hidden>"
    return event


_LONG_HEX = re.compile(r"([0-9a-fA-F]{8})[0-9a-fA-F]{32,}")
"""A key has 20 bytes or more: a hash of 16 at least, and the group. Names of locks are shorter."""


def cut_keys(_: object, __: str, event: EventDict) -> EventDict:
    """Leave 8 digits of whatever may be a key in hexadecimal: system errors name chunks' files."""
    for name, value in event.items():
        if isinstance(value, str) and len(value) > KEY_DIGITS:
            event[name] = _LONG_HEX.sub(r"\1..", value)
    return event


def setup(level: str, log_format: str, stream: TextIO | None = None) -> RepeatLimit:
    """Send the lines of this process, libraries included, to `stream` (stderr). Replaces an earlier setup."""
    stream = sys.stderr if stream is None else stream
    console = log_format == "console" or (log_format == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        hide_payload,
        structlog.processors.format_exc_info,
        cut_keys,
    ]
    render: Processor
    if console:
        render = structlog.dev.ConsoleRenderer(colors=_wants_color(stream))
    else:
        render = structlog.processors.JSONRenderer(default=str)
    handler = LineHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    limit = RepeatLimit()
    handler.addFilter(limit)
    root = logging.getLogger()
    for earlier in [present for present in root.handlers if isinstance(present, LineHandler)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(LEVELS[level])
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # a later setup must reach loggers that exist already
    )
    return limit


def set_level(level: str) -> None:
    """Write lines of this level and above from now on."""
    logging.getLogger().setLevel(LEVELS[level])


def _wants_color(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def log_held_back(limit: RepeatLimit) -> None:
    """Write one line per event that was held back in a window that is over. Called from the daemon's tick."""
    for event, count in limit.flush().items():
        structlog.get_logger("kvtier.logs").warning("repeated lines held back", repeated=event, count=count)
