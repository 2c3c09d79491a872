"""Copies between engines' memory, opened by handle, and the pool, as the daemon's copy helpers run them.

`CopyEngine` owns the registrations, the queue of each direction and the list of finished jobs; how bytes move
is its two implementations': `HostCopyEngine` here, on POSIX shared memory, and `CudaCopyEngine` in cuda.py.
Neither knows leases, generations or checksums: who submits a job compares generations before and after.

    submit --check--> queue of loads --------> thread copy-load ----+--> finished --> poll, wait
                      queue of stores -------> thread copy-store ---+

Loads never wait for stores: each direction has a thread, and on a device a stream, of its own.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from kvtier_ops.faults import fault_point
from kvtier_ops.fragments import (
    CopyRefused,
    Direction,
    Fragments,
    GroupPlaces,
    PlacedCopy,
    TensorPlace,
    plan_fragments,
)
from kvtier_ops.host import HostTensors, copy_in, copy_out
from kvtier_ops.ipc import (
    HandleError,
    MemoryHandle,
    MemoryKind,
    check_registration,
    open_shared,
    remove_orphan,
)
from kvtier_ops.layout import GroupLayout
from kvtier_ops.pool import MappedPool
from kvtier_ops.timeline import OpenedTimeline

MAX_MEMORIES = 1024
"""Open registrations of one engine: ranks of the instances on one device."""

MAX_QUEUED_JOBS = 4096
"""Jobs that have not ended, both directions together."""

TIMELINE_POLL_S = 0.0005
"""Between two looks whether an engine's compute has come to a value; a device needs no look."""

ABANDONED_POLL_S = 0.05
"""Between two looks whether the engine is there at all: others' copies wait behind its own."""

Bytes = npt.NDArray[np.uint8]


class CopyEngineBroken(RuntimeError):
    """The device's context is lost: every job fails until the process that has it is started anew."""


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Copies that are submitted, and end, together."""

    job_id: int
    """The caller's; no two unfinished jobs may have the same."""
    direction: Direction
    memory_id: int
    copies: tuple[PlacedCopy, ...]
    wait_value: int = 0
    """What the memory's timeline is to reach before the copy begins; an event of a device has no value."""


@dataclass(frozen=True, slots=True)
class CopyResult:
    """How a job ended. Where not ok, the bytes that it writes mean nothing; `message` says why."""

    job_id: int
    ok: bool
    message: str
    nbytes: int
    """Bytes that the job names; 0 where it failed."""
    seconds: float
    """Time spent copying: without the queue, the copies before it, and the wait for the engine's compute; 0
    where it failed."""


@dataclass(slots=True)
class Memory:
    """A registration: the tensors of one rank, opened."""

    memory_id: int
    groups: tuple[GroupPlaces, ...]
    handles: tuple[MemoryHandle, ...]
    event: int = 0
    """The engine's event, 0 = it has synchronized before it asks."""
    timeline: OpenedTimeline | None = None
    """The same where memory is shared memory; None = it has synchronized."""
    tensors: HostTensors | None = None
    unfinished: int = 0
    closing: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """A job that has passed the checks, with what its copy needs."""

    job: CopyJob
    memory: Memory
    fragments: Fragments


@dataclass(slots=True)
class _Lane:
    """One direction: its queue, and what of it is under way."""

    ready: threading.Condition
    jobs: deque[Admitted] = field(default_factory=deque)
    begun: dict[int, float] = field(default_factory=dict)
    """When each job under way was begun, by id; on a device it may still be behind others."""
    ended: float = 0.0
    """When the last job under way ended; the next one had the device from then on."""


class CopyEngine(ABC):
    """Runs jobs of one device. All methods may be called from any thread; none waits for a copy but `wait`
    and `close`, and these without the GIL.
    """

    kind: MemoryKind

    def __init__(self, pool: MappedPool | Bytes) -> None:
        """Use the pool's data area, or an array of shape (bytes,), uint8; kept mapped until `close`."""
        self._pool: Bytes = pool.data if isinstance(pool, MappedPool) else pool
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._finished: list[CopyResult] = []
        self._unfinished: set[int] = set()
        self._memories: dict[int, Memory] = {}
        self._lanes = {direction: _Lane(threading.Condition(self._lock)) for direction in Direction}
        self._threads: list[threading.Thread] = []
        self._broken = ""
        self._closed = False

    @property
    def pinned_bytes(self) -> int:
        """How much of the pool's front is known to the device; 0 where there is none."""
        return 0

    @property
    def pin_problem(self) -> str:
        """Why the rest will not be; copies from there are staged by the driver, and slower."""
        return ""

    @property
    def broken(self) -> str:
        """Why no job can succeed any more; empty while the engine works."""
        return self._broken

    def oldest_s(self) -> float:
        """Return for how many seconds a direction is at the job that it has begun; 0 where there is none.

        The wait for the engine's compute is included, the jobs of the direction before it are not. A job has
        no deadline here: a device that waits for the event of an engine that hangs cannot be told to stop.
        Whoever owns this process ends it instead.
        """
        with self._lock:
            since = [max(min(lane.begun.values()), lane.ended) for lane in self._lanes.values() if lane.begun]
            return time.monotonic() - min(since) if since else 0.0

    def open_memory(
        self,
        memory_id: int,
        groups: Sequence[Sequence[MemoryHandle]],
        layouts: Sequence[GroupLayout],
        event_handle: bytes = b"",
    ) -> None:
        """Check and open a rank's tensors: per group, in the order of its layout.

        Raises HandleError naming the field, CopyEngineBroken; nothing stays open then.
        """
        if len(groups) != len(layouts):
            raise HandleError(f"groups: {len(groups)} groups; the namespace has {len(layouts)}")
        paired: list[list[tuple[MemoryHandle, int]]] = []
        for group, (handles, layout) in enumerate(zip(groups, layouts, strict=True)):
            if len(handles) != len(layout.tensors):
                raise HandleError(
                    f"groups: {len(handles)} tensors in group {group}; its layout names {len(layout.tensors)}"
                )
            paired.append([(h, t.page_bytes) for h, t in zip(handles, layout.tensors, strict=True)])
        check_registration(paired)
        for handles in groups:
            for handle in handles:
                if handle.kind is not self.kind:
                    raise HandleError(f"kind: {handle.kind.name}; this device takes {self.kind.name}")
        with self._lock:
            self._raise_if_unusable()
            if memory_id in self._memories:
                raise HandleError(f"memory_id: {memory_id} is open already")
            if len(self._memories) >= MAX_MEMORIES:
                raise HandleError(f"memory_id: {MAX_MEMORIES} registrations are open, the limit")
        memory = self._open(memory_id, groups, layouts, event_handle)
        with self._lock:
            if memory_id not in self._memories and not self._closed:
                self._memories[memory_id] = memory
                return
        self._close(memory)
        raise HandleError(f"memory_id: {memory_id} was opened by another thread, or the engine was closed")

    def close_memory(self, memory_id: int) -> None:
        """Take no more jobs of it; those that have not begun fail, those that have end by themselves.

        Before the last of its jobs is reported its mapping is closed: from then on none of its bytes moves.
        Closing what is not open does nothing.
        """
        with self._lock:
            memory = self._memories.pop(memory_id, None)
            if memory is None:
                return
            memory.closing = True
            waiting = [
                admitted
                for lane in self._lanes.values()
                for admitted in lane.jobs
                if admitted.memory is memory
            ]
            for admitted in waiting:
                self._lanes[admitted.job.direction].jobs.remove(admitted)
            is_idle = memory.unfinished == 0
        if is_idle:
            self._close(memory)
        for admitted in waiting:
            self._finish(admitted, "memory_id: the memory was closed before the copy began")

    def submit(self, job: CopyJob) -> None:
        """Check a job and queue it. Raises CopyRefused, before any byte moved, and CopyEngineBroken."""
        with self._lock:
            self._raise_if_unusable()
            memory = self._memories.get(job.memory_id)
            if memory is None:
                raise CopyRefused(f"memory_id: {job.memory_id} is not open; register the memory again")
            if job.job_id in self._unfinished:
                raise CopyRefused(f"job_id: {job.job_id} has not ended yet")
            if len(self._unfinished) >= MAX_QUEUED_JOBS:
                raise CopyRefused(f"job_id: {MAX_QUEUED_JOBS} jobs have not ended, the limit; wait for some")
            # From here on the memory stays open until the job has ended.
            memory.unfinished += 1
            self._unfinished.add(job.job_id)
        try:
            fragments = self._plan(memory, job)
        except BaseException:
            self._forget(memory, job.job_id)
            raise
        admitted = Admitted(job, memory, fragments)
        with self._lock:
            is_open = not (memory.closing or self._closed)
            if is_open:
                self._lanes[job.direction].jobs.append(admitted)
                self._lanes[job.direction].ready.notify()
        if not is_open:
            self._finish(admitted, "memory_id: the memory was closed before the copy began")

    def poll(self) -> list[CopyResult]:
        """Return the jobs that have ended since the last call, in the order of their ends."""
        with self._lock:
            return self._take_finished()

    def wait(self, timeout_s: float) -> list[CopyResult]:
        """As `poll`, but wait until there is one; empty after `timeout_s`, and once the engine is closed."""
        with self._lock:
            self._ended.wait_for(lambda: self._finished or self._closed, timeout_s)
            return self._take_finished()

    def close(self, timeout_s: float) -> bool:
        """Close every memory and end the threads; False if one is still in a copy after `timeout_s`.

        The jobs' ends can still be polled. Safe to repeat.
        """
        for memory_id in list(self._memories):
            self.close_memory(memory_id)
        with self._lock:
            self._closed = True
            self._ended.notify_all()
            for lane in self._lanes.values():
                lane.ready.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @abstractmethod
    def _open(
        self,
        memory_id: int,
        groups: Sequence[Sequence[MemoryHandle]],
        layouts: Sequence[GroupLayout],
        event_handle: bytes,
    ) -> Memory:
        """Open checked handles. Raises HandleError with nothing left open."""

    @abstractmethod
    def _close(self, memory: Memory) -> None:
        """Close what `_open` opened; no job of it is left. Never raises."""

    @abstractmethod
    def _copy(self, admitted: Admitted) -> None:
        """Run a job on its direction's thread; `_finish` is called before or after the return, once.

        An exception ends the job as failed; it is raised only where `_finish` is not called.
        """

    def _plan(self, memory: Memory, job: CopyJob) -> Fragments:
        return plan_fragments(memory.groups, job.copies, job.direction, self._pool.size)

    def _begin(self) -> None:
        """Begin the threads; called once by the implementation, when it is ready."""
        for direction in Direction:
            name = f"copy-{direction.name.lower()}"
            thread = threading.Thread(target=self._serve, args=(direction,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _enter(self, direction: Direction) -> None:  # noqa: B027 - most have nothing to prepare
        """Prepare the thread of a direction, on it, before its first job."""

    def _serve(self, direction: Direction) -> None:
        self._enter(direction)
        lane = self._lanes[direction]
        while True:
            with self._lock:
                lane.ready.wait_for(lambda: lane.jobs or self._closed)
                if not lane.jobs:
                    return
                admitted = lane.jobs.popleft()
                lane.begun[admitted.job.job_id] = time.monotonic()
            if self._broken:
                self._finish(admitted, self._broken)
                continue
            # The error is gone here, and with it the frames that may still hold a view of the memory: closing
            # it would leave it mapped.
            message = self._try_copy(admitted)
            if message:
                self._finish(admitted, message)

    def _try_copy(self, admitted: Admitted) -> str:
        """Return why the copy failed, or nothing."""
        try:
            self._copy(admitted)
        except Exception as error:  # noqa: BLE001 - whatever it was, the job ends, and the thread goes on
            return f"{type(error).__name__}: {error}"
        return ""

    def _finish(self, admitted: Admitted, message: str = "", seconds: float = 0.0) -> None:
        """Report the end of a job; with a message it has failed."""
        memory, job_id, lane = admitted.memory, admitted.job.job_id, self._lanes[admitted.job.direction]
        with self._lock:
            memory.unfinished -= 1
            is_last = memory.closing and memory.unfinished == 0
        if is_last:
            self._close(memory)
        nbytes = 0 if message else admitted.fragments.total_bytes
        with self._lock:
            self._unfinished.discard(job_id)
            if lane.begun.pop(job_id, None) is not None:
                lane.ended = time.monotonic()
            self._finished.append(CopyResult(job_id, not message, message, nbytes, seconds))
            self._ended.notify_all()

    def _forget(self, memory: Memory, job_id: int) -> None:
        """Undo the admission of a job that was refused."""
        with self._lock:
            memory.unfinished -= 1
            self._unfinished.discard(job_id)
            is_last = memory.closing and memory.unfinished == 0
        if is_last:
            self._close(memory)

    def _break(self, reason: str) -> None:
        """Fail every job from now on."""
        with self._lock:
            self._broken = self._broken or reason

    def _raise_if_unusable(self) -> None:
        if self._broken:
            raise CopyEngineBroken(self._broken)
        if self._closed:
            raise CopyEngineBroken("the copy engine was closed")

    def _take_finished(self) -> list[CopyResult]:
        finished, self._finished = self._finished, []
        return finished


class HostCopyEngine(CopyEngine):
    """Copies of engines whose memory is POSIX shared memory, with the numpy copies of host.py."""

    kind = MemoryKind.POSIX_SHM

    def __init__(self, pool: MappedPool | Bytes) -> None:
        super().__init__(pool)
        self._begin()

    def _open(
        self,
        memory_id: int,
        groups: Sequence[Sequence[MemoryHandle]],
        layouts: Sequence[GroupLayout],
        event_handle: bytes,
    ) -> Memory:
        mapped: dict[bytes, Bytes] = {}
        for handles in groups:
            for handle in handles:
                if handle.handle not in mapped:
                    mapped[handle.handle] = open_shared(handle)
        names = list(mapped)
        places, arrays = [], []
        for handles, layout in zip(groups, layouts, strict=True):
            tensors = [
                _pages(mapped[handle.handle], handle, tensor.page_bytes)
                for handle, tensor in zip(handles, layout.tensors, strict=True)
            ]
            arrays.append(tensors)
            places.append(
                GroupPlaces(
                    layout,
                    tuple(
                        TensorPlace(
                            tensor.ctypes.data,
                            handle.block_stride_bytes,
                            handle.num_blocks,
                            names.index(handle.handle),
                        )
                        for tensor, handle in zip(tensors, handles, strict=True)
                    ),
                )
            )
        opened = tuple({handle.handle: handle for handles in groups for handle in handles}.values())
        timeline = OpenedTimeline(event_handle) if event_handle else None
        return Memory(memory_id, tuple(places), opened, timeline=timeline, tensors=HostTensors(arrays))

    def _close(self, memory: Memory) -> None:
        memory.tensors = None  # unmapped with the last view
        if memory.timeline is not None:
            memory.timeline.is_abandoned()
        memory.timeline = None
        for handle in memory.handles:
            remove_orphan(handle)

    def _copy(self, admitted: Admitted) -> None:
        self._await_compute(admitted)
        began = time.monotonic()
        self._move(admitted)
        self._finish(admitted, seconds=time.monotonic() - began)

    def _await_compute(self, admitted: Admitted) -> None:
        """Wait as long as a device would: see `oldest_s`. Raises RuntimeError where it will never come."""
        timeline, look_at = admitted.memory.timeline, time.monotonic() + ABANDONED_POLL_S
        while timeline is not None and not timeline.has_reached(admitted.job.wait_value):
            if admitted.memory.closing:
                raise RuntimeError("the memory was closed before the engine's compute was done")
            if time.monotonic() > look_at:
                look_at += ABANDONED_POLL_S
                if timeline.is_abandoned():
                    raise RuntimeError("the engine is gone, and its compute will not be done")
            time.sleep(TIMELINE_POLL_S)

    def _move(self, admitted: Admitted) -> None:
        tensors, job = admitted.memory.tensors, admitted.job
        assert tensors is not None
        copy_pages = copy_out if job.direction is Direction.STORE else copy_in
        for placed in job.copies:
            fault_point("copy_engine.before_chunk")
            layout = admitted.memory.groups[placed.copy.group].layout
            part = self._pool[placed.part_start : placed.part_start + layout.part_bytes]
            copy_pages(tensors, layout, placed.copy, part)


def _pages(allocation: Bytes, handle: MemoryHandle, page_bytes: int) -> Bytes:
    """Return a tensor's pages, shape (num_blocks, page_bytes)."""
    tensor = allocation[handle.offset_bytes : handle.offset_bytes + handle.size_bytes]
    return as_strided(tensor, (handle.num_blocks, page_bytes), (handle.block_stride_bytes, 1))
