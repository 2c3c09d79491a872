"""CUDA's driver API, as much as doctor needs, by ctypes: libcuda.so.1 comes with the driver and nothing else.

Owns signatures and errors. A handle or a pointer of the device is an int. Used in child processes only: any
of these calls may hang when the driver does.
"""

from __future__ import annotations

import ctypes
import uuid
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p

LIBRARY = "libcuda.so.1"

HANDLE_BYTES = 64
NAME_BYTES = 256
PCI_BYTES = 32
LAZY_PEER_ACCESS = 1
"""The one flag that cuIpcOpenMemHandle knows, and asks for."""

REGISTER_PORTABLE = 1
"""The registration holds for all contexts."""


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", c_ubyte * HANDLE_BYTES),)


class _Uuid(ctypes.Structure):
    """CUuuid."""

    _fields_ = (("bytes", c_ubyte * 16),)


_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (POINTER(_Uuid), c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuMemcpyDtoH_v2": (c_void_p, c_ulonglong, c_size_t),
    "cuMemcpyHtoD_v2": (c_ulonglong, c_void_p, c_size_t),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuIpcGetMemHandle": (POINTER(_Handle), c_ulonglong),
    "cuIpcOpenMemHandle_v2": (POINTER(c_ulonglong), _Handle, c_uint),
    "cuIpcCloseMemHandle": (c_ulonglong,),
}


class DriverMissing(Exception):
    """There is no driver library here, or one too old."""


class CudaError(Exception):
    """A call was refused. `name` is the driver's, as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, call: str, code: int, name: str, meaning: str) -> None:
        super().__init__(f"{call}: {name} ({code}): {meaning}")
        self.call = call
        self.code = code
        self.name = name
        self.meaning = meaning


class CudaDriver:
    """The driver's library. One thread uses it, whose current context `use` sets."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Bind every function. Raises DriverMissing, naming the first that is not there."""
        self._library = library
        for name, types in _SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise DriverMissing(f"{LIBRARY} has no {name}: the driver is older than CUDA 11.4") from None
            function.argtypes = types
            function.restype = c_int

    @classmethod
    def load(cls) -> CudaDriver:
        """Load the system's driver library. Raises DriverMissing."""
        try:
            return cls(ctypes.CDLL(LIBRARY))
        except OSError as error:
            raise DriverMissing(str(error)) from error

    def init(self) -> None:
        """Begin. All but `version` needs it, once in a process."""
        self._call("cuInit", 0)

    def version(self) -> int:
        """Return the newest CUDA version that the driver can serve: 12080 is 12.8."""
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        return version.value

    def devices(self) -> list[int]:
        """Return every device that CUDA_VISIBLE_DEVICES lets this process see."""
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return [self._device(ordinal) for ordinal in range(count.value)]

    def _device(self, ordinal: int) -> int:
        device = c_int()
        self._call("cuDeviceGet", byref(device), ordinal)
        return device.value

    def name(self, device: int) -> str:
        """Return the product's name."""
        buffer = ctypes.create_string_buffer(NAME_BYTES)
        self._call("cuDeviceGetName", buffer, NAME_BYTES, device)
        return buffer.value.decode(errors="replace")

    def uuid(self, device: int) -> str:
        """Return what nvidia-smi -L calls it: GPU-, and the UUID in lower case."""
        found = _Uuid()
        self._call("cuDeviceGetUuid_v2", byref(found), device)
        return f"GPU-{uuid.UUID(bytes=bytes(found.bytes))}"

    def pci_address(self, device: int) -> str:
        """Return its place on the PCI bus as sysfs writes it: 0000:1b:00.0."""
        buffer = ctypes.create_string_buffer(PCI_BYTES)
        self._call("cuDeviceGetPCIBusId", buffer, PCI_BYTES, device)
        return buffer.value.decode(errors="replace").lower()

    def total_bytes(self, device: int) -> int:
        """Return its memory."""
        size = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(size), device)
        return size.value

    def use(self, device: int) -> None:
        """Make the device's primary context, which every library shares, the current one. Kept to the end."""
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def synchronize(self) -> None:
        """Wait for all that was begun."""
        self._call("cuCtxSynchronize")

    def allocate(self, num_bytes: int) -> int:
        """Return the address of memory of the device."""
        pointer = c_ulonglong()
        self._call("cuMemAlloc_v2", byref(pointer), num_bytes)
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give back what `allocate` returned."""
        self._call("cuMemFree_v2", pointer)

    def copy_to_host(self, address: int, pointer: int, num_bytes: int) -> None:
        """Copy from the device, and wait."""
        self._call("cuMemcpyDtoH_v2", address, pointer, num_bytes)

    def copy_to_device(self, pointer: int, address: int, num_bytes: int) -> None:
        """Copy to the device; from memory that is not registered it may end a little later."""
        self._call("cuMemcpyHtoD_v2", pointer, address, num_bytes)

    def register(self, address: int, num_bytes: int) -> None:
        """Pin memory of this process for copies by the device."""
        self._call("cuMemHostRegister_v2", address, num_bytes, REGISTER_PORTABLE)

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        self._call("cuMemHostUnregister", address)

    def export_memory(self, pointer: int) -> bytes:
        """Return the handle by which another process opens what `allocate` returned."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", byref(handle), pointer)
        return bytes(handle.reserved)

    def open_memory(self, handle: bytes) -> int:
        """Return the address, in this process, of what another one exported."""
        assert len(handle) == HANDLE_BYTES, f"a handle of {len(handle)} bytes"
        pointer = c_ulonglong()
        opened = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", byref(pointer), opened, LAZY_PEER_ACCESS)
        return pointer.value

    def close_memory(self, pointer: int) -> None:
        """Undo `open_memory`; the other process must not free it before."""
        self._call("cuIpcCloseMemHandle", pointer)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(
                name, code, self._text("cuGetErrorName", code), self._text("cuGetErrorString", code)
            )

    def _text(self, function: str, code: int) -> str:
        text = c_char_p()
        getattr(self._library, function)(code, byref(text))
        return text.value.decode(errors="replace") if text.value else f"error {code}"


def cuda_version() -> str:
    """Return the newest CUDA version that the driver here can serve, "12.8"; "none" without a driver."""
    try:
        version = CudaDriver.load().version()
    except (DriverMissing, CudaError):
        return "none"
    return f"{version // 1000}.{version % 1000 // 10}"
