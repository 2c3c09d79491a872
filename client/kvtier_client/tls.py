"""The certificates of a client that reaches the daemon over TCP.

Owns reading the files: anew for every connection, so that renewed certificates need no restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

VARIABLES: Mapping[str, str] = {
    "ca": "KVTIER_TLS_CA",
    "cert": "KVTIER_TLS_CERT",
    "key": "KVTIER_TLS_KEY",
    "server_name": "KVTIER_TLS_SERVER_NAME",
}
"""Environment variables that the daemon's command line knows too."""


class TlsUnusable(Exception):
    """A file cannot be read. It may be there at the next attempt."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files: who signed the daemon's certificate, and this client's certificate and its key."""

    ca: str
    cert: str
    key: str
    server_name: str = ""
    """What the daemon's certificate is called, where that is not the host of the address."""

    def __post_init__(self) -> None:
        missing = [name for name in ("ca", "cert", "key") if not getattr(self, name)]
        if missing:
            raise ValueError(f"TLS needs ca, cert and key; {' and '.join(missing)} is missing")

    @classmethod
    def given(cls, values: Mapping[str, str]) -> TlsFiles | None:
        """Make it of what was given by name; None if nothing was. Raises ValueError."""
        if not any(values.get(name) for name in ("ca", "cert", "key")):
            return None
        return cls(*(values.get(name, "") for name in VARIABLES))

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises TlsUnusable."""
        contents = []
        for path in (self.ca, self.key, self.cert):
            try:
                contents.append(Path(path).read_bytes())
            except OSError as error:
                raise TlsUnusable(f"{path} cannot be read: {error.strerror}") from error
        return grpc.ssl_channel_credentials(*contents)
