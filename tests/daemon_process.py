"""`kvtier serve` as a process of its own, on a real socket, for every test that needs a daemon.

Owns starting, stopping, killing and restarting it, and removing its pool whatever happened. Knows the
command line and the health service, nothing of the daemon's inside. Used through the fixture `start_daemon`
or imported: `from tests.daemon_process import DaemonProcess` (run scripts as `python -m tests.benchmarks.x`).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier.v1 import admin_pb2, admin_pb2_grpc
from kvtier_ops.directory import default_pool_directory

REPOSITORY = Path(__file__).parents[1]
ROOTS = [str(REPOSITORY / root) for root in ("proto", "ops", "server", "client")]

WAIT_S = 30.0
"""Far above what anything here takes; a test that waits this long has failed."""

CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a channel's backoff must not be another test's
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
]
"""For channels of tests: quick to connect again, and no limit of their own before the daemon's."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Return as soon as `condition` holds; fail the test, saying `what` did not happen, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain for this: {what}")
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """State of a process as the kernel names it, T = it has got SIGSTOP, Z = dead; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between open and read
        return ""


def child_environment(**env: str) -> dict[str, str]:
    """Environment in which our packages and `tests` can be imported, without settings of the person's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVTIER_")}
    return {**kept, "PYTHONPATH": os.pathsep.join([*ROOTS, str(REPOSITORY)]), **env}


class DaemonProcess:
    """One daemon and its pool. Also a context manager: on leaving it is killed and its pool removed.

    `options` are further options of `kvtier serve`, policy="arc" for `--policy arc`; `config` is the text
    of a TOML file. The address, the name and the pool stay the same over `restart`.
    """

    def __init__(
        self,
        tmp_dir: Path,
        pool_bytes: int | str = "4MiB",
        *,
        config: str = "",
        env: Mapping[str, str] | None = None,
        name: str | None = None,
        address: str | None = None,
        **options: str,
    ) -> None:
        self.name = name or f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self.pool_directory = default_pool_directory(self.name)
        self._files = tmp_dir / self.name
        self._files.mkdir(parents=True, exist_ok=True)
        # Not below `tmp_dir`: pytest's names are long, and Linux allows 107 bytes for a socket's path.
        self._run_dir = Path(tempfile.mkdtemp(prefix="kvtier-run-"))
        self.address = address or f"unix://{self._run_dir}/s/kvtier.sock"
        self.metrics_port = 0
        self.tcp_port = 0
        """Of `server.tcp_address`, where the configuration has one."""
        self.process: subprocess.Popen[bytes] | None = None
        self._env = child_environment(**(env or {}))
        self._arguments = [
            "--address", self.address,
            "--name", self.name,
            "--pool-bytes", str(pool_bytes),
            "--metrics-address", "127.0.0.1:0",
        ]  # fmt: skip
        for option, value in options.items():
            self._arguments += ["--" + option.replace("_", "-"), value]
        if config:
            file = self._files / "kvtier.toml"
            file.write_text(config)
            self._arguments += ["--config", str(file)]

    @property
    def pid(self) -> int:
        """Process id of the daemon that was started last."""
        assert self.process is not None, "not started"
        return self.process.pid

    @property
    def socket(self) -> Path:
        """File of the daemon's socket."""
        return Path(self.address.removeprefix("unix://"))

    @property
    def pool_file(self) -> Path:
        """File that engines map."""
        return self.pool_directory / "pool"

    def start(self, *more: str) -> Self:
        """Start it, with `more` arguments this once; return when it serves and its pool has its memory."""
        self.launch(*more)
        try:
            wait_until(self._serves_or_ended, "the daemon serves")
        except AssertionError as error:
            raise AssertionError(f"{error}; its log:\n{self.log_text()}") from None
        if self.exit_code() is not None:
            raise AssertionError(f"the daemon ended with {self.exit_code()}:\n{self.log_text()}")
        wait_until(self._has_announced, "the daemon says where its metrics are")
        wait_until(self._is_backed, "the pool has its memory")
        return self

    def launch(self, *more: str) -> Self:
        """Start the process and wait for nothing: for daemons that are to refuse, or to be killed early."""
        assert self.exit_code() is not None or self.process is None, "still running"
        with self._out.open("wb") as out, self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvtier_server", "serve", *self._arguments, *more],
                env=self._env,
                cwd=self._files,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                # As a service of its own. Linux shares CPUs out by session first (sched_autogroup): in ours
                # it would wait for its turn behind whatever the tests compute.
                start_new_session=True,
            )
        return self

    def exit_code(self) -> int | None:
        """Exit code of a process that has ended, else None."""
        return self.process.poll() if self.process is not None else None

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """Wait for its end and return the exit code."""
        assert self.process is not None, "not started"
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon has not ended:\n{self.log_text()}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process is not None, "not started"
        self.process.send_signal(number)

    def stop(self) -> int:
        """Stop it as a service manager does (SIGTERM) and return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it without a chance to do anything (SIGKILL). The pool stays."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_S)

    def restart(self, *more: str) -> Self:
        """Kill it if it runs, and start it again at the same address with the same pool."""
        self.kill()
        return self.start(*more)

    def close(self) -> None:
        """Kill it if it runs, and remove its pool. A second call does nothing."""
        self.kill()
        shutil.rmtree(self._run_dir, ignore_errors=True)
        if self.pool_directory.exists():
            shutil.rmtree(self.pool_directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """A channel of its own to the daemon."""
        with grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            yield channel

    def status(self) -> admin_pb2.GetStatusResponse:
        """Ask the daemon for its status."""
        with self.channel() as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=WAIT_S, wait_for_ready=True)

    def health(self, service: str = "") -> str:
        """Ask for the health of one service: "SERVING", "NOT_SERVING", "UNKNOWN", or a gRPC status' name."""
        with self.channel() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
            except grpc.RpcError as error:
                return _code_name(error)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    def page(self, path: str) -> tuple[int, str]:
        """Get a page from its HTTP side: status and text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=WAIT_S)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def log_text(self) -> str:
        """What all its starts wrote to stderr: log lines and messages."""
        return self._log.read_text() if self._log.exists() else ""

    def out_text(self) -> str:
        """What its last start wrote to stdout."""
        return self._out.read_text() if self._out.exists() else ""

    def num_fds(self) -> int:
        """Number of open files of the daemon."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def num_threads(self) -> int:
        """Number of threads of the daemon."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    @property
    def _log(self) -> Path:
        return self._files / "daemon.log"

    @property
    def _out(self) -> Path:
        return self._files / "daemon.out"

    def _serves_or_ended(self) -> bool:
        return self.exit_code() is not None or (self.socket.exists() and self.health() == "SERVING")

    def _is_backed(self) -> bool:
        status = self.status()
        return status.pool.backed_bytes == status.pool.data_bytes or status.state != "serving"

    def _has_announced(self) -> bool:
        found = re.search(r"^  metrics  (off$|http://[^:]+:(\d+)/)", self.out_text(), re.MULTILINE)
        if found is not None:
            self.metrics_port = int(found[2] or 0)
        tcp = re.search(r"^  address  (?!unix:)\S+:(\d+)( |$)", self.out_text(), re.MULTILINE)
        self.tcp_port = int(tcp[1]) if tcp is not None else 0
        return found is not None


def _code_name(error: Exception) -> str:
    assert isinstance(error, grpc.Call), error
    return str(error.code().name)
