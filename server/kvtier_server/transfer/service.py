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
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import structlog

from kvtier.v1 import transfer_pb2 as pb
from kvtier_ops.directory import PoolError
from kvtier_ops.locks import CopyGate, OwnerLock
from kvtier_server.callers import current_caller
from kvtier_server.config import LimitsConfig
from kvtier_server.core.instances import Session
from kvtier_server.core.refused import BadRequest, Refused
from kvtier_server.core.tiering import Core
from kvtier_server.metrics import CUDA_IPC, REMOTE_HOST, Metrics
from kvtier_server.rpc import CallScope, ServicerContext
from kvtier_server.stats import CopyDeviceStats
from kvtier_server.transfer.device_process import DeviceProcess, HelperLost, ImportFailed, failed
from kvtier_server.transfer.messages import job_of, register_of, response_of
from kvtier_server.transfer.wire import HOST_DEVICE, Done, Job, Register

SERVICE = "kvtier.v1.TransferService"

DRAIN_S = 2.0
"""What copies of an earlier session may take to end before its process is refused a new one; clients wait
longer for Attach."""

DEVICE_STOP_S = 2.0
"""What the process of a device that nobody uses any more may take to end."""

log = structlog.get_logger("kvtier.transfer")


class CannotImport(Refused):
    """Memory cannot be opened by the daemon. The engine copies through shared memory, and says so."""

    reason = "CUDA_IPC_IMPORT"


class TooManyMemories(Refused):
    """A session has as many registrations as it may have."""

    reason = "LIMIT_TRANSFER_MEMORIES"


class TooManyDevices(Refused):
    """As many devices have a process as the daemon runs at once."""

    reason = "LIMIT_TRANSFER_DEVICES"


class CopiesRun(Refused):
    """Copies of the process's earlier session still run."""

    reason = "INFLIGHT"


@dataclass(slots=True)
class _Memory:
    id: int
    session: Session
    device: DeviceProcess
    gate: str
    is_open: bool = False
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

    def __init__(
        self,
        core: Core,
        scope: CallScope,
        metrics: Metrics,
        limits: LimitsConfig,
        pool_path: str,
        pool_id: int,
        pool_lock_fd: int,
    ) -> None:
        self._core = core
        self._scope = scope
        self._parse = scope.parser("TransferService/Transfer", pb.TransferRequest)
        self._metrics = metrics
        self._limits = limits
        self._directory = Path(pool_path).parent
        self._pool_path = pool_path
        self._pool_id = pool_id
        self._pool_lock_fd = pool_lock_fd
        self._lock: OwnerLock | None = None
        """Held by this process and every helper: free when nothing of them can arrive any more."""
        self._has_gates = False
        self._devices: dict[str, DeviceProcess] = {}
        self._memories: dict[int, _Memory] = {}
        self._memory_ids = count(1)
        self._running: Counter[str] = Counter()
        """Copies under way by the lock file of the process that asked."""
        self._ended = asyncio.Event()
        """Set at the end of each copy."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._restarts: Counter[str] = Counter()
        """By device; of those that nobody uses any more too."""

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
                self._forget(memory)
                memory.device.unregister(memory.id)
        used = {memory.device for memory in self._memories.values()}
        for name, device in list(self._devices.items()):
            if device not in used:
                self._restarts[name] += device.num_restarts
                del self._devices[name]  # its context takes hundreds of MiB of the device
                self._begin_task(self._end_device(device))

    async def _end_device(self, device: DeviceProcess) -> None:
        if not await device.close(DEVICE_STOP_S):
            log.warning("copy_process_stays", device=device.device)

    def _lose_memory(self, memory_id: int) -> None:
        """Forget memory that could not be opened again: its engine is told when it names it."""
        memory = self._memories.get(memory_id)
        if memory is not None:
            self._forget(memory)

    def _forget(self, memory: _Memory) -> None:
        self._memories.pop(memory.id, None)
        CopyGate.remove(self._directory, memory.gate)

    # What operators see

    def paths(self) -> dict[str, str]:
        """How the bytes of the workers' sessions move that have memory open, by session: `metrics.PATHS`."""
        memories = self._memories.values()
        return {memory.session.id: _path_of(memory.device) for memory in memories if memory.is_open}

    def devices(self) -> tuple[CopyDeviceStats, ...]:
        """The devices that have, or had, a copy process, by name."""
        memories: Counter[str] = Counter()
        jobs: Counter[str] = Counter()
        for memory in self._memories.values():
            memories[memory.device.device] += 1
            jobs[memory.device.device] += memory.jobs
        found = []
        for name in sorted({*self._devices, *self._restarts}):
            device = self._devices.get(name)
            found.append(
                CopyDeviceStats(name, "unused", self._restarts[name])
                if device is None
                else CopyDeviceStats(
                    name,
                    device.state,
                    self._restarts[name] + device.num_restarts,
                    memories[name],
                    jobs[name],
                    device.pinned_bytes,
                    device.problem,
                )
            )
        return tuple(found)

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
        limit = self._limits.transfer_memories
        if sum(memory.session is session for memory in self._memories.values()) >= limit:
            raise TooManyMemories(
                f"{limit} registrations of this session are open, the limit (limits.transfer_memories)"
            )
        register = register_of(request, session, next(self._memory_ids), self._limits.transfer_tensors)
        device = self._device(register)
        register = register._replace(gate=self._new_gate())
        # From now on, so that what is opened is also closed if the caller stops waiting.
        memory = _Memory(register.memory_id, session, device, register.gate)
        self._memories[memory.id] = memory
        try:
            await device.register(register)
        except (ImportFailed, HelperLost) as error:
            self._forget(memory)
            log.warning(
                "memory_refused",
                engine=session.instance.engine_id,
                rank=session.rank,
                device=device.device,
                why=str(error),
            )
            raise CannotImport(
                f"{error}; the engine copies through shared memory instead", device=device.device
            ) from error
        memory.is_open = True
        return pb.RegisterMemoryResponse(
            boot_id=self._scope.boot_id,
            memory_id=memory.id,
            lock_file=self._own_lock().name,
            gate_file=memory.gate,
            max_jobs=self._limits.transfer_jobs,
        )

    def _new_gate(self) -> str:
        try:
            if not self._has_gates:
                self._has_gates = True
                CopyGate.remove_all(self._directory)
            return CopyGate.create(self._directory)
        except (OSError, PoolError) as error:
            raise CannotImport(
                f"no lock file can be made in {self._directory} ({error}); the engine copies through shared "
                "memory instead"
            ) from error

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
            limit = self._limits.transfer_devices
            if len(self._devices) >= limit:
                raise TooManyDevices(
                    f"device {name} would be one more than {limit}, the limit (limits.transfer_devices)"
                )
            self._devices[name] = DeviceProcess(
                name,
                self._pool_path,
                self._pool_id,
                tuple(fd for fd in (self._pool_lock_fd, self._own_lock().fd) if fd >= 0),
                self._lose_memory,
            )
        return self._devices[name]

    # Transfer

    async def _transfer(self, _: AsyncIterator[bytes], context: ServicerContext) -> None:
        stream = _Stream()
        # Not by the iterator: it would keep the message it is left at, in a ring of its own.
        reading = asyncio.create_task(self._read(context, stream))
        try:
            while (answer := await stream.answers.get()) is not None:
                await context.write(answer.SerializeToString())
                stream.written.set()
            await reading
        except Exception as error:  # noqa: BLE001 every error becomes a status
            await self._scope.abort(context, self._scope.as_refused("TransferService/Transfer", error))
        finally:
            reading.cancel()

    async def _read(self, context: ServicerContext, stream: _Stream) -> None:
        try:
            while isinstance(raw := await context.read(), bytes):
                request = self._parse(raw)
                await self._make_room(stream, is_job=bool(request.job_id))
                if not request.job_id:
                    # Whatever has become of the session: its copies may still run, and are waited for.
                    stream.answers.put_nowait(pb.TransferResponse(ok=True))
                    continue
                session = self._session(request.session_id)
                self._core.transfers.check_worker(session)
                self._begin(session, request, stream)
        finally:
            stream.is_read = True
            if not stream.jobs:
                stream.answers.put_nowait(None)

    async def _make_room(self, stream: _Stream, is_job: bool) -> None:
        """Wait until the client has read its answers, and few enough of its jobs are under way."""
        while stream.answers.qsize() > self._limits.transfer_answers:
            stream.written.clear()
            await stream.written.wait()
        while is_job and stream.jobs >= self._limits.transfer_jobs:
            self._ended.clear()
            await self._ended.wait()

    def _begin(self, session: Session, request: pb.TransferRequest, stream: _Stream) -> None:
        """Begin a job, or answer what is wrong with it. Raises BadRequest for memory that is not there."""
        memory = self._memories.get(request.memory_id)
        if memory is None or memory.session is not session:
            raise BadRequest("memory_id", f"{request.memory_id}; this session has not registered it")
        try:
            job = job_of(request, self._core.books.limits.max_keys)
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
        stream.answers.put_nowait(response_of(job, done))
        if stream.is_read and not stream.jobs:
            stream.answers.put_nowait(None)

    async def _copied(self, session: Session, memory: _Memory, job: Job) -> Done:
        look_up = self._core.transfers.not_writable if job.is_store else self._core.transfers.not_readable
        not_held = look_up(session, job.slot_ids, job.generations)
        asked = memory.device.run(job._replace(not_held=tuple(not_held)))
        if not job.is_store:
            done = await asked
        else:
            others = set(not_held)
            held = [slot_id for index, slot_id in enumerate(job.slot_ids) if index not in others]
            with self._core.transfers.writing(session, held):
                done = await asked
        if done.seconds > 0:
            direction = "store" if job.is_store else "load"
            self._metrics.observe_transfer(direction, _path_of(memory.device), done.num_bytes, done.seconds)
        return done


def _path_of(device: DeviceProcess) -> str:
    return REMOTE_HOST if device.device == HOST_DEVICE else CUDA_IPC
