"""Device memory and an event of the engine, named for the process that copies: CUDA IPC.

Owns both exports. Importing it loads no CUDA library: cuda-bindings, which torch brings, is loaded when they
are called in the engine.

NOT RUN ON A GPU yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from kvtier_ops.ipc import CUDA_HANDLE_BYTES, HandleError, MemoryHandle, MemoryKind

EXPORT_FIX = (
    "memory of expandable segments and of vLLM's sleep mode (its cumem allocator) cannot be exported: start "
    "the engine with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False and without sleep mode, "
    "or set transfer = shm"
)


def export_cuda(tensor_ptr: int, size_bytes: int, block_stride_bytes: int, num_blocks: int) -> MemoryHandle:
    """Name a tensor in device memory (`tensor.data_ptr()`), in the engine, with its context current.

    The handle is the whole allocation's: torch cuts many tensors from one. The allocation must outlive the
    registration. Raises HandleError where the memory is not a device's, or is of a kind that CUDA IPC cannot
    export; the message says what to set. Raises it too where there is no cuda-bindings or no driver.
    """
    driver = _load_driver()
    attribute = driver.CUpointer_attribute
    memory_type = _cuda(
        driver.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, tensor_ptr),
        f"tensor_ptr: {tensor_ptr:#x} is no memory that CUDA knows",
    )
    if int(memory_type) != int(driver.CUmemorytype.CU_MEMORYTYPE_DEVICE):
        raise HandleError(f"tensor_ptr: {tensor_ptr:#x} is not device memory; set transfer = shm")
    capable = _cuda(
        driver.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, tensor_ptr),
        "tensor_ptr: CUDA does not say whether its memory can be exported",
    )
    if not int(capable):
        raise HandleError(f"tensor_ptr: CUDA IPC cannot export this memory; {EXPORT_FIX}")
    ordinal = _cuda(
        driver.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, tensor_ptr),
        "tensor_ptr: CUDA does not say on which device it is",
    )
    base, allocation_bytes = _cuda_pair(
        driver.cuMemGetAddressRange(driver.CUdeviceptr(tensor_ptr)),
        f"tensor_ptr: CUDA does not say in which allocation it lies; {EXPORT_FIX}",
    )
    exported = _cuda(
        driver.cuIpcGetMemHandle(base), f"tensor_ptr: its allocation cannot be exported; {EXPORT_FIX}"
    )
    device = _cuda(driver.cuDeviceGet(int(ordinal)), "device_uuid: the device is unknown")
    return MemoryHandle(
        MemoryKind.CUDA_IPC,
        _uuid_of(driver, device),
        _handle_bytes(exported),
        int(allocation_bytes),
        tensor_ptr - int(base),
        size_bytes,
        block_stride_bytes,
        num_blocks,
    )


class ExportedEvent:
    """An event of the engine that orders copies after its compute: `ComputeEvent` of a device.

    Why the order holds (`timeline.py`, and here): the helper makes its stream wait for the event, which takes
    its latest record at the time of the call; that is the one before the request, or a later one, and then
    the copy only waits longer. It answers a job when its own event behind the copy is over.
    NOT RUN ON A GPU yet.
    """

    def __init__(self, current_stream: Callable[[], int]) -> None:
        """Make the event in the current context. Raises HandleError.

        `current_stream`: the stream that is recorded (`lambda: torch.cuda.current_stream().cuda_stream`).
        """
        self._current_stream = current_stream
        self._driver = driver = _load_driver()
        flags = driver.CUevent_flags
        self._event = _cuda(
            driver.cuEventCreate(int(flags.CU_EVENT_DISABLE_TIMING) | int(flags.CU_EVENT_INTERPROCESS)),
            "event_handle: no event can be made",
        )
        exported = _cuda(driver.cuIpcGetEventHandle(self._event), "event_handle: it cannot be exported")
        self.handle = _handle_bytes(exported)

    def record(self) -> int:
        stream = self._current_stream()
        _cuda(
            (*self._driver.cuEventRecord(self._event, self._driver.CUstream(stream)), None),
            "event_handle: it cannot be recorded",
        )
        return 0

    def close(self) -> None:
        if self._event is not None:
            self._driver.cuEventDestroy(self._event)
            self._event = None


def _load_driver() -> Any:
    """Return cuda-bindings' driver module, begun."""
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)  # done already where the engine has a context
    except (ImportError, RuntimeError) as error:
        # Without NVIDIA's library cuda-bindings raises a RuntimeError of its own at the first call.
        raise HandleError(
            f"kind: CUDA memory needs cuda-bindings and a driver ({error}); set transfer = shm"
        ) from error
    if int(status) != 0:
        raise HandleError(f"kind: the CUDA driver does not begin ({status!s}); set transfer = shm")
    return driver


def _uuid_of(driver: Any, device: Any) -> bytes:
    # With MIG the first version gives the whole GPU's; from CUDA 13 on there is only one function.
    read = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid
    uuid = _cuda(read(device), "device_uuid: the driver does not give it")
    return bytes(uuid.bytes)


def _handle_bytes(exported: Any) -> bytes:
    # Not every version of cuda-bindings shows the bytes of a handle as an attribute; all give its address.
    return ctypes.string_at(int(exported.getPtr()), CUDA_HANDLE_BYTES)


def _cuda(answer: tuple[Any, ...], what: str) -> Any:
    """Return the one value of a call of cuda-bindings, or raise HandleError."""
    if int(answer[0]) != 0:
        raise HandleError(f"{what} ({answer[0]!s})")
    return answer[1]


def _cuda_pair(answer: tuple[Any, ...], what: str) -> tuple[Any, Any]:
    _cuda(answer, what)
    return answer[1], answer[2]
