"""A real Prometheus of its own: found, started on a free port with the repository's rules, asked, ended.

Owns the process and its directory, which is removed. Nothing of the machine's own Prometheus is touched.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.daemon_process import REPOSITORY, child_environment, wait_until

CONFIGURATION = REPOSITORY / "docker" / "prometheus"
UNPACKED = REPOSITORY / "build" / "prometheus" / "usr" / "bin"
"""Where `make` unpacks Debian's package, when it is not installed."""

MISSING = "type `make prometheus` or: apt-get install prometheus"
STOP_S = 20.0
ASK_S = 10.0


class NoPrometheus(Exception):
    """There is none here; the message says what to type."""


class Series(NamedTuple):
    """One line of an answer: its labels, and (time, value) pairs, of an instant query one."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def value(self) -> float:
        """The last value."""
        return self.points[-1][1]


def program(name: str) -> str:
    """Find `prometheus` or `promtool`. Raises NoPrometheus."""
    found = shutil.which(name) or shutil.which(name, path=str(UNPACKED))
    if found is None:
        raise NoPrometheus(f"there is no {name} here; {MISSING}")
    return found


def promtool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a check; what it says is in `stdout` and `stderr`."""
    return subprocess.run(
        [program("promtool"), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


class Prometheus:
    """Scrapes `target` ("host:port") with docker/prometheus/prometheus.yml, every `interval`."""

    def __init__(self, target: str, interval: str = "1s") -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kvtier-run-"))
        self._process: subprocess.Popen[bytes] | None = None
        text = (CONFIGURATION / "prometheus.yml").read_text()
        for pattern, new in (
            (r'targets: \["[^"]*"\]', f'targets: ["{target}"]'),
            (r"scrape_interval: \w+", f"scrape_interval: {interval}"),
            (r"evaluation_interval: \w+", f"evaluation_interval: {interval}"),
            (r"- alerts\.yml", f"- {CONFIGURATION / 'alerts.yml'}"),
        ):
            text, count = re.subn(pattern, new, text)
            assert count == 1, f"prometheus.yml has {count} places like {pattern}"
        self._config = self._directory / "prometheus.yml"
        self._config.write_text(text)
        self.address = ""

    def start(self, port: int = 0) -> None:
        """Return when it answers; port 0 = any that is free. Raises NoPrometheus."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={self._config}",
                    f"--storage.tsdb.path={self._directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for whoever started it
            )
        wait_until(self._has_address, "Prometheus says where it listens")
        wait_until(self._is_ready, f"Prometheus is ready\n{self.log_text()}")

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    def ask(self, path: str, **parameters: str) -> Any:
        """Get a page of its HTTP API; return its `data`. Raises OSError where it does not answer."""
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=ASK_S) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Series]:
        """Evaluate an expression now; samples that are no number are left out."""
        found = self.ask("query", query=expression)["result"]
        return _series([(each["metric"], [each["value"]]) for each in found])

    def query_range(self, expression: str, start: float, end: float, step_s: float) -> list[Series]:
        """Evaluate it over a time; Unix seconds."""
        found = self.ask("query_range", query=expression, start=str(start), end=str(end), step=str(step_s))
        return _series([(each["metric"], each["values"]) for each in found["result"]])

    def log_text(self) -> str:
        """What it has logged."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def close(self) -> None:
        """End it and remove its directory. Repeating it does nothing."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self._directory / "prometheus.log"

    def _has_address(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"Prometheus has ended:\n{self.log_text()}"
        found = re.search(r'msg="Listening on" address=(127\.0\.0\.1:\d+)', self.log_text())
        if found is not None:
            self.address = f"http://{found[1]}"
        return found is not None

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/-/ready", timeout=ASK_S) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


def _series(found: Sequence[tuple[Mapping[str, str], Sequence[tuple[float, str]]]]) -> list[Series]:
    rows = []
    for labels, points in found:
        numbers = [(float(when), float(value)) for when, value in points if math.isfinite(float(value))]
        if numbers:
            rows.append(Series(labels, numbers))
    return rows
