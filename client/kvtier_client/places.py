"""The process's place in a pool directory: its lock file and, in workers, its mapping of the pool.

Owns their order: the lock is taken before the pool is mapped and let go after it is unmapped, because a free
lock tells the daemon that this process writes nothing any more. Used by the background thread only.
"""

from __future__ import annotations

from pathlib import Path

from kvtier_ops.locks import OWNERS_DIRECTORY, OwnerLock
from kvtier_ops.pool import MappedPool


class PoolPlace:
    """What this process holds of the daemon's pool, over many sessions.

    A new pool or directory is taken beside the old one; `retire` lets the old one go, once the shim has been
    told about the new.
    """

    def __init__(self) -> None:
        self.pool: MappedPool | None = None
        self._lock: OwnerLock | None = None
        self._directory = Path()
        self._old_pools: list[MappedPool] = []
        self._old_locks: list[OwnerLock] = []

    @property
    def mapped_pool_id(self) -> int:
        """Id of the mapped pool; 0 = none."""
        return self.pool.pool_id if self.pool else 0

    def take_lock(self, directory: Path) -> str:
        """Hold a lock file in `directory` and return its name. Raises PoolError, OSError."""
        if self._lock is not None:
            # The file is gone when the pool was removed and made again: then the lock protects nothing.
            if directory == self._directory and (directory / OWNERS_DIRECTORY / self._lock.name).exists():
                return self._lock.name
            self._old_locks.append(self._lock)
            self._lock = None
        self._lock = OwnerLock.acquire(directory)
        self._directory = directory
        return self._lock.name

    def map_pool(self, path: Path, pool_id: int) -> MappedPool:
        """Map the pool unless it is mapped. Raises PoolError, OSError; the old mapping stays then."""
        if self.pool is None or self.pool.pool_id != pool_id:
            pool = MappedPool.open(path, pool_id)
            if self.pool is not None:
                self._old_pools.append(self.pool)
            self.pool = pool
        return self.pool

    def retire(self) -> None:
        """Let go of earlier pools, then of earlier lock files."""
        for pool in self._old_pools:
            pool.close()
        for lock in self._old_locks:
            lock.release()
        self._old_pools.clear()
        self._old_locks.clear()

    def leave(self) -> None:
        """Let go of everything. No copy of this process may be running."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None
        self.retire()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
