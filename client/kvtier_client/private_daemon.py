"""A daemon for demo and bench: `kvtier serve` as a process, its pool removed at the end whatever happened.

Owns the process and the pool's directory. Knows the daemon by its command line and its gRPC services only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from kvtier.v1 import admin_pb2, admin_pb2_grpc
from kvtier_ops.directory import default_pool_directory

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 40.0
"""More than the 25 s that a daemon gives copies and tiers when it stops."""
CALL_TIMEOUT_S = 5.0
POLL_S = 0.02


class DaemonFailed(RuntimeError):
    """The daemon does not do what is needed; the message names its log."""


class Daemon:
    """One daemon with a pool of its own name. Also a context manager: on leaving, both are gone."""

    def __init__(
        self,
        directory: Path,
        label: str,
        name: str,
        pool_bytes: str,
        logs: Path,
        tier: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """`label`: of its socket and its log. `tier`: the keys of a tier below the pool; None = no tier.

        `options`: more of `kvtier serve`.
        """
        self.address = f"unix://{directory}/{label}.sock"
        self.log_file = logs / f"{label}.log"
        self._pool_directory = default_pool_directory(name)
        self._command = [
            sys.executable, "-m", "kvtier_server", "serve",
            "--address", self.address,
            "--name", name,
            "--pool-bytes", pool_bytes,
            "--metrics-address", "",
            *options,
        ]  # fmt: skip
        if tier is not None:
            config = directory / f"{label}.toml"
            # A JSON string is a TOML string too.
            lines = ["[[tiers]]", *(f"{key} = {json.dumps(value)}" for key, value in tier.items())]
            config.write_text("\n".join(lines) + "\n")
            self._command += ["--config", str(config)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, again after `kill`, and return when it answers. Raises DaemonFailed."""
        # Settings of the person's own daemon are not meant for this one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVTIER_")}
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for whoever started it, who stops it last
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self._ask()
                return self
            except grpc.RpcError:
                code = self._process.poll()
                if code is not None:
                    raise DaemonFailed(f"the daemon ended with exit code {code};{self._log_tail()}") from None
                if time.monotonic() > deadline:
                    what = f"the daemon does not answer after {START_TIMEOUT_S:.0f} s;"
                    raise DaemonFailed(what + self._log_tail()) from None
                time.sleep(POLL_S)

    def status(self) -> admin_pb2.GetStatusResponse:
        """Ask for its status. Raises DaemonFailed."""
        try:
            return self._ask()
        except grpc.RpcError as error:
            raise DaemonFailed(f"the daemon does not tell its status: {error};{self._log_tail()}") from None

    def wait_backed(self) -> None:
        """Return when the whole pool has its memory. Raises DaemonFailed where there is too little."""
        while True:
            status = self.status()
            if status.pool.backed_bytes == status.pool.data_bytes:
                return
            if status.state == "degraded":
                raise DaemonFailed(f"the pool cannot have all of its memory;{self._log_tail()}")
            time.sleep(POLL_S)

    def _ask(self) -> admin_pb2.GetStatusResponse:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.address, options=options) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)

    def kill(self) -> None:
        """End it without a chance to do anything (SIGKILL). Its pool stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End it in order: copies and tiers get their time. Its pool stays. Repeating it does nothing."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def close(self) -> None:
        """Stop it and remove its pool. Repeating it does nothing."""
        self.stop()
        self.remove_pool()

    def remove_pool(self) -> None:
        """Remove the pool of a daemon that has ended."""
        if self._pool_directory.exists():
            shutil.rmtree(self._pool_directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        self.close()

    def _log_tail(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()[-10:]
        return f" its log {self.log_file} ends with:\n" + "\n".join(lines)
