"""A real gRPC server that speaks kvtier.v1 and answers as a test says.

A double of the network peer, for what a real daemon cannot be made to show on demand: a lost reply, a stall,
a reply of another boot. What the daemon itself promises is tested against the real one, in tests/integration.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from kvtier.v1 import offload_pb2 as pb
from kvtier.v1 import offload_pb2_grpc
from kvtier_ops.pool import Pool

POOL_BYTES = 1 << 20
Reply = TypeVar("Reply")

Context = grpc.ServicerContext
Script = Callable[[Any, Context], Any]


class Peer(offload_pb2_grpc.OffloadServiceServicer):
    """Answers every call harmlessly; `scripts[method]` takes over where a test sets one.

    Every request is kept in `requests[method]`. `events` are sent on the stream of the open session.
    """

    def __init__(self, socket: Path, pool_directory: Path, boot_id: str = "00000000000000b1") -> None:
        self.address = f"unix://{socket}"
        self.boot_id = boot_id
        self.scripts: dict[str, Script] = {}
        self.requests: dict[str, list[Any]] = {}
        self.lookup_lease_ms = 30_000
        self.max_keys = 8192
        self.epoch = 1
        self.missing_ranks: tuple[int, ...] = ()
        self.changed = threading.Condition()
        self._pool = Pool.create(pool_directory, POOL_BYTES)
        self._sessions = 0
        self._events: SimpleQueue[pb.AttachResponse | None] | None = None
        self._server = grpc.server(ThreadPoolExecutor(8))
        offload_pb2_grpc.add_OffloadServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.end_stream()
        self._server.stop(0).wait()
        self._pool.close()

    @property
    def pool(self) -> pb.PoolInfo:
        return pb.PoolInfo(
            directory=str(self._pool.directory),
            path=self._pool.path.name,
            pool_id=self._pool.pool_id,
            data_bytes=self._pool.data_bytes,
        )

    def send(self, event: pb.AttachResponse) -> None:
        """Send an event on the stream of the newest session."""
        assert self._events is not None, "nobody is attached"
        self._events.put(event)

    def end_stream(self) -> None:
        """End the newest session, as a daemon that dies does."""
        if self._events is not None:
            self._events.put(None)

    def asked(self, method: str) -> list[Any]:
        with self.changed:
            return list(self.requests.get(method, ()))

    def wait_asked(self, method: str, count: int = 1, timeout_s: float = 20) -> list[Any]:
        """Wait until `method` was called `count` times and return its requests."""
        with self.changed:
            arrived = self.changed.wait_for(lambda: len(self.requests.get(method, ())) >= count, timeout_s)
            assert arrived, f"{method} was called {len(self.requests.get(method, ()))} times, not {count}"
            return list(self.requests[method])

    def refuse(self, context: Context, code: grpc.StatusCode, reason: str, details: str = "") -> None:
        context.set_trailing_metadata((("kvtier-reason", reason), ("kvtier-boot-id", self.boot_id)))
        context.abort(code, details or reason)

    def _answer(self, method: str, request: Any, context: Context, reply: Reply) -> Reply:
        with self.changed:
            self.requests.setdefault(method, []).append(request)
            self.changed.notify_all()
        script = self.scripts.get(method)
        if script is None:
            return reply
        answer: Reply = script(request, context)
        return answer

    def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:  # noqa: N802
        return self._answer(
            "Describe", request, context, pb.DescribeResponse(boot_id=self.boot_id, pool=self.pool)
        )

    def Attach(  # noqa: N802
        self, request: pb.AttachRequest, context: Context
    ) -> Iterator[pb.AttachResponse]:
        self._sessions += 1
        attached = pb.Attached(
            session_id=f"{self.boot_id}-{self._sessions}",
            boot_id=self.boot_id,
            pool=self.pool,
            slot_bytes=[4096],
            limits=pb.Limits(
                max_keys=self.max_keys,
                max_message_bytes=8 << 20,
                max_params_bytes=65_536,
                lookup_lease_ms=self.lookup_lease_ms,
                copy_lease_ms=300_000,
            ),
            epoch=self.epoch,
            missing_ranks=self.missing_ranks,
        )
        events: SimpleQueue[pb.AttachResponse | None] = SimpleQueue()
        self._events = events
        context.add_callback(lambda: events.put(None))
        yield self._answer("Attach", request, context, pb.AttachResponse(attached=attached))
        while (event := events.get()) is not None:
            yield event

    def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:  # noqa: N802
        misses = bytes([pb.LOOKUP_STATUS_MISS]) * len(request.keys)
        return self._answer(
            "Lookup", request, context, pb.LookupResponse(boot_id=self.boot_id, statuses=misses)
        )

    def PrepareLoad(  # noqa: N802
        self, request: pb.PrepareLoadRequest, context: Context
    ) -> pb.PrepareLoadResponse:
        return self._answer("PrepareLoad", request, context, pb.PrepareLoadResponse(boot_id=self.boot_id))

    def PrepareStore(  # noqa: N802
        self, request: pb.PrepareStoreRequest, context: Context
    ) -> pb.PrepareStoreResponse:
        full = [pb.STORE_VERDICT_FULL] * len(request.keys)
        return self._answer(
            "PrepareStore", request, context, pb.PrepareStoreResponse(boot_id=self.boot_id, verdicts=full)
        )

    def Complete(self, request: pb.CompleteRequest, context: Context) -> pb.CompleteResponse:  # noqa: N802
        return self._answer("Complete", request, context, pb.CompleteResponse(boot_id=self.boot_id))

    def RenewLeases(  # noqa: N802
        self, request: pb.RenewLeasesRequest, context: Context
    ) -> pb.RenewLeasesResponse:
        fine = [pb.COMPLETE_STATUS_OK] * len(request.lease_ids)
        return self._answer(
            "RenewLeases", request, context, pb.RenewLeasesResponse(boot_id=self.boot_id, statuses=fine)
        )

    def Touch(self, request: pb.TouchRequest, context: Context) -> pb.TouchResponse:  # noqa: N802
        return self._answer("Touch", request, context, pb.TouchResponse(boot_id=self.boot_id))

    def FinishRequest(  # noqa: N802
        self, request: pb.FinishRequestRequest, context: Context
    ) -> pb.FinishRequestResponse:
        return self._answer("FinishRequest", request, context, pb.FinishRequestResponse(boot_id=self.boot_id))

    def Reset(self, request: pb.ResetRequest, context: Context) -> pb.ResetResponse:  # noqa: N802
        self.epoch += 1
        return self._answer(
            "Reset", request, context, pb.ResetResponse(boot_id=self.boot_id, epoch=self.epoch)
        )


if __name__ == "__main__":  # a peer of its own process, which a test can stop
    with Peer(Path(sys.argv[1]), Path(sys.argv[2])):
        sys.stdin.read()
