"""Watch the daemon: hit rate, copies, occupancy, tiers, engines, and what deserves a look.

  kvtier top                        redrawn every two seconds; q or Ctrl-C ends it
  kvtier top --interval 10
  kvtier top --once                 one picture over two seconds, for a log or a ticket
  kvtier top --once -o json         the figures for a script

A daemon that stops or restarts does not end it: it waits, and goes on with the next one.
Exit code: 0, or 2 without a daemon where --once is given.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING

from kvtier_server.address import client_address
from kvtier_server.cli.connection import add_connection_arguments, ask_status
from kvtier_server.cli.failure import Failure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from kvtier.v1.admin_pb2 import GetStatusResponse

SUMMARY = "watch hit rate, copies, tiers and engines, live"

MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 3600.0
MAX_SILENCE_S = 2.0
"""Longest wait for an answer between two pictures: keys are not read meanwhile."""
COLUMNS = 80
"""Of what is written to a file or a pipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--interval", type=_interval, default=2.0, metavar="SECONDS", help="between two pictures (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="ask twice, --interval apart, print, and end")
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "json"),
        default="table",
        help="json: with --once (default: table)",
    )
    add_connection_arguments(parser)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not MIN_INTERVAL_S <= seconds <= MAX_INTERVAL_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds from {MIN_INTERVAL_S} to {MAX_INTERVAL_S:.0f}"
        )
    return seconds


def run(args: argparse.Namespace) -> int:
    """Show one picture, or one after the other."""
    if args.output == "json" and not args.once:
        raise Failure("-o json is for one picture; add --once", 2)
    if args.once:
        return _once(args)
    console = _console()
    watch = Watch(args)
    try:
        if console.is_terminal:
            _live(console, watch, args.interval)
        else:
            while True:
                _print(console, [*watch.picture(COLUMNS, None), _blank()])
                sys.stdout.flush()
                time.sleep(args.interval)
    except KeyboardInterrupt:
        pass
    return 0


def _once(args: argparse.Namespace) -> int:
    first = ask_status(args)
    time.sleep(args.interval)
    second = ask_status(args)
    if args.output == "json":
        print(json.dumps(figures(first, second), indent=2))
        return 0
    from kvtier_server.cli.top_figures import hints
    from kvtier_server.cli.top_screen import screen

    console = _console()
    address = client_address(args.address, os.environ)
    columns = console.width if console.is_terminal else COLUMNS
    _print(console, screen(first, second, hints(first, second), address=address, columns=columns, rows=None))
    return 0


def figures(old: GetStatusResponse, new: GetStatusResponse) -> dict[str, object]:
    """Write the picture as JSON has it. Fields are added here, never renamed.

    `rates` is null where the daemon was restarted in between, a hit rate where nothing was looked up.
    """
    from kvtier_server.cli.top_figures import copied_bytes, hints, hit_rate, rates

    now = rates(old, new)
    return {
        "boot_id": new.boot_id,
        "state": new.state,
        "uptime_seconds": new.uptime_seconds,
        "rates": asdict(now) if now is not None else None,
        "total": {
            "lookup_keys": sum(new.lookup_keys.values()),
            "hit_rate": hit_rate(new.lookup_keys),
            "lookup_tokens": new.lookup_tokens,
            "store_bytes": copied_bytes(new, "store"),
            "load_bytes": copied_bytes(new, "load"),
            "evictions": sum(new.evictions.values()),
            "refused": sum(new.store_refused.values()),
        },
        "hints": hints(old, new),
    }


class Watch:
    """The daemon over time: keeps the last two answers, and since when there is none."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = argparse.Namespace(**{**vars(args), "timeout": min(args.timeout, MAX_SILENCE_S)})
        self._address = client_address(args.address, os.environ)
        self._last: GetStatusResponse | None = None
        self._silent_since: float | None = None

    def picture(self, columns: int, rows: int | None) -> list[Text]:
        """Ask, and draw what was heard or that nothing was."""
        from kvtier_server.cli.top_figures import hints
        from kvtier_server.cli.top_screen import screen, waiting

        try:
            new = ask_status(self._args)
        except Failure as failure:
            self._last = None
            now = time.monotonic()
            if self._silent_since is None:
                self._silent_since = now
            return waiting(self._address, str(failure), now - self._silent_since, columns)
        self._silent_since = None
        old, self._last = self._last, new
        return screen(old, new, hints(old, new), address=self._address, columns=columns, rows=rows)


def _live(console: Console, watch: Watch, interval_s: float) -> None:
    """Redraw until a key or a signal ends it; the terminal is as before then, whatever happened."""
    with _signals(), _keys() as wait_for_key, console.screen(hide_cursor=True) as display:
        while True:
            width, height = console.size
            from rich.console import Group

            display.update(Group(*watch.picture(width, height)))
            if wait_for_key(interval_s):
                return


@contextmanager
def _signals() -> Iterator[None]:
    """Have SIGTERM and a lost terminal unwind as Ctrl-C does, so that the terminal is given back."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Give a function that waits so many seconds for a `q`, and tells whether it came.

    Keys are read without waiting for a line and are not shown. Ctrl-Z is off: the shell would get a terminal
    that still shows the picture.
    """
    if not sys.stdin.isatty():
        yield _wait
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        mode = termios.tcgetattr(fd)
        mode[6][termios.VSUSP] = b"\x00"
        termios.tcsetattr(fd, termios.TCSADRAIN, mode)
        yield lambda seconds: _wait_for_q(fd, seconds)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _wait_for_q(fd: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([fd], [], [], left)
        if readable:
            typed = os.read(fd, 64)
            if not typed or b"q" in typed.lower():  # nothing: the terminal has gone
                return True
    return False


def _console() -> Console:
    from rich.console import Console

    return Console(
        file=sys.stdout,
        no_color=bool(os.environ.get("NO_COLOR")),
        highlight=False,
        emoji=False,
        markup=False,
        soft_wrap=False,
    )


def _print(console: Console, lines: list[Text]) -> None:
    for line in lines:
        if console.is_terminal:
            console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
        else:
            print(line.plain)


def _blank() -> Text:
    from rich.text import Text

    return Text("")
