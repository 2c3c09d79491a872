"""The tiers below the pool, made from their settings. Owns nothing: they are the daemon's."""

from __future__ import annotations

from collections.abc import Callable

from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.pool import Pool
from kvtier_server.config import Config
from kvtier_server.config_tiers import TierConfig
from kvtier_server.core.lower_tiers import CascadeWhen, TierRules
from kvtier_server.core.namespaces import MAX_KEY_BYTES
from kvtier_server.secondary.base import OffloadingSpec, SecondaryTier, TierError
from kvtier_server.secondary.factory import BUILTIN_TIERS
from kvtier_server.socket_lock import StartError

TIER_STOP_S = 2.0
"""What the threads of one tier may take to end; one that hangs in an I/O ends with the process."""


def make_tiers(
    config: Config, pool: Pool, on_finished: Callable[[], None]
) -> list[tuple[SecondaryTier, TierRules]]:
    """Make the tiers below the pool, in their order. `on_finished` is called by the tiers' threads.

    Raises StartError, with those that were made ended again.
    """
    spec = OffloadingSpec(
        pool.data_bytes, SLOT_UNIT_BYTES, MAX_KEY_BYTES, str(pool.path), pool.data_offset, pool.lock_fd
    )
    made: list[tuple[SecondaryTier, TierRules]] = []
    for common, parameters in config.tiers:
        try:
            tier = BUILTIN_TIERS.create(
                common.type, parameters, spec, pool.data.data, on_finished, common.module_path
            )
        except TierError as error:
            for other, _ in made:
                other.shutdown(TIER_STOP_S)
            raise StartError(f"tier {common.name!r}: {error}", 2) from error
        made.append((tier, rules_of(common)))
    return made


def rules_of(common: TierConfig) -> TierRules:
    """Return how the core uses a tier."""
    return TierRules(
        common.name,
        CascadeWhen(common.cascade),
        max_queued_bytes=common.max_queued,
        max_running_bytes=common.max_running,
        min_uses=common.min_uses,
        clean_share=common.clean_share,
        probe_wait_ns=common.probe_wait,
    )
