"""Whether a process can still write into the pool: by itself, or by copies that the daemon makes for it."""

from __future__ import annotations

from collections.abc import Callable

from kvtier_ops.lock_watch import OwnerLocks
from kvtier_server.core.instances import TooManySessions


class ProcessLocks:
    """The core's seam `Locks` over the files of a pool's directory."""

    def __init__(self, locks: OwnerLocks, is_copying_for: Callable[[str], bool]) -> None:
        self._locks = locks
        self._is_copying_for = is_copying_for

    def hold(self, name: str) -> bool:
        """As `Locks.hold`."""
        try:
            return self._locks.hold(name)
        except OSError as error:
            raise TooManySessions(
                f"the daemon has no open file left to follow lock_file with ({error.strerror}); raise its "
                "limit: LimitNOFILE of the service, or ulimit -n"
            ) from error

    def is_free(self, name: str) -> bool:
        """As `Locks.is_free`."""
        return not self._is_copying_for(name) and self._locks.is_free(name)

    def let_go(self, name: str) -> None:
        """As `Locks.let_go`."""
        self._locks.let_go(name)
