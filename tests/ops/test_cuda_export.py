"""Exporting device memory and an event: what is asked of cuda-bindings (a double), and what is refused.

It proves nothing about a driver. It keeps the answers' form: a tuple that begins with the status.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtier_ops.cuda_export import ExportedEvent, export_cuda
from kvtier_ops.ipc import HandleError, MemoryHandle, MemoryKind
from kvtier_ops.pinning import HOST_REGISTER_FLAGS, PinnedPool, cuda_registrar

BASE, SIZE = 0x7000_0000, 1 << 20
UUID = bytes(range(16))
DEVICE, HOST = 2, 1
WAIT_S = 20.0


class Exported:
    """A handle as cuda-bindings gives it: its bytes lie at an address."""

    def __init__(self, fill: int) -> None:
        self._bytes = ctypes.create_string_buffer(bytes([fill]) * 64, 64)

    def getPtr(self) -> int:  # noqa: N802 - cuda-bindings' name
        return ctypes.addressof(self._bytes)


class Driver(ModuleType):
    """`cuda.bindings.driver`, as far as it is used. One allocation; `failing` calls answer status 1."""

    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE=1,
        CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE=2,
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=3,
    )
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=DEVICE)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2, CU_EVENT_INTERPROCESS=4)
    CUdeviceptr = CUstream = staticmethod(int)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.attributes = {1: DEVICE, 2: 1, 3: 0}
        self.failing = ""
        self.recorded: list[tuple[int, int]] = []
        self.destroyed: list[int] = []
        self.flags = 0

    def _answer(self, name: str, *values: object) -> tuple[object, ...]:
        return (1, None, None) if name == self.failing else (0, *values)

    def cuInit(self, flags: int) -> tuple[int]:  # noqa: N802
        return (100 if self.failing == "cuInit" else flags,)

    def cuPointerGetAttribute(self, attribute: int, address: int) -> tuple[object, ...]:  # noqa: N802
        return self._answer(
            "cuPointerGetAttribute" if address >= BASE else self.failing, self.attributes[attribute]
        )

    def cuMemGetAddressRange(self, address: int) -> tuple[object, ...]:  # noqa: N802
        return self._answer("cuMemGetAddressRange", BASE, SIZE)

    def cuIpcGetMemHandle(self, address: int) -> tuple[object, ...]:  # noqa: N802
        assert address == BASE, "of the allocation, not of the tensor"
        return self._answer("cuIpcGetMemHandle", Exported(7))

    def cuDeviceGet(self, ordinal: int) -> tuple[object, ...]:  # noqa: N802
        return self._answer("cuDeviceGet", ordinal)

    def cuDeviceGetUuid_v2(self, device: int) -> tuple[object, ...]:  # noqa: N802
        return self._answer("cuDeviceGetUuid_v2", SimpleNamespace(bytes=UUID))

    def cuEventCreate(self, flags: int) -> tuple[object, ...]:  # noqa: N802
        self.flags = flags
        return self._answer("cuEventCreate", 77)

    def cuIpcGetEventHandle(self, event: int) -> tuple[object, ...]:  # noqa: N802
        assert event == 77
        return self._answer("cuIpcGetEventHandle", Exported(9))

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:  # noqa: N802
        self.recorded.append((event, stream))
        return (1 if self.failing == "cuEventRecord" else 0,)

    def cuEventDestroy(self, event: int) -> tuple[int]:  # noqa: N802
        self.destroyed.append(event)
        return (0,)


class Runtime(ModuleType):
    """`cuda.bindings.runtime`, as far as pinning uses it."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.registered: dict[int, int] = {}
        self.devices: list[int] = []
        self._thread = threading.local()

    def cudaSetDevice(self, device: int) -> tuple[int]:  # noqa: N802
        self.devices.append(device)
        self._thread.device = device
        return (0,)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> tuple[int]:  # noqa: N802
        assert flags == HOST_REGISTER_FLAGS
        if len(self.registered) == 2:
            return (2,)
        self.registered[address] = nbytes
        return (0,)

    def cudaHostUnregister(self, address: int) -> tuple[int]:  # noqa: N802
        assert self._thread.device == 3, "the thread that closes may have another device, or none"
        del self.registered[address]
        return (0,)


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = ModuleType("cuda.bindings")
    made.driver, made.runtime = Driver(), Runtime()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", made)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made.driver)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made.runtime)
    return made


def test_a_tensor_is_named_by_its_allocation_and_its_place_in_it(bindings: Any) -> None:
    handle = export_cuda(BASE + 4096, 8192, 1024, 8)
    assert handle == MemoryHandle(MemoryKind.CUDA_IPC, UUID, b"\x07" * 64, SIZE, 4096, 8192, 1024, 8)
    handle.check(1024)


def test_memory_of_expandable_segments_is_refused_with_the_fix(bindings: Any) -> None:
    bindings.driver.attributes[2] = 0
    with pytest.raises(HandleError, match=r"^tensor_ptr: .*expandable_segments:False.*or set transfer = shm"):
        export_cuda(BASE, 8192, 1024, 8)


def test_memory_that_is_no_devices_is_refused(bindings: Any) -> None:
    bindings.driver.attributes[1] = HOST
    with pytest.raises(HandleError, match=r"^tensor_ptr: .*is not device memory"):
        export_cuda(BASE, 8192, 1024, 8)


@pytest.mark.parametrize(
    ("failing", "field"),
    [
        ("cuInit", "kind"),
        ("cuPointerGetAttribute", "tensor_ptr"),
        ("cuMemGetAddressRange", "tensor_ptr"),
        ("cuIpcGetMemHandle", "tensor_ptr"),
        ("cuDeviceGet", "device_uuid"),
        ("cuDeviceGetUuid_v2", "device_uuid"),
    ],
)
def test_a_call_that_fails_is_a_refusal_that_names_the_field(bindings: Any, failing: str, field: str) -> None:
    bindings.driver.failing = failing
    with pytest.raises(HandleError, match=f"^{field}: "):
        export_cuda(BASE, 8192, 1024, 8)


def test_an_event_is_made_for_other_processes_and_records_the_stream_of_the_moment(bindings: Any) -> None:
    streams = iter([5, 6])
    event = ExportedEvent(lambda: next(streams))
    assert event.handle == b"\x09" * 64
    assert bindings.driver.flags == 2 | 4
    assert event.record() == event.record() == 0, "an event has no value to wait for"
    assert bindings.driver.recorded == [(77, 5), (77, 6)]
    bindings.driver.failing = "cuEventRecord"
    event._current_stream = lambda: 7
    with pytest.raises(HandleError, match=r"^event_handle: "):
        event.record()
    event.close()
    event.close()
    assert bindings.driver.destroyed == [77]


def test_an_engine_pins_the_pool_piece_by_piece_and_says_which_piece_it_could_not(bindings: Any) -> None:
    pool = np.zeros(4 * 4096, np.uint8)
    said: list[str] = []
    pinned = PinnedPool(pool, cuda_registrar(3), 4096, said.append)
    assert not pinned.wait(WAIT_S)
    assert pinned.ready_bytes == 2 * 4096
    assert "4096 bytes of the pool at 8192 cannot be registered" in pinned.error
    assert set(bindings.runtime.devices) == {3}
    pinned.close()
    assert said == [pinned.error]
    assert bindings.runtime.registered == {}
