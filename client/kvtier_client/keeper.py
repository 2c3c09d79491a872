"""The background thread: opens the session, keeps it, and opens the next one when it ends.

Owns the order of a session's life. Opening: Describe, lock file, Attach, map the pool, tell the shim. Ending:
calls miss at once, stream closed, shim told, copies drained. No engine thread ever waits for any of it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from threading import Thread

import grpc

from kvtier.v1 import offload_pb2, offload_pb2_grpc
from kvtier_client.attach import EventStream, session_info
from kvtier_client.channel import open_channel, read_failure
from kvtier_client.chores import Chores, pauses_s
from kvtier_client.gate import Gate
from kvtier_client.link import Link
from kvtier_client.options import ClientOptions
from kvtier_client.places import PoolPlace
from kvtier_client.reset import Weights
from kvtier_client.sender import CompletionSender
from kvtier_client.stats import ClientStats
from kvtier_client.tls import TlsUnusable
from kvtier_ops.pool import PoolError

logger = logging.getLogger(__name__)

_ENDED = "the daemon ended the session: "
_USUAL_ENDS = frozenset({_ENDED + reason for reason in ("INSTANCE_LOST", "REPLACED", "DRAINING")})
"""Another process of the instance, its successor or the daemon comes or goes as intended: no warning."""


class CannotAttach(Exception):
    """No session this time. The message goes to `away_reason`; the next attempt comes after a pause."""


class SessionKeeper:
    """Keeps one process attached. `start` and `stop` are called once each."""

    def __init__(
        self,
        gate: Gate,
        address: str,
        request: offload_pb2.AttachRequest,
        *,
        maps_pool: bool,
        options: ClientOptions,
        sender: CompletionSender,
        stats: ClientStats,
        weights: Weights,
    ) -> None:
        self._gate = gate
        self._request = request
        self._address = address
        self._maps_pool = maps_pool
        self._options = options
        self._sender = sender
        self._stats = stats
        self._weights = weights
        self._place = PoolPlace()
        self._previous_session = ""
        self._drained = True
        self._logged_reason = ""
        self._thread = Thread(target=self._run, name="kvtier-keeper", daemon=True)

    def start(self) -> None:
        """Begin to attach."""
        self._thread.start()

    def stop(self, *, drained: bool, timeout_s: float) -> None:
        """Wait for the end of session and thread, which the gate's `closing` brings about.

        Lets go of pool and lock file if `drained` and the listener says within the time that no copy runs.
        If not, both stay until the process ends: a free lock would tell the daemon that nothing is written.
        """
        give_up_at = time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the session does not end in time; pool and lock file stay until the process ends")
        elif drained and self._no_copy_runs(max(0.0, give_up_at - time.monotonic())):
            self._place.leave()

    def _no_copy_runs(self, timeout_s: float) -> bool:
        try:
            if self._gate.listener.drain(timeout_s):
                return True
        except Exception:
            self._stats.add("listener_errors")
            logger.exception("the listener's drain failed")
        logger.warning("copies are still running; pool and lock file stay until the process ends")
        return False

    def _run(self) -> None:
        pauses = pauses_s(self._options)
        while not self._gate.closing:
            try:
                self._drain()
                opened_at = time.monotonic()
                self._live()
                # A session that ends at once is no reason to try faster.
                if time.monotonic() - opened_at > self._options.reconnect_max_ms / 1000:
                    pauses = pauses_s(self._options)
            except CannotAttach as error:
                self._say_away(str(error))
            except Exception:
                self._stats.add("keeper_errors")
                logger.exception("the background thread failed; it goes on")
            self._pause(next(pauses))

    def _live(self) -> None:
        """Open a session and keep it until it ends. Raises CannotAttach.

        Over a channel of its own, whose end is also the end of all calls of the session.
        """
        try:
            channel = open_channel(self._address, self._options.tls)
        except TlsUnusable as error:
            raise CannotAttach(f"no certificate to show the daemon: {error}") from None
        try:
            self._live_over(offload_pb2_grpc.OffloadServiceStub(channel))
        finally:
            channel.close()

    def _live_over(self, stub: offload_pb2_grpc.OffloadServiceStub) -> None:
        gate = self._gate
        first: list[offload_pb2.Attached] = []
        links: list[Link] = []
        ended: list[str] = []

        def on_first(message: offload_pb2.AttachResponse) -> None:
            with gate.lock:
                if message.WhichOneof("event") == "attached":
                    first.append(message.attached)
                else:
                    ended.append("the daemon did not begin with `attached`")
                gate.changed.notify_all()

        def on_end(reason: str) -> None:
            with gate.lock:
                ended.append(reason)
                gate.changed.notify_all()
            for link in links:
                gate.lose(link, reason)

        request = self._describe(stub)
        self._stats.add("rpc_attach")
        stream = EventStream(
            stub.Attach,
            request,
            on_first=on_first,
            on_event=lambda message: self._event(links[0], message),
            on_end=on_end,
        )
        stream.start()
        try:
            with gate.lock:
                gate.changed.wait_for(
                    lambda: first or ended or gate.closing, self._options.attach_deadline_ms / 1000
                )
            if not first:
                raise CannotAttach(ended[0] if ended else "the daemon did not answer Attach in time")
            link = self._open_link(stub, first[0])
            links.append(link)
            self._announce(link)
            stream.release()
            Chores(gate, link, self._sender, self._options, self._stats).run()
        finally:
            for link in links:
                gate.lose(link, "closed")
            stream.close()
            for link in links:
                self._detached(link)

    def _describe(self, stub: offload_pb2_grpc.OffloadServiceStub) -> offload_pb2.AttachRequest:
        """Ask where the pool is, take a lock file there and return the request to attach with."""
        self._stats.add("rpc_describe")
        try:
            described = stub.Describe(
                offload_pb2.DescribeRequest(), timeout=self._options.prepare_deadline_ms / 1000
            )
        except (grpc.RpcError, ValueError) as error:
            failure = read_failure(error)
            if failure.boot_id:
                raise CannotAttach(f"the daemon refuses: {failure.reason}: {failure.details}") from None
            # grpc's details change from attempt to attempt, and each would be a new line in the log.
            logger.debug("Describe failed: %s", failure.details)
            advice = "start one: kvtier serve"
            if not self._address.startswith("unix:"):
                advice += ", or look into its log whether it refuses this client's certificate"
            raise CannotAttach(f"no daemon answers at {self._address} ({failure.reason}); {advice}") from None
        directory = Path(described.pool.directory)
        try:
            lock_file = self._place.take_lock(directory)
        except (PoolError, OSError) as error:
            raise CannotAttach(
                f"no lock file can be made in the daemon's pool directory {directory} ({error}); "
                "engine and daemon need the same user and, in containers, the same mount"
            ) from None
        request = offload_pb2.AttachRequest()
        request.CopyFrom(self._request)
        request.lock_file = lock_file
        request.previous_session = self._previous_session
        request.epoch = self._weights.epoch
        request.mapped_pool_id = self._place.mapped_pool_id
        return request

    def _open_link(self, stub: offload_pb2_grpc.OffloadServiceStub, attached: offload_pb2.Attached) -> Link:
        """Map the pool and bring the epoch up to date; the session is usable then. Raises CannotAttach."""
        self._previous_session = attached.session_id
        pool = None
        if self._maps_pool:
            path = Path(attached.pool.directory) / attached.pool.path
            try:
                pool = self._place.map_pool(path, attached.pool.pool_id)
            except (PoolError, OSError) as error:
                raise CannotAttach(
                    f"the pool {path} cannot be mapped ({error}); engine and daemon need the same user and, "
                    "in containers, the same mount"
                ) from None
        link = Link(session_info(attached, pool), stub, self._options, self._stats)
        self._restore_weights(link)
        return link

    def _restore_weights(self, link: Link) -> None:
        if not self._weights.restore(link, self._options.attach_deadline_ms / 1000):
            raise CannotAttach("the epoch of the engine's new weights could not be set")

    def _announce(self, link: Link) -> None:
        """Let the engine use the session. Raises CannotAttach."""
        self._stats.add("attaches")
        self._logged_reason = ""
        logger.info("attached to %s as session %s", self._address, link.session_id)
        gate = self._gate
        while not gate.install(link):
            # The weights have changed since their epoch was restored, when there was no session to tell.
            self._restore_weights(link)
        gate.deliver(link, self._gate.listener.on_attached, link.info)
        self._place.retire()
        with gate.lock:
            link.announced = True
            gate.changed.notify_all()

    def _detached(self, link: Link) -> None:
        self._stats.add("detaches")
        reason = "closed" if self._gate.closing else self._gate.away_reason
        self._drained = False
        self._gate.deliver_detached(self._gate.listener.on_detached, reason)
        if not self._gate.closing:
            self._say_away(reason)

    def _drain(self) -> None:
        """Make sure that no copy of an earlier session runs. Raises CannotAttach while one does."""
        if self._drained:
            return
        if not self._gate.listener.drain(self._options.drain_timeout_ms / 1000):
            self._stats.add("drain_waits")
            raise CannotAttach("copies of the last session are still running")
        self._drained = True

    def _event(self, link: Link, message: offload_pb2.AttachResponse) -> None:
        """Take an event, on the reading thread."""
        gate, listener = self._gate, self._gate.listener
        match message.WhichOneof("event"):
            case "resolved":
                event = message.resolved
                gate.deliver(
                    link,
                    listener.on_resolved,
                    event.lease_id,
                    event.key,
                    int(event.status),
                    event.slot_id,
                    event.generation,
                )
            case "credits_wanted":
                gate.deliver(link, listener.on_credits_wanted, message.credits_wanted.count)
            case "draining":
                gate.deliver(link, listener.on_draining, message.draining.deadline_ms)
            case "workers_changed":
                missing_ranks = tuple(message.workers_changed.missing_ranks)
                with gate.lock:
                    link.set_missing_ranks(missing_ranks)
                    gate.changed.notify_all()
                gate.deliver(link, listener.on_workers_changed, missing_ranks)
            case "ended":
                gate.lose(link, _ENDED + message.ended.reason)
            case other:
                logger.debug("an event of a newer daemon was passed over: %s", other)

    def _say_away(self, reason: str) -> None:
        """Tell why there is no session: to who asks, and once to the log."""
        with self._gate.lock:
            self._gate.away_reason = reason
        if reason != self._logged_reason:
            self._logged_reason = reason
            level = logging.INFO if reason in _USUAL_ENDS else logging.WARNING
            logger.log(level, "not attached, everything is a miss: %s", reason)

    def _pause(self, seconds: float) -> None:
        with self._gate.lock:
            self._gate.changed.wait_for(lambda: self._gate.closing, seconds)
