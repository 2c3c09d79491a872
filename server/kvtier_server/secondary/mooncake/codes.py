"""What Mooncake's store returns, as far as anything depends on it.

Non-negative: bytes that were read, or 0 for done. A name for each code that is told to people, and the set of
those after which nothing of the call goes on.
"""

from __future__ import annotations

DONE = 0
TOO_SMALL = -600
NOT_READY = -703
NOT_FOUND = -704
EXISTS = -705
HAS_LEASE = -706
LEASE_EXPIRED = -707
NO_SPACE = -200
TRANSFER_FAILED = -800
RPC_FAILED = -900
RPC_TIMEOUT = -901
OVER_QUOTA = -1700

_NAMES = {
    TOO_SMALL: "invalid parameters",
    NOT_READY: "not ready",
    NOT_FOUND: "not found",
    EXISTS: "exists already",
    HAS_LEASE: "somebody reads it",
    LEASE_EXPIRED: "the read took longer than its lease",
    NO_SPACE: "no space",
    TRANSFER_FAILED: "the transfer failed",
    RPC_FAILED: "the master is not reached",
    RPC_TIMEOUT: "the master does not answer",
    OVER_QUOTA: "over its quota",
}

_SETTLED = frozenset(_NAMES) - {TRANSFER_FAILED}


def describe(code: int) -> str:
    """Say in words what a code means."""
    return f"{_NAMES.get(code, 'failed')} ({code})"


def is_settled(code: int) -> bool:
    """Tell whether the call's memory is surely not touched any more.

    A transfer that failed may have failed for waiting only, with the bytes still on their way; what is not
    known is taken for that.
    """
    return code >= 0 or code in _SETTLED
