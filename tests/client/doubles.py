"""The client's border, replaced: records what a shim tells the daemon, and answers what the test says.

For tests of the shims only. How the real client behaves is tested against a real daemon.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtier_client.answers import (
    CreditGrant,
    LookupAnswer,
    LookupStatus,
    SessionInfo,
    SessionLimits,
    SlotsForMisses,
)
from kvtier_client.client import OffloadClient
from kvtier_client.context import ReqContext
from kvtier_client.costs import TokenCosts
from kvtier_client.listener import ClientListener
from kvtier_client.lookups import PendingLookup
from kvtier_client.options import ClientOptions, EngineIdentity, Role
from kvtier_client.reports import LoadReportItem, StoreReportItem
from kvtier_ops.namespace import NamespaceFacts
from kvtier_ops.pool import MappedPool

LIMITS = SessionLimits(
    max_keys=8192,
    max_params_bytes=64 << 10,
    lookup_lease_ms=30_000,
    max_credit_bytes=1 << 30,
)


POOL_ID = 1

LATER_LEASE = 1 << 40
"""Of slots that were asked for in the present session."""


def session(
    slot_bytes: Sequence[int] = (4096,), pool: MappedPool | None = None, limits: SessionLimits = LIMITS
) -> SessionInfo:
    return SessionInfo(
        session_id="session",
        boot_id="0123456789abcdef",
        pool=pool,
        pool_id=POOL_ID if pool is None else pool.pool_id,
        slot_bytes=tuple(slot_bytes),
        limits=limits,
        epoch=1,
        missing_ranks=(),
    )


class ManualLookup(PendingLookup):
    """A lookup that is answered when the test calls `arrive`."""

    def __init__(
        self,
        keys: Sequence[bytes],
        lease_id: int,
        first_chunks: Sequence[int],
        slots_for_misses: Sequence[SlotsForMisses] = (),
        store_lease_id: int = 0,
    ) -> None:
        self.keys = list(keys)
        self.lease_id = lease_id
        self.first_chunks = tuple(first_chunks)
        self.slots_for_misses = list(slots_for_misses)
        self.store_lease_id = store_lease_id
        self.cancelled = False
        self.arrived: LookupAnswer | None = None

    def arrive(
        self,
        statuses: str,
        *,
        unwanted: Sequence[int] = (),
        leased: Sequence[int] | None = None,
        slots: Sequence[int] = (),
    ) -> None:
        """Answer one letter a key: H(it), U(nleased hit), P(ending), M(iss). All H are leased by default.

        `slots` come along for the missing keys of group 0.
        """
        numbers = [_STATUS_OF_LETTER[letter] for letter in statuses]
        hits = [index for index, letter in enumerate(statuses) if letter == "H"]
        pinned = (hits if leased is None else leased) if self.lease_id else []
        self.arrived = LookupAnswer(
            numbers,
            lease_id=self.lease_id,
            leased_runs=tuple((index, 1) for index in pinned),
            slot_ids=[100 + index for index in pinned],
            generations=[7] * len(pinned),
            unwanted_indexes=unwanted,
            pool_id=POOL_ID,
            credits=[CreditGrant(0, list(slots), [9] * len(slots))] if slots else (),
            store_lease_id=self.store_lease_id if slots else 0,
        )

    def fail(self, reason: str) -> None:
        self.arrived = LookupAnswer.missed(len(self.keys), reason)

    def done(self) -> bool:
        return self.arrived is not None

    @property
    def age_s(self) -> float:
        return 0.0

    @property
    def took_s(self) -> float | None:
        return None

    def wait(self, timeout_s: float) -> bool:
        return self.arrived is not None

    def answer(self) -> LookupAnswer:
        assert self.arrived is not None
        return self.arrived

    def cancel(self) -> None:
        self.cancelled = True


_STATUS_OF_LETTER = {
    "H": LookupStatus.HIT,
    "U": LookupStatus.HIT_UNLEASED,
    "P": LookupStatus.PENDING,
    "M": LookupStatus.MISS,
}


@dataclass
class Told:
    """What a shim told the daemon, in order."""

    announced: list[tuple[str, list[int], list[int], list[bytes]]] = field(default_factory=list)
    started_loads: list[tuple[int, int, list[int]]] = field(default_factory=list)
    store_reports: list[StoreReportItem] = field(default_factory=list)
    load_reports: list[LoadReportItem] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    costs: list[TokenCosts] = field(default_factory=list)
    asked_credits: list[tuple[int, int]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    flushes: int = 0


class RecordingClient(OffloadClient):
    """An attached client without a daemon behind it."""

    def __init__(self, facts: NamespaceFacts, *, rank: int = 0, world_size: int = 1) -> None:
        self.facts = facts
        self.identity = EngineIdentity("engine", 1, Role.WORKER, rank, world_size)
        self.told = Told()
        self.lookups: list[ManualLookup] = []
        self.expired: set[int] = set()
        self.resets: list[str] = []
        self._listener = ClientListener()
        self._info: SessionInfo | None = None
        self._ids = itertools.count(1000)
        self._pid = os.getpid()

    @property
    def options(self) -> ClientOptions:
        return ClientOptions()

    @property
    def listener(self) -> ClientListener:
        return self._listener

    @listener.setter
    def listener(self, listener: ClientListener) -> None:
        self._listener = listener

    @property
    def session(self) -> SessionInfo | None:
        return self._info

    @property
    def forked(self) -> bool:
        return os.getpid() != self._pid

    @property
    def attached(self) -> bool:
        return self._info is not None

    @property
    def ready(self) -> bool:
        return self._info is not None

    def attach(self, info: SessionInfo) -> None:
        self._info = info
        self.listener.on_attached(info)

    def detach(self) -> None:
        self._info = None
        self.listener.on_detached("the daemon is gone")

    def lookup_async(
        self,
        ctx: ReqContext,
        keys: Sequence[bytes],
        *,
        lease: bool = True,
        first_chunks: Sequence[int] = (),
        max_tokens: int | None = None,
        pending_wait_ms: int = 0,
        lease_hits: bool = False,
        slots_for_misses: Sequence[SlotsForMisses] = (),
        timeout_s: float | None = None,
    ) -> PendingLookup:
        lease_id = next(self._ids) if lease else 0
        self.lookups.append(ManualLookup(keys, lease_id, first_chunks, slots_for_misses, next(self._ids)))
        return self.lookups[-1]

    def new_lease_id(self) -> int:
        return next(self._ids)

    def keep_lease(self, lease_id: int) -> None:
        pass

    def lease_valid(self, lease_id: int) -> bool:
        return lease_id not in self.expired

    def request_credits(self, group: int, count: int) -> bool:
        self.told.asked_credits.append((group, count))
        return True

    def announce(
        self, req_id: str, slot_ids: Sequence[int], generations: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        self.told.order.append("announce")
        self.told.announced.append((req_id, list(slot_ids), list(generations), list(keys)))

    def start_load(self, lookup_lease_id: int, load_lease_id: int, slot_ids: Sequence[int]) -> None:
        self.told.order.append("start_load")
        self.told.started_loads.append((lookup_lease_id, load_lease_id, list(slot_ids)))

    def report_store(self, item: StoreReportItem) -> None:
        self.told.store_reports.append(item)

    def report_load(self, item: LoadReportItem) -> None:
        self.told.load_reports.append(item)

    def return_credits(self, slot_ids: Sequence[int], generations: Sequence[int]) -> None:
        self.told.order.append("return_credits")
        self.told.returned.extend(slot_ids)

    def release(self, lease_id: int) -> None:
        self.told.order.append("release")
        self.told.released.append(lease_id)

    def report_costs(self, costs: TokenCosts) -> None:
        self.told.costs.append(costs)

    def finish(self, req_id: str) -> None:
        self.told.order.append("finish")
        self.told.finished.append(req_id)

    def flush_step(self) -> None:
        self.flush()

    def flush(self) -> None:
        self.told.flushes += 1

    def reset(self, weights_id: str = "", timeout_s: float = 5.0) -> bool:
        self.told.order.append("reset")
        self.resets.append(weights_id)
        return True
