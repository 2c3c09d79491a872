"""A daemon under a service manager: what it says on $NOTIFY_SOCKET, and when."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.daemon_process import DaemonProcess
from tests.service_manager import Manager


@pytest.fixture
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="kvtier-run-") as directory:
        manager = Manager(f"{directory}/notify")
        yield manager
        manager.close()


@pytest.fixture
def managed(manager: Manager, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that was started and not waited for."""
    env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "300000"}
    with DaemonProcess(tmp_path, env=env) as daemon:
        yield daemon.launch()


def test_the_manager_hears_that_the_daemon_serves_when_it_does(
    manager: Manager, managed: DaemonProcess
) -> None:
    assert manager.heard() == {"READY": "1", "STATUS": "serving, 0 sessions"}
    assert managed.health() == "SERVING"


def test_the_watchdog_hears_the_daemon_until_it_hangs(manager: Manager, managed: DaemonProcess) -> None:
    assert "READY" in manager.heard()
    assert [manager.heard() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3


def test_the_manager_hears_of_a_stop_before_it_is_over(manager: Manager, managed: DaemonProcess) -> None:
    assert "READY" in manager.heard()
    assert managed.stop() == 0
    heard = [manager.heard()]
    while "STOPPING" not in heard[-1]:
        assert heard[-1] == {"WATCHDOG": "1"}
        heard.append(manager.heard())
    assert heard[-1]["STATUS"] == "draining, 0 sessions"


def test_a_daemon_that_refuses_to_start_says_nothing(manager: Manager, tmp_path: Path) -> None:
    env = {"NOTIFY_SOCKET": manager.address}
    with DaemonProcess(tmp_path, "100TiB", env=env) as daemon:
        assert daemon.launch().wait() == 2
    assert manager.heard_nothing()
