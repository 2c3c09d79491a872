"""What the daemon does between calls: deliver, pump, settle, hash, let time pass.

Owns the loop's ticks and what a call puts off until its reply is on the way. On the loop's thread; what
blocks runs on `threads` and comes back through the loop.
"""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import Executor

import structlog

from kvtier_ops.checksum import part_checksum
from kvtier_ops.layout import part_offset
from kvtier_ops.pool import Pool
from kvtier_server import logs
from kvtier_server.core.books import HashRequest
from kvtier_server.core.tiering import Core
from kvtier_server.metrics import Metrics
from kvtier_server.observer import Observer
from kvtier_server.primary.tier import SLICE_ITEMS
from kvtier_server.service import boottime_ns
from kvtier_server.sessions import Sessions
from kvtier_server.tier_health import TierHealth
from kvtier_server.transfer.service import TransferService

log = structlog.get_logger("kvtier.upkeep")

TICK_S = 0.1
"""Time between two ticks: expiry and quarantine need no finer one, and an idle daemon stays under 1 % CPU."""

SNAPSHOT_TICKS = 10
"""Ticks between two snapshots for metrics: one a second, as scrapes are far apart."""


class Upkeep:
    """Keeps the core, the sessions and the metrics going. Made before the loop runs."""

    def __init__(
        self,
        core: Core,
        pool: Pool,
        sessions: Sessions,
        transfers: TransferService,
        metrics: Metrics,
        observer: Observer,
        threads: Executor,
    ) -> None:
        self._core = core
        self._pool = pool
        self._sessions = sessions
        self._transfers = transfers
        self._metrics = metrics
        self._observer = observer
        self._threads = threads
        self._settling = False
        self._pumping = False
        self._awaits_probes = False

    def collect(self) -> None:
        """Take what the tiers have done."""
        self._core.below.collect(boottime_ns())
        self.after_call()

    def after_call(self) -> None:
        """Deliver what the call caused, and do what it put off once its reply is on the way."""
        self._tell()
        if self._core.below.is_behind and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)
        if not self._awaits_probes:
            self._await_probes()
        if not self._settling and self._core.books.should_settle:
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle)

    def _tell(self) -> None:
        if self._core.books.notices:
            self._sessions.dispatch()

    def _await_probes(self) -> None:
        probes_end_ns = self._core.below.promotions.probes_end_ns
        if probes_end_ns is not None:
            self._awaits_probes = True
            delay_s = max(probes_end_ns - boottime_ns(), 0) / 1e9
            asyncio.get_running_loop().call_later(delay_s, self._end_probes)

    def _end_probes(self) -> None:
        self._awaits_probes = False
        self._core.below.promotions.end_probes(boottime_ns())
        self.after_call()

    def _pump(self) -> None:
        self._pumping = False  # whatever an out-of-tree tier raises, the next call tries again
        self._pumping = self._core.below.pump()
        self._tell()
        if self._pumping:
            asyncio.get_running_loop().call_soon(self._pump)

    def _settle(self) -> None:
        self._settling = False
        if self._core.books.settle():
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle)
        self._tell()

    def _start_hashes(self) -> None:
        """Have slots hashed that readers complained about, off this thread."""
        loop = asyncio.get_running_loop()
        requests = self._core.books.hash_requests
        while requests:
            request = requests.popleft()
            future = loop.run_in_executor(self._threads, self._hash, request)
            future.add_done_callback(functools.partial(self._hashed, request))

    def _hash(self, request: HashRequest) -> bool:
        recorded = self._pool.part_checksum(request.slot_id, request.part)
        if not recorded:
            return True  # none was computed when it was stored: there is nothing to be different from
        offset = part_offset(request.part_bytes, request.part)
        return part_checksum(self._pool.part_view(request.slot_id, offset, request.part_bytes)) == recorded

    def _hashed(self, request: HashRequest, future: asyncio.Future[bool]) -> None:
        if not future.cancelled():
            failure = future.exception()
            if failure is not None:
                log.error("hash_failed", slot=request.slot_id, part=request.part, exc_info=failure)
            matches = failure is not None or future.result()  # who cannot tell condemns nothing
            self._core.completions.hashed(request, matches)
            if not matches:
                log.error("corrupt_chunk", slot=request.slot_id, part=request.part, action="quarantined")

    async def tick_forever(self, limiter: logs.RepeatLimit, tier_health: TierHealth) -> None:
        """Let the core see time pass, until cancelled."""
        count = 0
        while True:
            due_ns = boottime_ns() + int(TICK_S * 1e9)
            await asyncio.sleep(TICK_S)
            now_ns = boottime_ns()
            self._observer.ticked(now_ns, late_s=max((now_ns - due_ns) / 1e9, 0.0))
            count += 1
            try:
                self._tick(now_ns, with_snapshot=count % SNAPSHOT_TICKS == 1)
                await tier_health.tell(self._metrics.snapshot.tiers[1:])
            except Exception:  # a bug of ours must be seen, and time must go on
                log.exception("tick_failed")
            logs.log_held_back(limiter)

    def _tick(self, now_ns: int, with_snapshot: bool) -> None:
        self._core.tick(now_ns)
        self._core.below.collect(now_ns)
        if not self._pumping:
            self._pump()
        self._sessions.dispatch()
        self._transfers.forget_ended()
        self._start_hashes()
        if not self._settling:
            self._settle()
        self._core.books.primary.write_recency(SLICE_ITEMS)
        times = self._core.below.promotions.times
        while times:
            self._metrics.observe_promotion(*times.popleft())
        if with_snapshot:
            self._metrics.publish(self._observer.snapshot())
