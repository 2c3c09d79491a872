"""docker/systemd: the unit as systemd reads it, and what it must leave to the daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.daemon_process import REPOSITORY

from kvtier_server.address import check_listen_address, default_address
from kvtier_server.config import Config, load_config
from kvtier_server.notify import BEAT_S

SYSTEMD = REPOSITORY / "docker" / "systemd"
UNIT = SYSTEMD / "kvtier.service"
MOST_EXPOSED = 20
"""Tenths; systemd calls up to 2.0 `OK` and more than 5.0 `MEDIUM`. It is 1.8 with systemd 252."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")


def settings() -> dict[str, list[str]]:
    """The unit's settings, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def setting(name: str) -> str:
    (value,) = settings()[name]
    return value


def config() -> Config:
    env = dict(each.split("=", 1) for each in settings()["Environment"])
    return load_config({}, None, env)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit with the command of this environment in place of the one in /opt."""
    unit = tmp_path / UNIT.name
    here = Path(sys.executable).with_name("kvtier")
    assert here.exists()
    unit.write_text(UNIT.read_text().replace("/opt/kvtier/bin/kvtier", str(here)))
    return unit


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@needs_systemd
def test_systemd_has_nothing_to_say_against_it(installed: Path) -> None:
    verified = analyze("verify", "--man=no", str(installed))
    assert (verified.returncode, verified.stderr) == (0, "")


@needs_systemd
def test_systemd_finds_little_of_the_machine_exposed(installed: Path) -> None:
    checked = analyze(
        "security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", str(installed)
    )
    if "unrecognized option" in checked.stderr:
        pytest.skip("systemd before 250 cannot look at a file")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers here")
def test_its_user_is_made_as_one_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    made = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", "-"],
        input=(SYSTEMD / "kvtier.sysusers").read_text(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    (line,) = [
        each for each in (tmp_path / "etc/passwd").read_text().splitlines() if each.startswith("kvtier:")
    ]
    assert int(line.split(":")[2]) < 1000, "systemd-logind empties /dev/shm of others"
    assert setting("User") == "kvtier"


def test_the_socket_lies_in_a_directory_of_one_user_where_root_looks_for_it() -> None:
    address = config().server.address
    check_listen_address(address)
    assert address == default_address({}, uid=0)
    assert f"/run/{setting('RuntimeDirectory')}/" in address
    assert setting("RuntimeDirectoryMode") == "0700"


def test_it_is_given_the_time_to_drain_before_it_is_killed() -> None:
    drain = config().drain
    assert int(setting("TimeoutStopSec")) > (drain.copies + drain.tiers) / 1e9 + 10
    assert setting("KillMode") == "mixed"
    assert setting("KillSignal") == "SIGTERM"


def test_its_notices_are_awaited_and_its_silence_is_not_taken_for_a_hang_too_early() -> None:
    assert setting("Type") == "notify"
    assert setting("NotifyAccess") == "main"
    assert int(setting("WatchdogSec")) > 10 * BEAT_S


def test_the_pool_can_be_pinned_and_outlives_the_daemon() -> None:
    assert setting("LimitMEMLOCK") == "infinity"
    assert setting("RemoveIPC") == "no"
    assert "DynamicUser" not in settings()
    assert "PrivateDevices" not in settings()
    assert "PrivateIPC" not in settings()


def test_a_mistake_in_the_settings_is_not_tried_again() -> None:
    assert setting("RestartPreventExitStatus") == "2"


def test_it_starts_the_command_that_the_first_lines_install() -> None:
    folder = re.match(r"(\S+)/kvtier serve ", setting("ExecStart"))
    assert folder is not None
    assert f"#   {folder[1]}/pip install" in UNIT.read_text()
