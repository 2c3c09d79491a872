"""EventsService: watchers of what happens to chunks, and snapshots of where they are.

Owns the streams and their pace. A watcher is a place in the core's log and nothing more: its next message is
made when its stream takes it, so who does not read costs what one message costs, and finds out later what it
has missed. The core knows of no watcher and waits for none; all of this is on the loop's thread, in pieces.

    log    1 2 3 4 5 6 7 8 9 ...
               |       |   `-- the next one: where watchers that keep up stand
               |       `------ a slow watcher
               `-------------- the oldest that is kept; who stands before it is told `overflow`
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

import grpc

from kvtier.v1 import events_pb2 as pb
from kvtier_ops.namespace import SpaceName
from kvtier_server.core.index_walk import IndexWalk
from kvtier_server.core.refused import BadRequest, Draining, Refused
from kvtier_server.core.tiering import Core
from kvtier_server.event_wire import Batches, max_keys_of_a_message, snapshot_rows
from kvtier_server.metrics import Metrics
from kvtier_server.rpc import CODES, CallScope, RequestT, ServicerContext

SERVICE = "kvtier.v1.EventsService"
WATCH, SNAPSHOT = "EventsService/Watch", "EventsService/Snapshot"

GATHER_S = 0.05
"""Events are gathered so long: a message costs as much as a hundred keys."""

HEARTBEAT_S = 1.0
"""Without news a watcher hears so often that there are none, and from where it may continue."""

PAUSE_S = 0.001
"""After each stream that is written to, for the calls of engines: a message takes up to 0.4 ms."""

REST_S = 0.002
"""A slice of a snapshot takes 0.4 ms; after each of them all snapshots together rest."""

NAMESPACE = re.compile("[0-9a-f]{32}")


class EventsGone(Refused):
    """The events that are asked for are not kept any more, or were another daemon's."""

    reason = "EVENTS_GONE"


class TooManyWatchers(Refused):
    """As many streams of events are open as the daemon takes."""

    reason = "LIMIT_WATCHERS"


class _Watcher:
    """One Watch stream. `position`: the first sequence it has not been told of."""

    def __init__(self, position: int, namespace: str) -> None:
        self.position = position
        self.namespace = namespace
        self.told_at = float("-inf")
        self.news = asyncio.Event()


class EventStreams:
    """The open streams. All methods run on the loop's thread."""

    def __init__(
        self, core: Core, scope: CallScope, metrics: Metrics, max_streams: int, max_message_bytes: int
    ) -> None:
        self._core = core
        self._log = core.books.events
        self._scope = scope
        self._metrics = metrics
        self._max_streams = max_streams
        self._slice_items = max_keys_of_a_message(max_message_bytes)
        self._batches = Batches(self._log, scope.boot_id, max_message_bytes)
        self._watchers: set[_Watcher] = set()
        self._pacer: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        """Held by whoever has much to send, for one piece of it and the rest after it."""
        self._is_stopping = False
        self.num_open = 0
        """Streams of both kinds."""
        self.num_overflows = 0
        """How often a watcher was told that it has missed something."""

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
        """Method handlers by RPC name."""
        return {
            "Watch": self._handler(WATCH, pb.WatchRequest, self._watch),
            "Snapshot": self._handler(SNAPSHOT, pb.SnapshotRequest, self._snapshot),
        }

    def _handler(
        self,
        method: str,
        request_type: type[RequestT],
        stream: Callable[[RequestT, ServicerContext], Awaitable[None]],
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Make a method handler that runs one stream to its end, which is OK or a refusal.

        Counted by how it ended, without its time.
        """
        parse = self._scope.parser(method, request_type)

        async def serve(raw: bytes, context: ServicerContext) -> None:
            self.num_open += 1
            try:
                self._check_may_open()
                going = stream(parse(raw), context)
                raw = b""  # a stream is long
                await going
            except Exception as error:  # noqa: BLE001 every error becomes a status
                if context.done():
                    return  # its client is gone, and nobody hears the status
                refused = self._scope.as_refused(method, error)
            else:
                self._metrics.observe_rpc(method, "OK", 0.0)
                return
            finally:
                raw = b""  # a refusal must not hold it: see rpc.py's first lines
                self.num_open -= 1
            self._metrics.observe_rpc(method, CODES[refused.reason].name, 0.0)
            await self._scope.abort(context, refused)

        return grpc.unary_stream_rpc_method_handler(serve)

    def end_all(self) -> None:
        """End every stream as one of a daemon that stops, and begin none any more."""
        self._is_stopping = True
        for watcher in self._watchers:
            watcher.news.set()

    def _check_may_open(self) -> None:
        self._check_goes_on()
        if self.num_open > self._max_streams:
            raise TooManyWatchers(
                f"{self._max_streams} watchers and snapshots are served already, the limit "
                "(limits.watchers); close one, or raise it"
            )

    def _check_goes_on(self) -> None:
        if self._is_stopping:
            raise Draining("the daemon is stopping; watch again when it is back, and take a new snapshot")

    # Watch

    async def _watch(self, request: pb.WatchRequest, context: ServicerContext) -> None:
        """Tell a watcher what happens until its client is gone, or the daemon stops."""
        _check_namespace(request.namespace)
        watcher = _Watcher(self._first_sequence(request), request.namespace)
        self._watchers.add(watcher)
        if self._pacer is None:
            self._pacer = asyncio.create_task(self._pace())
        try:
            while True:
                self._check_goes_on()
                message = self._next_message(watcher)
                if message is None and watcher.position == self._log.next_sequence:
                    watcher.news.clear()
                    await watcher.news.wait()
                    continue
                if message is not None:
                    await context.write(message)
                if watcher.position < self._log.next_sequence:
                    async with self._turn:  # many that are behind must not fill the loop
                        await asyncio.sleep(PAUSE_S)
        finally:
            self._watchers.discard(watcher)

    def _first_sequence(self, request: pb.WatchRequest) -> int:
        first, boot_id = request.from_sequence, request.boot_id
        if first and not boot_id:
            raise BadRequest("boot_id", "missing; a sequence number belongs to a boot")
        if boot_id and boot_id != self._scope.boot_id:
            raise EventsGone(
                f"boot {boot_id[:64]!r} is gone with its events, this is boot {self._scope.boot_id}; "
                "take a new snapshot"
            )
        next_sequence = self._log.next_sequence
        if not first:
            return next_sequence
        if first > next_sequence:
            raise BadRequest("from_sequence", f"{first} was never reached; the next event is {next_sequence}")
        if not self._log.keeps(first):
            raise EventsGone(
                f"event {first} is not kept any more, the oldest one is {self._log.oldest}; take a new "
                "snapshot",
                oldest_sequence=str(self._log.oldest),
                next_sequence=str(next_sequence),
            )
        return first

    def _next_message(self, watcher: _Watcher) -> bytes | None:
        """Move a watcher on, and return what it is to be told of that; None = nothing now."""
        now = time.monotonic()
        message = b""
        next_sequence = self._log.next_sequence
        if not self._log.keeps(watcher.position):
            self.num_overflows += 1
            watcher.position = next_sequence
            message = self._batches.overflow(next_sequence)
        elif watcher.position < next_sequence:
            batch = self._batches.get(watcher.position, watcher.namespace)
            watcher.position, message = batch.end, batch.wire
        if not message:
            if now - watcher.told_at < HEARTBEAT_S:
                return None
            message = self._batches.heartbeat(watcher.position)
        watcher.told_at = now
        return message

    async def _pace(self) -> None:
        """Wake the watchers for whom there is news, one after the other, as long as there are any."""
        while self._watchers:
            await asyncio.sleep(GATHER_S)
            next_sequence = self._log.next_sequence
            beat_before = time.monotonic() - HEARTBEAT_S
            for watcher in list(self._watchers):
                if watcher.position >= next_sequence and watcher.told_at > beat_before:
                    continue
                watcher.news.set()
                await asyncio.sleep(PAUSE_S)
        self._pacer = None

    # Snapshot

    async def _snapshot(self, request: pb.SnapshotRequest, context: ServicerContext) -> None:
        """Send the index in slices; between two of them, and while the reader takes its time, all goes on."""
        wanted = request.namespace
        _check_namespace(wanted)

        def covers(space: SpaceName) -> bool:
            return wanted in ("", space.namespace)

        walk = IndexWalk(self._core.books, self._core.below, covers, self._slice_items)
        steps = walk.steps()
        while True:
            async with self._turn:
                rows = next(steps, None)
                message = snapshot_rows(self._scope.boot_id, rows) if rows else b""
                await asyncio.sleep(REST_S)
            self._check_goes_on()
            if walk.is_lost:
                raise EventsGone(
                    "more has happened during the snapshot than is kept; ask again, read faster, or raise "
                    "limits.events and limits.event_keys"
                )
            if rows is None:
                break
            if message:
                await context.write(message)
        last = pb.SnapshotResponse(
            boot_id=self._scope.boot_id,
            next_sequence=walk.next_sequence,
            exact_sequence=walk.exact_sequence,
            unlisted_tiers=walk.unlisted_tiers,
        )
        await context.write(last.SerializeToString())


def _check_namespace(namespace: str) -> None:
    if namespace and not NAMESPACE.fullmatch(namespace):
        raise BadRequest(
            "namespace",
            f"{namespace[:64]!r} is no digest; write all 32 hex digits, or nothing for all of them",
        )
