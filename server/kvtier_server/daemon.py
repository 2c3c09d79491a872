"""The daemon: built, served, drained.

Owns the process: which parts there are and how they are wired, signals, and the order of starting and
stopping. The loop's thread is the one that is in the core; what blocks runs on other threads and comes back
through the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import structlog
from grpc_health.v1 import health_pb2

from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.lock_watch import OwnerLocks
from kvtier_server import __version__, events, logs, service
from kvtier_server.admin import service as admin
from kvtier_server.admission import ReuseFilter
from kvtier_server.config import Config
from kvtier_server.core.adoption import Adopted
from kvtier_server.core.instances import Session
from kvtier_server.core.tiering import Core
from kvtier_server.core_limits import core_limits
from kvtier_server.doctor.cuda_driver import cuda_version
from kvtier_server.events import EventStreams
from kvtier_server.grpc_server import Handlers, Servers, raise_file_limit
from kvtier_server.hangup import LOOK_S, Hangups
from kvtier_server.http import HttpServer
from kvtier_server.message_bytes import message_bytes
from kvtier_server.metrics import Metrics
from kvtier_server.notify import Notifier
from kvtier_server.observer import Observer
from kvtier_server.output import drop_output
from kvtier_server.policies.loader import load_policy_class
from kvtier_server.pool_slots import Backing, PoolSlots
from kvtier_server.pool_start import open_pool
from kvtier_server.process_locks import ProcessLocks
from kvtier_server.reload import Reloads
from kvtier_server.rpc import CallScope
from kvtier_server.service import OffloadService, boottime_ns
from kvtier_server.sessions import Sessions
from kvtier_server.socket_lock import SocketLock, StartError
from kvtier_server.stats import PHASE_DRAINING, PHASE_SERVING
from kvtier_server.stopping import Stopping, held
from kvtier_server.tier_health import TierHealth
from kvtier_server.tiers_start import TIER_STOP_S, make_tiers, rules_of
from kvtier_server.tracing import Tracing
from kvtier_server.transfer import service as transfer
from kvtier_server.transfer.service import TransferService
from kvtier_server.upkeep import TICK_S, Upkeep
from kvtier_server.warm_start import Registry, take_over

log = structlog.get_logger("kvtier.daemon")

LAST_CALLS_S = 1.0
"""Longest wait for calls that began while the server stopped; none of them waits for anything."""

FLUSH_POLL_S = 0.01
"""Between two looks at what goes down while the daemon stops."""


def run(config: Config, reread: Callable[[], Config], given: Mapping[str, str]) -> int:
    """Serve in the foreground until SIGTERM, SIGINT or a Drain. Returns the exit code of `kvtier serve`.

    `reread` reads the configuration's sources again, for SIGHUP. `given`: where each setting is from.
    """
    limiter = logs.setup(config.server.log_level, config.server.log_format)
    hangups = Hangups()
    hangups.wait_for_loop()
    raise_file_limit()
    try:
        daemon = Daemon(config, reread, hangups)
    except StartError as error:
        _tell(error, given)
        return error.exit_code
    try:
        asyncio.run(daemon.serve(limiter))
    except StartError as error:
        _tell(error, given)
        return error.exit_code
    finally:
        daemon.close()
    return 0


def _tell(error: StartError, given: Mapping[str, str]) -> None:
    """Say to the person at the terminal why it does not start, and whether the environment is why."""
    kind, _, variable = given.get(error.setting, "").partition(" ")
    origin = f" ({error.setting} from {variable})" if kind == "environment" else ""
    print(f"kvtier serve: {error}{origin}", file=sys.stderr)  # noqa: T201


class Daemon:
    """One daemon. Construction takes locks and pool; `serve` runs it; `close` gives everything back."""

    def __init__(self, config: Config, reread: Callable[[], Config], hangups: Hangups) -> None:
        self._config = config
        self._hangups = hangups
        self._notifier = Notifier.take(os.environ, os.getpid())  # before there are child processes
        self.boot_id = secrets.token_hex(8)
        self._socket_locks = [SocketLock.of(config.server.address)]
        if config.server.admin_address:
            self._socket_locks.append(SocketLock.of(config.server.admin_address, "server.admin_address"))
        self._pool = open_pool(config)
        self._owner_locks = OwnerLocks(self._pool.directory)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tiers = make_tiers(config, self._pool, self._on_tier_finished)
        policy_class = load_policy_class(config.pool.policy)
        self.core = Core(
            self._pool.data_bytes,
            PoolSlots(self._pool),
            policy_class,
            ProcessLocks(self._owner_locks, self._is_copying_for),
            functools.partial(secrets.randbits, 64),
            core_limits(config),
            ReuseFilter(config.admission.store_threshold, config.admission.max_tracked),
            self._tiers,
        )
        self._metrics = Metrics(
            version=__version__,
            limits=config.limit_values(),
            tiers=[common.name for common, _ in config.tiers],
            cuda=cuda_version(),
        )
        self._tracing = self._make_tracing(config)
        self._scope = CallScope(
            self.boot_id,
            config.limits.unary_calls,
            self._metrics,
            self._after_call,
            message_bytes(config.limits.max_keys, config.limits.max_params),
            self._tracing,
        )
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
        self._events = EventStreams(
            self.core, self._scope, self._metrics, config.limits.watchers, config.limits.max_message
        )
        self._threads = ThreadPoolExecutor(
            max(1, min(4, (os.cpu_count() or 2) - 1)), thread_name_prefix="kvtier-work"
        )
        self._adopted = self._take_over()
        self._backing = Backing(self._pool, config.pool.backing_piece, self._on_backed)
        self._observer = Observer(
            self.boot_id,
            config,
            self._pool,
            self.core,
            self._backing,
            self._transfers,
            self._events,
            self._metrics,
        )
        self._upkeep = Upkeep(
            self.core,
            self._pool,
            self._sessions,
            self._transfers,
            self._metrics,
            self._observer,
            self._threads,
        )
        self._stopping = Stopping(lambda: self._config.drain.copies)
        self._reloads = Reloads(config, reread, self._apply, self._metrics)
        self._copies_hang = False
        self._connections_hang = False

    def _make_tracing(self, config: Config) -> Tracing | None:
        if not config.otel.endpoint:
            return None
        resource = {
            "service.name": "kvtier",
            "service.version": __version__,
            "service.instance.id": self.boot_id,
        }
        tracing = Tracing(config.otel, self._metrics.registry, resource)
        tracing.follow(self.core.books.instances.sessions.get)
        return tracing

    def _is_copying_for(self, lock_file: str) -> bool:
        """Ask the transfers, which are made after the core that asks."""
        return self._transfers.is_copying_for(lock_file)

    def _on_tier_finished(self) -> None:
        """Have the loop's thread look at what a tier has done. Called by the tiers' threads."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(self._upkeep.collect)

    def _on_backed(self, num_bytes: int) -> None:
        """Offer what has been backed. Called by the backing's thread."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._offer, num_bytes)

    def _offer(self, num_bytes: int) -> None:
        self.core.books.primary.slabs.backed_bytes = num_bytes

    def _after_call(self) -> None:
        self._upkeep.after_call()

    def _apply(self, config: Config) -> None:
        """Go by what a reload may change of the configuration; `config` has the rest as it was."""
        self._config = config
        self.core.books.set_limits(core_limits(config))
        self.core.books.filter.threshold = config.admission.store_threshold
        self._scope.max_unary_calls = config.limits.unary_calls
        self._sessions.max_events = config.limits.session_events
        for below, (common, _) in zip(self.core.below.tiers, config.tiers, strict=True):
            below.rules = rules_of(common)
        self._metrics.limits = config.limit_values()

    def _take_over(self) -> Adopted | None:
        """Serve what an earlier daemon left, if it left a pool. Raises StartError."""
        if not self._pool.kept:
            return None
        try:
            return take_over(self._pool, self.core, self._owner_locks)
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
            lookup_lease_ms=session.instance.lookup_lease_ns // 1_000_000,
            copy_lease_ms=books.limits.copy_lease_ns // 1_000_000,
            max_credit_bytes=books.max_credit_bytes(session.instance),
            max_pinned_bytes=books.max_pinned_bytes(session.instance),
        )

    def _services(self) -> dict[str, Handlers]:
        """Return every service of the wire contract, those included that say they are UNIMPLEMENTED."""
        return {
            service.SERVICE: self._service.handlers() | {"Attach": self._sessions.handler()},
            admin.SERVICE: admin.handlers(
                self._scope,
                self._observer.snapshot,
                self.core,
                self._stopping,
                boottime_ns,
                self._transfers.paths,
            ),
            transfer.SERVICE: self._transfers.handlers(),
            events.SERVICE: self._events.handlers(),
        }

    async def serve(self, limiter: logs.RepeatLimit) -> None:
        """Run until somebody asks to stop, then drain. Raises StartError if the address cannot be had."""
        loop = self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        if self._hangups.has_come:
            self._on_hangup()
        self._look_at_terminal()
        servers = Servers(self._config, self._services(), self._scope)
        self._metrics.publish(self._observer.snapshot())  # the first scrape may come before the first tick
        http = self._start_http()
        await servers.start()
        self._backing.start()
        self._observer.phase = PHASE_SERVING
        for name in ("", service.SERVICE, admin.SERVICE):
            await servers.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        tier_health = TierHealth(servers.health)
        await tier_health.tell(self._metrics.snapshot.tiers[1:])
        gc.freeze()
        # A full collection over a million index entries stops the loop for a third of a second.
        gc.set_threshold(50_000, 20, 1 << 30)
        self._announce(servers, http)
        self._notifier.ready(self._status())
        beats = asyncio.create_task(self._notifier.beat_forever(self._status))
        ticks = asyncio.create_task(self._upkeep.tick_forever(limiter, tier_health))
        try:
            await self._stopping.wait()
            await self._drain(servers)
        finally:
            ticks.cancel()
            beats.cancel()
            self._reloads.stop()
            self._copies_hang = not await self._transfers.close(TIER_STOP_S)
            await _let_tasks_end()
            self._backing.stop()
            self._threads.shutdown(cancel_futures=True)
            if http is not None:
                http.stop()
        if self._connections_hang:
            # The loop, when it is closed, waits for gRPC's threads, and these for the connections.
            self.close()
            log.warning("connections_hang", effect="the process ends without them")
            os._exit(0)

    def _start_http(self) -> HttpServer | None:
        address = self._config.server.metrics_address
        if not address:
            return None
        http = HttpServer(address, self._metrics, self._observer.state)
        try:
            http.start()
        except OSError as error:
            raise StartError(f"{error.strerror}; choose another --metrics-address", 1) from error
        return http

    def _announce(self, servers: Servers, http: HttpServer | None) -> None:
        """Say on stdout where everything is: the first thing a person looks for."""
        pool = self._pool
        metrics = f"{http.url}/metrics" if http is not None else "off"
        kept = f"warm: {self._adopted.published} chunks kept" if self._adopted is not None else "empty"
        lines = (
            f"kvtier {__version__} serving",
            *(f"  address  {address}{how and f' ({how})'}" for address, how in servers.listening),
            f"  pool     {pool.path} ({pool.data_bytes} bytes, {kept}, policy {self._config.pool.policy})",
            f"  tiers    primary (the pool){''.join(f', {b.rules.name}' for b in self.core.below.tiers)}",
            f"  metrics  {metrics}",
        )
        _say("\n".join(lines))
        log.info("serving", boot=self.boot_id, address=self._config.server.address, pool=str(pool.path))

    def _status(self) -> str:
        """Say how the daemon is, in the words that `systemctl status` shows."""
        sessions = len(self._metrics.snapshot.sessions)
        return f"{self._observer.state().phase}, {sessions} session{'' if sessions == 1 else 's'}"

    def _on_signal(self) -> None:
        if self._stopping.by_signal():
            log.warning("stopped_at_once", why="second signal")
            for lock in self._socket_locks:
                lock.unlink()
            os._exit(0)

    def _look_at_terminal(self) -> None:
        """Look every second, as long as there is one."""
        self._hangups.look()
        if self._hangups.has_terminal:
            asyncio.get_running_loop().call_later(LOOK_S, self._look_at_terminal)

    def _on_hangup(self) -> None:
        """Read the configuration again; but where it means that the terminal was closed, stop."""
        if self._hangups.means_stop():
            self._stopping.ask()
        else:
            self._reloads.ask()

    async def _drain(self, servers: Servers) -> None:
        """Refuse what is new, wait for copies that run, close the streams, stop."""
        self._observer.phase = PHASE_DRAINING
        self._notifier.stopping(self._status())
        self.core.books.draining = True
        self._events.end_all()
        await servers.health.enter_graceful_shutdown()
        deadline_ms = self._stopping.copies_ms
        self._sessions.tell_all(pb.AttachResponse(draining=pb.Draining(deadline_ms=deadline_ms)))
        log.info("draining", copies=held(self.core).copies, deadline_ms=deadline_ms)
        while held(self.core).copies and self._stopping.left_ms:  # noqa: ASYNC110 the core is asked
            await asyncio.sleep(TICK_S)
        left_copies = held(self.core).copies  # asked before the sessions end, and their leases with them
        self._sessions.end_all()
        await self._flush_tiers()
        self._connections_hang = not await servers.stop(grace_s=1.0)
        log.info("stopped", left_copies=left_copies)
        directory = self._config.pool.directory
        which = f"--directory {shlex.quote(directory)}" if directory else f"--name {self._config.server.name}"
        # The person who stopped it should know where the memory went.
        _say(
            "kvtier stopped. The pool keeps its memory for the next start; to free it: "
            f"kvtier pool remove {which}"
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

    def close(self) -> None:
        """Give back the pool's and the sockets' locks. The pool's file stays."""
        self._notifier.close()
        if self._tracing is not None:
            self._tracing.close()
        ended = [tier.shutdown(TIER_STOP_S) for tier, _ in self._tiers]
        if not all(ended) or self._copies_hang:
            # Something hangs that may still write into a slot: the locks go with the process, not before.
            what = "copies_hang" if all(ended) else "tier_hangs"
            log.warning(what, effect="the pool's lock is kept until the process is gone")
            return
        self._threads.shutdown(cancel_futures=True)
        self._pool.close()
        for lock in self._socket_locks:
            lock.release()


def _say(text: str) -> None:
    """Print the command's output. No daemon ends because its disk is full or its terminal was closed."""
    try:
        print(text, flush=True)  # noqa: T201
    except OSError as error:
        drop_output()
        log.warning("output_not_written", error=error.strerror, effect="nothing more is printed")


async def _let_tasks_end() -> None:
    """Let the other tasks of the loop end, such as calls that gRPC took in its last instant.

    Cancelled instead, each would leave a traceback in the log of a daemon that stops as it should.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=LAST_CALLS_S)
