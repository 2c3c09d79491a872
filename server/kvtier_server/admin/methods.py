"""Which operator calls there are, and what each may do: the one table that whoever admits callers goes by.

Owns no caller and no rule about callers. An engine needs none of these calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

SERVICE = "kvtier.v1.AdminService"


class Access(Enum):
    """What a call does to the daemon."""

    READ = "read"
    """It looks, and counts no use."""
    CHANGE = "change"
    """It takes chunks, or the daemon, away from engines."""


METHODS: Mapping[str, Access] = {
    "GetStatus": Access.READ,
    "ListSessions": Access.READ,
    "ListNamespaces": Access.READ,
    "ListTenants": Access.READ,
    "Explain": Access.READ,
    "Evict": Access.CHANGE,
    "Clear": Access.CHANGE,
    "SetQuota": Access.CHANGE,
    "Drain": Access.CHANGE,
}
"""Every method of the service."""


def access_of(path: str) -> Access | None:
    """Return what a call does, by its path "/kvtier.v1.AdminService/Drain"; None if it is no admin call."""
    service, _, method = path.removeprefix("/").partition("/")
    return METHODS.get(method) if service == SERVICE else None
