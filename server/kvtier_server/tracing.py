"""Spans of what engines wait for: lookup, load, store, in the trace of the request that caused them.

Owns their names and attributes - numbers, times, digests of names, and no key, prompt or parameter - and
which trace a report of copies belongs to: it comes later, and over another session. Off, OpenTelemetry is not
even imported.

    kvtier.lookup          Lookup
    kvtier.prepare_load    PrepareLoad, of an engine that asks again
    kvtier.prepare_store   PrepareStore
    kvtier.load, .store    one rank's copies, as its report in Complete tells them
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from kvtier.v1 import offload_pb2 as pb
from kvtier_server.core.instances import Session
from kvtier_server.core.refused import Refused
from kvtier_server.socket_lock import StartError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span
    from prometheus_client import CollectorRegistry

    from kvtier_server.config_otel import OtelConfig
    from kvtier_server.span_export import SpanQueue

HEADER = "traceparent"
MAX_REMEMBERED = 65_536
"""Requests, leases and slots whose trace is known, the oldest forgotten first."""
CLOSE_S = 2.0
"""What sending the last spans may take while the daemon stops."""
MAX_COPY_S = 3600.0
"""Longest copy that is believed, as for the metrics."""

_TRACE_PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

Attributes = dict[str, str | int | float]
Handler = Callable[[Any], "Message | Awaitable[Message]"]
Describe = Callable[[Any, Any, Session | None, "Context"], Attributes]
Metadata = Iterable[tuple[str, str | bytes]]
T = TypeVar("T")

_parent: ContextVar[str] = ContextVar("kvtier_trace_parent", default="")


def call_belongs_to(metadata: Metadata | None) -> None:
    """Note the trace of the call that this task answers."""
    for name, value in metadata or ():
        if name == HEADER and isinstance(value, str):
            _parent.set(value)


class Tracing:
    """Makes spans. On the loop's thread, `close` excepted."""

    def __init__(self, config: OtelConfig, registry: CollectorRegistry, resource: Mapping[str, str]) -> None:
        """Begin. Raises StartError if OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise StartError(
                f"otel.endpoint needs OpenTelemetry ({error}); run in kvtier's directory: "
                "pip install '.[server,otel]'",
                2,
            ) from error
        from kvtier_server.span_export import SpanQueue

        exporter = OTLPSpanExporter(
            endpoint=config.endpoint,
            insecure=config.endpoint.startswith("http://"),
            credentials=_credentials(config),
            timeout=config.timeout / 1e9,
        )
        self._queue: SpanQueue = SpanQueue(exporter, config.max_queued, registry)
        # Without the SDK's hook at the interpreter's exit: the daemon closes what it opens.
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.share)),
            resource=Resource.create(dict(resource)),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._queue)  # type: ignore[arg-type]  # by shape: its base is the SDK's
        self._tracer = provider.get_tracer("kvtier")
        self._session_of: Callable[[str], Session | None] = lambda session_id: None
        self._by_request: _Remembered[tuple[int, str]] = _Remembered()
        self._by_lease: _Remembered[tuple[int, int]] = _Remembered()
        self._by_slot: _Remembered[tuple[int, int]] = _Remembered()

    def follow(self, session_of: Callable[[str], Session | None]) -> None:
        """Learn where sessions are found; before the first call."""
        self._session_of = session_of

    def close(self) -> None:
        """Send what is left."""
        self._queue.close(CLOSE_S)

    def around(self, method: str, handler: Handler) -> Handler | None:
        """Return the handler with a span around it; None where no span is made of a method."""
        spanned: dict[str, Describe] = {
            "OffloadService/Lookup": self._lookup,
            "OffloadService/PrepareLoad": self._prepare_load,
            "OffloadService/PrepareStore": self._prepare_store,
        }
        make = spanned.get(method)
        if make is not None:
            return self._spanned(f"kvtier.{_snake(method.rpartition('/')[2])}", handler, make)
        return self._complete(handler) if method == "OffloadService/Complete" else None

    def _spanned(self, name: str, handler: Handler, describe: Describe) -> Handler:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        async def call(message: Any) -> Message:
            span = self._tracer.start_span(name, context=_context(_parent.get()), kind=SpanKind.SERVER)
            if not span.is_recording():
                return await _answer(handler, message)
            try:
                session = self._session_of(message.session_id)
                span.set_attribute("kvtier.keys", len(message.keys))
                span.set_attributes(_of_session(session))
                reply = await _answer(handler, message)
                span.set_attributes(describe(message, reply, session, set_span_in_context(span)))
            except Exception as error:
                reason = error.reason if isinstance(error, Refused) else "INTERNAL"
                span.set_attribute("kvtier.reason", reason)
                span.set_status(Status(StatusCode.ERROR))  # the reason says it; a message may say too much
                raise
            else:
                return reply
            finally:
                span.end()

        return call

    def _lookup(
        self, message: pb.LookupRequest, reply: pb.LookupResponse, session: Session | None, context: Context
    ) -> Attributes:
        if session is not None:
            serial = session.instance.serial
            self._by_request.put((serial, message.context.request_id), context)
            if message.lease_id:
                self._by_lease.put((serial, message.lease_id), context)
        statuses = bytes(reply.statuses)
        return {
            "kvtier.hits": statuses.count(pb.LOOKUP_STATUS_HIT)
            + statuses.count(pb.LOOKUP_STATUS_HIT_UNLEASED),
            "kvtier.pending": statuses.count(pb.LOOKUP_STATUS_PENDING),
            "kvtier.leased": sum(run.count for run in reply.leased),
            "kvtier.tier": "primary",
        }

    def _prepare_load(
        self,
        message: pb.PrepareLoadRequest,
        reply: pb.PrepareLoadResponse,
        session: Session | None,
        context: Context,
    ) -> Attributes:
        if session is not None:
            self._by_lease.put((session.instance.serial, message.lease_id), context)
        return {"kvtier.leased": len(reply.slot_ids), "kvtier.tier": "primary"}

    def _prepare_store(
        self,
        message: pb.PrepareStoreRequest,
        reply: pb.PrepareStoreResponse,
        session: Session | None,
        context: Context,
    ) -> Attributes:
        for slot in zip(reply.slot_ids, reply.generations, strict=True):
            self._by_slot.put(slot, context)
        return {"kvtier.granted": len(reply.slot_ids), "kvtier.evicted": len(reply.evicted_keys)}

    def _complete(self, handler: Handler) -> Handler:
        async def call(message: pb.CompleteRequest) -> Message:
            reply = await _answer(handler, message)
            session = self._session_of(message.session_id)
            if session is not None:
                self._copies(message, session)
            return reply

        return call

    def _copies(self, message: pb.CompleteRequest, session: Session) -> None:
        """Make spans of copies that are over; their time is the rank's word."""
        serial = session.instance.serial
        for announced in message.announcements:
            context = self._by_request.get((serial, announced.request_id))
            if context is not None:
                for slot in zip(announced.slot_ids, announced.generations, strict=True):
                    self._by_slot.put(slot, context)
        for start in message.load_starts:
            context = self._by_lease.get((serial, start.lookup_lease_id))
            if context is not None:
                self._by_lease.put((serial, start.load_lease_id), context)
        for loaded in message.load_reports:
            context = self._by_lease.get((serial, loaded.lease_id))
            failed = len(loaded.torn_slot_ids) + len(loaded.mismatches)
            told: Attributes = {"kvtier.bytes": loaded.bytes, "kvtier.failed": failed}
            self._copied("kvtier.load", session, loaded.seconds, context, told)
        for stored in message.store_reports:
            slots: Sequence[tuple[int, int]] = list(
                zip(stored.slot_ids[:1], stored.generations[:1], strict=False)
            )
            context = self._by_slot.get(slots[0]) if slots else None
            told = {
                "kvtier.bytes": stored.bytes,
                "kvtier.failed": len(stored.failed),
                "kvtier.keys": len(stored.slot_ids),
            }
            self._copied("kvtier.store", session, stored.seconds, context, told)

    def _copied(
        self, name: str, session: Session, seconds: float, context: Context | None, told: Attributes
    ) -> None:
        end_ns = time.time_ns()
        took_s = seconds if 0 < seconds <= MAX_COPY_S else 0.0
        span: Span = self._tracer.start_span(
            name, context=context or _context(""), start_time=end_ns - int(took_s * 1e9)
        )
        if span.is_recording():
            span.set_attributes({**told, **_of_session(session), "kvtier.rank": session.rank})
        span.end(end_ns)


class _Remembered(OrderedDict[T, "Context"]):
    """Traces by what they will be asked for again, bounded."""

    def put(self, name: T, context: Context) -> None:
        self[name] = context
        self.move_to_end(name)
        if len(self) > MAX_REMEMBERED:
            self.popitem(last=False)


async def _answer(handler: Handler, message: object) -> Message:
    answer = handler(message)
    return answer if isinstance(answer, Message) else await answer


def _context(parent: str) -> Context:
    """Return the context of a caller's span; an empty one where there is none, or none that can be read."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    found = _TRACE_PARENT.fullmatch(parent)
    if found is None:
        return Context()
    trace_id, span_id, flags = (int(text, 16) for text in found.groups())
    if not trace_id or not span_id:
        return Context()
    caller = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return set_span_in_context(NonRecordingSpan(caller), Context())


def _of_session(session: Session | None) -> Attributes:
    if session is None:
        return {}
    tenant = session.instance.tenant
    return {
        "kvtier.tenant": hashlib.blake2b(tenant.encode(), digest_size=4).hexdigest() if tenant else "",
        "kvtier.namespace": session.instance.namespace.digest[:12],
        "kvtier.engine": session.instance.engine_id,
    }


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _credentials(config: OtelConfig) -> Any:
    if not config.endpoint.startswith("https://"):
        return None
    import grpc

    try:
        authorities = Path(config.ca_file).read_bytes() if config.ca_file else None
        return grpc.ssl_channel_credentials(authorities)
    except OSError as error:
        raise StartError(f"otel.ca_file {config.ca_file} cannot be read: {error.strerror}", 2) from error
