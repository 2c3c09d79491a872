"""Where the commands of the documentation are run: a daemon with a tier, files under the names they use.

Owns what stands for what: an address, a configuration, a root of chunks. Nothing outside its directory and
its daemon's pool is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tests.daemon_process import WAIT_S, DaemonProcess, child_environment, wait_until

REPOSITORY = Path(__file__).parents[2]
COMMAND_TIMEOUT_S = 60.0
CERTIFICATE = REPOSITORY / "docker/tls/certificate.sh"


class Sandbox:
    """One daemon, `kvtier` on the PATH, and an environment that leads every command there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.root = directory / "chunks"
        self.config = directory / "kvtier.toml"
        tier = (
            f'[[tiers]]\ntype = "filesystem"\nname = "disk"\nroot = "{self.root}"\ncapacity = "64MiB"\n'
            f'state_directory = "{directory}/state"\n'
        )
        self.config.write_text(f'[pool]\nbytes = "4MiB"\n{tier}')
        trace = directory / "mooncake.jsonl"
        trace.write_text('{"hash_ids": [0, 1]}\n{"hash_ids": [0, 1, 2]}\n')
        for name, san in (("kvtier", "DNS:localhost,IP:127.0.0.1"), ("ops", "DNS:ops.example.com")):
            subprocess.run(
                ["sh", str(CERTIFICATE), "certs", name, san], cwd=directory, capture_output=True, check=True
            )
        self.daemon = DaemonProcess(directory, config=tier + _tls(directory / "certs"))
        bin_directory = directory / "bin"
        bin_directory.mkdir()
        kvtier = bin_directory / "kvtier"
        kvtier.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvtier_server "$@"\n')
        kvtier.chmod(0o755)
        self.env = child_environment(
            PATH=f"{bin_directory}{os.pathsep}{os.environ['PATH']}",
            HOME=str(directory),
            XDG_RUNTIME_DIR=str(directory),
            XDG_STATE_HOME=str(directory / "state"),
            KVTIER_ADDRESS=self.daemon.address,
            KVTIER_SERVER__NAME=self.daemon.name,
        )

    def fit(self, command: str) -> str:
        """Put what there is here in the place of what documentation calls it."""
        for pattern, value in (
            (r"unix:///run/kvtier/kvtier\.sock", self.daemon.address),
            (r"127\.0\.0\.1:9471", f"127.0.0.1:{self.daemon.metrics_port}"),
            (r"/etc/kvtier[\w/-]*\.toml|(?<=--config )(FILE|kvtier\.toml)\b", str(self.config)),
            (r"localhost:9470", f"localhost:{self.daemon.tcp_port}"),
            (r"docker/tls/certificate\.sh", str(CERTIFICATE)),
            (r"/var/lib/kvtier/chunks|(?<=--path )ROOT\b", str(self.root)),
            (r"(?<=--pool-bytes )\S+", "4MiB"),
            (r"(?<=--bytes )\S+", "4MiB"),
            (r"(?<=--tier )NAME\b", "disk"),
        ):
            command = re.sub(pattern, lambda _, value=value: value, command)  # type: ignore[misc]
        return command

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command line to its end, as bash does."""
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            env=self.env,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def drain(self, command: str) -> None:
        """Run a drain to its end, and start the daemon again for what comes after."""
        done = self.run(command)
        assert done.returncode == 0, done.stderr
        assert self.daemon.wait() == 0
        self.daemon.start()

    def serve(self, command: str) -> tuple[int, str]:
        """Run `kvtier serve` with a socket and a pool of its own until it serves; exit code and messages."""
        with contextlib.closing(DaemonProcess(self._directory)) as other:
            words = shlex.split(command)
            with contextlib.suppress(ValueError):
                at = words.index("--address")
                words[at : at + 2] = []
            log = self._directory / "serve.log"
            env = {
                **self.env,
                "KVTIER_ADDRESS": other.address,
                "KVTIER_SERVER__NAME": other.name,
                "KVTIER_SERVER__METRICS_ADDRESS": "127.0.0.1:0",
                "KVTIER_POOL__BYTES": "4MiB",
            }
            config = self._directory / "other.toml"
            config.write_text('[[tiers]]\ntype = "example"\n')
            words = [str(config) if word == str(self.config) else word for word in words]
            with log.open("wb") as out:
                process = subprocess.Popen(
                    words, env=env, cwd=self._directory, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
            try:
                wait_until(
                    lambda: process.poll() is not None or other.health() == "SERVING", "it serves, or ends"
                )
                process.send_signal(signal.SIGTERM)
                return process.wait(WAIT_S), log.read_text()
            finally:
                process.kill()
                process.wait(WAIT_S)


def _tls(certs: Path) -> str:
    return f"""
[server]
tcp_address = "localhost:0"

[tls]
certificate_file = "{certs}/kvtier.pem"
key_file = "{certs}/kvtier.key"
client_ca_file = "{certs}/ca.pem"
admins = ["ops.example.com"]
"""
