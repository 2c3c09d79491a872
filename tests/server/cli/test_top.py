"""`kvtier top`: the figures by themselves, and the picture in a terminal of 80 columns and 24 lines."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtier.v1.admin_pb2 import GetStatusResponse, LeaseStatus
from kvtier_client.bench.block_client import BlockClient
from kvtier_client.bench.replayer import Replayer
from kvtier_server.cli.top_figures import hints, rates
from kvtier_server.cli.top_screen import screen, waiting

from ...conftest import StartDaemon
from ...daemon_process import DaemonProcess, child_environment, wait_until
from ...terminal import Terminal
from .conftest import Kvtier
from .test_status import full_status

SHOW_CURSOR, MAIN_SCREEN = b"\x1b[?25h", b"\x1b[?1049l"
COLOUR = re.compile(rb"\x1b\[[0-9;]*3[0-7]m")


def later(status: GetStatusResponse, seconds: float) -> GetStatusResponse:
    copy = GetStatusResponse()
    copy.CopyFrom(status)
    copy.uptime_seconds += seconds
    return copy


def test_rates_are_differences_over_the_daemons_own_time() -> None:
    old = full_status()
    old.transfers.add(direction="load", path="shm", bytes=10**9)
    new = later(old, 2.0)
    new.lookup_keys["hit"] += 300
    new.lookup_keys["miss"] += 100
    new.transfers[0].bytes += 4 * 10**9
    new.tiers[0].hit_tokens += 1600
    now = rates(old, new)
    assert now is not None
    assert (now.lookup_keys_per_s, now.hit_rate, now.load_bytes_per_s) == (200, 0.75, 2 * 10**9)
    assert now.tiers["primary"].hit_tokens_per_s == 800


def test_there_is_no_rate_over_a_restart_and_none_of_one_answer() -> None:
    old = full_status()
    new = later(old, 2.0)
    assert rates(None, new) is None
    new.boot_id = "another"
    assert rates(old, new) is None


def test_hints_name_what_deserves_a_look_and_what_to_type() -> None:
    status = full_status()
    status.leases.append(LeaseStatus(kind="store", count=1, oldest_age_seconds=1200))
    status.tiers.add(name="disk", health="12 errors in a row")
    said = "\n".join(hints(None, status))
    assert "checksum failures: 1" in said
    assert "tier disk: 12 errors in a row" in said
    assert "fuser -v /dev/shm/kvtier-1-default/owners/*" in said
    assert "a store lease is stuck for 20 min" in said
    assert "25% of the pool has its memory" in said
    assert "scheduler is not attached" in said


def test_a_daemon_in_order_has_no_hints() -> None:
    status = full_status()
    status.checksum_failures = 0
    status.tiers[0].quarantined_slots = 0
    status.pool.backed_bytes = status.pool.data_bytes
    scheduler = status.sessions.add()
    scheduler.CopyFrom(status.sessions[0])
    scheduler.role = "scheduler"
    assert hints(None, status) == []


def test_a_collapsed_hit_rate_and_a_tier_that_drops_are_hinted_at() -> None:
    old = full_status()
    old.tiers.add(name="disk")
    new = later(old, 2.0)
    new.lookup_keys["miss"] += 2000
    new.lookup_keys["hit"] += 4000
    old.lookup_keys["hit"] = new.lookup_keys["hit"]
    new.tiers[1].cascades["done"] = 100
    new.tiers[1].dropped["queue_full"] = 100
    said = "\n".join(hints(old, new))
    assert "hit rate 0% now, 67% since start" in said
    assert "tier disk drops 50%" in said


@pytest.mark.parametrize("columns", [40, 80, 81, 132, 200])
def test_no_line_is_wider_than_the_terminal_whatever_the_names(columns: int) -> None:
    status = full_status()
    for number in range(40):
        session = status.sessions.add()
        session.CopyFrom(status.sessions[0])
        session.engine_id = f"引擎-{number}-" + "y" * 80
    status.tiers.add(name="t" * 32, capacity_bytes=1 << 50, used_bytes=1 << 49, chunks=10**12)
    status.pool.name = "p" * 64
    now = later(status, 1.0)
    now.lookup_keys["hit"] += 10**9
    for rows in (24, 50, None):
        picture = screen(
            status, now, hints(status, now), address="unix:///" + "a" * 100, columns=columns, rows=rows
        )
        assert all(line.cell_len <= columns for line in picture)
        assert rows is None or len(picture) <= rows
    assert all(line.cell_len <= columns for line in waiting("unix:///" + "a" * 90, "why " * 50, 3, columns))


def test_a_name_cannot_command_the_terminal() -> None:
    status = full_status()
    status.sessions[0].engine_id = "\x1b]0;mine\x07\x1b[2J"
    status.tiers.add(name="disk", health="\x1b[31mred")
    picture = screen(None, status, hints(None, status), address="x", columns=80, rows=None)
    assert all(line.plain.isprintable() for line in picture)
    assert any("?]0;mine?[2J" in line.plain for line in picture)


def test_one_quarantined_slot_is_seen_in_the_bar_of_a_large_pool() -> None:
    status = full_status()
    status.tiers[0].quarantined_bytes = 4096
    bar = screen(None, status, [], address="x", columns=80, rows=24)[2].plain
    assert bar.count("!") == 1


@pytest.mark.parametrize("quarantined", [0, 1023 << 20])
def test_the_legend_fits_whatever_the_pool_holds(quarantined: int) -> None:
    status = full_status()
    pool = status.tiers[0]
    pool.capacity_bytes = pool.usable_bytes = 9999 << 20
    pool.used_bytes, pool.reserved_bytes, pool.quarantined_bytes = 1023 << 20, 1022 << 20, quarantined
    picture = "\n".join(line.plain for line in screen(None, status, [], address="x", columns=80, rows=24))
    assert "# 1023MiB" in picture
    assert ("quarantined" in picture) == bool(quarantined)
    assert re.search(r"\. .* free$", picture, re.MULTILINE)


@contextmanager
def traffic(daemon: DaemonProcess) -> Iterator[None]:
    """An engine that stores and loads all the time, and begins again when its daemon does."""
    ended = threading.Event()

    def play() -> None:
        rng = random.Random(1)
        with BlockClient(daemon.address, 64 << 10, engine_id="vllm-7c9d-0") as blocks:
            replayer = Replayer(blocks, "lru")
            while not ended.is_set():
                first = 20 * rng.randrange(30)
                try:
                    replayer.play(range(first, first + rng.randrange(4, 20)))
                except RuntimeError:  # the daemon is away
                    ended.wait(0.05)

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(60)


def top(*options: str, columns: int = 80, rows: int = 24, **env: str) -> Terminal:
    command = [sys.executable, "-m", "kvtier_server", "top", "--interval", "0.2", *options]
    return Terminal(command, child_environment(**env), columns, rows)


@pytest.fixture
def tiered(start_daemon: StartDaemon, tmp_path: Path) -> DaemonProcess:
    config = (
        f'[[tiers]]\ntype = "filesystem"\nname = "disk"\nroot = "{tmp_path}/chunks"\ncapacity = "64MiB"\n'
        f'state_directory = "{tmp_path}/state"\n'
    )
    return start_daemon(pool_bytes="16MiB", config=config)


def test_a_person_sees_the_daemon_at_work_in_80_columns_over_its_restart(tiered: DaemonProcess) -> None:
    with traffic(tiered), top("--address", tiered.address) as terminal:
        lines = terminal.wait_for(
            lambda text: re.search(r"^load +0\.\d*[1-9]\d* GB/s", text, re.MULTILINE) is not None,
            "a load rate",
        )
        text = "\n".join(lines)
        assert re.search(r"^kvtier .*  serving  up \d", lines[0])
        assert re.search(r"^pool .*\[#+.*\] +16MiB +\d+%$", text, re.MULTILINE)
        assert re.search(r"^disk .*\[#+.*\] +64MiB +\d+%$", text, re.MULTILINE)
        assert re.search(r"^lookups +[\d,.k]+ keys/s +[\d,.k]+ keys$", text, re.MULTILINE)
        assert re.search(r"^hit rate +\d+\.\d% +\d+\.\d%$", text, re.MULTILINE)
        assert re.search(r"^vllm-7c9d-0 +scheduler \+ rank 0", text, re.MULTILINE)
        assert "…" not in text
        assert lines[-1] == "", "one line to spare"
        tiered.kill()
        gone = terminal.wait_for(lambda text: "no daemon, waiting" in text, "it says that there is none")
        assert any("kvtier serve" in line for line in gone)
        tiered.start()
        terminal.wait_for(lambda text: "serving" in text and "keys/s" in text, "it goes on")
        terminal.press("q")
        assert terminal.wait() == 0
        assert terminal.settings() == terminal.settings_before


@pytest.mark.parametrize("end", ["q", "Q", "\x03", "SIGTERM", "SIGHUP"])
def test_it_gives_the_terminal_back_however_it_ends(daemon: DaemonProcess, end: str) -> None:
    with top("--address", daemon.address) as terminal:
        terminal.wait_for(lambda text: "serving" in text, "the first picture")
        if end.startswith("SIG"):
            terminal.process.send_signal(signal.Signals[end])
        else:
            terminal.press(end)
        assert terminal.wait() == 0
        assert terminal.settings() == terminal.settings_before
        assert SHOW_CURSOR in terminal.written
        assert MAIN_SCREEN in terminal.written
        assert "Traceback" not in "".join(terminal.lines())


def test_it_starts_before_its_daemon(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, top("--address", daemon.address) as terminal:
        terminal.wait_for(lambda text: "no daemon, waiting" in text, "it waits")
        daemon.start()
        terminal.wait_for(lambda text: "serving" in text and "no engine is attached" in text, "the daemon")


def test_it_fills_a_terminal_that_was_made_larger(daemon: DaemonProcess) -> None:
    with top("--address", daemon.address) as terminal:
        terminal.wait_for(lambda text: "serving" in text, "the first picture")
        terminal.resize(120, 40)
        terminal.wait_for(lambda text: max(map(len, text.split("\n"))) > 100, "a wider bar")


def test_colour_is_for_terminals_and_not_with_no_color(daemon: DaemonProcess) -> None:
    with top("--address", daemon.address) as coloured:
        coloured.wait_for(lambda text: "serving" in text, "the first picture")
        assert COLOUR.search(coloured.written)
    with top("--address", daemon.address, NO_COLOR="1") as plain:
        plain.wait_for(lambda text: "serving" in text, "the first picture")
        assert not COLOUR.search(plain.written)


def test_once_prints_one_picture_for_a_log(kvtier: Kvtier, daemon: DaemonProcess) -> None:
    printed = kvtier("top", "--once", "--interval", "0.2", "--address", daemon.address)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert "\x1b" not in printed.stdout
    assert max(map(len, printed.stdout.splitlines())) <= 80
    assert "serving" in printed.stdout
    figures = json.loads(
        kvtier("top", "--once", "--interval", "0.2", "-o", "json", "--address", daemon.address).stdout
    )
    assert figures["state"] == "serving"
    assert figures["rates"]["window_s"] >= 0.2


def test_once_without_a_daemon_is_exit_2(kvtier: Kvtier, tmp_path: Path) -> None:
    refused = kvtier("top", "--once", "--address", f"unix://{tmp_path}/none.sock")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "kvtier serve" in refused.stderr


@pytest.mark.parametrize(
    "arguments", [["--interval", "0"], ["--interval", "nan"], ["--interval", "x"], ["-o", "json"]]
)
def test_what_makes_no_sense_is_refused(kvtier: Kvtier, arguments: list[str]) -> None:
    assert kvtier("top", *arguments).returncode == 2


def test_into_a_pipe_it_writes_one_plain_picture_after_the_other(daemon: DaemonProcess) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "kvtier_server", "top", "--interval", "0.1", "--address", daemon.address],
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        titles = 0
        while titles < 3:
            line = process.stdout.readline()
            assert "\x1b" not in line
            titles += line.startswith("kvtier ")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: process.poll() is not None, "Ctrl-C ends it")
    assert process.returncode == 0
