"""The configuration as the core's limits."""

from __future__ import annotations

from kvtier_server.config import Config
from kvtier_server.core.limits import Limits
from kvtier_server.event_wire import max_keys_of_a_message


def core_limits(config: Config) -> Limits:
    """Return what the core may use."""
    limits = config.limits
    return Limits(
        max_keys=limits.max_keys,
        max_params_bytes=limits.max_params,
        max_engines=limits.engines,
        max_sessions=limits.sessions,
        max_requests=limits.requests_per_instance,
        max_remembered_keys=limits.remembered_keys,
        max_leases=limits.leases_per_instance,
        max_remembered=limits.remembered_completions,
        max_events=limits.events,
        max_event_keys=limits.event_keys,
        max_keys_per_event=max_keys_of_a_message(limits.max_message),
        lookup_lease_ns=config.leases.lookup,
        copy_lease_ns=config.leases.copy_,
        tombstone_ns=limits.tombstone,
        max_pending_wait_ns=config.leases.pending_wait,
        max_promotion_ns=config.leases.promotion,
        pin_share=limits.pin_share,
        credit_share=limits.credit_share,
        min_credit_slots=limits.min_credit_slots,
    )
