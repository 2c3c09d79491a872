"""Taking the pool when the daemon starts: checked, locked, and said what to do where that cannot be."""

from __future__ import annotations

from kvtier_ops.directory import planted_link
from kvtier_ops.locks import PoolStillWritten
from kvtier_ops.pool import Pool, PoolBusy, PoolError, check_capacity
from kvtier_server.config import Config
from kvtier_server.policies.loader import PolicyLoadError, load_policy_class
from kvtier_server.socket_lock import StartError


def open_pool(config: Config) -> Pool:
    """Check that the pool can be had, then take it. Raises StartError with what to do."""
    try:
        load_policy_class(config.pool.policy)
    except PolicyLoadError as error:
        raise StartError(str(error), 2) from error
    directory = config.pool_directory
    link = planted_link(directory)
    if link is not None:
        raise StartError(
            f"the pool {directory} lies behind {link}, a link of another user; choose another pool.directory "
            "or --name",
            2,
        )
    try:
        check_capacity(directory, config.pool.bytes)
        return Pool.create(directory, config.pool.bytes, fresh=config.pool.fresh)
    except PoolBusy as error:
        raise StartError(
            f"{error}; stop it (kill {error.pid}) or start this one under another --name", 1
        ) from error
    except PoolStillWritten as error:
        raise StartError(f"{error}; or start this one under another --name", 1) from error
    except PoolError as error:
        raise StartError(str(error), 2) from error
    except OSError as error:
        raise StartError(f"cannot make the pool in {directory}: {error.strerror}", 2) from error
