"""RegisterMemory and Transfer: which session may have what copied, and by which device's process.

Owns registrations, the copies under way, and what follows from them for others: the lock file of a process
is not free, and its successor is not attached, while something is copied for it. A copy is no store or load
yet: the worker reports it through Complete, as one that it has made itself. Everything here runs on the
loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import grpc
import structlog

from kvtier.v1 import transfer_pb2 as pb
from kvtier_ops.ipc import MAX_TENSORS, HandleError, MemoryHandle, MemoryKind
from kvtier_ops.locks import OwnerLock
from kvtier_server.callers import current_caller
from kvtier_server.core.instances import Session
from kvtier_server.core.namespaces import GeometryMismatch
from kvtier_server.core.refused import BadRequest, Refused
from kvtier_server.core.tiering import Core
from kvtier_server.rpc import CallScope, ServicerContext
from kvtier_server.transfer.device_process import DeviceProcess, HelperLost, ImportFailed, failed
from kvtier_server.transfer.wire import HOST_DEVICE, Done, Job, Register

SERVICE = "kvtier.v1.TransferService"

MAX_MEMORIES = 8
"""Registrations of one session; an engine has one, or one more while it replaces it."""

MAX_JOBS = 512
"""Copies under way for one session."""

MAX_DEVICES = 32
"""Devices with a process at one time; nodes have 8 or 16."""

MAX_ANSWERS = 512
"""Answers that a client has not read; nothing more is taken from it meanwhile."""

DRAIN_S = 2.0
"""What copies of an earlier session may take to end before its process is refused a new one; clients wait
longer for Attach."""

DEVICE_STOP_S = 2.0
"""What the process of a device that nobody uses any more may take to end."""

log = structlog.get_logger("kvtier.transfer")


class CannotImport(Refused):
    """Memory cannot be opened by the daemon. The engine copies through shared memory, and says so."""

    reason = "CUDA_IPC_IMPORT"


class CopiesRun(Refused):
    """Copies of the process's earlier session still run."""

    reason = "INFLIGHT"


@dataclass(slots=True)
class _Memory:
    id: int
    session: Session
    device: DeviceProcess
    jobs: int = 0


@dataclass(slots=True)
class _Stream:
    """One Transfer stream: its answers, None at the end."""

    answers: asyncio.Queue[pb.TransferResponse | None] = field(default_factory=asyncio.Queue)
    jobs: int = 0
    is_read: bool = False
    written: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after each answer."""


class TransferService:
    """See the module's first lines."""

    def __init__(self, core: Core, scope: CallScope, pool_path: str, pool_id: int, pool_lock_fd: int) -> None:
        self._core = core
        self._scope = scope
        self._pool_path = pool_path
        self._pool_id = pool_id
        self._pool_lock_fd = pool_lock_fd
        self._lock: OwnerLock | None = None
        """Held by this process and every helper: free when nothing of them can arrive any more."""
        self._devices: dict[str, DeviceProcess] = {}
        self._memories: dict[int, _Memory] = {}
        self._memory_ids = count(1)
        self._running: Counter[str] = Counter()
        """Copies under way by the lock file of the process that asked."""
        self._ended = asyncio.Event()
        """Set at the end of each copy."""
        self._tasks: set[asyncio.Task[None]] = set()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
        """Method handlers by name."""
        return {
            "RegisterMemory": self._scope.unary(
                "TransferService/RegisterMemory", pb.RegisterMemoryRequest, self._register
            ),
            "Transfer": grpc.stream_stream_rpc_method_handler(self._transfer),
        }

    # What others have to know

    def is_copying_for(self, lock_file: str) -> bool:
        """Tell whether something is copied for this process; then its lock file counts as held."""
        return lock_file in self._running

    async def drained(self, lock_file: str) -> None:
        """Wait until nothing is copied for a process that attaches anew. Raises CopiesRun."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self.is_copying_for(lock_file):
                    self._ended.clear()
                    await self._ended.wait()
        if self.is_copying_for(lock_file):
            raise CopiesRun(
                f"{self._running[lock_file]} copies of this process's earlier session still run after "
                f"{DRAIN_S:.0f} s; attach again later"
            )

    def forget_ended(self) -> None:
        """Close memory of sessions that have ended, once nothing is copied from or to it."""
        sessions = self._core.books.instances.sessions
        for memory in list(self._memories.values()):
            if not memory.jobs and sessions.get(memory.session.id) is not memory.session:
                del self._memories[memory.id]
                memory.device.unregister(memory.id)
        used = {memory.device for memory in self._memories.values()}
        for name, device in list(self._devices.items()):
            if device not in used:
                del self._devices[name]  # its context takes hundreds of MiB of the device
                self._begin_task(self._end_device(device))

    async def _end_device(self, device: DeviceProcess) -> None:
        if not await device.close(DEVICE_STOP_S):
            log.warning("copy_process_stays", device=device.device)

    def _lose_memory(self, memory_id: int) -> None:
        """Forget memory that could not be opened again: its engine is told when it names it."""
        self._memories.pop(memory_id, None)

    async def close(self, timeout_s: float) -> bool:
        """End the helpers; False if one is in a copy that nothing ends."""
        ended = await asyncio.gather(*[device.close(timeout_s) for device in self._devices.values()])
        if all(ended) and self._lock is not None:
            self._lock.release()
        return all(ended)

    def _session(self, session_id: str) -> Session:
        return current_caller().check_own(self._core.books.instances.session(session_id))

    # RegisterMemory

    async def _register(self, request: pb.RegisterMemoryRequest) -> pb.RegisterMemoryResponse:
        session = self._session(request.session_id)
        self._core.transfers.check_worker(session)
        if sum(memory.session is session for memory in self._memories.values()) >= MAX_MEMORIES:
            raise BadRequest("session_id", f"{MAX_MEMORIES} registrations are open, the limit for a session")
        register = _register_of(request, session, next(self._memory_ids))
        device = self._device(register)
        # From now on, so that what is opened is also closed if the caller stops waiting.
        self._memories[register.memory_id] = _Memory(register.memory_id, session, device)
        try:
            await device.register(register)
        except (ImportFailed, HelperLost) as error:
            self._memories.pop(register.memory_id, None)
            raise CannotImport(
                f"{error}; the engine copies through shared memory instead", device=device.device
            ) from error
        return pb.RegisterMemoryResponse(
            boot_id=self._scope.boot_id, memory_id=register.memory_id, lock_file=self._own_lock().name
        )

    def _own_lock(self) -> OwnerLock:
        # Not before it is needed: a warm start waits for the locks that it finds.
        if self._lock is None:
            self._lock = OwnerLock.acquire(Path(self._pool_path).parent)
        return self._lock

    def _device(self, register: Register) -> DeviceProcess:
        uuids = {handle.device_uuid for group in register.groups for handle in group}
        if len(uuids) != 1:
            raise BadRequest("groups", f"memory of {len(uuids)} devices; a worker has one")
        name = uuids.pop().hex() or HOST_DEVICE
        if name not in self._devices:
            if len(self._devices) >= MAX_DEVICES:
                raise BadRequest("groups", f"device {name}; {MAX_DEVICES} others are in use, the limit")
            self._devices[name] = DeviceProcess(
                name,
                self._pool_path,
                self._pool_id,
                tuple(fd for fd in (self._pool_lock_fd, self._own_lock().fd) if fd >= 0),
                self._lose_memory,
            )
        return self._devices[name]

    # Transfer

    async def _transfer(self, requests: AsyncIterator[bytes], context: ServicerContext) -> None:
        stream = _Stream()
        reading = asyncio.create_task(self._read(requests, stream))
        try:
            while (answer := await stream.answers.get()) is not None:
                await context.write(answer.SerializeToString())
                stream.written.set()
            await reading
        except Exception as error:  # noqa: BLE001 every error becomes a status
            await self._scope.abort(context, self._scope.as_refused("TransferService/Transfer", error))
        finally:
            reading.cancel()

    async def _read(self, requests: AsyncIterator[bytes], stream: _Stream) -> None:
        try:
            async for raw in requests:
                await self._make_room(stream)
                request = pb.TransferRequest.FromString(raw)
                session = self._session(request.session_id)
                self._core.transfers.check_worker(session)
                if request.job_id:
                    self._begin(session, request, stream)
                else:
                    stream.answers.put_nowait(pb.TransferResponse(ok=True))
        finally:
            stream.is_read = True
            if not stream.jobs:
                stream.answers.put_nowait(None)

    async def _make_room(self, stream: _Stream) -> None:
        """Wait until the client has read its answers, and few enough of its jobs are under way."""
        while stream.answers.qsize() > MAX_ANSWERS:
            stream.written.clear()
            await stream.written.wait()
        while stream.jobs >= MAX_JOBS:
            self._ended.clear()
            await self._ended.wait()

    def _begin(self, session: Session, request: pb.TransferRequest, stream: _Stream) -> None:
        """Begin a job, or answer what is wrong with it. Raises BadRequest for memory that is not there."""
        memory = self._memories.get(request.memory_id)
        if memory is None or memory.session is not session:
            raise BadRequest("memory_id", f"{request.memory_id}; this session has not registered it")
        try:
            job = _job_of(request, self._core.books.limits.max_keys)
        except BadRequest as error:
            every = range(min(len(request.slot_ids), self._core.books.limits.max_keys))
            stream.answers.put_nowait(
                pb.TransferResponse(
                    job_id=request.job_id,
                    failed=every,
                    failures=[pb.TRANSFER_FAILURE_ERROR] * len(every),
                    checksums=[0] * len(every),
                    message=str(error),
                )
            )
            return
        memory.jobs += 1
        stream.jobs += 1
        self._running[session.lock_file] += 1
        self._begin_task(self._run(session, memory, job, stream))

    def _begin_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, session: Session, memory: _Memory, job: Job, stream: _Stream) -> None:
        """Copy, and answer. Goes on when the stream or the session ends."""
        try:
            done = await self._copied(session, memory, job)
        except Exception:
            log.exception("copy_failed", job=job.job_id)
            done = failed(job, "an error in the daemon; its log has it")
        finally:
            memory.jobs -= 1
            stream.jobs -= 1
            self._running[session.lock_file] -= 1
            if not self._running[session.lock_file]:
                del self._running[session.lock_file]
            self._ended.set()
        stream.answers.put_nowait(_response(job, done))
        if stream.is_read and not stream.jobs:
            stream.answers.put_nowait(None)

    async def _copied(self, session: Session, memory: _Memory, job: Job) -> Done:
        look_up = self._core.transfers.not_writable if job.is_store else self._core.transfers.not_readable
        not_held = look_up(session, job.slot_ids, job.generations)
        return await memory.device.run(job._replace(not_held=tuple(not_held)))


def _register_of(request: pb.RegisterMemoryRequest, session: Session, memory_id: int) -> Register:
    """Check and translate. Raises BadRequest, GeometryMismatch."""
    namespace = session.instance.namespace
    part = namespace.part_of(session.rank)
    geometry = namespace.geometries[part]
    if len(request.groups) != len(geometry):
        raise GeometryMismatch("groups: number of groups", len(geometry), len(request.groups))
    paired: list[list[tuple[MemoryHandle, int]]] = []
    for index, (group, tensors) in enumerate(zip(request.groups, geometry, strict=True)):
        if len(group.tensors) != len(tensors):
            raise GeometryMismatch(f"groups[{index}]: number of tensors", len(tensors), len(group.tensors))
        paired.append(
            [
                (_handle_of(message), tensor.page_bytes)
                for message, tensor in zip(group.tensors, tensors, strict=True)
            ]
        )
    if sum(map(len, paired)) > MAX_TENSORS:
        raise BadRequest("groups", f"{sum(map(len, paired))} tensors; {MAX_TENSORS} are allowed")
    try:
        for handle, page_bytes in chain.from_iterable(paired):
            handle.check(page_bytes)  # against each other, which takes longer, the helper checks them
    except HandleError as error:
        raise BadRequest("groups", str(error)) from error
    return Register(
        memory_id,
        namespace.facts.blocks_per_chunk,
        part,
        namespace.facts.num_parts,
        tuple(tuple(handle for handle, _ in group) for group in paired),
        tuple(tuple(tensor.page_bytes for tensor in tensors) for tensors in geometry),
        request.event_handle,
    )


def _handle_of(message: pb.MemoryHandle) -> MemoryHandle:
    try:
        kind = MemoryKind(message.kind)
    except ValueError:
        raise BadRequest("groups", f"kind: {message.kind} is no kind of memory that is known here") from None
    return MemoryHandle(
        kind,
        message.device_uuid,
        message.handle,
        message.allocation_bytes,
        message.offset_bytes,
        message.size_bytes,
        message.block_stride_bytes,
        message.num_blocks,
    )


def _job_of(request: pb.TransferRequest, max_keys: int) -> Job:
    """Check what can be checked without the memory, and translate. Raises BadRequest."""
    if request.direction not in (pb.TRANSFER_DIRECTION_STORE, pb.TRANSFER_DIRECTION_LOAD):
        raise BadRequest("direction", f"{request.direction}; it is STORE or LOAD")
    if not 1 <= len(request.slot_ids) <= max_keys:
        raise BadRequest("slot_ids", f"{len(request.slot_ids)} slots; 1 to {max_keys} are allowed in a job")
    if len(request.generations) != len(request.slot_ids):
        raise BadRequest(
            "generations", f"{len(request.generations)} entries for {len(request.slot_ids)} slots"
        )
    if request.group_slots and sum(request.group_slots) != len(request.slot_ids):
        raise BadRequest(
            "group_slots", f"their sum is {sum(request.group_slots)}, there are {len(request.slot_ids)} slots"
        )
    return Job(
        request.job_id,
        request.memory_id,
        request.direction == pb.TRANSFER_DIRECTION_STORE,
        request.verify,
        tuple(request.slot_ids),
        tuple(request.generations),
        tuple(request.block_ids),
        tuple(request.group_sizes),
        tuple(request.block_indices),
        tuple(request.group_slots) or None,
        request.wait_value,
        (),
    )


def _response(job: Job, done: Done) -> pb.TransferResponse:
    return pb.TransferResponse(
        job_id=job.job_id,
        ok=not done.failed,
        failed=done.failed,
        failures=[pb.TransferFailure.ValueType(why) for why in done.failures],
        checksums=done.checksums,
        message=done.message,
        bytes=done.num_bytes,
        seconds=done.seconds,
    )
