"""The scope every call runs in: parsing, refusals to status codes, limits, timing.

Owns the table from reasons to gRPC codes. Handlers get raw bytes and are parsed in here, so that malformed
bytes are INVALID_ARGUMENT with metadata and not UNKNOWN without; nothing that a handler raises leaves as a
traceback.

A refused call must leave no memory behind. What grpc raises to end it makes a ring: the call's state, that
error, its traceback, the frames it went through, the context, the state. Only the collector of cyclic garbage
ends it, and that comes after tens of thousands of allocations, or never. So whatever is large has to be out
of these frames by then: each drops its request, and `as_refused` the frames below it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn, TypeVar

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from kvtier_server.core.refused import BadRequest, Refused
from kvtier_server.metrics import Metrics
from kvtier_server.tracing import Tracing, call_belongs_to

DOMAIN = "kvtier"

CODES: dict[str, grpc.StatusCode] = {
    "BAD_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "GEOMETRY_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
    "NOT_RESIDENT": grpc.StatusCode.FAILED_PRECONDITION,
    "WORKERS_MISSING": grpc.StatusCode.FAILED_PRECONDITION,
    "CUDA_IPC_IMPORT": grpc.StatusCode.FAILED_PRECONDITION,
    "CANNOT_CLEAR": grpc.StatusCode.FAILED_PRECONDITION,
    "CANNOT_EVICT": grpc.StatusCode.FAILED_PRECONDITION,
    "PROTOCOL_VERSION": grpc.StatusCode.FAILED_PRECONDITION,
    "SESSION_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "LEASE_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "EVENTS_GONE": grpc.StatusCode.OUT_OF_RANGE,
    "RANK_TAKEN": grpc.StatusCode.ALREADY_EXISTS,
    "POOL_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "QUOTA": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "INFLIGHT": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "LIMIT_ENGINES": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "LIMIT_SESSIONS": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "LIMIT_WATCHERS": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "LIMIT_TRANSFER_MEMORIES": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "LIMIT_TRANSFER_DEVICES": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "LIMIT_UNARY_CALLS": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "CERTIFICATE_UNKNOWN": grpc.StatusCode.PERMISSION_DENIED,
    "ROLE_MISSING": grpc.StatusCode.PERMISSION_DENIED,
    "TENANT_MISMATCH": grpc.StatusCode.PERMISSION_DENIED,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "UNIMPLEMENTED": grpc.StatusCode.UNIMPLEMENTED,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}
"""Reason -> status code; the contract with clients."""

_RETRYABLE = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
RETRY_DELAY_S = 1
"""Told with backpressure: about the time in which copies end and slots come free."""

log = structlog.get_logger("kvtier.rpc")

RequestT = TypeVar("RequestT", bound=Message)
ServicerContext = grpc.aio.ServicerContext[bytes, bytes]


class TooManyCalls(Refused):
    """As many unary calls are in progress as the daemon takes at once."""

    reason = "LIMIT_UNARY_CALLS"


class Unimplemented(Refused):
    """The wire contract has this call, this daemon does not."""

    reason = "UNIMPLEMENTED"


class CallScope:
    """Wraps handlers. `after_call` runs after each, on the loop's thread, whatever became of the call."""

    def __init__(
        self,
        boot_id: str,
        max_unary_calls: int,
        metrics: Metrics,
        after_call: Callable[[], None],
        max_bytes: Mapping[str, int],
        tracing: Tracing | None = None,
    ) -> None:
        """`max_bytes`: by method, the longest message (`message_bytes.py`)."""
        self.boot_id = boot_id
        self.max_unary_calls = max_unary_calls
        """Calls at once; more are refused."""
        self._metrics = metrics
        self._after_call = after_call
        self._max_bytes = max_bytes
        self._tracing = tracing
        self._in_progress = 0

    def parser(self, method: str, request_type: type[RequestT]) -> Callable[[bytes], RequestT]:
        """Make the function that reads a method's messages. It raises BadRequest, DecodeError."""
        max_bytes = self._max_bytes[method]
        from_string = request_type.FromString

        def parse(raw: bytes) -> RequestT:
            if len(raw) > max_bytes:
                raise BadRequest("request", f"{len(raw)} bytes; at most {max_bytes} are allowed in this call")
            return from_string(raw)

        return parse

    def unary(
        self,
        method: str,
        request_type: type[RequestT],
        handler: Callable[[RequestT], Message | Awaitable[Message]],
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Make a method handler of a function from message to message, called on the loop's thread.

        A handler of calls that can be long returns an awaitable, and lets others in between its slices.
        """
        self._metrics.expect_rpc(method)
        spanned = self._tracing.around(method, handler) if self._tracing is not None else None
        handler = spanned or handler
        parse = self.parser(method, request_type)
        observe = self._metrics.observe_rpc
        clock = time.perf_counter

        async def call(raw: bytes, context: ServicerContext) -> bytes:
            if spanned is not None:
                call_belongs_to(context.invocation_metadata())
            start = clock()
            self._in_progress += 1
            try:
                if self._in_progress > self.max_unary_calls:
                    raise TooManyCalls(
                        f"{self.max_unary_calls} calls are in progress, the limit (limits.unary_calls)"
                    )
                answer = handler(parse(raw))
                message = answer if isinstance(answer, Message) else await answer
                reply = message.SerializeToString()
            except Exception as error:  # noqa: BLE001 every error becomes a status
                refused = self.as_refused(method, error)
                observe(method, CODES[refused.reason].name, clock() - start)
                await self.abort(context, refused)
            else:
                observe(method, "OK", clock() - start)
                return reply
            finally:
                raw = b""  # see the module's first lines
                self._in_progress -= 1
                self._after_call()

        return grpc.unary_unary_rpc_method_handler(call)

    def unimplemented(self, method: str, what: str) -> Callable[[object, ServicerContext], Awaitable[bytes]]:
        """Make the behaviour of a call that this daemon does not have, of whatever arity."""

        async def call(request: object, context: ServicerContext) -> bytes:
            del request
            self._metrics.observe_rpc(method, "UNIMPLEMENTED", 0.0)
            await self.abort(context, Unimplemented(f"{what} is not part of this version of kvtier"))

        return call

    def as_refused(self, method: str, error: Exception) -> Refused:
        """Turn what a handler raised into a refusal; a bug is logged under an id that the caller gets.

        Takes the error's frames and causes from it: they hold the message that was refused.
        """
        refused = self._refused(method, error)
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return refused

    def _refused(self, method: str, error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, DecodeError):
            return BadRequest("request", "its bytes are no valid message of this call")
        error_id = secrets.token_hex(4)
        log.error("call_failed", method=method, error_id=error_id, exc_info=error)
        return _Internal(f"internal error {error_id}; the daemon's log has it under this id")

    def observe_refused(self, method: str, refused: Refused) -> None:
        """Count a call that was refused before its handler ran."""
        self._metrics.observe_rpc(method, CODES[refused.reason].name, 0.0)

    async def abort(self, context: ServicerContext, refused: Refused) -> NoReturn:
        """End the call with the refusal's status, its reason in the trailers."""
        code = CODES[refused.reason]
        status = Status(code=code.value[0], message=str(refused))
        info = ErrorInfo(reason=refused.reason, domain=DOMAIN, metadata=refused.metadata)
        details: list[Message] = [info]
        if code in _RETRYABLE:
            details.append(RetryInfo(retry_delay=Duration(seconds=RETRY_DELAY_S)))
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        await context.abort(
            code,
            str(refused),
            (
                ("kvtier-reason", refused.reason),
                ("kvtier-boot-id", self.boot_id),
                ("grpc-status-details-bin", status.SerializeToString()),
            ),
        )


class _Internal(Refused):
    reason = "INTERNAL"
