"""The calls of NVIDIA's driver library that cupy does not give, by ctypes.

Owns nothing of the device. NOT RUN ON A GPU yet, but for the refusal where there is no driver.
"""

from __future__ import annotations

import ctypes
from typing import Any

from kvtier_ops.ipc import DEVICE_UUID_BYTES, HandleError

LIBRARY = "libcuda.so.1"


class Driver:
    """The library, loaded and begun. Any thread."""

    def __init__(self) -> None:
        """Load it. Raises HandleError where there is none."""
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise HandleError(
                f"device_uuid: no CUDA driver ({error}); install NVIDIA's, or give the container its devices"
            ) from error
        self._call("device_uuid", "cuInit", ctypes.c_uint(0))

    def uuids(self) -> list[bytes]:
        """Return the UUIDs of the devices that this process sees, in their order."""
        count = ctypes.c_int()
        self._call("device_uuid", "cuDeviceGetCount", ctypes.byref(count))
        return [self._uuid(number) for number in range(count.value)]

    def find_device(self, device_uuid: bytes) -> int:
        """Return the number of the device. Raises HandleError, with those that there are."""
        uuids = self.uuids()
        if device_uuid not in uuids:
            seen = ", ".join(uuid.hex() for uuid in uuids) or "none"
            raise HandleError(
                f"device_uuid: {device_uuid.hex()} is not a device that this process sees ({seen}); "
                "check CUDA_VISIBLE_DEVICES and the devices of the container"
            )
        return uuids.index(device_uuid)

    def address_range(self, address: int) -> tuple[int, int]:
        """Return the begin and the size of the allocation around an address of the current context.

        Raises HandleError.
        """
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call(
            "allocation_bytes",
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(size),
            ctypes.c_uint64(address),
        )
        return base.value, size.value

    def _uuid(self, number: int) -> bytes:
        device, uuid = ctypes.c_int(), (ctypes.c_ubyte * DEVICE_UUID_BYTES)()
        self._call("device_uuid", "cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
        # With MIG the first version gives the whole GPU's.
        self._call("device_uuid", "cuDeviceGetUuid_v2", uuid, device)
        return bytes(uuid)

    def _call(self, field: str, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise HandleError(f"{field}: {name} failed with CUDA error {status}")


def visible_devices() -> list[bytes]:
    """Return the UUIDs of the devices that this process sees. Raises HandleError without a driver."""
    return Driver().uuids()
