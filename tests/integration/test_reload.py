"""SIGHUP: a real daemon reads its configuration again, under load, and says what it made of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, child_environment, wait_until
from tests.integration.test_tiers import EXAMPLE
from tests.raw_engine import RawEngine, refusal, to_key, to_keys

from kvtier_server.config import Config
from kvtier_server.config_values import Reload
from kvtier_server.metrics import RELOAD_RESULTS

Line = dict[str, Any]

NEW = {
    "server": {"log_level": '"debug"'},
    "limits": {
        "engines": "2",
        "sessions": "7",
        "unary_calls": "99",
        "requests_per_instance": "77",
        "leases_per_instance": "88",
        "remembered_keys": "66",
        "tombstone": '"61s"',
        "pin_share": "0.25",
        "credit_share": "0.125",
        "min_credit_slots": "3",
        "session_events": "55",
    },
    "leases": {"lookup": '"31s"', "copy": '"301s"', "pending_wait": '"3s"', "promotion": '"11s"'},
    "admission": {"store_threshold": "2"},
    "drain": {"copies": '"111ms"', "tiers": '"222ms"'},
}
"""Another value for every setting that a reload applies."""


def toml(sections: dict[str, dict[str, str]]) -> str:
    return "".join(
        f"[{section}]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
        for section, settings in sections.items()
    )


def log_lines(daemon: DaemonProcess, event: str) -> list[Line]:
    lines = [json.loads(line) for line in daemon.log_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def samples(daemon: DaemonProcess) -> dict[str, float]:
    lines = daemon.page("/metrics")[1].splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def reloads(daemon: DaemonProcess) -> dict[str, float]:
    now = samples(daemon)
    return {result: now[f'kvtier_config_reloads_total{{result="{result}"}}'] for result in RELOAD_RESULTS}


def reload(daemon: DaemonProcess, text: str, result: str) -> None:
    """Write the file, send SIGHUP, and wait until the daemon has counted that result."""
    config_of(daemon).write_text(text)
    before = reloads(daemon)[result]
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: reloads(daemon)[result] == before + 1, f"the reload ends: {result}")


def config_of(daemon: DaemonProcess) -> Path:
    return Path(f"/proc/{daemon.pid}/cwd/kvtier.toml").resolve()


@contextlib.contextmanager
def under_load(engine: RawEngine) -> Iterator[None]:
    """Look up and store all the time; every call must be answered."""
    errors: list[grpc.RpcError] = []
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            keys = to_keys(range(number, number + 4))
            try:
                engine.lookup(keys, lease_id=engine.new_lease_id(), request_id=f"load-{number}")
                engine.prepare_store(keys, request_id=f"load-{number}")
            except grpc.RpcError as error:
                errors.append(error)

    thread = threading.Thread(target=work, name="load")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert not errors, errors


def test_every_setting_that_may_change_changes_at_once_is_told_and_is_in_the_metrics(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="[limits]\nengines = 64\n")
    engine = make_engine(daemon).attach()
    with under_load(engine):
        reload(daemon, toml(NEW), "applied")
    (line,) = log_lines(daemon, "config_reloaded")
    assert line["changed"]["limits.engines"] == "64 -> 2"
    assert line["changed"]["limits.tombstone"] == "1min -> 61s"
    assert line["changed"]["leases.copy"] == "5min -> 301s"
    assert line["changed"]["limits.pin_share"] == "0.5 -> 0.25"
    assert line["changed"]["drain.copies"] == "10s -> 111ms"
    assert line["changed"]["server.log_level"] == "info -> debug"
    assert set(line["changed"]) == {f"{section}.{key}" for section, keys in NEW.items() for key in keys}
    assert set(line["for_new_engines"]) == {
        "limits.requests_per_instance", "limits.remembered_keys", "leases.lookup",
    }  # fmt: skip
    now = samples(daemon)
    assert now['kvtier_limit{name="limits.engines"}'] == 2
    assert now['kvtier_limit{name="leases.copy"}'] == 301
    assert now['kvtier_limit{name="drain.copies"}'] == 0.111
    assert now['kvtier_limit{name="limits.pin_share"}'] == 0.25


def test_new_names_every_setting_that_is_marked() -> None:
    marked = {
        f"{section}.{field.alias or name}"
        for section in NEW
        for name, field in type(getattr(example_config(), section)).model_fields.items()
        if any(isinstance(mark, Reload) for mark in field.metadata)
    }
    assert marked == {f"{section}.{key}" for section, keys in NEW.items() for key in keys}


def example_config() -> Config:
    return Config.model_validate({"server": {"address": "unix:///tmp/x.sock"}})


def test_what_a_reload_applied_is_what_the_daemon_does(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="# nothing yet\n")
    before = make_engine(daemon).attach()
    reload(daemon, toml(NEW), "applied")
    assert before.scheduler is not None
    after = make_engine(daemon)
    session = after.attach_scheduler()
    after.attach_worker()
    assert before.scheduler.attached.limits.lookup_lease_ms == 30_000
    assert session.attached.limits.lookup_lease_ms == 31_000
    assert session.attached.limits.max_pinned_bytes == before.scheduler.attached.limits.max_pinned_bytes // 2
    failed = refusal(make_engine(daemon).attach_scheduler)
    assert (failed.reason, "limits.engines" in failed.message) == ("LIMIT_ENGINES", True)
    answer = after.lookup([to_key(1)])
    assert list(answer.unwanted) == [0], "the reuse filter is on"
    assert set(after.prepare_store([to_key(1)]).verdicts) == {4}
    before.lookup([to_key(1)])
    before.prepare_store(to_keys(range(5)))
    before.lookup(to_keys(range(5)), request_id="second")
    assert before.prepare_store(to_keys(range(5)), request_id="second").slot_ids
    assert daemon.stop() == 0
    assert '"left_copies": 5' in daemon.log_text(), "the stop waited for no more than 111 ms"
    assert before.scheduler.wait_for("draining").draining.deadline_ms == 111


def test_a_file_that_has_not_changed_changes_nothing(start_daemon: StartDaemon) -> None:
    text = toml({"limits": {"engines": "5"}})
    daemon = start_daemon(config=text)
    reload(daemon, text, "unchanged")
    (line,) = log_lines(daemon, "config_reloaded")
    assert (line["changed"], line["for_new_engines"]) == ({}, [])
    assert log_lines(daemon, "config_needs_restart") == []


def test_a_broken_file_is_told_with_all_mistakes_and_changes_nothing(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config=toml({"limits": {"engines": "5"}}))
    engine = make_engine(daemon).attach()
    before = samples(daemon)
    with under_load(engine):
        reload(daemon, '[limits]\nengines = 0\nsesions = 3\n[drain]\ncopies = "1s"\n', "failed")
    (line,) = log_lines(daemon, "config_reload_failed")
    assert line["level"] == "error"
    assert sorted(mistake.partition(" ")[0] for mistake in line["mistakes"]) == [
        "limits.engines", "limits.sesions",
    ]  # fmt: skip
    assert "did you mean limits.sessions?" in " ".join(line["mistakes"])
    now = samples(daemon)
    limits = [name for name in now if name.startswith("kvtier_limit")]
    assert {name: now[name] for name in limits} == {name: before[name] for name in limits}
    assert now["kvtier_config_last_reload_successful"] == 0
    loaded_at = "kvtier_config_last_reload_success_timestamp_seconds"
    assert now[loaded_at] == before[loaded_at] > 0
    reload(daemon, "[limits\n", "failed")
    config_of(daemon).unlink()
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: reloads(daemon)["failed"] == 3, "a file that is gone is a mistake too")
    reload(daemon, toml({"limits": {"engines": "6"}}), "applied")
    now = samples(daemon)
    assert now["kvtier_config_last_reload_successful"] == 1
    assert now[loaded_at] > before[loaded_at]
    assert now['kvtier_limit{name="limits.engines"}'] == 6


def test_what_needs_a_restart_is_named_and_stays_and_the_rest_is_applied(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config=EXAMPLE)
    text = (
        toml({"limits": {"max_keys": "9", "engines": "5"}, "server": {"log_format": '"console"'}})
        + '[pool]\npolicy = "arc"\n'
        + EXAMPLE.replace("64MiB", "32MiB")
        + 'max_queued = "5MiB"\n'
    )
    for _ in range(2):  # they are named again as long as they differ
        reload(daemon, text, "needs_restart")
    lines = log_lines(daemon, "config_needs_restart")
    assert len(lines) == 2
    for line in lines:
        assert line["level"] == "warning"
        assert set(line["settings"]) == {
            "limits.max_keys", "server.log_format", "pool.policy", "tiers[spare].capacity",
        }  # fmt: skip
    changed = [line["changed"] for line in log_lines(daemon, "config_reloaded")]
    assert changed == [{"limits.engines": "64 -> 5", "tiers[spare].max_queued": "1GiB -> 5MiB"}, {}]
    now = samples(daemon)
    assert now['kvtier_limit{name="limits.max_keys"}'] == 8192
    assert now['kvtier_limit{name="limits.engines"}'] == 5
    assert daemon.status().pool.policy == "lru"
    reload(daemon, toml({"limits": {"engines": "5"}}), "needs_restart")
    assert log_lines(daemon, "config_needs_restart")[-1]["settings"] == ["tiers"]


def test_the_command_line_and_the_environment_stay_stronger_than_the_file(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="# nothing yet\n", env={"KVTIER_LIMITS__ENGINES": "9"}, log_level="warning")
    reload(daemon, toml({"limits": {"engines": "5"}, "server": {"log_level": '"debug"'}}), "unchanged")
    assert samples(daemon)['kvtier_limit{name="limits.engines"}'] == 9


def test_a_log_that_is_turned_down_says_so_first_and_one_that_is_turned_up_too(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(config="# nothing yet\n")
    for level, lines in (("error", 1), ("error", 1), ("info", 2)):
        text = toml({"server": {"log_level": f'"{level}"'}})
        reload(daemon, text, "applied" if len(log_lines(daemon, "config_reloaded")) < lines else "unchanged")
        assert len(log_lines(daemon, "config_reloaded")) == lines
    assert log_lines(daemon, "config_reloaded")[1]["changed"] == {"server.log_level": "error -> info"}


def test_many_signals_at_once_leave_the_last_file(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="# nothing yet\n")
    for engines in range(1, 30):
        config_of(daemon).write_text(toml({"limits": {"engines": str(engines)}}))
        daemon.signal(signal.SIGHUP)
    wait_until(lambda: samples(daemon)['kvtier_limit{name="limits.engines"}'] == 29, "the last one holds")
    assert daemon.stop() == 0


def test_a_file_that_became_a_fifo_is_a_mistake_and_holds_up_no_stop(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="# nothing yet\n")
    file = config_of(daemon)
    file.unlink()
    os.mkfifo(file)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: reloads(daemon)["failed"] == 1, "the reload fails")
    (line,) = log_lines(daemon, "config_reload_failed")
    assert line["mistakes"] == [f"{file}: is no regular file"]
    assert samples(daemon)["kvtier_config_last_reload_successful"] == 0
    assert daemon.stop() == 0
    assert daemon.launch().wait() == 2
    assert f"kvtier serve: {file}: is no regular file" in daemon.log_text()


def test_a_hangup_during_the_start_is_answered_after_it(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, config="# nothing yet\n") as daemon:
        daemon.launch()
        wait_until(daemon.pool_file.exists, "it opens its pool")
        daemon.signal(signal.SIGHUP)
        wait_until(
            lambda: daemon.exit_code() is not None or log_lines(daemon, "config_reloaded") != [], "it reloads"
        )
        assert daemon.exit_code() is None, daemon.log_text()
        assert daemon.health() == "SERVING"
        assert daemon.stop() == 0


@contextlib.contextmanager
def in_terminal(
    daemon: DaemonProcess, log: Path, *setsid: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The daemon, run with a terminal as its stdin; yields it and the terminal's other end."""
    terminal, side = os.openpty()
    command = ["setsid", *setsid, sys.executable, "-m", "kvtier_server", "serve"]
    options = ["--metrics-address", "", "--pool-bytes", "4MiB", "--name", daemon.name]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options, "--address", daemon.address],
            env=child_environment(),
            stdin=side,
            stdout=file,
            stderr=file,
        )
    os.close(side)
    try:
        wait_until(lambda: daemon.socket.exists() and daemon.health() == "SERVING", "it serves")
        yield process, terminal
    finally:
        process.kill()
        process.wait()


def test_a_terminal_that_is_closed_stops_the_daemon_that_was_started_in_it(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon()
    daemon.stop()
    with in_terminal(daemon, tmp_path / "log", "--ctty") as (process, terminal):
        os.close(terminal)
        assert process.wait(WAIT_S) == 0, (tmp_path / "log").read_text()


def test_a_daemon_that_outlived_its_terminal_reloads_at_a_hangup(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon()
    daemon.stop()
    log = tmp_path / "log"
    with in_terminal(daemon, log) as (process, terminal):  # it is not its controlling one: no signal comes
        os.close(terminal)
        wait_until(lambda: "terminal_gone" in log.read_text(), "it has seen that the terminal is gone")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "config_reloaded" in log.read_text(), "it reads its configuration again")
        assert daemon.health() == "SERVING"
