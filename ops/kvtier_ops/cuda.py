"""Copies between device memory, opened by CUDA IPC, and the pinned pool, with cupy.

Owns one device's streams, the opened allocations and events, and the calls of the driver. What is copied by
which means is planned in fragments.py; the kernels are kernels.cu. Runs in a helper process of its own per
device, because an engine that is killed in mid-copy may take this process's context with it: the engine is
`broken` then, and the process is to be started anew.

NOT RUN ON A GPU yet: every call of the driver in this file was written from the signatures and documents of
cupy 13 and 14 and cuda-bindings 12.9 and 13, and has never run. What has: the plans, the queues, and the
kernels as far as NVRTC (to PTX).

Without MPS the kernels of two processes take turns on the whole device, so that a kernel of this process
stops the engine's for as long as it runs, however few blocks it has; the copy engines run beside both. So the
kernel is for fragments that the copy engines are slow with, and no others. What that costs is the line
"matmul" of `make bench-gpu`.

    thread copy-load   --engine's event, copies, event--> stream --> thread end-load  --> finished
    thread copy-store  --           the same          --> stream --> thread end-store --> finished
"""

from __future__ import annotations

import contextlib
import importlib.resources
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier_ops.copy_engine import Admitted, CopyEngine, CopyJob, Memory
from kvtier_ops.cuda_driver import Driver
from kvtier_ops.fragments import (
    KERNEL_PIECE_BYTES,
    Direction,
    Fragments,
    GroupPlaces,
    Means,
    TensorPlace,
    Work,
    assign_means,
    kernel_descriptors,
    pieces_per_row,
    plan_fragments,
)
from kvtier_ops.ipc import CUDA_HANDLE_BYTES, HandleError, MemoryHandle, MemoryKind
from kvtier_ops.layout import GroupLayout
from kvtier_ops.pinning import HOST_REGISTER_FLAGS, PIECE_BYTES, PinnedPool, Registrar
from kvtier_ops.pool import MappedPool

KERNEL_NAMES = {Direction.STORE: "gather", Direction.LOAD: "scatter"}
KERNEL_OPTIONS = ("-std=c++17",)

KERNEL_BLOCKS = 16
"""Blocks of a kernel: 256 KiB of loads under way, about three times what a link of 55 GB/s and 1.5 us of
latency needs. NOT MEASURED yet."""

KERNEL_THREADS = 256

MAX_UNDER_WAY = 8
"""Jobs of a direction that the device has been given: what has not begun can still be called off."""

BATCH_DRIVER_VERSION = 12080
"""cudaMemcpyBatchAsync came with CUDA 12.8."""

Bytes = npt.NDArray[np.uint8]


def kernel_source() -> str:
    """Return the text of kernels.cu."""
    return (importlib.resources.files("kvtier_ops") / "kernels.cu").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A job that the device has."""

    admitted: Admitted
    began: int
    """The event between the wait for the engine's compute and the first copy."""
    ended: int
    """The event behind the last copy."""
    held: tuple[object, ...]
    """What the device reads until the job ends."""


class CudaCopyEngine(CopyEngine):
    """Copies of one device. NOT RUN ON A GPU yet: see the module."""

    kind = MemoryKind.CUDA_IPC

    def __init__(
        self,
        pool: MappedPool | Bytes,
        device_uuid: bytes,
        means: Means | None = None,
        kernel_blocks: int = KERNEL_BLOCKS,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """Find the device, compile the kernels, make the streams, begin to pin the pool.

        `means`: None = what this machine has. Raises HandleError for an unknown device, ImportError without
        cupy, and cupy's errors.
        """
        super().__init__(pool)
        import cupy

        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        self._driver = Driver()
        self.device_uuid = device_uuid
        self._device = self._driver.find_device(device_uuid)
        self._runtime.setDevice(self._device)
        self._bindings = _batch_bindings(self._runtime)
        self._means = means or self._default_means()
        self._kernel_blocks = kernel_blocks
        module = cupy.RawModule(code=kernel_source(), options=KERNEL_OPTIONS)
        self._kernels = {way: module.get_function(name) for way, name in KERNEL_NAMES.items()}
        self._base = self._pool.ctypes.data
        self._streams = {
            # Lower is more urgent: a load is waited for.
            way: int(self._runtime.streamCreateWithPriority(self._runtime.streamNonBlocking, priority))
            for way, priority in ((Direction.LOAD, -1), (Direction.STORE, 0))
        }
        self._under_way: dict[Direction, queue.Queue[_UnderWay | None]] = {
            way: queue.Queue(MAX_UNDER_WAY) for way in Direction
        }
        self._allocations = _Allocations(self._runtime, self._driver)
        self.pinned = PinnedPool(self._pool, self._registrar(), piece_bytes)
        self._on_thread: dict[Direction, Any] = {}
        self._endings: list[threading.Thread] = []
        for way in Direction:
            name = f"end-{way.name.lower()}"
            ending = threading.Thread(target=self._end_jobs, args=(way,), name=name, daemon=True)
            self._endings.append(ending)
            ending.start()
        self._begin()

    def close(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        if not super().close(timeout_s):
            return False
        if not self._endings:
            return True
        for way in Direction:
            with contextlib.suppress(queue.Full):
                self._under_way[way].put(None, timeout=max(0.0, deadline - time.monotonic()))
        for ending in self._endings:
            ending.join(max(0.0, deadline - time.monotonic()))
        if any(ending.is_alive() for ending in self._endings):
            return False
        self._endings.clear()
        self._runtime.setDevice(self._device)
        reason = self.pinned.close()
        if reason:
            self._break(reason)
        for stream in self._streams.values():
            with contextlib.suppress(self._runtime.CUDARuntimeError):
                self._runtime.streamDestroy(stream)
        return True

    @property
    def pinned_bytes(self) -> int:
        return self.pinned.ready_bytes

    @property
    def pin_problem(self) -> str:
        return self.pinned.error

    def _default_means(self) -> Means:
        attribute = self._runtime.deviceGetAttribute
        same_address = attribute(self._runtime.cudaDevAttrCanUseHostPointerForRegisteredMem, self._device)
        max_pitch = int(attribute(self._runtime.cudaDevAttrMaxPitch, self._device))
        means = Means(batch=self._bindings is not None, max_pitch_bytes=max_pitch)
        if not same_address:
            # The kernel is given the pool's addresses in this process.
            return Means(0, means.batch, max_pitch)
        return means

    def _registrar(self) -> Registrar:
        def register(address: int, nbytes: int) -> None:
            self._runtime.setDevice(self._device)  # of the thread
            self._runtime.hostRegister(address, nbytes, HOST_REGISTER_FLAGS)

        return Registrar(register, self._runtime.hostUnregister)

    def _open(
        self,
        memory_id: int,
        groups: Sequence[Sequence[MemoryHandle]],
        layouts: Sequence[GroupLayout],
        event_handle: bytes,
    ) -> Memory:
        handles = tuple({h.handle: h for tensors in groups for h in tensors}.values())
        for handle in handles:
            if handle.device_uuid != self.device_uuid:
                raise HandleError(
                    f"device_uuid: the memory is on {handle.device_uuid.hex()}, this is "
                    f"{self.device_uuid.hex()}; a helper copies for one device"
                )
        if len(event_handle) not in {0, CUDA_HANDLE_BYTES}:
            raise HandleError(f"event_handle: {len(event_handle)} bytes; {CUDA_HANDLE_BYTES} or none")
        self._runtime.setDevice(self._device)
        addresses: dict[bytes, int] = {}
        event = 0
        try:
            for handle in handles:
                addresses[handle.handle] = self._allocations.open(handle)
            if event_handle:
                event = self._open_event(event_handle)
        except BaseException:
            for opened in addresses:
                self._allocations.close(opened)
            raise
        names = list(addresses)
        places = tuple(
            GroupPlaces(
                layout,
                tuple(
                    TensorPlace(
                        addresses[h.handle] + h.offset_bytes,
                        h.block_stride_bytes,
                        h.num_blocks,
                        names.index(h.handle),
                    )
                    for h in tensors
                ),
            )
            for tensors, layout in zip(groups, layouts, strict=True)
        )
        return Memory(memory_id, places, handles, event)

    def _open_event(self, event_handle: bytes) -> int:
        try:
            return int(self._runtime.ipcOpenEventHandle(event_handle))
        except self._runtime.CUDARuntimeError as error:
            raise HandleError(
                f"event_handle: CUDA does not open it ({error}); its process may be gone"
            ) from error

    def _close(self, memory: Memory) -> None:
        try:
            self._runtime.setDevice(self._device)
            if memory.event:
                self._runtime.eventDestroy(memory.event)
            for handle in memory.handles:
                self._allocations.close(handle.handle)
        except self._runtime.CUDARuntimeError as error:
            self._break(f"closing memory {memory.memory_id}: {error}")

    def _plan(self, memory: Memory, job: CopyJob) -> Fragments:
        return plan_fragments(
            memory.groups, job.copies, job.direction, self._pool.size, self.pinned.boundaries
        )

    def _enter(self, direction: Direction) -> None:
        self._runtime.setDevice(self._device)
        # cupy launches kernels and takes memory on the stream of the thread.
        self._on_thread[direction] = self._cupy.cuda.ExternalStream(self._streams[direction], self._device)
        self._on_thread[direction].use()

    def _copy(self, admitted: Admitted) -> None:
        way = admitted.job.direction
        stream = self._streams[way]
        work = assign_means(admitted.fragments, self._means, self.pinned.ready_bytes, self.pinned.boundaries)
        events: list[int] = []
        try:
            if admitted.memory.event:
                self._runtime.streamWaitEvent(stream, admitted.memory.event, 0)
            self._record(stream, events)
            held = self._give(work, way, stream)
            self._record(stream, events)
        except Exception:
            # Some of the job may be under way: it must not be reported while its bytes still move.
            self._settle(stream)
            self._destroy(*events)
            raise
        began, ended = events
        self._under_way[way].put(_UnderWay(admitted, began, ended, held))

    def _record(self, stream: int, events: list[int]) -> None:
        """Record an event with its time on the stream, and append it."""
        events.append(int(self._runtime.eventCreateWithFlags(self._runtime.eventBlockingSync)))
        self._runtime.eventRecord(events[-1], stream)

    def _destroy(self, *events: int) -> None:
        for event in events:
            with contextlib.suppress(self._runtime.CUDARuntimeError):
                self._runtime.eventDestroy(event)

    def _settle(self, stream: int) -> None:
        try:
            self._runtime.streamSynchronize(stream)
        except self._runtime.CUDARuntimeError as error:
            self._break(f"the context is lost: {error}")

    def _give(self, work: Work, way: Direction, stream: int) -> tuple[object, ...]:
        """Put the work on the stream; return what must live until it is over."""
        runtime = self._runtime
        to_pool = way is Direction.STORE
        kind = runtime.memcpyDeviceToHost if to_pool else runtime.memcpyHostToDevice
        for run in work.pitched:
            device, pool = (run.device, run.device_pitch), (self._base + run.pool, run.pool_pitch)
            target, source = (pool, device) if to_pool else (device, pool)
            runtime.memcpy2DAsync(*target, *source, run.width_bytes, run.rows, kind, stream)
        for device_address, offset, nbytes in _rows(work.plain):
            pool_address = self._base + offset
            ends = (pool_address, device_address) if to_pool else (device_address, pool_address)
            runtime.memcpyAsync(*ends, nbytes, kind, stream)
        if len(work.batch):
            self._give_batch(work.batch, to_pool, stream)
        return self._launch(work.kernel, way) if len(work.kernel) else ()

    def _give_batch(self, fragments: Fragments, to_pool: bool, stream: int) -> None:
        """Hand many copies over in one call; cuda-bindings takes about 0.3 us for each [m, no GPU]."""
        bindings = self._bindings
        if bindings is None:
            raise RuntimeError("means: cuda-bindings has no cudaMemcpyBatchAsync here; set batch = False")
        device, pool = fragments.device.tolist(), (fragments.pool + self._base).tolist()
        targets, sources = (pool, device) if to_pool else (device, pool)
        attributes = bindings.cudaMemcpyAttributes()
        attributes.srcAccessOrder = bindings.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        sizes = fragments.nbytes.tolist()
        # Older versions give the index of the copy that failed as well.
        answer = bindings.cudaMemcpyBatchAsync(
            targets, sources, sizes, len(sizes), [attributes], [0], 1, stream
        )
        if int(answer[0]) != 0:
            raise RuntimeError(f"cudaMemcpyBatchAsync: {answer[0]!s}")

    def _launch(self, fragments: Fragments, way: Direction) -> tuple[object, ...]:
        """Launch the kernel on the thread's stream, its descriptors before it."""
        descriptors = kernel_descriptors(fragments, self._base)
        staged = self._cupy.cuda.alloc_pinned_memory(descriptors.nbytes)
        np.frombuffer(staged, np.uint8, descriptors.nbytes)[:] = descriptors.view(np.uint8)
        on_device = self._cupy.cuda.alloc(descriptors.nbytes)
        stream = self._streams[way]
        self._runtime.memcpyAsync(
            on_device.ptr, staged.ptr, descriptors.nbytes, self._runtime.memcpyHostToDevice, stream
        )
        per_row = pieces_per_row(fragments)
        blocks = min(self._kernel_blocks, len(fragments) * per_row)
        self._kernels[way](
            (blocks,),
            (KERNEL_THREADS,),
            (
                np.uint64(on_device.ptr),
                np.uint32(len(fragments)),
                np.uint32(per_row),
                np.uint32(KERNEL_PIECE_BYTES),
            ),
        )
        return staged, on_device

    def _end_jobs(self, way: Direction) -> None:
        """Wait, without the GIL, for each job's event in the order of the stream, and report it."""
        self._runtime.setDevice(self._device)
        while (given := self._under_way[way].get()) is not None:
            message, seconds = "", 0.0
            try:
                self._runtime.eventSynchronize(given.ended)
                seconds = self._runtime.eventElapsedTime(given.began, given.ended) / 1e3
            except self._runtime.CUDARuntimeError as error:
                # An error that shows here is the context's, and every later call has it too.
                message = f"the context is lost: {error}"
                self._break(message)
            self._destroy(given.began, given.ended)
            admitted = given.admitted
            del given  # its staging memory is free before the job is reported
            self._finish(admitted, message, seconds)


class _Allocations:
    """Opened allocations, each once, with how many registrations use it. Any thread."""

    def __init__(self, runtime: Any, driver: Driver) -> None:
        self._runtime = runtime
        self._driver = driver
        self._lock = threading.Lock()
        self._opened: dict[bytes, tuple[int, int]] = {}

    def open(self, handle: MemoryHandle) -> int:
        """Return the address of the allocation. Raises HandleError."""
        with self._lock:
            address, uses = self._opened.get(handle.handle, (0, 0))
            if not uses:
                address = self._open(handle)
            else:
                self._check_size(handle, address)
            self._opened[handle.handle] = address, uses + 1
            return address

    def close(self, name: bytes) -> None:
        with self._lock:
            address, uses = self._opened.pop(name)
            if uses > 1:
                self._opened[name] = address, uses - 1
            else:
                self._runtime.ipcCloseMemHandle(address)

    def _open(self, handle: MemoryHandle) -> int:
        try:
            address = int(self._runtime.ipcOpenMemHandle(handle.handle))
        except self._runtime.CUDARuntimeError as error:
            raise HandleError(
                f"handle: CUDA does not open it ({error}); its process may be gone, on another host or "
                "container, or the memory is of a kind that cannot be shared"
            ) from error
        try:
            self._check_size(handle, address)
        except HandleError:
            self._runtime.ipcCloseMemHandle(address)
            raise
        return address

    def _check_size(self, handle: MemoryHandle, address: int) -> None:
        base, size = self._driver.address_range(address)
        if (base, size) != (address, handle.allocation_bytes):
            raise HandleError(
                f"allocation_bytes: {handle.allocation_bytes}, but the driver opened {size} bytes, "
                f"{address - base} bytes in"
            )


def _batch_bindings(runtime: Any) -> Any:
    """Return cuda-bindings' runtime module if it and the driver have cudaMemcpyBatchAsync, else None."""
    if int(runtime.driverGetVersion()) < BATCH_DRIVER_VERSION:
        return None
    try:
        from cuda.bindings import runtime as bindings
    except ImportError:
        return None
    return bindings if hasattr(bindings, "cudaMemcpyBatchAsync") else None


def _rows(fragments: Fragments) -> list[tuple[int, int, int]]:
    columns = (fragments.device.tolist(), fragments.pool.tolist(), fragments.nbytes.tolist())
    return list(zip(*columns, strict=True))
