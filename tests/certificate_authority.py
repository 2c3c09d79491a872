"""Certificates for tests, made by the script that the README names."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc

from .daemon_process import CHANNEL_OPTIONS, REPOSITORY

SCRIPT = REPOSITORY / "docker" / "tls" / "certificate.sh"

OPTIONS = [*{**dict(CHANNEL_OPTIONS), "grpc.min_reconnect_backoff_ms": 20_000}.items()]
"""The last one is the time for one try to connect. Where a machine is busy, a handshake takes more than the
100 ms of other channels, and each call of a test would be UNAVAILABLE."""


@dataclass(frozen=True, slots=True)
class Issued:
    """Paths of one certificate, its key and its authority."""

    ca: Path
    cert: Path
    key: Path

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes()
        )

    def channel(self, port: int) -> grpc.Channel:
        """Connect with it to a daemon of this machine."""
        return grpc.secure_channel(f"localhost:{port}", self.credentials(), options=OPTIONS)

    def options(self) -> list[str]:
        """As options of the command line."""
        return ["--tls-ca", str(self.ca), "--tls-cert", str(self.cert), "--tls-key", str(self.key)]


class CertificateAuthority:
    """Signs certificates in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def issue(self, name: str, san: str = "") -> Issued:
        """Make a certificate; its alternative names are `san`, by default the name as DNS name."""
        subprocess.run(
            ["sh", str(SCRIPT), str(self.directory), name, san or f"DNS:{name}"],
            check=True,
            capture_output=True,
            timeout=60,
        )
        return Issued(
            self.directory / "ca.pem", self.directory / f"{name}.pem", self.directory / f"{name}.key"
        )

    def issue_for_daemon(self) -> Issued:
        """Make the certificate of a daemon on loopback."""
        return self.issue("daemon", "DNS:localhost,IP:127.0.0.1")


def tls_section(daemon: Issued, *, tenants: dict[str, str], observers: str = "", admins: str = "") -> str:
    """Write the configuration of a daemon that listens on TCP with this certificate."""
    named = "\n".join(f'"{name}" = "{tenant}"' for name, tenant in tenants.items())
    return f"""
[server]
tcp_address = "localhost:0"

[tls]
certificate_file = "{daemon.cert}"
key_file = "{daemon.key}"
client_ca_file = "{daemon.ca}"
observers = [{observers}]
admins = [{admins}]

[tls.tenants]
{named}
"""
