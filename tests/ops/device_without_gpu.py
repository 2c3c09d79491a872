"""A cupy whose device is this process's own memory, so that the code around the driver's calls runs anywhere.

It keeps the rules that the code relies on: a stream is a thread that does one thing after the other, later
than the call; a copy may name one registered piece of host memory only; nothing is registered or opened
twice. It proves nothing about a GPU.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TypeVar

import numpy as np

from kvtier_ops.fragments import DESCRIPTOR
from kvtier_ops.ipc import HandleError

DEVICE_UUID = bytes(range(16))
WAIT_S = 20.0

Work = Callable[[], object]
Thing = TypeVar("Thing")


class CUDARuntimeError(RuntimeError):
    """What cupy raises."""


class Memory(bytearray):
    """Memory that the device reads: cupy's pinned and device memory."""

    @property
    def ptr(self) -> int:
        return ctypes.addressof((ctypes.c_char * len(self)).from_buffer(self))


class Event(threading.Event):
    """An event with the time of the device's clock at which a stream came to it."""

    at_ms = 0.0


class Stream:
    """Does what it is given, in order, on a thread."""

    def __init__(self) -> None:
        self._work: queue.Queue[Work | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, work: Work) -> None:
        self._work.put(work)

    def synchronize(self) -> None:
        done = threading.Event()
        self._work.put(done.set)
        assert done.wait(WAIT_S)

    def destroy(self) -> None:
        self._work.put(None)
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class Runtime:
    """`cupy.cuda.runtime`, as far as it is used."""

    CUDARuntimeError = CUDARuntimeError
    memcpyHostToDevice, memcpyDeviceToHost = 1, 2  # noqa: N815 - cupy's names
    eventBlockingSync = 1  # noqa: N815
    streamNonBlocking = 1  # noqa: N815
    cudaDevAttrCanUseHostPointerForRegisteredMem, cudaDevAttrMaxPitch = 91, 11  # noqa: N815

    def __init__(self) -> None:
        self.exported: dict[bytes, tuple[int, int]] = {}
        """What other processes have: handle -> address, bytes."""
        self.memory_of_others: list[object] = []
        self.events_of_others: dict[bytes, threading.Event] = {}
        self.opened: set[int] = set()
        self.registered: dict[int, int] = {}
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, threading.Event] = {}
        self.clock_ms = 0.0
        """The device's clock: a plain copy takes a second, and a wait for another's event an hour."""
        self.copies: list[str] = []
        self.fail_copy_number = -1
        self.lost = False
        self.told_to_wait = threading.Semaphore(0)
        """Released for each wait for another process's event that a stream was given."""
        self._number = 1000

    def setDevice(self, device: int) -> None:  # noqa: N802
        assert device == 0

    def driverGetVersion(self) -> int:  # noqa: N802
        return 12000

    def deviceGetAttribute(self, attribute: int, device: int) -> int:  # noqa: N802
        assert device == 0
        return {91: 1, 11: (1 << 31) - 1}[attribute]

    def streamCreateWithPriority(self, flags: int, priority: int) -> int:  # noqa: N802
        assert flags == self.streamNonBlocking
        assert priority <= 0
        return self._keep(self.streams, Stream())

    def streamDestroy(self, stream: int) -> None:  # noqa: N802
        self.streams.pop(stream).destroy()

    def streamSynchronize(self, stream: int) -> None:  # noqa: N802
        self.streams[stream].synchronize()

    def streamWaitEvent(self, stream: int, event: int, flags: int) -> None:  # noqa: N802
        assert flags == 0
        waited = self.events[event]
        self.streams[stream].give(lambda: self._pass(3_600_000.0, partial(self._await, waited)))
        self.told_to_wait.release()

    def eventCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        assert flags == self.eventBlockingSync, "with its time"
        return self._keep(self.events, Event())

    def eventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        recorded = self.events[event]
        assert isinstance(recorded, Event)

        def record() -> None:
            recorded.at_ms = self.clock_ms
            recorded.set()

        self.streams[stream].give(record)

    def eventElapsedTime(self, first: int, second: int) -> float:  # noqa: N802
        events = self.events[first], self.events[second]
        assert all(isinstance(event, Event) and event.is_set() for event in events)
        return events[1].at_ms - events[0].at_ms  # type: ignore[attr-defined, no-any-return]

    def eventSynchronize(self, event: int) -> None:  # noqa: N802
        self._await(self.events[event])
        if self.lost:
            raise CUDARuntimeError("cudaErrorIllegalAddress: on purpose")

    def eventDestroy(self, event: int) -> None:  # noqa: N802
        del self.events[event]

    def ipcOpenMemHandle(self, handle: bytes) -> int:  # noqa: N802
        if handle not in self.exported:
            raise CUDARuntimeError("cudaErrorInvalidValue: invalid argument")
        address, _ = self.exported[handle]
        assert address not in self.opened, "an allocation is opened once"
        self.opened.add(address)
        return address

    def ipcCloseMemHandle(self, address: int) -> None:  # noqa: N802
        self.opened.remove(address)

    def ipcOpenEventHandle(self, handle: bytes) -> int:  # noqa: N802
        if handle not in self.events_of_others:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid resource handle")
        return self._keep(self.events, self.events_of_others[handle])

    def hostRegister(self, address: int, nbytes: int, flags: int) -> None:  # noqa: N802
        assert flags == 3
        assert address not in self.registered
        self.registered[address] = nbytes

    def hostUnregister(self, address: int) -> None:  # noqa: N802
        del self.registered[address]

    def memcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:  # noqa: N802
        move = partial(self._pass, 1000.0, partial(ctypes.memmove, target, source, nbytes))
        self._copy("plain", target, source, nbytes, kind, stream, move)

    def memcpy2DAsync(  # noqa: N802
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        kind: int,
        stream: int,
    ) -> None:
        def move() -> None:
            for row in range(rows):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        host_pitch = target_pitch if kind == self.memcpyDeviceToHost else source_pitch
        assert min(target_pitch, source_pitch) >= width
        self._copy("pitched", target, source, (rows - 1) * host_pitch + width, kind, stream, move)

    def _copy(
        self,
        what: str,
        target: int,
        source: int,
        span: int,
        kind: int,
        stream: int,
        move: Work,
    ) -> None:
        if len(self.copies) == self.fail_copy_number:
            raise CUDARuntimeError("cudaErrorInvalidValue: on purpose")
        host = target if kind == self.memcpyDeviceToHost else source
        pieces = [
            start
            for start, nbytes in self.registered.items()
            if start < host + span and host < start + nbytes
        ]
        assert len(pieces) <= 1, "a copy names one registered piece only"
        self.copies.append(what)
        self.streams[stream].give(move)

    def _pass(self, ms: float, work: Work) -> None:
        """Do what takes so long by the device's clock."""
        work()
        self.clock_ms += ms

    def _keep(self, where: dict[int, Thing], thing: Thing) -> int:
        self._number += 1
        where[self._number] = thing
        return self._number

    def _await(self, event: threading.Event) -> None:
        assert event.wait(WAIT_S)


class Cupy:
    """The module `cupy`, as far as it is used."""

    def __init__(self) -> None:
        runtime = Runtime()
        self._thread = threading.local()
        self.cuda = SimpleNamespace(
            runtime=runtime,
            alloc=Memory,
            alloc_pinned_memory=Memory,
            ExternalStream=lambda stream, _: SimpleNamespace(
                use=lambda: setattr(self._thread, "stream", stream)
            ),
        )

    def RawModule(self, code: str, options: tuple[str, ...]) -> SimpleNamespace:  # noqa: N802
        assert "__global__" in code
        assert options
        return SimpleNamespace(get_function=lambda name: lambda *given: self._launch(name, *given))

    def _launch(self, name: str, grid: tuple[int], block: tuple[int], given: tuple[np.generic, ...]) -> None:
        runtime = self.cuda.runtime
        assert given[0].dtype == np.uint64
        assert {value.dtype for value in given[1:]} == {np.dtype(np.uint32)}
        rows, count, per_row, piece_bytes = (int(value) for value in given)
        assert 0 < grid[0] <= count * per_row
        assert block[0] % 32 == 0
        runtime.copies.append(name)

        def run() -> None:
            # Not before the stream has come here: the descriptors are copied on it.
            table = np.frombuffer(ctypes.string_at(rows, count * DESCRIPTOR.itemsize), DESCRIPTOR)
            for item in range(count * per_row):
                device, pool, nbytes = (int(value) for value in table[item // per_row])
                begin = item % per_row * piece_bytes
                piece = min(piece_bytes, nbytes - begin)
                if piece > 0:
                    ends = (pool, device) if name == "gather" else (device, pool)
                    ctypes.memmove(ends[0] + begin, ends[1] + begin, piece)

        runtime.streams[self._thread.stream].give(run)


class Bindings:
    """`cuda.bindings.runtime`, as far as it is used."""

    cudaMemcpySrcAccessOrder = SimpleNamespace(cudaMemcpySrcAccessOrderStream=1)  # noqa: N815
    cudaMemcpyAttributes = SimpleNamespace  # noqa: N815

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def cudaMemcpyBatchAsync(  # noqa: N802
        self,
        targets: list[int],
        sources: list[int],
        sizes: list[int],
        count: int,
        attributes: list[SimpleNamespace],
        first_of: list[int],
        num_attributes: int,
        stream: int,
    ) -> tuple[int]:
        assert len(targets) == len(sources) == len(sizes) == count
        assert [entry.srcAccessOrder for entry in attributes] == [1]
        assert (first_of, num_attributes) == ([0], 1)
        self._runtime.copies.append("batch")
        for ends in zip(targets, sources, sizes, strict=True):
            self._runtime.streams[stream].give(partial(ctypes.memmove, *ends))
        return (0,)


class Driver:
    """The calls of libcuda."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def find_device(self, device_uuid: bytes) -> int:
        if device_uuid != DEVICE_UUID:
            raise HandleError(f"device_uuid: {device_uuid.hex()} is not there")
        return 0

    def address_range(self, address: int) -> tuple[int, int]:
        return next(place for place in self._runtime.exported.values() if place[0] == address)
