"""`doctor` as people run it; its checks have tests of their own in tests/server/doctor."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from tests.conftest import StartDaemon

from kvtier_server import __version__
from kvtier_server.cli import doctor
from kvtier_server.doctor.finding import Finding, Verdict, failed, passed, skipped, warned
from kvtier_server.doctor.machine import Machine
from kvtier_server.doctor.serving import check_answer
from kvtier_server.doctor.subject import Subject

from .conftest import Kvtier

NOWHERE = "unix:///nonexistent/kvtier.sock"
FINDINGS = [passed("a", "well"), warned("b", "not so", "mend it"), skipped("c", "nothing")]


def checks(text: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(text)["checks"]}


def test_it_examines_a_machine_without_daemon_and_configuration(kvtier: Kvtier) -> None:
    shown = kvtier("doctor", "--quick", "--address", NOWHERE)
    assert shown.stderr == ""
    lines = shown.stdout.splitlines()
    names = [line.split()[1] for line in lines if line[:4] in ("PASS", "WARN", "FAIL", "SKIP")]
    for name in ("kvtier", "installation", "configuration", "daemon", "pool.directory", "pool.filesystem",
                 "pool.hugepages", "pool.orphans", "limits.memlock", "limits.files", "limits.cpus", "numa",
                 "gpu.driver", "gpu.register", "gpu.ipc", "tier"):  # fmt: skip
        assert name in names
    for line, following in pairwise(lines):
        assert following.strip().startswith("-> ") == line.startswith(("WARN", "FAIL"))
    assert "\x1b" not in shown.stdout


def test_a_running_daemons_pool_is_the_one_examined(kvtier: Kvtier, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(pool_bytes="8MiB")
    before = daemon.num_fds()
    shown = kvtier("doctor", "--quick", "-o", "json", "--address", daemon.address)
    found = checks(shown.stdout)
    assert found["daemon"]["verdict"] == "pass"
    assert found["daemon"]["text"].startswith(f"serving at {daemon.address}, up ")
    assert f"{daemon.pool_directory}, mode 0700" in found["pool.directory"]["text"]
    assert f"held by the daemon with pid {daemon.pid}" in found["pool.directory"]["text"]
    assert found["pool.filesystem"]["text"].endswith("for a pool of 8MiB")
    assert daemon.health() == "SERVING"
    assert daemon.num_fds() <= before + 1  # a connection that is about to be closed


def test_a_running_daemon_with_another_pool_than_asked_for_is_a_warning(
    kvtier: Kvtier, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(pool_bytes="8MiB")
    asked = ("--address", daemon.address, "--name", daemon.name, "--pool-bytes", "16MiB")
    found = checks(kvtier("doctor", "--quick", "-o", "json", *asked).stdout)
    assert found["daemon.pool"]["verdict"] == "warn"
    assert found["daemon.pool"]["text"].startswith(f"it serves {daemon.pool_directory} of 8MiB, ")
    again = f"kill {daemon.pid} && tail --pid={daemon.pid} -f /dev/null && kvtier serve {' '.join(asked)}"
    assert found["daemon.pool"]["fix"] == again
    assert found["pool.filesystem"]["text"].endswith("for a pool of 16MiB")


def test_a_daemon_in_another_version_is_started_again_as_it_was(
    start_daemon: StartDaemon,
) -> None:
    """The version is taken from the daemon's answer; everything else from its process."""
    daemon = start_daemon()
    machine = Machine()
    answer = daemon.status()
    answer.version = "0.0.1"
    served = Subject.unconfigured(daemon.address).as_served(machine, answer)
    _, version = check_answer(machine, Subject.unconfigured(daemon.address), answer, is_asked_for=False)
    assert version.name == "daemon.version"
    assert f"kill {daemon.pid} && " in version.fix
    assert f"serve --address {daemon.address} --name {daemon.name} --pool-bytes 4MiB" in version.fix
    assert version.fix.endswith(served.serve())


def test_a_daemon_that_was_killed_leaves_a_socket_and_a_pool(
    kvtier: Kvtier, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon()
    daemon.kill()
    found = checks(kvtier("doctor", "--quick", "-o", "json", "--address", daemon.address).stdout)
    assert found["daemon"]["verdict"] == "warn"
    assert f"{daemon.socket} is left of a daemon that is gone" in found["daemon"]["text"]
    named = kvtier("doctor", "--quick", "-o", "json", "--address", daemon.address, "--name", daemon.name)
    assert "kept for a warm start" in checks(named.stdout)["pool.directory"]["text"]
    other = json.loads(kvtier("doctor", "--quick", "-o", "json", "--address", daemon.address).stdout)[
        "checks"
    ]
    assert f"kvtier pool remove --name {daemon.name}" in [check["fix"] for check in other]


def test_a_daemon_that_hangs_fails_and_is_named(kvtier: Kvtier, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        shown = kvtier("doctor", "--quick", "-o", "json", "--timeout", "0.5", "--address", daemon.address)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert shown.returncode == 1
    found = checks(shown.stdout)["daemon"]
    assert (found["verdict"], f"it is process {daemon.pid}" in found["text"]) == ("fail", True)
    assert found["fix"].startswith(f"kill {daemon.pid} && ")


def test_a_mistake_in_the_configuration_is_exit_1_and_told_with_all_others(
    kvtier: Kvtier, tmp_path: Path
) -> None:
    file = tmp_path / "kvtier.toml"
    file.write_text('[pool]\nbyts = "4GiB"\n[leases]\nlookup = "0s"\n')
    shown = kvtier("doctor", "--quick", "--config", str(file), "--address", NOWHERE)
    assert shown.returncode == 1
    wrong = [line for line in shown.stdout.splitlines() if line.startswith("FAIL  configuration ")]
    assert len(wrong) == 2
    assert f"-> ${{EDITOR:-vi}} {file}" in shown.stdout


def test_a_pool_that_does_not_fit_is_exit_1_with_one_that_would(kvtier: Kvtier) -> None:
    shown = kvtier("doctor", "--quick", "--pool-bytes", "100TiB", "--address", NOWHERE, "-o", "json")
    assert shown.returncode == 1
    answer = json.loads(shown.stdout)
    assert answer["verdict"] == "fail"
    wrong = [check for check in answer["checks"] if check["verdict"] == "fail"]
    assert {"pool.filesystem", "pool.memory"} <= {check["name"] for check in wrong}
    assert all("kvtier serve" in check["fix"] for check in wrong)


def test_an_address_that_is_none_is_told_and_the_rest_goes_on(kvtier: Kvtier) -> None:
    shown = kvtier("doctor", "--quick", "--address", "localhost")
    assert (shown.returncode, shown.stderr) == (1, "")
    assert "'localhost' is not host:port" in shown.stdout
    assert "limits.cpus" in shown.stdout


@pytest.mark.parametrize(
    ("findings", "code"), [(FINDINGS, 0), ([*FINDINGS, failed("d", "broken", "mend that")], 1)]
)
def test_the_exit_code_says_whether_something_has_failed(findings: list[Finding], code: int) -> None:
    assert doctor.exit_code(findings) == code


def test_json_has_the_same_fields_for_every_check() -> None:
    answer = doctor.to_dict(FINDINGS)
    assert answer == {
        "version": __version__,
        "verdict": "warn",
        "counts": {"pass": 1, "warn": 1, "fail": 0, "skip": 1},
        "checks": [
            {"name": "a", "verdict": "pass", "text": "well", "fix": ""},
            {"name": "b", "verdict": "warn", "text": "not so", "fix": "mend it"},
            {"name": "c", "verdict": "skip", "text": "nothing", "fix": ""},
        ],
    }


def test_a_line_for_each_check_and_below_it_what_to_type() -> None:
    shown = [line for finding in FINDINGS for line in doctor.lines(finding, lambda text, _: text)]
    assert shown == [
        f"PASS  {'a':<22} well",
        f"WARN  {'b':<22} not so",
        f"{'':<28} -> mend it",
        f"SKIP  {'c':<22} nothing",
    ]
    assert doctor.told(FINDINGS) == "1 PASS, 1 WARN, 0 FAIL, 1 SKIP"


def test_a_finding_has_something_to_type_exactly_where_something_is_wrong() -> None:
    with pytest.raises(AssertionError):
        Finding("x", Verdict.WARN, "no fix")
    with pytest.raises(AssertionError):
        Finding("x", Verdict.PASS, "a fix", "for nothing")


def test_the_help_says_what_the_exit_codes_are(kvtier: Kvtier) -> None:
    assert (
        "0 no check has failed, 1 at least one has, 2 a mistake in the call"
        in kvtier("doctor", "--help").stdout
    )


def test_nothing_lasts(kvtier: Kvtier, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    name = f"test-doctor-{os.getpid()}"
    kvtier("doctor", "--name", name, "--address", f"unix://{tmp_path}/none/kvtier.sock")
    assert not [entry for entry in set(os.listdir("/dev/shm")) - before if name in entry]
    assert list(tmp_path.iterdir()) == []
