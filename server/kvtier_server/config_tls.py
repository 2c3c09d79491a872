"""The section [tls]: the daemon's certificate, whose certificates it takes, and what their holders may do.

Owns the settings and what may be said about them; the files are read by `certificates.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from kvtier_server.config_values import AbsolutePath

MAX_TENANT_BYTES = 64
"""As in Attach."""
MAX_NAMES = 10_000
"""Of certificates, all lists together."""
NEEDS_TLS = (
    "is reachable from other machines, which needs mTLS: set tls.certificate_file, tls.key_file and "
    "tls.client_ca_file; or use a unix:// socket, or a loopback address such as 127.0.0.1:9470"
)
FILES = ("certificate_file", "key_file", "client_ca_file")


def _check_tenants(tenants: dict[str, str]) -> dict[str, str]:
    for name, tenant in tenants.items():
        if not name:
            raise ValueError('"" is no name of a certificate')
        if len(tenant.encode()) > MAX_TENANT_BYTES or not tenant.isprintable():
            raise ValueError(f"tenant {tenant!r} of {name!r}: at most {MAX_TENANT_BYTES} printable bytes")
    return tenants


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if "" in names:
        raise ValueError('"" is no name of a certificate')
    return names


Names = Annotated[tuple[str, ...], AfterValidator(_check_names)]


class TlsConfig(BaseModel):
    """mTLS for the daemon's TCP address. Names: a certificate's DNS or URI alternative names, else its CN."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate_file: AbsolutePath = ""
    """PEM, with the chain. Read again when it changes, like the two others."""
    key_file: AbsolutePath = ""
    """PEM; belongs to the daemon's user, mode 0600 or 0400."""
    client_ca_file: AbsolutePath = ""
    """PEM: who signs the certificates of clients. An authority of kvtier's own, not the system's."""
    tenants: Annotated[dict[str, str], AfterValidator(_check_tenants)] = {}
    """[tls.tenants]: engines, by name -> the one tenant that their sessions have."""
    observers: Names = ()
    """Who may read status and events."""
    admins: Names = ()
    """Who may also clear, evict, set quotas and drain."""

    @property
    def is_on(self) -> bool:
        """Whether TCP addresses speak TLS."""
        return bool(self.certificate_file)

    def problems(self, *, listens_on_tcp: bool) -> Iterator[tuple[str, str]]:
        """Find what does not go together: (dotted path, problem)."""
        missing = [name for name in FILES if not getattr(self, name)]
        if 0 < len(missing) < len(FILES):
            for name in missing:
                yield f"tls.{name}", "is missing; mTLS needs certificate_file, key_file and client_ca_file"
        named = len(self.tenants) + len(self.observers) + len(self.admins)
        if not missing and not listens_on_tcp:
            yield "tls.certificate_file", "is for TCP, and the daemon listens on none; set server.tcp_address"
        if not missing and not named:
            yield "tls.tenants", "no certificate has a role: name some in [tls.tenants], observers or admins"
        if named > MAX_NAMES:
            yield "tls.tenants", f"{named} names of certificates; at most {MAX_NAMES} are allowed"
