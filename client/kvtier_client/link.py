"""One open session, with everything that is void when it ends.

Owns the session's leases, its queue for Complete, and which requests have told their parameters. A new
session starts with a new link: nothing is carried over, so nothing of an old one can be taken for valid.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from kvtier.v1 import offload_pb2, offload_pb2_grpc
from kvtier_client.answers import SessionInfo
from kvtier_client.context import ReqContext
from kvtier_client.flush import CompletionBuffer
from kvtier_client.leases import LeaseBook
from kvtier_client.options import ClientOptions
from kvtier_client.stats import ClientStats
from kvtier_client.trace import Metadata, trace_metadata

logger = logging.getLogger(__name__)


class Link:
    """An open session. Methods need the gate's lock held, `context_message` excepted."""

    def __init__(
        self,
        info: SessionInfo,
        stub: offload_pb2_grpc.OffloadServiceStub,
        options: ClientOptions,
        stats: ClientStats,
    ) -> None:
        self.info = info
        self.stub = stub
        self.session_id = info.session_id
        self.boot_id = info.boot_id
        self.max_keys = info.limits.max_keys
        self.leases = LeaseBook(info.limits.lookup_lease_ms / 1000)
        self.buffer = CompletionBuffer(info.session_id, info.limits.max_keys)
        self.announced = False
        """Whether the listener knows."""
        self.flush_wanted = False
        """Whether what waits in the buffer is to go out as soon as nothing is in flight."""
        self.flush_at: float | None = None
        """When the background thread flushes if nobody else has; monotonic."""
        self.retry_at: float | None = None
        """When the background thread sends a batch again that got no answer; monotonic."""
        self._options = options
        self._stats = stats
        self._seen: dict[str, None] = {}

    def context_message(self, ctx: ReqContext) -> offload_pb2.RequestContext:
        """Return the request for the wire, with its parameters until a call that had them was answered."""
        if ctx.kv_transfer_params is None or ctx.wire_id in self._seen:
            return offload_pb2.RequestContext(request_id=ctx.wire_id)
        params = ctx.params_json()
        data, dropped = params.data, params.dropped
        if data and len(data) > self.info.limits.max_params_bytes:
            dropped = (f"<all: {len(data)} bytes>",)
            data = None
        if dropped:
            self._warn_dropped(ctx, dropped)
        return offload_pb2.RequestContext(request_id=ctx.wire_id, params_json=data)

    def trace_metadata(self, ctx: ReqContext) -> Metadata | None:
        """Return what a call for this request says of its trace. On the engine's thread; needs no lock."""
        return trace_metadata(ctx, self._options.trace_context)

    def mark_seen(self, ctx: ReqContext) -> None:
        """The daemon has the request's parameters."""
        if ctx.kv_transfer_params is None:
            return
        self._seen[ctx.wire_id] = None
        if len(self._seen) > self._options.max_seen_requests:
            del self._seen[next(iter(self._seen))]

    def release(self, lease_id: int) -> None:
        """Forget a lease and queue its end."""
        self.leases.forget(lease_id)
        self.buffer.release(lease_id)

    def finish(self, request_id: str) -> None:
        """Forget a request and queue its end. `request_id` as on the wire."""
        self._seen.pop(request_id, None)
        self.leases.forget_request(request_id)
        self.buffer.finish(request_id)

    def set_missing_ranks(self, missing_ranks: tuple[int, ...]) -> None:
        """Note which workers are not attached."""
        self.info = replace(self.info, missing_ranks=missing_ranks)

    def enter_epoch(self, epoch: int) -> None:
        """Note the instance's new epoch and give back what was leased in the old one."""
        self.info = replace(self.info, epoch=epoch)
        for lease_id in self.leases.forget_all():
            self.buffer.release(lease_id)

    def _warn_dropped(self, ctx: ReqContext, dropped: tuple[str, ...]) -> None:
        if not self._stats.snapshot()["params_dropped"]:
            logger.warning(
                "kv_transfer_params of request %r: %s cannot be sent and are left out (JSON without NaN, "
                "bytes and lone surrogates, with string keys, at most %d bytes); more are only counted",
                ctx.req_id,
                ", ".join(dropped[:8]),
                self.info.limits.max_params_bytes,
            )
        self._stats.add("params_dropped", len(dropped))
