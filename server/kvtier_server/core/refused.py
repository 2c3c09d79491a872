"""Refusals: what a caller asked that cannot be done, raised before anything changed.

Owns the base class and nothing else; each refusal stands beside the code that raises it. `service.py` maps
the reasons to status codes in one table.
"""

from __future__ import annotations

from typing import ClassVar


class Refused(Exception):
    """A call is refused as a whole; nothing has changed. `reason` is the word clients act on."""

    reason: ClassVar[str] = "REFUSED"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.metadata = metadata


class BadRequest(Refused):
    """A field is malformed; `field` names it. A bug of the client."""

    reason = "BAD_REQUEST"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", field=field)


class Inflight(Refused):
    """The instance would hold more of the pool at once than its share."""

    reason = "INFLIGHT"


class LeaseUnknown(Refused):
    """The lease was released before it was granted, or belongs to something else."""

    reason = "LEASE_UNKNOWN"


class Draining(Refused):
    """The daemon is stopping and grants nothing new."""

    reason = "DRAINING"
