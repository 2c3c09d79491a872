"""A real mooncake_master on loopback, fresh for each module or test: `make test-mooncake`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from tests.daemon_process import WAIT_S, wait_until

collect_ignore_glob = [] if importlib.util.find_spec("mooncake") else ["test_*.py"]

CLIENT_TTL_S = 2
"""Seconds without a heartbeat after which the master lets go of a node: its default is 10."""


class Master:
    """mooncake_master on a port of its own, which stays the same over `start`."""

    def __init__(self, directory: Path, lease_ms: int = 500) -> None:
        self._lease_ms = lease_ms
        self._log = directory / "master.log"
        self.port, self._metrics_port, self.metadata_port = free_ports(3)
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, and return when its port answers."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).parent / "mooncake_master"),
                    "--rpc_address=127.0.0.1",
                    f"--rpc_port={self.port}",
                    "--metrics_host=127.0.0.1",
                    f"--metrics_port={self._metrics_port}",
                    "--enable_http_metadata_server=true",
                    "--http_metadata_server_host=127.0.0.1",
                    f"--http_metadata_server_port={self.metadata_port}",
                    f"--client_ttl={CLIENT_TTL_S}",
                    f"--default_kv_lease_ttl={self._lease_ms}",
                    "--rpc_thread_num=2",
                    "--logtostderr=true",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, f"the master answers; its log is {self._log}")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log.read_text()[-2_000:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)


def free_ports(number: int) -> list[int]:
    """Return ports of loopback that nobody has."""
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(number)]
        for each in bound:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in bound]


def children(pid: int) -> dict[str, int]:
    """The helper processes of a daemon, by role."""
    found = {}
    for child in _child_pids(pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{child}/cmdline").read_text()
            for role in ("segment", "transfer"):
                if f'"role": "{role}"' in command:
                    found[role] = child
    return found


def _child_pids(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    found: list[int] = []
    for task in os.listdir(tasks):
        with contextlib.suppress(OSError):
            found += map(int, (tasks / task / "children").read_text().split())
    return found


@pytest.fixture
def master(tmp_path: Path) -> Iterator[Master]:
    """A running master."""
    own = Master(tmp_path)
    try:
        yield own.start()
    finally:
        own.kill()
