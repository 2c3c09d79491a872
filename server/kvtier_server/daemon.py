"""The daemon: built, served, drained.

Owns the process: which parts there are and how they are wired, the loop's ticks, signals, and the order of
starting and stopping. The loop's thread is the one that is in the core; what blocks runs on other threads and
comes back through the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import structlog
from grpc_health.v1 import health, health_pb2

from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.checksum import part_checksum
from kvtier_ops.layout import SLOT_UNIT_BYTES, part_offset
from kvtier_ops.locks import owner_lock_is_free
from kvtier_server import __version__, admin, logs, service
from kvtier_server.admission import ReuseFilter
from kvtier_server.config import Config
from kvtier_server.core.adoption import Adopted
from kvtier_server.core.books import HashRequest
from kvtier_server.core.instances import Session
from kvtier_server.core.leases import LeaseKind
from kvtier_server.core.limits import Limits
from kvtier_server.core.lower_tiers import CascadeWhen, TierRules
from kvtier_server.core.namespaces import MAX_KEY_BYTES
from kvtier_server.core.tiering import Core
from kvtier_server.grpc_server import build_server
from kvtier_server.http import HttpServer
from kvtier_server.metrics import Metrics
from kvtier_server.policies.loader import load_policy_class
from kvtier_server.pool_slots import Backing, PoolSlots
from kvtier_server.pool_start import open_pool
from kvtier_server.primary.tier import SLICE_ITEMS
from kvtier_server.rpc import CallScope
from kvtier_server.secondary.base import OffloadingSpec, SecondaryTier, TierError
from kvtier_server.secondary.factory import BUILTIN_TIERS
from kvtier_server.service import OffloadService, boottime_ns
from kvtier_server.sessions import Sessions
from kvtier_server.snapshot import (
    by_suffix,
    lease_stats,
    lower_stats,
    primary_stats,
    session_stats,
    tenant_bytes,
)
from kvtier_server.socket_lock import SocketLock, StartError
from kvtier_server.stats import (
    PHASE_DEGRADED,
    PHASE_DRAINING,
    PHASE_SERVING,
    PHASE_STARTING,
    PRIMARY_TIER,
    DaemonState,
    PoolStats,
    StatsSnapshot,
)
from kvtier_server.tier_health import TierHealth, in_order
from kvtier_server.transfer.service import TransferService
from kvtier_server.warm_start import Registry, take_over

log = structlog.get_logger("kvtier.daemon")

TICK_S = 0.1
"""Time between two ticks: expiry and quarantine need no finer one, and an idle daemon stays under 1 % CPU."""

LAST_CALLS_S = 1.0
"""Longest wait for calls that began while the server stopped; none of them waits for anything."""

FLUSH_POLL_S = 0.01
"""Between two looks at what goes down while the daemon stops."""

TIER_STOP_S = 2.0
"""What the threads of one tier may take to end; one that hangs in an I/O ends with the process."""

SNAPSHOT_TICKS = 10
"""Ticks between two snapshots for metrics: one a second, as scrapes are far apart."""

UNARY_METHODS = (
    "Describe", "Attach", "Lookup", "PrepareLoad", "PrepareStore", "Complete", "RenewLeases", "Touch",
    "FinishRequest", "Reset",
)  # fmt: skip


def run(config: Config) -> int:
    """Serve in the foreground until SIGTERM or SIGINT. Returns the exit code of `kvtier serve`."""
    limiter = logs.setup(config.server.log_level, config.server.log_format)
    try:
        daemon = Daemon(config)
    except StartError as error:
        print(f"kvtier serve: {error}", file=sys.stderr)  # noqa: T201 for the person at the terminal
        return error.exit_code
    try:
        asyncio.run(daemon.serve(limiter))
    except StartError as error:
        print(f"kvtier serve: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    finally:
        daemon.close()
    return 0


class Daemon:
    """One daemon. Construction takes locks and pool; `serve` runs it; `close` gives everything back."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._start_ns = boottime_ns()
        self._start_time_s = time.time()
        self.boot_id = secrets.token_hex(8)
        self._socket_lock = SocketLock.of(config.server.address)
        self._pool = open_pool(config)
        limits = _core_limits(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tiers = self._make_tiers()
        policy_class = load_policy_class(config.pool.policy)
        self.core = Core(
            self._pool.data_bytes,
            PoolSlots(self._pool),
            policy_class,
            self._lock_is_free,
            functools.partial(secrets.randbits, 64),
            limits,
            ReuseFilter(config.admission.store_threshold, config.admission.max_tracked),
            self._tiers,
        )
        self._metrics = Metrics(
            version=__version__,
            methods=[
                *(f"OffloadService/{method}" for method in UNARY_METHODS),
                "AdminService/GetStatus",
                "AdminService/Clear",
                "TransferService/RegisterMemory",
            ],
            limits=config.limit_values(),
            tiers=[common.name for common, _ in config.tiers],
        )
        self._scope = CallScope(self.boot_id, config.limits.unary_calls, self._metrics, self._after_call)
        self._registry = Registry(self._pool, self.core)
        self._service = OffloadService(
            self.core,
            self._scope,
            self._metrics,
            self._pool_info,
            __version__,
            boottime_ns,
            self._registry.write,
        )
        self._transfers = TransferService(
            self.core,
            self._scope,
            self._metrics,
            config.limits,
            str(self._pool.path),
            self._pool.pool_id,
            self._pool.lock_fd,
        )
        self._sessions = Sessions(
            self.core,
            self._scope,
            self._metrics,
            self._pool_info,
            self._limits_of,
            boottime_ns,
            config.limits.session_events,
            self._registry.write,
            self._transfers.drained,
        )
        self._threads = ThreadPoolExecutor(
            max(1, min(4, (os.cpu_count() or 2) - 1)), thread_name_prefix="kvtier-work"
        )
        self._adopted = self._take_over()
        self._phase = PHASE_STARTING
        self._last_tick_ns = self._start_ns
        self._loop_lag_s = 0.0
        self._copies_hang = False
        self._settling = False
        self._pumping = False
        self._awaits_probes = False
        self._has_tier_trouble = False
        self._backing: Backing | None = None

    def _make_tiers(self) -> list[tuple[SecondaryTier, TierRules]]:
        """Make the tiers below the pool. Raises StartError, with those that were made ended again."""
        spec = OffloadingSpec(
            self._pool.data_bytes,
            SLOT_UNIT_BYTES,
            MAX_KEY_BYTES,
            str(self._pool.path),
            self._pool.data_offset,
            self._pool.lock_fd,
        )
        made: list[tuple[SecondaryTier, TierRules]] = []
        for common, parameters in self._config.tiers:
            try:
                tier = BUILTIN_TIERS.create(
                    common.type,
                    parameters,
                    spec,
                    self._pool.data.data,
                    self._on_tier_finished,
                    common.module_path,
                )
            except TierError as error:
                for other, _ in made:
                    other.shutdown(TIER_STOP_S)
                raise StartError(f"tier {common.name!r}: {error}", 2) from error
            rules = TierRules(
                common.name,
                CascadeWhen(common.cascade),
                max_queued_bytes=common.max_queued,
                max_running_bytes=common.max_running,
                min_uses=common.min_uses,
                clean_share=common.clean_share,
                probe_wait_ns=common.probe_wait,
            )
            made.append((tier, rules))
        return made

    def _lock_is_free(self, name: str) -> bool:
        """Tell whether a process can write no more: it is gone, and nothing is copied for it."""
        return not self._transfers.is_copying_for(name) and owner_lock_is_free(self._pool.directory, name)

    def _on_tier_finished(self) -> None:
        """Have the loop's thread look at what a tier has done. Called by the tiers' threads."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        self.core.below.collect(boottime_ns())
        self._after_call()

    def _take_over(self) -> Adopted | None:
        """Serve what an earlier daemon left, if it left a pool. Raises StartError."""
        if not self._pool.kept:
            return None
        try:
            return take_over(self._pool, self.core)
        except OSError as error:
            raise StartError(
                f"cannot take over {self._pool.path}: {error.strerror}; free memory, or drop what is in it: "
                "kvtier serve --fresh",
                2,
            ) from error

    def _pool_info(self) -> pb.PoolInfo:
        return pb.PoolInfo(
            directory=str(self._pool.directory),
            path=str(self._pool.path),
            pool_id=self._pool.pool_id,
            data_bytes=self._pool.data_bytes,
        )

    def _limits_of(self, session: Session) -> pb.Limits:
        books = self.core.books
        return pb.Limits(
            max_keys=books.limits.max_keys,
            max_message_bytes=self._config.limits.max_message,
            max_params_bytes=books.limits.max_params_bytes,
            lookup_lease_ms=books.limits.lookup_lease_ns // 1_000_000,
            copy_lease_ms=books.limits.copy_lease_ns // 1_000_000,
            max_credit_bytes=books.max_credit_bytes(session.instance),
            max_pinned_bytes=books.max_pinned_bytes(session.instance),
        )

    async def serve(self, limiter: logs.RepeatLimit) -> None:
        """Run until a signal asks to stop, then drain. Raises StartError if the address cannot be had."""
        loop = self._loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, stop)
        server, health_servicer = build_server(
            self._config.server.address,
            self._config.limits.max_message,
            self._scope,
            self._service,
            self._sessions,
            self.snapshot,
            self.core.clearings,
            self._transfers,
        )
        self._metrics.publish(self.snapshot())  # the first scrape may come before the first tick
        http = self._start_http()
        self._backing = Backing(
            self._pool,
            self._config.pool.backing_piece,
            functools.partial(self._call_soon, loop, self._on_backed),
        )
        await server.start()
        self._backing.start()
        self._phase = PHASE_SERVING
        for name in ("", service.SERVICE, admin.SERVICE):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        tier_health = TierHealth(health_servicer)
        await tier_health.tell(self._metrics.snapshot.tiers[1:])
        gc.freeze()
        # A full collection over a million index entries stops the loop for a third of a second.
        gc.set_threshold(50_000, 20, 1 << 30)
        self._announce(http)
        ticks = asyncio.create_task(self._tick_forever(limiter, tier_health))
        try:
            await stop.wait()
            await self._drain(server, health_servicer)
        finally:
            ticks.cancel()
            self._copies_hang = not await self._transfers.close(TIER_STOP_S)
            await _let_tasks_end()
            self._backing.stop()
            self._threads.shutdown(cancel_futures=True)
            if http is not None:
                http.stop()

    def _start_http(self) -> HttpServer | None:
        address = self._config.server.metrics_address
        if not address:
            return None
        http = HttpServer(address, self._metrics, self._state)
        try:
            http.start()
        except OSError as error:
            raise StartError(f"{error.strerror}; choose another --metrics-address", 1) from error
        return http

    def _announce(self, http: HttpServer | None) -> None:
        """Say on stdout where everything is: the first thing a person looks for."""
        pool = self._pool
        metrics = f"http://127.0.0.1:{http.port}/metrics" if http is not None else "off"
        kept = f"warm: {self._adopted.published} chunks kept" if self._adopted is not None else "empty"
        lines = (
            f"kvtier {__version__} serving",
            f"  address  {self._config.server.address}",
            f"  pool     {pool.path} ({pool.data_bytes} bytes, {kept}, policy {self._config.pool.policy})",
            f"  tiers    primary (the pool){''.join(f', {b.rules.name}' for b in self.core.below.tiers)}",
            f"  metrics  {metrics}",
        )
        print("\n".join(lines), flush=True)  # noqa: T201 this is the command's output
        log.info("serving", boot=self.boot_id, address=self._config.server.address, pool=str(pool.path))

    def _on_signal(self, stop: asyncio.Event) -> None:
        if stop.is_set():
            log.warning("stopped_at_once", why="second signal")
            self._socket_lock.unlink()
            os._exit(0)
        stop.set()

    @staticmethod
    def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[int], None], value: int) -> None:
        loop.call_soon_threadsafe(function, value)

    def _on_backed(self, num_bytes: int) -> None:
        self.core.books.primary.slabs.backed_bytes = num_bytes

    def _after_call(self) -> None:
        """Deliver what the call caused, and do what it put off once its reply is on the way."""
        if self.core.books.notices:
            self._sessions.dispatch()
        if self.core.below.is_behind and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)
        if not self._awaits_probes:
            self._await_probes()
        if not self._settling and self.core.books.should_settle:
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle)

    def _await_probes(self) -> None:
        probes_end_ns = self.core.below.promotions.probes_end_ns
        if probes_end_ns is not None:
            self._awaits_probes = True
            delay_s = max(probes_end_ns - boottime_ns(), 0) / 1e9
            asyncio.get_running_loop().call_later(delay_s, self._end_probes)

    def _end_probes(self) -> None:
        self._awaits_probes = False
        self.core.below.promotions.end_probes(boottime_ns())
        self._after_call()

    def _pump(self) -> None:
        self._pumping = False  # whatever an out-of-tree tier raises, the next call tries again
        self._pumping = self.core.below.pump()
        if self._pumping:
            asyncio.get_running_loop().call_soon(self._pump)

    def _settle(self) -> None:
        self._settling = False
        if self.core.books.settle():
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle)

    def _start_hashes(self) -> None:
        """Have slots hashed that readers complained about, off this thread."""
        loop = asyncio.get_running_loop()
        requests = self.core.books.hash_requests
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
            self.core.completions.hashed(request, matches)
            if not matches:
                log.error("corrupt_chunk", slot=request.slot_id, part=request.part, action="quarantined")

    async def _tick_forever(self, limiter: logs.RepeatLimit, tier_health: TierHealth) -> None:
        """Let the core see time pass."""
        count = 0
        while True:
            due_ns = boottime_ns() + int(TICK_S * 1e9)
            await asyncio.sleep(TICK_S)
            now_ns = boottime_ns()
            self._loop_lag_s = max((now_ns - due_ns) / 1e9, 0.0)
            self._last_tick_ns = now_ns
            count += 1
            try:
                self._tick(now_ns, with_snapshot=count % SNAPSHOT_TICKS == 1)
                await tier_health.tell(self._metrics.snapshot.tiers[1:])
            except Exception:  # a bug of ours must be seen, and time must go on
                log.exception("tick_failed")
            logs.log_held_back(limiter)

    def _tick(self, now_ns: int, with_snapshot: bool) -> None:
        self.core.tick(now_ns)
        self.core.below.collect(now_ns)
        if not self._pumping:
            self._pump()
        self._sessions.dispatch()
        self._transfers.forget_ended()
        self._start_hashes()
        if not self._settling:
            self._settle()
        self.core.books.primary.write_recency(SLICE_ITEMS)
        times = self.core.below.promotions.times
        while times:
            self._metrics.observe_promotion(*times.popleft())
        if with_snapshot:
            self._metrics.publish(self.snapshot())

    def _state(self) -> DaemonState:
        return DaemonState(self._current_phase(), (boottime_ns() - self._last_tick_ns) / 1e9)

    def _current_phase(self) -> str:
        short = self._backing is not None and bool(self._backing.shortage)
        is_degraded = short or self._has_tier_trouble
        return PHASE_DEGRADED if is_degraded and self._phase == PHASE_SERVING else self._phase

    def snapshot(self) -> StatsSnapshot:
        """Count everything now. On the loop's thread."""
        books, now_ns = self.core.books, boottime_ns()
        books.unpin_all()
        books.primary.settle()  # or pins would show as they were a tick ago
        counts = books.counts
        shortage = self._backing.shortage if self._backing is not None else ""
        primary = primary_stats(books, shortage or "ok")
        lower = [lower_stats(below) for below in self.core.below.tiers]
        self._has_tier_trouble = not all(map(in_order, lower))
        return StatsSnapshot(
            boot_id=self.boot_id,
            version=__version__,
            phase=self._current_phase(),
            start_time_s=self._start_time_s,
            uptime_s=(now_ns - self._start_ns) / 1e9,
            loop_lag_s=self._loop_lag_s,
            pool=PoolStats(
                path=str(self._pool.path),
                name=self._config.server.name,
                data_bytes=self._pool.data_bytes,
                backed_bytes=books.primary.slabs.backed_bytes,
                policy=self._config.pool.policy,
            ),
            tiers=(replace(primary), *lower),
            sessions=session_stats(books, now_ns, self._transfers.paths()),
            copy_devices=self._transfers.devices(),
            leases=lease_stats(books, now_ns),
            lookup_keys=by_suffix(counts, "lookup"),
            lookup_tokens=counts["lookup_tokens"],
            hit_tokens={
                PRIMARY_TIER: counts["hit_tokens"],
                **{below.rules.name: below.counts["hit_tokens"] for below in self.core.below.tiers},
            },
            evictions={
                PRIMARY_TIER: by_suffix(counts, "removed"),
                **{below.rules.name: by_suffix(below.counts, "removed") for below in self.core.below.tiers},
            },
            store_refused=by_suffix(counts, "refused"),
            sessions_ended=by_suffix(counts, "session_ended"),
            checksum_failures={
                PRIMARY_TIER: counts["checksum:corrupt"],
                **{below.rules.name: below.counts["promotion:corrupt"] for below in self.core.below.tiers},
            },
            loads_torn=counts["load:torn"],
            credits=sum(r.key is None for r in books.reservations),
            tenant_used_bytes=tenant_bytes(books),
        )

    async def _drain(self, server: grpc.aio.Server, health_servicer: health.aio.HealthServicer) -> None:
        """Refuse what is new, wait for copies that run, close the streams, stop."""
        self._phase = PHASE_DRAINING
        self.core.books.draining = True
        await health_servicer.enter_graceful_shutdown()
        deadline = time.monotonic() + self._config.drain.copies / 1e9
        self._sessions.tell_all(
            pb.AttachResponse(draining=pb.Draining(deadline_ms=self._config.drain.copies // 1_000_000))
        )
        log.info("draining", copies=self._running_copies())
        while self._running_copies() and time.monotonic() < deadline:  # noqa: ASYNC110 the core is asked
            await asyncio.sleep(TICK_S)
        left_copies = self._running_copies()  # asked before the sessions end, and their leases with them
        self._sessions.end_all()
        await self._flush_tiers()
        await server.stop(grace=1.0)
        log.info("stopped", left_copies=left_copies)
        print(  # noqa: T201 the person who stopped it should know where the memory went
            f"kvtier stopped. The pool keeps its memory for the next start; to free it: kvtier pool remove "
            f"--name {self._config.server.name}",
            flush=True,
        )

    async def _flush_tiers(self) -> None:
        """Let what is on its way down arrive, as far as `drain.tiers` allows."""
        deadline = time.monotonic() + self._config.drain.tiers / 1e9
        while self.core.below.has_work and time.monotonic() < deadline:
            self.core.below.collect(boottime_ns())
            self.core.below.pump()
            await asyncio.sleep(FLUSH_POLL_S)
        if self.core.below.has_work:
            log.warning("tiers_not_flushed", waited_s=self._config.drain.tiers / 1e9)

    def _running_copies(self) -> int:
        books = self.core.books
        loads = sum(lease.kind is LeaseKind.LOAD for lease in books.leases)
        return loads + sum(reservation.key is not None for reservation in books.reservations)

    def close(self) -> None:
        """Give back the pool's and the socket's locks. The pool's file stays."""
        ended = [tier.shutdown(TIER_STOP_S) for tier, _ in self._tiers]
        if not all(ended) or self._copies_hang:
            # Something hangs that may still write into a slot: the locks go with the process, not before.
            what = "copies_hang" if all(ended) else "tier_hangs"
            log.warning(what, effect="the pool's lock is kept until the process is gone")
            return
        self._threads.shutdown(cancel_futures=True)
        self._pool.close()
        self._socket_lock.release()


async def _let_tasks_end() -> None:
    """Let the other tasks of the loop end, such as calls that gRPC took in its last instant.

    Cancelled instead, each would leave a traceback in the log of a daemon that stops as it should.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=LAST_CALLS_S)


def _core_limits(config: Config) -> Limits:
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
        lookup_lease_ns=config.leases.lookup,
        copy_lease_ns=config.leases.copy_,
        tombstone_ns=limits.tombstone,
        max_pending_wait_ns=config.leases.pending_wait,
        max_promotion_ns=config.leases.promotion,
        pin_share=limits.pin_share,
        credit_share=limits.credit_share,
        min_credit_slots=limits.min_credit_slots,
    )
