from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.service_manager import Manager

from kvtier_server.notify import BEAT_S, Notifier


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvtier-run-") as name:
        yield Path(name)


@pytest.fixture
def manager(directory: Path) -> Iterator[Manager]:
    manager = Manager(f"{directory}/notify")
    yield manager
    manager.close()


@pytest.fixture
def notifier(manager: Manager) -> Iterator[Notifier]:
    notifier = Notifier(manager.address)
    yield notifier
    notifier.close()


def test_the_manager_is_told_when_the_daemon_serves_and_when_it_stops(
    manager: Manager, notifier: Notifier
) -> None:
    notifier.ready("serving, 0 sessions")
    assert manager.heard() == {"READY": "1", "STATUS": "serving, 0 sessions"}
    notifier.stopping("draining, 0 sessions")
    assert manager.heard() == {"STOPPING": "1", "STATUS": "draining, 0 sessions"}


def test_a_status_is_told_again_only_when_it_has_changed(manager: Manager, notifier: Notifier) -> None:
    notifier.ready("serving, 0 sessions")
    manager.heard()
    notifier.beat("serving, 0 sessions")
    assert manager.heard_nothing()
    notifier.beat("serving, 1 session")
    assert manager.heard() == {"STATUS": "serving, 1 session"}


def test_a_watchdog_hears_every_beat_and_a_beat_comes_three_times_within_its_patience(
    manager: Manager,
) -> None:
    notifier = Notifier(manager.address, watchdog_s=0.3)
    assert notifier.beat_s == pytest.approx(0.1)
    notifier.ready("serving")
    manager.heard()
    notifier.beat("serving")
    assert manager.heard() == {"WATCHDOG": "1"}
    notifier.close()


def test_beats_go_on_until_they_are_cancelled(manager: Manager) -> None:
    notifier = Notifier(manager.address, watchdog_s=0.01)

    async def run() -> list[dict[str, str]]:
        beats = asyncio.create_task(notifier.beat_forever(lambda: "serving"))
        heard = [await asyncio.to_thread(manager.heard) for _ in range(3)]
        beats.cancel()
        return heard

    first, *others = asyncio.run(run())
    notifier.close()
    assert first == {"STATUS": "serving", "WATCHDOG": "1"}
    assert others == [{"WATCHDOG": "1"}] * 2


def test_without_a_manager_there_are_no_beats_to_wait_for() -> None:
    notifier = Notifier()
    notifier.ready("serving")
    asyncio.run(notifier.beat_forever(lambda: "serving"))
    notifier.close()


def test_what_found_no_room_goes_with_the_next_beat(directory: Path) -> None:
    manager = Manager(f"{directory}/notify")
    notifier = Notifier(manager.address)
    full = 0
    for full in range(10_000):
        notifier.beat(f"serving, {full} sessions")
        if notifier._unsent:
            break
    assert notifier._unsent == {"STATUS": f"serving, {full} sessions"}
    notifier.ready("serving")  # no room either
    assert [manager.heard() for _ in range(full)][-1] == {"STATUS": f"serving, {full - 1} sessions"}
    notifier.beat("degraded")
    assert manager.heard() == {"STATUS": "degraded", "READY": "1"}
    notifier.close()
    manager.close()


def test_a_manager_that_is_gone_for_a_while_is_told_when_it_is_back(directory: Path) -> None:
    notifier = Notifier(f"{directory}/notify")
    notifier.ready("serving")
    manager = Manager(f"{directory}/notify")
    notifier.beat("serving")
    assert manager.heard() == {"READY": "1", "STATUS": "serving"}
    notifier.close()
    manager.close()


def test_an_abstract_socket_is_reached_too() -> None:
    manager = Manager(f"@kvtier-test-{os.getpid()}")
    notifier = Notifier(manager.address)
    notifier.ready("serving")
    assert manager.heard()["READY"] == "1"
    notifier.close()
    manager.close()


def test_a_status_of_two_lines_cannot_become_a_field_of_its_own(manager: Manager, notifier: Notifier) -> None:
    notifier.ready("serving\nMAINPID=1")
    assert manager.heard() == {"READY": "1", "STATUS": "serving MAINPID=1"}


def test_the_variables_are_taken_out_of_the_environment(manager: Manager) -> None:
    env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "900000", "WATCHDOG_PID": "7", "HOME": "/"}
    notifier = Notifier.take(env, pid=7)
    assert env == {"HOME": "/"}
    assert notifier.beat_s == pytest.approx(0.3)
    notifier.ready("serving")
    assert manager.heard()["READY"] == "1"
    notifier.close()


@pytest.mark.parametrize(
    "env",
    [
        {"WATCHDOG_USEC": "900000", "WATCHDOG_PID": "8"},  # meant for another process
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
    ],
)
def test_a_watchdog_that_is_not_ours_is_none(env: dict[str, str]) -> None:
    assert Notifier.take(env, pid=7).beat_s == BEAT_S


@pytest.mark.parametrize("address", ["", "notify", "vsock:2:1234", "/" + "x" * 107])
def test_an_address_that_cannot_be_reached_is_nobody(address: str) -> None:
    notifier = Notifier.take({"NOTIFY_SOCKET": address}, pid=7)
    notifier.ready("serving")
    asyncio.run(notifier.beat_forever(lambda: "serving"))
    notifier.close()
