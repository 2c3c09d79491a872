"""Prometheus on a real daemon under load: what is promised to dashboards is there, and has values."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.daemon_process import REPOSITORY, child_environment, state_of, wait_until
from tests.server.metric_contract import METRICS, series_names

from . import dashboard
from .conftest import MOVES
from .prometheus import CONFIGURATION, promtool
from .stack import RATE_WINDOW, Stack

ALERTS = {
    "KvtierDown", "KvtierCorruption", "KvtierHitRateCollapse", "KvtierLeaseStuck", "KvtierBackpressure",
    "KvtierDiskSpace", "KvtierDiskWear", "KvtierSlowLoad", "KvtierEngineNotAttached", "KvtierFdLeak",
}  # fmt: skip


@pytest.mark.timeout(180)
def test_every_metric_of_the_list_is_in_prometheus_with_its_labels(stack: Stack) -> None:
    missing = []
    for name, contract in METRICS.items():
        for series in series_names(name):
            if contract.needs_device:  # the engines of this load copy themselves
                continue
            found = stack.prometheus.query(f"count by ({', '.join(contract.labels)}) ({series})")
            if not found or any(set(each.labels) != set(contract.labels) for each in found):
                missing.append((series, [dict(each.labels) for each in found]))
    assert not missing


@pytest.mark.timeout(180)
@pytest.mark.parametrize("query", dashboard.queries(), ids=lambda query: f"{query.panel}: {query.legend}")
def test_every_query_of_the_dashboard_is_answered(stack: Stack, query: dashboard.Query) -> None:
    assert query in stack.answers, query.filled(RATE_WINDOW, stack.shown_range)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("expression", MOVES)
def test_the_load_moves_what_the_dashboard_shows(stack: Stack, expression: str) -> None:
    assert sum(series.value for series in stack.prometheus.query(expression)) > 0


@pytest.mark.timeout(180)
def test_the_alerts_are_evaluated_and_a_daemon_in_order_fires_none(stack: Stack) -> None:
    groups = stack.prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == ALERTS
    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
    assert [alert for alert in stack.prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"] == []


@pytest.mark.timeout(180)
def test_promtool_finds_nothing_wrong_with_the_metrics(stack: Stack) -> None:
    checked = promtool("check", "metrics", stdin=stack.daemon.page("/metrics")[1])
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.mark.parametrize("what", [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_promtool_takes_the_files(what: tuple[str, str]) -> None:
    checked = promtool("check", what[0], str(CONFIGURATION / what[1]))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_fires_on_what_it_is_for_and_on_nothing_else() -> None:
    tested = promtool("test", "rules", str(CONFIGURATION / "alerts_test.yml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def descendants(pid: int) -> set[int]:
    """Every process below one, by the kernel's own list; those that end meanwhile have none."""
    children: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children |= set(map(int, (task / "children").read_text().split()))
    return children.union(*map(descendants, children))


@contextlib.contextmanager
def running_stack() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start the stack; it has said where everything is. Yields its process and its pool."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.observability.stack"],
        env=child_environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(7)]
        (pool,) = [Path(line.split()[1]) for line in said if line.startswith("pool ")]
        yield process, pool


@pytest.mark.timeout(120)
def test_ctrl_c_ends_every_process_and_removes_the_pool() -> None:
    with running_stack() as (process, pool):
        wait_until(lambda: len(descendants(process.pid)) >= 4, "daemon, Prometheus and two engines run")
        started = descendants(process.pid)
        assert pool.exists()
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=60)
    assert process.returncode == 0, (said, told)
    assert "everything has ended, the pool is removed" in said + told
    wait_until(lambda: not any(state_of(pid) for pid in started), "nothing of it runs")
    assert not pool.exists()


@pytest.mark.timeout(120)
def test_the_stack_ends_with_its_daemon_and_says_so() -> None:
    with running_stack() as (process, pool):
        started = descendants(process.pid)
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in started}
        daemon = min(pid for pid, line in lines.items() if b"serve" in line)
        os.kill(daemon, signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert told == "make stack: the daemon has ended (exit code 0); the stack ends\n"
    wait_until(lambda: not any(state_of(pid) for pid in started), "nothing of it runs")
    assert not pool.exists()


def test_a_stack_that_ends_too_early_says_which_queries_have_no_answer() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.observability.stack", "--seconds", "1"],
        env=child_environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "no answer to TTFT saved" in ended.stderr
