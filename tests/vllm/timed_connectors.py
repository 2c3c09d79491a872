"""Connectors that measure what the scheduler spends inside them. For the benchmark only.

Each call counts once, from the outside, whatever it calls. What belongs to a step is collected from one
beginning of scheduling to the next; a step is empty when it schedules no token, ends no request, and no
request asks to begin. Totals go
into the file that $KVTIER_TIMES names, now and then and at the end.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from kvtier_client.lookups import PendingLookup
from kvtier_client.vllm import KVTierConnector

FILE_VARIABLE = "KVTIER_TIMES"
DUMP_EVERY_REQUESTS = 8

SCHEDULING = ("on_new_request", "get_num_new_matched_tokens", "build_connector_meta")
"""What comes first in a step; the others belong to the step that has begun."""
OTHERS = (
    "update_state_after_alloc",
    "update_connector_output",
    "request_finished",
    "request_finished_all_groups",
    "take_events",
    "get_kv_connector_stats",
    "has_pending_push_work",
    "get_external_cache_hit_sources",
)
MANAGER = (
    "add_request",
    "begin_attempt",
    "note_scheduled",
    "note_failed_loads",
    "end_step",
    "on_new_request",
    "lookup",
    "prepare_load",
    "complete_load",
    "prepare_store",
    "complete_store",
    "on_request_finished",
    "on_schedule_end",
    "get_stats",
    "take_events",
    "has_pending_work",
)


class Times:
    """Nanoseconds by kind of step, and counts."""

    def __init__(self) -> None:
        self.depth = 0
        self.after_model = False
        self.is_empty = False
        self.has_asked = False
        self.step_ns = 0
        self.manager_ns = 0
        self.totals = {"requests": 0, "steps": 0, "empty_steps": 0}
        self.totals |= {"busy_ns": 0, "empty_ns": 0, "busy_manager_ns": 0, "empty_manager_ns": 0}
        self.waits: list[tuple[float, float]] = []

    def begin_step(self) -> None:
        """Close the step before."""
        kind = "empty" if self.is_empty else "busy"
        self.totals[f"{kind}_ns"] += self.step_ns
        self.totals[f"{kind}_manager_ns"] += self.manager_ns
        self.manager_ns = 0
        self.totals["steps"] += 1
        self.totals["empty_steps"] += self.is_empty
        self.step_ns = 0
        self.after_model = False
        self.is_empty = False
        self.has_asked = False


def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one method."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        times: Times | None = getattr(self, "times", None)
        if times is None or times.depth:
            return method(self, *args, **kwargs)
        if name in SCHEDULING and times.after_model:
            times.begin_step()
        times.depth = 1
        times.has_asked |= name in SCHEDULING[:2]
        began = time.perf_counter_ns()
        try:
            return method(self, *args, **kwargs)
        finally:
            times.step_ns += time.perf_counter_ns() - began
            times.depth = 0
            if name == "build_connector_meta":
                output = args[0]
                times.after_model = True
                times.is_empty = not (
                    times.has_asked or output.total_num_scheduled_tokens or output.finished_req_ids
                )
            elif name == "on_new_request":
                times.totals["requests"] += 1
                if times.totals["requests"] % DUMP_EVERY_REQUESTS == 0:
                    dump(self)

    return wrapper


def time_manager(manager: Any, times: Times) -> None:
    """Time the manager's own calls too, which all happen inside the connector's."""

    def of_manager(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return method(*args, **kwargs)
            finally:
                times.manager_ns += time.perf_counter_ns() - began

        return wrapper

    for name in MANAGER:
        if hasattr(manager, name):
            setattr(manager, name, of_manager(getattr(manager, name)))


def dump(connector: Any) -> None:
    """Write the totals."""
    times: Times = connector.times
    told: dict[str, Any] = {"totals": times.totals, "waits": times.waits, "rpcs": {}}
    client = getattr(connector.connector_scheduler.manager, "_client", None)
    if client is not None:
        told["rpcs"] = {
            name: count
            for name, count in client.stats.snapshot().items()
            if name.startswith("rpc_") and count
        }
    Path(os.environ[FILE_VARIABLE]).write_text(json.dumps(told))


def record_waits(times: Times) -> None:
    """Have every wait for a lookup noted: what was asked for, and what it took, in seconds."""
    wait = PendingLookup.wait

    def recorded(self: PendingLookup, timeout_s: float) -> bool:
        if self.done():
            return True
        began = time.perf_counter()
        arrived = wait(self, timeout_s)
        times.waits.append((timeout_s, time.perf_counter() - began))
        return arrived

    PendingLookup.wait = recorded  # type: ignore[method-assign]


def with_times(base: Any) -> Any:
    """Return a subclass of a connector that is measured on the scheduler's side."""

    class Timed(base):
        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
            super().__init__(vllm_config, role, kv_cache_config)
            if role == KVConnectorRole.SCHEDULER:
                self.times = Times()
                time_manager(self.connector_scheduler.manager, self.times)
                record_waits(self.times)

        def shutdown(self) -> None:
            if getattr(self, "times", None) is not None:
                dump(self)
            super().shutdown()

    for name in (*SCHEDULING, *OTHERS):
        if hasattr(base, name):
            setattr(Timed, name, timed(name, getattr(base, name)))
    return Timed


TimedKVTierConnector = with_times(KVTierConnector)
TimedOffloadingConnector = with_times(OffloadingConnector)
