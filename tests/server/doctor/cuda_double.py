"""A stand-in for libcuda.so.1, whose devices' memory are files; as a program it is `cuda_probe` on top of it.

Checks every argument against the types that were declared for its function, as ctypes would. Set up by the
environment: CUDA_DOUBLE is a directory for the memory, CUDA_DOUBLE_DEVICES how many devices there are,
CUDA_DOUBLE_FAULT what goes wrong:

    cuInit=802      the call answers with this error
    cuInit=hang     the call never returns
    cuInit=die      the call ends the process
    flip            of what is written to a device one byte is wrong
"""

# ruff: noqa: N802 - functions are called what CUDA calls them

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, cast

from kvtier_server.doctor import cuda_probe
from kvtier_server.doctor.cuda_driver import HANDLE_BYTES, CudaDriver

ERRORS = {
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    46: b"CUDA_ERROR_DEVICE_UNAVAILABLE",
    100: b"CUDA_ERROR_NO_DEVICE",
    201: b"CUDA_ERROR_INVALID_CONTEXT",
    802: b"CUDA_ERROR_SYSTEM_NOT_READY",
}
VERSION = 12080
EXCHANGE_BYTES = 1 << 20
"""Instead of what a device takes: files are slower."""


class Function:
    """One function of the library."""

    def __init__(self, name: str, body: Any) -> None:
        self.name = name
        self.body = body
        self.argtypes: tuple[Any, ...] = ()
        self.restype: object = None

    def __call__(self, *arguments: Any) -> int:
        assert self.restype is ctypes.c_int, self.name
        assert len(arguments) == len(self.argtypes), self.name
        for declared, argument in zip(self.argtypes, arguments, strict=True):
            declared.from_param(argument)
        name, _, effect = os.environ.get("CUDA_DOUBLE_FAULT", "").partition("=")
        if name == self.name:
            if effect == "hang":
                threading.Event().wait()
            if effect == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            return int(effect)
        return self.body(*arguments) or 0


class Library:
    """The functions that CudaDriver binds."""

    def __init__(self) -> None:
        self._directory = Path(os.environ["CUDA_DOUBLE"])
        self._numbers = itertools.count(1)
        self._memory: dict[int, Path] = {}
        self._registered: dict[int, int] = {}
        self._functions: dict[str, Function] = {}

    def __getattr__(self, name: str) -> Function:
        body = getattr(type(self), f"do_{name}", None)
        if body is None:
            raise AttributeError(name)
        return self._functions.setdefault(name, Function(name, lambda *arguments: body(self, *arguments)))

    def do_cuInit(self, flags: int) -> None:
        assert flags == 0

    def do_cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = VERSION

    def do_cuGetErrorName(self, code: int, text: Any) -> None:
        text._obj.value = ERRORS.get(code)

    def do_cuGetErrorString(self, code: int, text: Any) -> None:
        text._obj.value = b"said the double"

    def do_cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = int(os.environ.get("CUDA_DOUBLE_DEVICES", "1"))

    def do_cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device._obj.value = 10 + ordinal

    def do_cuDeviceGetName(self, name: Any, size: int, device: int) -> None:
        name.value = b"Double"

    def do_cuDeviceGetUuid_v2(self, uuid: Any, device: int) -> None:
        uuid._obj.bytes[15] = device - 10

    def do_cuDeviceGetPCIBusId(self, name: Any, size: int, device: int) -> None:
        name.value = b"0000:8A:00.0"

    def do_cuDeviceTotalMem_v2(self, size: Any, device: int) -> None:
        size._obj.value = 141 << 30

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context._obj.value = 0x1000 + device

    def do_cuCtxSetCurrent(self, context: Any) -> None:
        assert context.value >= 0x1000

    def do_cuCtxSynchronize(self) -> None:
        return

    def do_cuMemAlloc_v2(self, pointer: Any, size: int) -> None:
        pointer._obj.value = next(self._numbers) << 40
        path = self._directory / f"{os.getpid()}-{pointer._obj.value:x}"
        path.write_bytes(bytes(size))
        self._memory[pointer._obj.value] = path

    def do_cuMemFree_v2(self, pointer: int) -> None:
        self._memory.pop(pointer).unlink()

    def do_cuMemcpyDtoH_v2(self, address: int, pointer: int, size: int) -> None:
        ctypes.memmove(address, self._memory[pointer].read_bytes()[:size], size)

    def do_cuMemcpyHtoD_v2(self, pointer: int, address: int, size: int) -> None:
        content = bytearray(ctypes.string_at(address, size))
        if os.environ.get("CUDA_DOUBLE_FAULT") == "flip":
            content[12345] ^= 1
        self._memory[pointer].write_bytes(content)

    def do_cuMemHostRegister_v2(self, address: int, size: int, flags: int) -> None:
        assert address % 4096 == 0
        self._registered[address] = size

    def do_cuMemHostUnregister(self, address: int) -> None:
        del self._registered[address]

    def do_cuIpcGetMemHandle(self, handle: Any, pointer: int) -> None:
        handle._obj.reserved[:] = str(self._memory[pointer]).encode().ljust(HANDLE_BYTES, b"\0")

    def do_cuIpcOpenMemHandle_v2(self, pointer: Any, handle: Any, flags: int) -> None:
        assert flags == 1
        pointer._obj.value = next(self._numbers) << 44
        self._memory[pointer._obj.value] = Path(bytes(handle.reserved).rstrip(b"\0").decode())

    def do_cuIpcCloseMemHandle(self, pointer: int) -> None:
        del self._memory[pointer]


def driver() -> CudaDriver:
    """Bind the double as the library would be bound."""
    return CudaDriver(cast("ctypes.CDLL", Library()))


if __name__ == "__main__":
    cuda_probe.EXCHANGE_BYTES = EXCHANGE_BYTES
    cuda_probe.say(cuda_probe.answer(driver, sys.argv[1:], [sys.executable, __file__]))
