from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.v1 import admin_pb2
from kvtier_server import __version__
from kvtier_server.doctor.finding import Verdict
from kvtier_server.doctor.machine import Machine
from kvtier_server.doctor.serving import Silence, check_answer, check_no_answer
from kvtier_server.doctor.subject import Subject

SERVE = "kvtier serve --config '/etc/kv tier.toml'"
NOBODY = Silence("no daemon at unix:///x; start one: kvtier serve", is_listening=False)
SOMEBODY = Silence("it does not answer", is_listening=True)


@pytest.fixture
def left(shared_memory: Path) -> Iterator[Path]:
    """A socket's file."""
    path = shared_memory / "kvtier.sock"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        yield path


def status(
    *, version: str = __version__, state: str = "serving", health: str = "ok"
) -> admin_pb2.GetStatusResponse:
    return admin_pb2.GetStatusResponse(
        version=version,
        state=state,
        uptime_seconds=95,
        pool=admin_pb2.PoolStatus(path="/dev/shm/kvtier-0-x/pool", name="x", data_bytes=1 << 30),
        tiers=[
            admin_pb2.TierStatus(name="primary", health="ok"),
            admin_pb2.TierStatus(name="disk", health=health),
        ],
    )


def test_no_daemon_and_no_socket_is_a_warning_with_the_way_to_start_one(subject: Subject) -> None:
    found = check_no_answer(Machine(), subject, NOBODY)
    assert (found.verdict, found.text, found.fix) == (Verdict.WARN, "no daemon at unix:///x", SERVE)


def test_a_socket_that_a_dead_daemon_left_is_named(subject: Subject, left: Path) -> None:
    left.with_name("kvtier.sock.lock").write_text(f"{os.getpid()}\n")  # alive, but it holds no lock
    found = check_no_answer(Machine(), replace(subject, address=f"unix://{left}"), NOBODY)
    assert (found.verdict, found.fix) == (Verdict.WARN, SERVE)
    assert found.text.startswith(f"{left} is left of a daemon that is gone")


def test_a_daemon_that_holds_its_socket_and_does_not_answer_fails(subject: Subject, left: Path) -> None:
    with left.with_name("kvtier.sock.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = check_no_answer(Machine(), replace(subject, address=f"unix://{left}"), SOMEBODY)
    pid = os.getpid()
    assert (found.verdict, found.text) == (Verdict.FAIL, f"it does not answer; it is process {pid}")
    assert found.fix == f"kill {pid} && tail --pid={pid} -f /dev/null && {SERVE}"


def test_a_daemon_that_does_not_answer_and_cannot_be_seen_fails_too(subject: Subject, left: Path) -> None:
    """Behind TCP, or in another container, whose locks and pids are not ours to see."""
    for address in ("127.0.0.1:9470", f"unix://{left}"):
        found = check_no_answer(Machine(), replace(subject, address=address), SOMEBODY)
        assert (found.verdict, found.text) == (Verdict.FAIL, "it does not answer")
        assert found.fix == f"kvtier status --address {address}"


def test_one_that_serves_passes(subject: Subject) -> None:
    (found,) = check_answer(Machine(), subject, status(), is_asked_for=False)
    assert (found.verdict, found.text) == (Verdict.PASS, f"serving at {subject.address}, up 1m35s")


def test_one_that_is_degraded_is_a_warning_and_says_why(subject: Subject) -> None:
    (found,) = check_answer(
        Machine(), subject, status(state="degraded", health="EIO: bad disk"), is_asked_for=False
    )
    assert (found.verdict, found.fix) == (Verdict.WARN, f"kvtier status --address {subject.address}")
    assert found.text.endswith("; disk: EIO: bad disk")


def test_another_version_and_another_pool_than_asked_for_are_warnings(subject: Subject) -> None:
    found = list(check_answer(Machine(), subject, status(version="0.0.1"), is_asked_for=True))
    assert [(each.name, each.verdict) for each in found] == [
        ("daemon", Verdict.PASS),
        ("daemon.version", Verdict.WARN),
        ("daemon.pool", Verdict.WARN),
    ]
    assert {each.fix for each in found[1:]} == {SERVE}
    assert "it serves /dev/shm/kvtier-0-x of 1GiB, the configuration asks for" in found[2].text


def test_the_pool_that_is_served_is_the_one_that_is_meant(subject: Subject) -> None:
    served = subject.as_served(Machine(), status())
    assert (served.name, served.pool_directory, served.pool_bytes) == (
        "x",
        Path("/dev/shm/kvtier-0-x"),
        1 << 30,
    )
    assert served.serve() == SERVE
    assert subject.as_served(Machine(), admin_pb2.GetStatusResponse()) == subject
