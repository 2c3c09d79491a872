"""`make stack`: a daemon with a tier below its pool, engines that load it, and Prometheus, as processes.

The same parts as in docker/compose.yaml, but for Grafana: its dashboard's queries are asked and shown as a
table. In the foreground; Ctrl-C ends everything and removes the pool.

    python -m tests.observability.stack [--seconds N] [--port N] [--picture FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from tests.daemon_process import REPOSITORY, DaemonProcess

from . import dashboard
from .dashboard import Query
from .load import Load
from .prometheus import NoPrometheus, Prometheus, Series

POOL = "24MiB"
"""Less than the chats leave, so that chunks are evicted and come up again."""

TIER = """
[[tiers]]
type = "filesystem"
name = "disk"
root = "{directory}/chunks"
capacity = "48MiB"
writes_per_day = "1TiB"
state_directory = "{directory}/state"
"""
RATE_WINDOW = "15s"
SHOW_EVERY_S = 15.0
POLL_S = 1.0


class DaemonEnded(Exception):
    """The daemon has ended, and with it what is shown."""


class Stack:
    """All of it. On leaving, every process has ended and the pool is removed."""

    def __init__(self, port: int = 0) -> None:
        """`port`: of Prometheus; 0 = any that is free."""
        self._port = port
        self._parts = contextlib.ExitStack()
        self.answers: dict[Query, list[Series]] = {}
        """To every query that has had one, the last that was not empty."""

    def __enter__(self) -> Self:
        with self._parts:
            directory = Path(tempfile.mkdtemp(prefix="kvtier-run-"))
            self._parts.callback(shutil.rmtree, directory, ignore_errors=True)
            self.daemon = DaemonProcess(directory, POOL, config=TIER.format(directory=directory))
            self._parts.enter_context(self.daemon).start()
            self.prometheus = Prometheus(f"127.0.0.1:{self.daemon.metrics_port}")
            self._parts.callback(self.prometheus.close)
            self.prometheus.start(self._port)
            self.load = Load(self.daemon.address, directory)
            self._parts.callback(self.load.close)
            self.load.start()
            self.began = time.time()
            self._parts = self._parts.pop_all()  # nothing failed: all of it stays until we leave
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts.close()

    @property
    def shown_range(self) -> str:
        """What a dashboard over the whole run would say."""
        return f"{max(int(time.time() - self.began), 1)}s"

    def pids(self) -> list[int]:
        """Every process that was started and runs now."""
        return [self.daemon.pid, self.prometheus.pid, *self.load.pids()]

    def ask(self) -> None:
        """Ask every query of the dashboard. Raises DaemonEnded, AssertionError if another part has ended."""
        code = self.daemon.exit_code()
        if code is not None:
            raise DaemonEnded(f"the daemon has ended (exit code {code}); the stack ends")
        assert not self.load.trouble, self.load.trouble
        for query in dashboard.queries():
            found = self.prometheus.query(query.filled(RATE_WINDOW, self.shown_range))
            if found:
                self.answers[query] = found

    def unanswered(self) -> list[Query]:
        """Queries that have had no answer yet."""
        return [query for query in dashboard.queries() if query not in self.answers]


def rows(stack: Stack) -> Iterator[tuple[str, str, str]]:
    """Panel, series and value of what was answered last."""
    for query in dashboard.queries():
        found = stack.answers.get(query)
        if found is None:
            yield query.panel, query.legend, "no answer yet"
        for series in found or ():
            yield query.panel, query.name(series.labels), with_unit(series.value, query.unit)


def with_unit(value: float, unit: str) -> str:
    """Write a value as the dashboard's panel would."""
    if unit == "percentunit":
        return f"{100 * value:.1f} %"
    if unit == "s":
        return f"{value * 1e3:.2f} ms" if abs(value) < 1 else f"{value:.2f} s"
    if unit in {"bytes", "Bps"}:
        step, names = (
            (1024, ("B", "KiB", "MiB", "GiB")) if unit == "bytes" else (1000, ("B", "kB", "MB", "GB"))
        )
        power = 0
        while abs(value) >= step and power < len(names) - 1:
            value, power = value / step, power + 1
        return f"{value:.1f} {names[power]}" + ("/s" if unit == "Bps" else "")
    return f"{value:.2f} /s" if unit == "cps" else f"{value:g}"


def say_where(stack: Stack) -> None:
    """Print where everything is, and what to look at."""
    address = stack.daemon.address
    lines = (
        f"daemon      {stack.daemon.address}",
        f"            try: kvtier status --address {address}; kvtier admin sessions --address {address}",
        f"pool        {stack.daemon.pool_directory}",
        f"metrics     http://127.0.0.1:{stack.daemon.metrics_port}/metrics",
        f"Prometheus  {stack.prometheus.address}, with /alerts",
        f"dashboard   {dashboard.FILE.relative_to(REPOSITORY)}, for a Grafana; what it would show is below",
        "Ctrl-C ends all of it and removes the pool",
    )
    print("\n".join(lines), flush=True)


def show(stack: Stack) -> None:
    """Print what the dashboard would show."""
    print(f"\nafter {stack.shown_range}, {stack.load.answers} requests answered")
    last = ""
    for panel, name, value in rows(stack):
        print(f"  {'' if panel == last else panel:<40} {name:<24} {value:>14}")
        last = panel
    sys.stdout.flush()


def run(stack: Stack, seconds: float, ended: threading.Event) -> None:
    """Ask and show until the time is over, or somebody ends it."""
    until = time.monotonic() + seconds if seconds else float("inf")
    shown_at = time.monotonic()
    while time.monotonic() < until and not ended.wait(min(POLL_S, max(until - time.monotonic(), 0))):
        stack.ask()
        if time.monotonic() - shown_at >= SHOW_EVERY_S:
            show(stack)
            shown_at = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it. 0 = every query of the dashboard was answered, 1 = one was not, 2 = there is no Prometheus."""
    parser = argparse.ArgumentParser(prog="make stack", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0, help="end after so long (default: by Ctrl-C)")
    parser.add_argument("--port", type=int, default=0, help="of Prometheus (default: any that is free)")
    parser.add_argument("--picture", type=Path, help="draw the dashboard's queries into this SVG file")
    options = parser.parse_args(arguments)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    try:
        with Stack(options.port) as stack:
            say_where(stack)
            run(stack, options.seconds, ended)
            show(stack)
            if options.picture is not None:
                from .picture import draw

                options.picture.write_text(draw(stack.prometheus, stack.began, time.time(), RATE_WINDOW))
            unanswered = stack.unanswered()
    except NoPrometheus as error:
        print(f"make stack: {error}", file=sys.stderr)
        return 2
    except DaemonEnded as error:
        print(f"make stack: {error}", file=sys.stderr)
        return 1
    for query in unanswered:
        print(f"no answer to {query.panel}: {query.expression}", file=sys.stderr)
    print("everything has ended, the pool is removed", flush=True)
    return 1 if unanswered and not ended.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
