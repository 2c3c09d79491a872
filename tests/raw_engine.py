"""A small engine on bare gRPC stubs, for tests of the protocol itself.

Owns sessions with lock files of their own and one-line calls. It checks nothing, repeats nothing and hides
nothing: what the daemon answers is what the test gets. Bytes of chunks are not copied here.
"""

from __future__ import annotations

import itertools
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from kvtier.v1 import admin_pb2_grpc, offload_pb2_grpc
from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.locks import OwnerLock

from .daemon_process import CHANNEL_OPTIONS, WAIT_S

PART_BYTES = 4096
PROTOCOL_MINOR = 1


def to_key(number: int, group: int = 0) -> bytes:
    """Key of chunk `number` of a group: 16 bytes of hash and the group's index."""
    return number.to_bytes(16, "big") + group.to_bytes(4, "big")


def to_keys(numbers: Sequence[int], group: int = 0) -> list[bytes]:
    """Keys of chunks of one group."""
    return [to_key(number, group) for number in numbers]


def namespace(num_parts: int = 1, num_groups: int = 1, **changes: object) -> pb.NamespaceFacts:
    """Facts of a small model; `changes` replace fields."""
    fields: dict[str, object] = {
        "model": "test-model",
        "weights_id": "0123abcd",
        "kv_dtype": "bfloat16",
        "hash_algorithm": "sha256",
        "tokens_per_hash": 16,
        "blocks_per_chunk": 1,
        "kv_cache_layout": "LBHNC",
        "groups": [pb.GroupFacts(tokens_per_block=16, part_bytes=PART_BYTES) for _ in range(num_groups)],
        "tensor_parallel_size": num_parts,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "num_parts": num_parts,
    }
    return pb.NamespaceFacts(**{**fields, **changes})  # type: ignore[arg-type]


def geometry_of(facts: pb.NamespaceFacts) -> list[pb.GroupGeometry]:
    """A rank's tensors that agree with the facts: two per group, of equal size."""
    blocks = max(facts.blocks_per_chunk, 1)
    return [
        pb.GroupGeometry(
            tensors=[
                pb.TensorGeometry(name=f"layer.{layer}", page_bytes=group.part_bytes // blocks // 2)
                for layer in range(2)
            ]
        )
        for group in facts.groups
    ]


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed call as a client sees it: its status, and what the trailers say about it."""

    code: grpc.StatusCode
    message: str
    reason: str
    """ErrorInfo.reason; "" where gRPC itself made the error."""
    domain: str
    metadata: Mapping[str, str]
    retry_seconds: float | None
    """RetryInfo, where it is there."""
    trailers: Mapping[str, str]
    """Plain text trailers: kvtier-reason, kvtier-boot-id."""


def failure_of(error: BaseException) -> Failure:
    """Read what a failed call raised."""
    assert isinstance(error, grpc.Call), error
    info, retry_seconds = ErrorInfo(), None
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        retry = RetryInfo()
        if not detail.Unpack(info) and detail.Unpack(retry):
            retry_seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    trailers = {name: text for name, text in error.trailing_metadata() or () if isinstance(text, str)}
    return Failure(
        error.code(),
        error.details() or "",
        info.reason,
        info.domain,
        dict(info.metadata),
        retry_seconds,
        trailers,
    )


def failure(call: Callable[[], object]) -> Failure:
    """Make a call that must fail, and read how."""
    try:
        reply = call()
    except grpc.RpcError as error:
        return failure_of(error)
    raise AssertionError(f"this call was to fail, but it answered: {reply}")


def refusal(call: Callable[[], object]) -> Failure:
    """Make a call that the daemon must refuse, and check that status, details and trailers say the same."""
    failed = failure(call)
    assert failed.reason, f"the daemon did not say why: {failed}"
    assert failed.domain == "kvtier", failed
    assert failed.trailers["kvtier-reason"] == failed.reason, failed
    assert len(bytes.fromhex(failed.trailers["kvtier-boot-id"])) == 8, failed
    backpressure = failed.code in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
    assert (failed.retry_seconds is not None) == backpressure, failed
    return failed


class RawSession:
    """One Attach stream. Its events are read on a thread and kept until the test asks for them."""

    def __init__(
        self, stub: offload_pb2_grpc.OffloadServiceStub, request: pb.AttachRequest, lock: OwnerLock
    ) -> None:
        self.lock = lock
        self._call = stub.Attach(request, wait_for_ready=True)
        self._events: queue.SimpleQueue[pb.AttachResponse | grpc.RpcError | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="raw-session", daemon=True)
        self._thread.start()
        first = self._take()
        if isinstance(first, grpc.RpcError):
            self.close()
            raise first
        assert first is not None, "the stream ended without a message"
        assert first.WhichOneof("event") == "attached", first
        self.attached = first.attached
        self.id = first.attached.session_id

    def _read(self) -> None:
        try:
            for event in self._call:
                self._events.put(event)
            self._events.put(None)
        except grpc.RpcError as error:
            self._events.put(error)

    def _take(self) -> pb.AttachResponse | grpc.RpcError | None:
        try:
            return self._events.get(timeout=WAIT_S)
        except queue.Empty:
            raise AssertionError("no event came") from None

    def wait_for(self, kind: str) -> pb.AttachResponse:
        """Return the next event of this kind ("resolved", ...); those before it are passed over."""
        while True:
            event = self._take()
            assert isinstance(event, pb.AttachResponse), f"the stream ended ({event!r}) without {kind}"
            if event.WhichOneof("event") == kind:
                return event

    def wait_for_end(self) -> grpc.StatusCode:
        """Wait until the stream ends, and return its status."""
        while (event := self._take()) is not None:
            if isinstance(event, grpc.RpcError):
                return failure_of(event).code
        return grpc.StatusCode.OK

    def close(self, *, release_lock: bool = True) -> None:
        """End the stream, and with it the session. A process that is to look alive keeps its lock."""
        self._call.cancel()
        self._thread.join(WAIT_S)
        if release_lock:
            self.lock.release()


class RawEngine:
    """One engine instance. Sessions are opened one by one, or all with `attach`.

    Without `facts` it has a namespace of its own, so that tests can share a daemon.
    """

    def __init__(
        self,
        address: str,
        engine_id: str = "",
        *,
        nonce: int = 0,
        world_size: int = 1,
        facts: pb.NamespaceFacts | None = None,
        tenant: str = "",
        channel: grpc.Channel | None = None,
    ) -> None:
        self.engine_id = engine_id or f"engine-{secrets.token_hex(4)}"
        self.nonce = nonce or secrets.randbits(63) + 1
        self.world_size = world_size
        self.facts = facts or namespace(num_parts=world_size, weights_id=secrets.token_hex(4))
        self.tenant = tenant
        self.sessions: list[RawSession] = []
        self.workers: dict[int, RawSession] = {}
        self.scheduler: RawSession | None = None
        self.address = address
        self.channel = channel or grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.stub = offload_pb2_grpc.OffloadServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self._lease_ids = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all sessions."""
        for session in self.sessions:
            session.close()
        self.channel.close()

    def send_bytes(self, path: str, raw: bytes) -> bytes:
        """Make a unary call with bytes as they are, and return those of the reply."""
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(path, bytes, bytes)
        return call(raw, timeout=WAIT_S)

    def stream_bytes(self, path: str, raw: bytes) -> list[bytes]:
        """Make a call whose reply is a stream, with bytes as they are, and return all it says."""
        call: grpc.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(path, bytes, bytes)
        return list(call(raw, timeout=WAIT_S))

    def describe(self) -> pb.DescribeResponse:
        """Ask where the pool is."""
        return self.stub.Describe(pb.DescribeRequest(), timeout=WAIT_S, wait_for_ready=True)

    def attach_request(self, role: pb.SessionRole.ValueType, rank: int = 0) -> pb.AttachRequest:
        """What this engine says in Attach, without a lock file."""
        request = pb.AttachRequest(
            protocol_minor=PROTOCOL_MINOR,
            engine_id=self.engine_id,
            instance_nonce=self.nonce,
            role=role,
            rank=rank,
            world_size=self.world_size,
            tenant=self.tenant,
            namespace=self.facts,
            lock_file="00000000",
        )
        if role == pb.SESSION_ROLE_WORKER:
            request.geometry.extend(geometry_of(self.facts))
        return request

    def open_session(self, request: pb.AttachRequest, *, lock: OwnerLock | None = None) -> RawSession:
        """Attach with a lock (a new one if none is given). Raises grpc.RpcError when refused."""
        if lock is None:
            lock = OwnerLock.acquire(Path(self.describe().pool.directory))
        request.lock_file = lock.name
        try:
            session = RawSession(self.stub, request, lock)
        except BaseException:
            lock.release()
            raise
        self.sessions.append(session)
        return session

    def attach_scheduler(self) -> RawSession:
        """Open the scheduler's session."""
        self.scheduler = self.open_session(self.attach_request(pb.SESSION_ROLE_SCHEDULER))
        return self.scheduler

    def attach_worker(self, rank: int = 0) -> RawSession:
        """Open the session of one rank."""
        session = self.open_session(self.attach_request(pb.SESSION_ROLE_WORKER, rank))
        self.workers[rank] = session
        return session

    def attach(self) -> Self:
        """Open all sessions, the scheduler's first."""
        self.attach_scheduler()
        for rank in range(self.world_size):
            self.attach_worker(rank)
        return self

    def new_lease_id(self) -> int:
        """A lease id that this instance has not used."""
        return next(self._lease_ids)

    @property
    def session_id(self) -> str:
        """The scheduler's session."""
        assert self.scheduler is not None, "no scheduler is attached"
        return self.scheduler.id

    def lookup(
        self,
        keys: Sequence[bytes],
        *,
        lease_id: int = 0,
        request_id: str = "request",
        pending_wait_ms: int = 0,
    ) -> pb.LookupResponse:
        """Ask for keys."""
        return self.stub.Lookup(
            pb.LookupRequest(
                session_id=self.session_id,
                context=pb.RequestContext(request_id=request_id),
                keys=keys,
                lease_id=lease_id,
                pending_wait_ms=pending_wait_ms,
            ),
            timeout=WAIT_S,
        )

    def prepare_load(
        self, keys: Sequence[bytes], *, lease_id: int | None = None, request_id: str = "request"
    ) -> pb.PrepareLoadResponse:
        """Pin keys."""
        return self.stub.PrepareLoad(
            pb.PrepareLoadRequest(
                session_id=self.session_id,
                context=pb.RequestContext(request_id=request_id),
                keys=keys,
                lease_id=self.new_lease_id() if lease_id is None else lease_id,
            ),
            timeout=WAIT_S,
        )

    def prepare_store(
        self, keys: Sequence[bytes], *, lease_id: int | None = None, request_id: str = "request"
    ) -> pb.PrepareStoreResponse:
        """Reserve slots."""
        return self.stub.PrepareStore(
            pb.PrepareStoreRequest(
                session_id=self.session_id,
                context=pb.RequestContext(request_id=request_id),
                keys=keys,
                lease_id=self.new_lease_id() if lease_id is None else lease_id,
            ),
            timeout=WAIT_S,
        )

    def take_credits(self, count: int, *, group: int = 0) -> pb.CreditGrant:
        """Reserve slots without keys."""
        request = pb.PrepareStoreRequest(
            session_id=self.session_id,
            lease_id=self.new_lease_id(),
            credits=[pb.CreditRequest(group=group, count=count)],
        )
        return self.stub.PrepareStore(request, timeout=WAIT_S).credits[0]

    def complete(self, session: RawSession | None = None, **items: object) -> pb.CompleteResponse:
        """Report: `items` are fields of CompleteRequest; from the scheduler, or a worker's `session`."""
        session_id = self.session_id if session is None else session.id
        request = pb.CompleteRequest(session_id=session_id, **items)  # type: ignore[arg-type]
        return self.stub.Complete(request, timeout=WAIT_S)

    def report_stores(
        self, slot_ids: Sequence[int], generations: Sequence[int], keys: Sequence[bytes], rank: int = 0
    ) -> pb.CompleteResponse:
        """Say that a rank has written its part of these slots."""
        report = pb.StoreReport(
            part=rank if self.facts.num_parts > 1 else 0,
            slot_ids=slot_ids,
            generations=generations,
            keys=keys,
            checksums=[0] * len(slot_ids),
        )
        return self.complete(self.workers[rank], store_reports=[report])

    def store(self, keys: Sequence[bytes], request_id: str = "request") -> pb.PrepareStoreResponse:
        """Store chunks, all granted, through to their publication."""
        granted = self.prepare_store(keys, request_id=request_id)
        assert set(granted.verdicts) == {pb.STORE_VERDICT_GRANTED}, granted.verdicts
        for rank in self.workers:
            self.report_stores(granted.slot_ids, granted.generations, keys, rank)
        return granted
