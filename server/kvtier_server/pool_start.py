"""Taking the pool when the daemon starts: checked, locked, and said what to do where that cannot be.

A daemon that was killed may leave processes of its tiers behind that still read into the pool. They hold its
lock until they end, which takes milliseconds, unless their medium hangs.
"""

from __future__ import annotations

import time
from pathlib import Path

from kvtier_ops.locks import DAEMON_LOCK_FILE
from kvtier_ops.pool import Pool, PoolBusy, PoolError, check_capacity
from kvtier_server.config import Config
from kvtier_server.policies.loader import PolicyLoadError, load_policy_class
from kvtier_server.socket_lock import StartError

LEFTOVERS_S = 5.0
"""How long to wait for what a dead daemon has left behind."""

LEFTOVERS_POLL_S = 0.02


def open_pool(config: Config) -> Pool:
    """Check that the pool can be had, then take it. Raises StartError with what to do."""
    try:
        load_policy_class(config.pool.policy)
    except PolicyLoadError as error:
        raise StartError(str(error), 2) from error
    directory = config.pool_directory
    try:
        check_capacity(directory, config.pool.bytes)
        return _take_pool(config)
    except PoolBusy as error:
        if not _runs(error.pid):
            left_by = f"daemon {error.pid}" if error.pid else "a daemon that has ended"
            raise StartError(
                f"the pool {directory} is still held by what {left_by} left behind, an I/O of its tiers that "
                f"hangs; it is free when that ends (who: fuser -v {directory / DAEMON_LOCK_FILE}); or start "
                "this one under another --name",
                1,
            ) from error
        raise StartError(
            f"{error}; stop it (kill {error.pid}) or start this one under another --name", 1
        ) from error
    except PoolError as error:
        raise StartError(str(error), 2) from error
    except OSError as error:
        raise StartError(f"cannot make the pool in {directory}: {error.strerror}", 2) from error


def _take_pool(config: Config) -> Pool:
    """Take the pool; wait a while for what a dead daemon has left behind. Raises as Pool.create."""
    give_up_at = time.monotonic() + LEFTOVERS_S
    while True:
        try:
            return Pool.create(config.pool_directory, config.pool.bytes, fresh=config.pool.fresh)
        except PoolBusy as error:
            if _runs(error.pid) or time.monotonic() > give_up_at:
                raise
        time.sleep(LEFTOVERS_POLL_S)


def _runs(pid: int) -> bool:
    """Tell whether a process is there and not dead; 0 is none."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
