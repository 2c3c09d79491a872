"""The process that copies for engines, one per device: `python -P -m kvtier_server.transfer.helper SETTINGS`.

Maps the pool, opens the memory that engines have exported, and copies between the two. Whose a slot is the
daemon has looked up; here the fence is kept, before a slot is touched and after its last byte, as a worker
that copies itself keeps it. Checksums are computed over the pool's side, behind the copy, on other threads.

    socket --> main: plan, fence --> CopyEngine --> waiter --> finisher: checksum, fence --> socket

Ends when the daemon ends. Until it has ended it holds two locks that it has from the daemon: one tells
engines when nothing of it can arrive any more, the other keeps the pool from being taken over before.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kvtier_ops.checksum import part_checksum
from kvtier_ops.copy_engine import CopyEngine, CopyEngineBroken, CopyJob, CopyResult, HostCopyEngine
from kvtier_ops.faults import fault_point
from kvtier_ops.fragments import CopyRefused, Direction, PlacedCopy
from kvtier_ops.ipc import HandleError
from kvtier_ops.layout import GroupLayout, TensorLayout, part_offset, slot_bytes, slot_offset
from kvtier_ops.locks import CopyGate
from kvtier_ops.plan import ChunkCopy, PlanError, plan_job
from kvtier_ops.pool import MappedPool
from kvtier_ops.slot_table import SlotState, fence
from kvtier_server.transfer.wire import (
    ALIVE_S,
    HANG_S,
    HOST_DEVICE,
    LAYOUT,
    LENGTH_BYTES,
    Alive,
    Done,
    Failure,
    Job,
    Message,
    Ready,
    Register,
    Registered,
    Unregister,
    pack,
    unpack,
)

NUM_FINISHERS = 2
"""Threads that hash: xxh3 reads some 10 GB/s, and one would hold up what follows a large store."""

WAIT_S = 3600.0
"""Between two looks of a waiter that nothing wakes: none is needed."""

BROKEN_STATUS, HUNG_STATUS = 4, 5
"""Exit status where the device's context is lost, and where a copy hangs."""


@dataclass(slots=True)
class _Running:
    """A job under way. Columns have one entry per slot."""

    job: Job
    copies: tuple[ChunkCopy, ...]
    failures: list[Failure | None]
    checksums: list[int]
    expected: list[int]
    """Checksums that a load is to find; 0 = none is compared."""
    gate: CopyGate


@dataclass(frozen=True, slots=True)
class _Memory:
    blocks_per_chunk: int
    part: int
    num_parts: int
    layouts: tuple[GroupLayout, ...]
    gate: CopyGate


class Helper:
    """Takes messages on one thread, and answers from others."""

    def __init__(self, channel: socket.socket, pool: MappedPool, engine: CopyEngine) -> None:
        self._directory = pool.path.parent  # where the gates are
        self._channel = channel
        self._sending = threading.Lock()
        self._pool = pool
        self._engine = engine
        self._memories: dict[int, _Memory] = {}
        self._running: dict[int, _Running] = {}
        self._taking_since: float | None = None
        self._finishers = ThreadPoolExecutor(NUM_FINISHERS, thread_name_prefix="finish")
        for work in (self._wait, self._watch):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def take(self, message: Message) -> None:
        """Do what a message says."""
        self._taking_since = time.monotonic()
        self._take(message)
        self._taking_since = None

    def _take(self, message: Message) -> None:
        if isinstance(message, Register):
            self._register(message)
        elif isinstance(message, Unregister):
            memory = self._memories.pop(message.memory_id, None)
            self._engine.close_memory(message.memory_id)
            if memory is not None:
                memory.gate.close()
        elif isinstance(message, Job):
            self._begin(message)

    def send(self, message: Message) -> None:
        """Say something; if nobody listens any more, the daemon is gone, and so is this process."""
        data = pack(message)
        try:
            with self._sending:
                self._channel.sendall(data)
        except OSError:
            os._exit(0)

    def _register(self, register: Register) -> None:
        try:
            layouts = tuple(
                GroupLayout(
                    tuple(TensorLayout(str(i), page_bytes) for i, page_bytes in enumerate(tensors)),
                    register.blocks_per_chunk,
                )
                for tensors in register.page_bytes
            )
            gate = CopyGate.open(self._directory, register.gate)
            try:
                self._engine.open_memory(register.memory_id, register.groups, layouts, register.event_handle)
            except BaseException:
                gate.close()
                raise
        except Exception as error:  # noqa: BLE001 - of one engine's memory: the others' copies go on
            self.send(Registered(register.memory_id, str(error) or type(error).__name__))
            return
        self._memories[register.memory_id] = _Memory(
            register.blocks_per_chunk, register.part, register.num_parts, layouts, gate
        )
        self.send(Registered(register.memory_id, ""))

    # From a job's begin to its end

    def _begin(self, job: Job) -> None:
        memory = self._memories.get(job.memory_id)
        if memory is None:
            self._refuse(job, f"memory {job.memory_id} is not open any more")
            return
        try:
            copies = plan_job(
                job.block_ids,
                job.group_sizes,
                job.block_indices,
                memory.blocks_per_chunk,
                job.group_slots,
                ends_whole=job.is_store,
            )
            if len(job.group_sizes) > len(memory.layouts):
                raise PlanError(f"group_sizes: {len(job.group_sizes)} groups of {len(memory.layouts)}")
            if len(copies) != len(job.slot_ids):
                raise PlanError(f"slot_ids: {len(job.slot_ids)} slots, the blocks fill {len(copies)}")
        except PlanError as error:
            self._refuse(job, str(error))
            return
        if not memory.gate.enter():
            self._refuse(job, "the engine has given this registration up")
            return
        fault_point("helper.before_job")
        count = len(copies)
        running = _Running(job, copies, [None] * count, [0] * count, [0] * count, memory.gate)
        placed = []
        for index in job.not_held:
            running.failures[index] = Failure.NOT_HELD
        for index, copy in enumerate(copies):
            running.failures[index] = running.failures[index] or self._why_not(running, index, copy, memory)
            if running.failures[index] is None:
                start = part_offset(memory.layouts[copy.group].part_bytes, memory.part)
                placed.append(PlacedCopy(copy, slot_offset(job.slot_ids[index]) + start))
        self._running[job.job_id] = running
        direction = Direction.STORE if job.is_store else Direction.LOAD
        try:
            self._engine.submit(CopyJob(job.job_id, direction, job.memory_id, tuple(placed), job.wait_value))
        except CopyRefused as error:
            del self._running[job.job_id]
            memory.gate.leave()
            self._refuse(job, str(error))
        except CopyEngineBroken as error:
            self._refuse(job, str(error))
            os._exit(BROKEN_STATUS)

    def _refuse(self, job: Job, message: str) -> None:
        every = tuple(range(len(job.slot_ids)))
        self.send(
            Done(job.job_id, every, (int(Failure.ERROR),) * len(every), (0,) * len(every), message, 0, 0.0)
        )

    def _why_not(self, running: _Running, index: int, copy: ChunkCopy, memory: _Memory) -> Failure | None:
        """Say why a slot cannot be copied; before any byte moves."""
        job = running.job
        slot_id, part_bytes = job.slot_ids[index], memory.layouts[copy.group].part_bytes
        if len(copy.block_ids) < (memory.blocks_per_chunk if job.is_store else 1):
            return Failure.INCOMPLETE
        record = self._pool.slots.read(slot_id)
        if record is None or record.generation != job.generations[index]:
            return Failure.TORN
        # A slot that went back keeps its generation until it is given out again: look at its state as well.
        if job.is_store and record.state is not SlotState.RESERVED:
            return Failure.TORN
        if record.slot_bytes < slot_bytes(part_bytes, memory.num_parts):
            return Failure.NOT_HELD  # of another group's size: what follows it is somebody else's
        if job.verify and not job.is_store:
            running.expected[index] = self._pool.part_checksum(slot_id, memory.part)
        return None

    def _wait(self) -> None:
        try:
            while True:
                for result in self._engine.wait(WAIT_S):
                    running = self._running.pop(result.job_id)
                    running.gate.leave()
                    memory = self._memories.get(running.job.memory_id)
                    if running.job.is_store or any(running.expected):
                        self._finishers.submit(self._finish, running, result, memory)
                    else:
                        self._finish(running, result, memory)  # nothing to hash: one thread less on the way
        except BaseException:  # noqa: BLE001 - as in `_finish`
            _end_badly()

    def _watch(self) -> None:
        """Say now and then that nothing hangs; end the process if something does, and its jobs with it.

        Two looks must say so: the first one after the whole process stood still counts that time too.
        """
        hung_before = False
        while True:
            time.sleep(ALIVE_S)
            since = self._taking_since
            taking_s = 0.0 if since is None else time.monotonic() - since
            hangs = max(taking_s, self._engine.oldest_s()) > HANG_S
            if hangs and hung_before:
                with contextlib.suppress(OSError):
                    print("a copy hangs", file=sys.stderr)  # noqa: T201 - the daemon's log
                os._exit(HUNG_STATUS)
            hung_before = hangs
            self.send(Alive(self._engine.pinned_bytes, self._engine.pin_problem))

    def _finish(self, running: _Running, result: CopyResult, memory: _Memory | None) -> None:
        try:
            self._conclude(running, result, memory)
        except BaseException:  # noqa: BLE001
            # A job that is never answered would hold its slots for ever; the end of this process answers it.
            _end_badly()

    def _conclude(self, running: _Running, result: CopyResult, memory: _Memory | None) -> None:
        job, message = running.job, result.message
        if memory is None:
            message = message or "the memory was closed meanwhile"
        for index, failure in enumerate(running.failures):
            if failure is None:
                running.failures[index] = (
                    Failure.ERROR if message or memory is None else self._check(running, index, memory)
                )
        failed = [(index, int(failure)) for index, failure in enumerate(running.failures) if failure]
        self.send(
            Done(
                job.job_id,
                tuple(index for index, _ in failed),
                tuple(failure for _, failure in failed),
                tuple(running.checksums),
                message,
                result.nbytes,
                result.seconds,
            )
        )
        if self._engine.broken:
            os._exit(BROKEN_STATUS)

    def _check(self, running: _Running, index: int, memory: _Memory) -> Failure | None:
        """Look at a slot after its copy: hashed, and still what it was."""
        job, layout = running.job, memory.layouts[running.copies[index].group]
        slot_id = job.slot_ids[index]
        differs = False
        if job.is_store or running.expected[index]:
            start = part_offset(layout.part_bytes, memory.part)
            found = part_checksum(self._pool.part_view(slot_id, start, layout.part_bytes))
            differs = not job.is_store and found != running.expected[index]
            if job.is_store or differs:
                running.checksums[index] = found
        fence()
        if self._pool.generation(slot_id) != job.generations[index]:
            running.checksums[index] = 0
            return Failure.TORN
        return Failure.MISMATCH if differs else None


def main(arguments: list[str]) -> None:
    """Work until the daemon is gone. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is the daemon's to answer
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = json.loads(arguments[0])
    if settings["layout"] != LAYOUT:
        sys.exit("another version of kvtier was installed under its daemon; start the daemon anew")
    path = Path(settings["pool"])
    channel = socket.socket(fileno=settings["channel"])
    pool = MappedPool.open(path, settings["pool_id"])
    try:
        engine = _engine(settings["device"], pool)
    except (HandleError, ImportError) as error:
        channel.sendall(pack(Ready(str(error))))
        sys.exit(0)
    helper = Helper(channel, pool, engine)
    helper.send(Ready(""))
    stream = channel.makefile("rb")
    try:
        while header := stream.read(LENGTH_BYTES):
            helper.take(unpack(stream.read(int.from_bytes(header, "little"))))
    except Exception:  # noqa: BLE001 - as in `_finish`
        _end_badly()
    os._exit(0)  # whatever the threads are in: the daemon waits for the end of the process, or is gone


def _end_badly() -> NoReturn:
    """End the process over a bug, with its trace in the daemon's log."""
    with contextlib.suppress(OSError):  # the daemon is gone, and with it who reads
        traceback.print_exc()
    os._exit(1)


def _engine(device: str, pool: MappedPool) -> CopyEngine:
    """Make the engine of a device. Raises HandleError, ImportError."""
    if device == HOST_DEVICE:
        return HostCopyEngine(pool)
    from kvtier_ops.cuda import CudaCopyEngine  # loads CUDA's libraries, in this process only

    try:
        return CudaCopyEngine(pool, bytes.fromhex(device))
    except ImportError as error:
        raise ImportError(
            f"{error}; install it, in kvtier's directory: pip install '.[cuda12]' or '.[cuda13]'"
        ) from error


if __name__ == "__main__":
    main(sys.argv[1:])
