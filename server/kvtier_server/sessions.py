"""Attach: one stream per session, and the notices that go down it.

Owns the streams' queues. A session lives exactly as long as its stream: when the stream ends, from whichever
side, the core is told. A reader that does not read is ended, never waited for.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import grpc
import structlog

from kvtier.v1 import offload_pb2 as pb
from kvtier_server.callers import MAX_SAID, current_caller
from kvtier_server.core.books import Notice
from kvtier_server.core.instances import Session
from kvtier_server.core.tiering import Core
from kvtier_server.facts import PROTOCOL_MINOR, applicant_of, facts_of
from kvtier_server.metrics import Metrics
from kvtier_server.rpc import CODES, CallScope, ServicerContext

log = structlog.get_logger("kvtier.sessions")

METHOD = "OffloadService/Attach"


class Sessions:
    """The open Attach streams. All methods run on the loop's thread."""

    def __init__(
        self,
        core: Core,
        scope: CallScope,
        metrics: Metrics,
        pool_info: Callable[[], pb.PoolInfo],
        limits_of: Callable[[Session], pb.Limits],
        clock: Callable[[], int],
        max_events: int,
        on_spaces_changed: Callable[[], None],
        drained: Callable[[str], Awaitable[None]],
    ) -> None:
        """`drained` waits until nothing is copied for the process with that lock file, or refuses."""
        self._core = core
        self._scope = scope
        self._metrics = metrics
        self._pool_info = pool_info
        self._limits_of = limits_of
        self._clock = clock
        self.max_events = max_events
        """Unread events of one session; one that has more is ended."""
        self._on_spaces_changed = on_spaces_changed
        self._drained = drained
        self._parse = scope.parser(METHOD, pb.AttachRequest)
        self._queues: dict[str, asyncio.Queue[pb.AttachResponse | None]] = {}

    def handler(self) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Method handler of Attach."""
        self._metrics.expect_rpc(METHOD)
        return grpc.unary_stream_rpc_method_handler(self._attach)

    async def _attach(self, raw: bytes, context: ServicerContext) -> None:
        session_id = f"{self._scope.boot_id}-{secrets.token_hex(8)}"
        try:
            first = await self._first(session_id, self._parse(raw), context)
        except Exception as error:  # noqa: BLE001 every error becomes a status
            refused = self._scope.as_refused(METHOD, error)
            self._metrics.observe_rpc(METHOD, CODES[refused.reason].name, 0.0)
            log.info("attach_refused", reason=refused.reason, why=str(refused))
            await self._scope.abort(context, refused)
        finally:
            raw = b""  # a session is long, and a refusal must not hold it: see rpc.py's first lines
        if first is None:
            return
        queue: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue()
        self._queues[session_id] = queue
        self._metrics.observe_rpc(METHOD, "OK", 0.0)
        try:
            self.dispatch()  # attaching told others, and ended a session that this one replaces
            await context.write(first.SerializeToString())
            while (event := await queue.get()) is not None:
                await context.write(event.SerializeToString())
        finally:
            # Also when the client is gone (the task is cancelled): this is where its death is noticed.
            self._queues.pop(session_id, None)
            self._core.end_session(session_id, "CLOSED")
            self.dispatch()
            log.info("session_closed", session=session_id)

    async def _first(
        self, session_id: str, request: pb.AttachRequest, context: ServicerContext
    ) -> pb.AttachResponse | None:
        """Open a session, and return its stream's first message; None if its client is gone."""
        await self._drained(request.lock_file)
        return None if context.cancelled() else self._open(session_id, request)

    def _open(self, session_id: str, request: pb.AttachRequest) -> pb.AttachResponse:
        request.tenant = current_caller().tenant_to_attach_as(request.tenant)
        applicant = applicant_of(request)
        session = self._core.attach(session_id, applicant, facts_of(request), self._clock())
        try:
            self._on_spaces_changed()
            return self._opened(session, request.protocol_minor)
        except BaseException:
            self._core.end_session(session_id, "CLOSED")  # or a session without a stream would stay
            raise

    def _opened(self, session: Session, protocol_minor: int) -> pb.AttachResponse:
        instance = session.instance
        log.info(
            "session_opened",
            session=session.id,
            engine=instance.engine_id,
            role=str(session.role),
            rank=session.rank,
            namespace=instance.namespace.digest[:12],
            model=instance.namespace.facts.model[-MAX_SAID:],  # paths differ at their ends
        )
        return pb.AttachResponse(
            attached=pb.Attached(
                session_id=session.id,
                boot_id=self._scope.boot_id,
                pool=self._pool_info(),
                slot_bytes=[size_class.slot_bytes for size_class in instance.namespace.classes],
                limits=self._limits_of(session),
                protocol_minor=min(PROTOCOL_MINOR, protocol_minor),
                epoch=instance.space.name.epoch,
                missing_ranks=instance.missing_ranks(),
                namespace_digest=instance.namespace.digest,
            )
        )

    def dispatch(self) -> None:
        """Hand the core's notices to the streams they are for."""
        notices = self._core.books.notices
        while notices:
            notice = notices.popleft()
            queue = self._queues.get(notice.session_id)
            if queue is None:
                continue
            if queue.qsize() >= self.max_events:
                log.warning("session_ended", session=notice.session_id, reason="SLOW_READER")
                del self._queues[notice.session_id]
                queue.put_nowait(None)
                self._core.end_session(notice.session_id, "SLOW_READER")
                continue
            queue.put_nowait(_event(notice))
            if notice.kind == "ended":
                queue.put_nowait(None)

    def tell_all(self, event: pb.AttachResponse) -> None:
        """Put one event on every stream."""
        for queue in self._queues.values():
            queue.put_nowait(event)

    def end_all(self) -> None:
        """Close every stream after what is queued."""
        for queue in self._queues.values():
            queue.put_nowait(None)


def _event(notice: Notice) -> pb.AttachResponse:
    match notice.kind:
        case "resolved":
            return pb.AttachResponse(
                resolved=pb.Resolved(
                    lease_id=notice.lease_id,
                    key=notice.key,
                    status=pb.LookupStatus.ValueType(notice.status),
                    slot_id=notice.slot_id,
                    generation=notice.generation,
                )
            )
        case "workers_changed":
            return pb.AttachResponse(workers_changed=pb.WorkersChanged(missing_ranks=notice.ranks))
        case "credits_wanted":
            return pb.AttachResponse(credits_wanted=pb.CreditsWanted(count=notice.count))
        case "ended":
            return pb.AttachResponse(ended=pb.SessionEnded(reason=notice.reason))
    raise AssertionError(f"no event for notice {notice.kind!r}")
