"""The child processes of doctor's GPU checks: `python -P -m kvtier_server.doctor.cuda_probe ROLE ...`.

Each prints one JSON object: what was found, or {"missing": ...} without a driver, {"error": {...}} where a
call of the driver was refused. Owns what is tried, not what it means.

    devices                    driver version, devices
    register UUID DIRECTORY    pin a mapping of a file there, as the pool is
    exchange UUID              open memory of another process, copy both ways, compare every byte
    export UUID                that other process, which `exchange` begins
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
import numpy.typing as npt

from kvtier_server.doctor.cuda_driver import CudaDriver, CudaError, DriverMissing

EXCHANGE_BYTES = 64 << 20
"""Enough to see the link's speed, little enough to be free on a device that an engine has filled."""

REGISTER_BYTES = 2 << 20

ROUNDS = 5
"""Copies in each direction; the fastest is told, because the first ones pay for waking the link."""

Answer = dict[str, object]
Bytes = npt.NDArray[np.uint8]


class Refused(Exception):
    """The other process could not do its part; `answer` is what it said."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(str(answer))
        self.answer = answer


def main(arguments: Sequence[str]) -> None:
    """Do what the arguments say with the system's driver."""
    command = [sys.executable, "-P", "-m", "kvtier_server.doctor.cuda_probe"]
    say(answer(CudaDriver.load, arguments, command))


def answer(load: Callable[[], CudaDriver], arguments: Sequence[str], command: Sequence[str]) -> Answer:
    """Do what the arguments say; `command` begins another process like this one."""
    role, *rest = arguments
    try:
        driver = load()
        if role == "devices":
            return devices(driver)
        driver.init()
        uuid, *more = rest
        use(driver, uuid)
        if role == "register":
            return register(driver, *more)
        if role == "exchange":
            return exchange(driver, [*command, "export", uuid])
        return export(driver)
    except DriverMissing as error:
        return {"missing": str(error)}
    except CudaError as error:
        return {"error": told(error)}
    except Refused as error:
        return error.answer


def say(said: Answer) -> None:
    """Write one answer, a line of JSON, to whoever began this process."""
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def told(error: CudaError) -> Answer:
    """Write an error as JSON has it."""
    return {"call": error.call, "code": error.code, "name": error.name, "meaning": error.meaning}


def devices(driver: CudaDriver) -> Answer:
    """Name the driver and the devices. A driver without devices has a version too."""
    version = driver.version()
    try:
        driver.init()
        found = [
            {
                "uuid": driver.uuid(device),
                "name": driver.name(device),
                "pci_address": driver.pci_address(device),
                "total_bytes": driver.total_bytes(device),
            }
            for device in driver.devices()
        ]
    except CudaError as error:
        return {"version": version, "error": told(error)}
    return {"version": version, "devices": found}


def use(driver: CudaDriver, uuid: str) -> None:
    """Take the device with this UUID. Its number may differ between two processes, its UUID does not."""
    found = [device for device in driver.devices() if driver.uuid(device) == uuid]
    if not found:
        raise Refused({"missing": f"there is no device {uuid} any more"})
    driver.use(found[0])


def register(driver: CudaDriver, directory: str) -> Answer:
    """Pin a shared mapping of a file in the pool's file system, which is gone afterwards."""
    num_bytes = max(REGISTER_BYTES, os.statvfs(directory).f_bsize)
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, num_bytes)
        os.posix_fallocate(fd, 0, num_bytes)
        mapping = mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    began = time.perf_counter()
    driver.register(address, num_bytes)
    seconds = time.perf_counter() - began
    driver.unregister(address)
    return {"bytes": num_bytes, "seconds": seconds}


def export(driver: CudaDriver) -> Answer:
    """Fill memory of the device, show it to the other process, and see what that has written there."""
    host = _host_memory()
    pointer = driver.allocate(host.size)
    host[:] = pattern(0)
    driver.copy_to_device(pointer, host.ctypes.data, host.size)
    driver.synchronize()
    say({"handle": driver.export_memory(pointer).hex(), "bytes": host.size})
    if not sys.stdin.readline():
        return {}  # nobody is left to tell
    host[:] = 0
    driver.copy_to_host(host.ctypes.data, pointer, host.size)
    wrong = _count_wrong(host, pattern(1))
    driver.free(pointer)  # the other process has closed it before it asked
    return {"wrong": wrong}


def exchange(driver: CudaDriver, exporter: Sequence[str]) -> Answer:
    """Read what another process has put into the device's memory, write there, have it compared."""
    other = subprocess.Popen(exporter, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdin is not None, "a pipe was asked for"
        assert other.stdout is not None, "a pipe was asked for"
        exported = _heard(other.stdout)
        if "handle" not in exported:
            raise Refused(exported)
        found = _copy_both_ways(driver, bytes.fromhex(str(exported["handle"])))
        other.stdin.write("compare\n")
        other.stdin.close()
        compared = _heard(other.stdout)
        if "wrong" not in compared:
            raise Refused(compared)
        return {**found, "wrong_there": compared["wrong"]}
    finally:
        other.kill()
        other.wait()


def _copy_both_ways(driver: CudaDriver, handle: bytes) -> Answer:
    host = _host_memory()
    pointer = driver.open_memory(handle)
    is_pinned = True
    try:
        driver.register(host.ctypes.data, host.size)
    except CudaError:
        is_pinned = False  # another check says why
    to_host_s = _fastest(lambda: driver.copy_to_host(host.ctypes.data, pointer, host.size))
    wrong_here = _count_wrong(host, pattern(0))
    host[:] = pattern(1)

    def to_device() -> None:
        driver.copy_to_device(pointer, host.ctypes.data, host.size)
        driver.synchronize()

    to_device_s = _fastest(to_device)
    driver.close_memory(pointer)
    if is_pinned:
        driver.unregister(host.ctypes.data)
    return {
        "bytes": host.size,
        "pinned": is_pinned,
        "to_host_s": to_host_s,
        "to_device_s": to_device_s,
        "wrong_here": wrong_here,
    }


def pattern(seed: int) -> Bytes:
    """Return bytes in which no two words are equal, and no word of one seed is another seed's."""
    words = np.arange(EXCHANGE_BYTES // 8, dtype=np.uint64) * np.uint64(2) + np.uint64(seed)
    return (words * np.uint64(0x9E3779B97F4A7C15)).view(np.uint8)


def _host_memory() -> Bytes:
    """Return memory whose pages are there, on a page's boundary."""
    memory = np.frombuffer(mmap.mmap(-1, EXCHANGE_BYTES), np.uint8)
    ctypes.memset(memory.ctypes.data, 1, memory.size)
    return memory


def _count_wrong(found: Bytes, expected: Bytes) -> int:
    return int(np.count_nonzero(found != expected))


def _fastest(copy: Callable[[], None]) -> float:
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        copy()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _heard(stream: IO[str]) -> Answer:
    line = stream.readline()
    if not line:
        raise Refused({"missing": "the process that exports the memory has ended without a word"})
    said: Answer = json.loads(line)
    return said


if __name__ == "__main__":
    main(sys.argv[1:])
