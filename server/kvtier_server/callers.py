"""Who calls: a process of this machine, or the holder of a certificate; and what it may therefore do.

Owns the roles and the caller of the call that runs. Which call needs which role is `access.py`'s table; which
certificate is whose, the configuration's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from kvtier_server.core.instances import Session, session_unknown
from kvtier_server.core.naming import named, quoted
from kvtier_server.core.refused import Refused

MAX_SAID = 64
"""Characters of what a caller says that an answer or a line of the log repeats."""


class CertificateUnknown(Refused):
    """The certificate is valid, and nobody said what its holder may do."""

    reason = "CERTIFICATE_UNKNOWN"


class RoleMissing(Refused):
    """The caller may not make this call, here."""

    reason = "ROLE_MISSING"


class TenantMismatch(Refused):
    """The certificate belongs to another tenant than the one that is asked for."""

    reason = "TENANT_MISMATCH"


class Role(StrEnum):
    """What callers are allowed. `ADMIN` includes `OBSERVER`, and neither includes `ENGINE`."""

    ENGINE = "engine"
    OBSERVER = "observer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who calls. `tenant`: the only one whose sessions it may open and use; None = any."""

    name: str
    roles: frozenset[Role]
    tenant: str | None = None

    def tenant_to_attach_as(self, claimed: str) -> str:
        """Return the tenant of a new session: the certificate's, which need not be claimed.

        Raises TenantMismatch if another one is claimed.
        """
        if self.tenant is None:
            return claimed
        if claimed not in ("", self.tenant):
            raise TenantMismatch(
                f"tenant {claimed[:MAX_SAID]!r} is claimed, and the certificate of {self.name!r} belongs to "
                f"tenant {self.tenant!r} ([tls.tenants]); leave the engine's tenant empty, or write this one",
                field="tenant",
            )
        return self.tenant

    def check_own(self, session: Session) -> Session:
        """Return the session. Raises SessionUnknown, as if it were not there, for another tenant's."""
        if self.tenant is not None and session.instance.tenant != self.tenant:
            raise session_unknown(session.id)
        return session


LOCAL = Caller("", frozenset(Role))
"""A process that may open the socket: the files' owner, who needs no daemon to do everything."""

ENGINES = Caller("", frozenset({Role.ENGINE, Role.OBSERVER}))
"""The same, where changes by operators have a socket of their own."""

_caller: ContextVar[Caller] = ContextVar("kvtier_caller", default=LOCAL)


def current_caller() -> Caller:
    """Return who made the call that runs."""
    return _caller.get()


def call_comes_from(caller: Caller) -> None:
    """Note who made the call that this task answers."""
    _caller.set(caller)


class CertificateHolders:
    """Whom a verified certificate stands for. A name is a DNS or URI alternative name, or the common name."""

    def __init__(self, tenants: Mapping[str, str], admins: Iterable[str], observers: Iterable[str]) -> None:
        self._tenants = dict(tenants)
        self._roles: dict[str, set[Role]] = {name: {Role.ENGINE} for name in tenants}
        for name in admins:
            self._roles.setdefault(name, set()).update((Role.ADMIN, Role.OBSERVER))
        for name in observers:
            self._roles.setdefault(name, set()).add(Role.OBSERVER)

    def holder(self, auth_context: Mapping[str, Iterable[bytes]]) -> Caller:
        """Return the caller of a connection. Raises CertificateUnknown with what to write where.

        Alternative names are what authorities check; the common name counts only where there is none.
        """
        names = _texts(auth_context, "peer_dns") + _texts(auth_context, "peer_uri")
        names = names or _texts(auth_context, "x509_common_name")
        known = [name for name in names if name in self._roles]
        if not known:
            told = named(map(quoted, names)) or "nothing"
            raise CertificateUnknown(
                f"the certificate names {told}, which this daemon does not know; add a name to "
                "[tls.tenants], tls.observers or tls.admins of its configuration"
            )
        tenants = {self._tenants[name] for name in known if name in self._tenants}
        if len(tenants) > 1:
            raise CertificateUnknown(
                f"the names of the certificate, {named(map(quoted, known))}, belong to several tenants in "
                "[tls.tenants]; a certificate has one"
            )
        roles = frozenset(role for name in known for role in self._roles[name])
        # Who is no engine has no session to ask about; "" keeps it out of everybody's all the same.
        return Caller(known[0], roles, tenants.pop() if tenants else "")


def _texts(auth_context: Mapping[str, Iterable[bytes]], name: str) -> list[str]:
    return [text.decode(errors="replace") for text in auth_context.get(name, ())]
