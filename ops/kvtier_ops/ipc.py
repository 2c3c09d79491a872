"""Typed handles of an engine's KV tensors: what they say, how they are checked, made and opened.

Owns the handle, its checks and both exports: CUDA IPC and POSIX shared memory, which is the same path without
a GPU. Moves no byte. Importing it loads no CUDA library: `export_cuda` and `ExportedEvent` load
cuda-bindings, which torch brings, when they are called in the engine.

NOT RUN ON A GPU yet: `export_cuda` and `ExportedEvent`. All else runs in the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SHARED_DIRECTORY = "/dev/shm"
DEVICE_UUID_BYTES = 16
CUDA_HANDLE_BYTES = 64
"""Of cudaIpcMemHandle_t and of cudaIpcEventHandle_t."""

MAX_ALLOCATION_BYTES = 1 << 47
"""What a process can address. Below it, no sum of two fields overflows 64 bits."""

MAX_BLOCKS = 1 << 32
"""Block ids are 32 bits on the wire."""

MAX_TENSORS = 1024
"""Tensors of one registration, all groups together: each is compared with every other of its group."""

MAX_COMPARED_BLOCKS = 1 << 24
"""How many blocks the comparisons of tensors of different strides look at: a third of a second."""

_SHARED_NAME = re.compile(rb"kvtier-mem-[0-9a-f]{32}")
_COMPARED_AT_ONCE = 1 << 18

EXPORT_FIX = (
    "memory of expandable segments and of vLLM's sleep mode (its cumem allocator) cannot be exported: start "
    "the engine with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False and without sleep mode, "
    "or set transfer = shm"
)

Bytes = npt.NDArray[np.uint8]


class HandleError(ValueError):
    """The memory cannot be exported, registered or opened. The message begins with the wrong field."""


class MemoryKind(enum.IntEnum):
    """What kind of memory a handle names; the numbers are the protocol's."""

    CUDA_IPC = 1
    POSIX_SHM = 2


@dataclass(frozen=True, slots=True)
class MemoryHandle:
    """One KV tensor inside an allocation of another process: `num_blocks` pages, evenly spaced.

    allocation  |<- offset_bytes ->| page 0 .. | page 1 .. |      |
                                   |<-stride ->|
                                   |<----- size_bytes ---->|
    """

    kind: MemoryKind
    device_uuid: bytes
    """16 bytes; empty for shared memory."""
    handle: bytes
    """cudaIpcMemHandle_t, or the name of the shared memory."""
    allocation_bytes: int
    offset_bytes: int
    size_bytes: int
    block_stride_bytes: int
    num_blocks: int

    def check(self, page_bytes: int) -> None:
        """Raise HandleError, naming the field, unless every page lies inside tensor and allocation."""
        self._check_names()
        positive = ("allocation_bytes", "size_bytes", "block_stride_bytes", "num_blocks")
        for field in (*positive, "offset_bytes"):
            value = getattr(self, field)
            limit = MAX_BLOCKS if field == "num_blocks" else MAX_ALLOCATION_BYTES
            if not (field in positive) <= value <= limit:
                raise HandleError(f"{field}: {value} is not between {int(field in positive)} and {limit}")
        if self.offset_bytes + self.size_bytes > self.allocation_bytes:
            raise HandleError(
                f"size_bytes: {self.size_bytes} bytes at offset {self.offset_bytes} end behind the "
                f"allocation of {self.allocation_bytes} bytes"
            )
        if page_bytes > self.block_stride_bytes:
            raise HandleError(
                f"block_stride_bytes: blocks {self.block_stride_bytes} bytes apart cannot hold pages of "
                f"{page_bytes} bytes"
            )
        needed = (self.num_blocks - 1) * self.block_stride_bytes + page_bytes
        if needed > self.size_bytes:
            raise HandleError(
                f"num_blocks: {self.num_blocks} blocks, {self.block_stride_bytes} bytes apart, need "
                f"{needed} bytes; the tensor has {self.size_bytes}"
            )

    def _check_names(self) -> None:
        if self.kind not in tuple(MemoryKind):
            raise HandleError(f"kind: {self.kind!r} is not a kind of memory that this version knows")
        uuid_bytes = DEVICE_UUID_BYTES if self.kind is MemoryKind.CUDA_IPC else 0
        if len(self.device_uuid) != uuid_bytes:
            raise HandleError(
                f"device_uuid: {len(self.device_uuid)} bytes; {self.kind.name} needs {uuid_bytes}"
            )
        if self.kind is MemoryKind.CUDA_IPC and len(self.handle) != CUDA_HANDLE_BYTES:
            raise HandleError(f"handle: {len(self.handle)} bytes; CUDA_IPC needs {CUDA_HANDLE_BYTES}")
        if self.kind is MemoryKind.POSIX_SHM and not _SHARED_NAME.fullmatch(self.handle):
            raise HandleError(
                f"handle: {self.handle[:80]!r} is not a name that export_shared gives: kvtier-mem- and 32 "
                "hex digits"
            )

    @property
    def allocation(self) -> tuple[MemoryKind, bytes, bytes]:
        """What two handles of one allocation have in common."""
        return self.kind, self.device_uuid, self.handle


def check_registration(groups: Sequence[Sequence[tuple[MemoryHandle, int]]]) -> None:
    """Check every (handle, page bytes) of a registration, and that no two tensors of a group share a byte.

    Layers that interleave in one allocation are normal. So are tensors that several *groups* share: engines
    with hybrid models give one buffer to a layer of each group and keep their block ids apart.
    Raises HandleError.
    """
    count = sum(map(len, groups))
    if count > MAX_TENSORS:
        raise HandleError(f"groups: {count} tensors; one registration may have {MAX_TENSORS}")
    for group, tensors in enumerate(groups):
        sizes: dict[tuple[MemoryKind, bytes, bytes], int] = {}
        for index, (handle, page_bytes) in enumerate(tensors):
            try:
                handle.check(page_bytes)
            except HandleError as error:
                raise HandleError(f"{error} (tensor {index} of group {group})") from None
            if sizes.setdefault(handle.allocation, handle.allocation_bytes) != handle.allocation_bytes:
                raise HandleError(
                    f"allocation_bytes: tensor {index} of group {group} gives {handle.allocation_bytes}, "
                    "another tensor of the same allocation gives another size"
                )
        pair = find_overlap(tensors)
        if pair:
            raise HandleError(f"offset_bytes: tensors {pair[0]} and {pair[1]} of group {group} overlap")


def find_overlap(tensors: Sequence[tuple[MemoryHandle, int]]) -> tuple[int, int] | None:
    """Return the places of two tensors of (handle, page bytes) that share a byte, or None.

    The handles have passed `check`. Raises HandleError where tensors of different strides, one among the
    other's pages, have too many blocks to compare, all pairs together.
    """
    compared = 0
    by_allocation: dict[tuple[MemoryKind, bytes, bytes], list[int]] = {}
    for index, (handle, _) in enumerate(tensors):
        by_allocation.setdefault(handle.allocation, []).append(index)
    for indexes in by_allocation.values():
        for place, second in enumerate(indexes):
            for first in indexes[:place]:
                compared += _blocks_to_compare(*tensors[first], *tensors[second])
                if compared > MAX_COMPARED_BLOCKS:
                    raise HandleError(
                        f"num_blocks: tensors of different strides share an allocation, and more than "
                        f"{MAX_COMPARED_BLOCKS} blocks would have to be compared"
                    )
                if _pages_overlap(*tensors[first], *tensors[second]):
                    return first, second
    return None


def _blocks_to_compare(first: MemoryHandle, first_page: int, second: MemoryHandle, second_page: int) -> int:
    """Return how many blocks have to be looked at to tell whether two tensors share a byte."""
    if first.block_stride_bytes == second.block_stride_bytes:
        return 0
    end = first.offset_bytes + (first.num_blocks - 1) * first.block_stride_bytes + first_page
    other_end = second.offset_bytes + (second.num_blocks - 1) * second.block_stride_bytes + second_page
    if end <= second.offset_bytes or other_end <= first.offset_bytes:
        return 0
    return min(first.num_blocks, second.num_blocks)


def _pages_overlap(first: MemoryHandle, first_page: int, second: MemoryHandle, second_page: int) -> bool:
    start, stride = first.offset_bytes, first.block_stride_bytes
    other, other_stride = second.offset_bytes, second.block_stride_bytes
    end = start + (first.num_blocks - 1) * stride + first_page
    other_end = other + (second.num_blocks - 1) * other_stride + second_page
    if end <= other or other_end <= start:
        return False
    if stride != other_stride:
        if first.num_blocks > second.num_blocks:
            return _compare_blocks(second, second_page, first, first_page)
        return _compare_blocks(first, first_page, second, second_page)
    # Page j of the second minus page i of the first is `distance + (j - i) * stride`: they share a byte where
    # that lies between -second_page and first_page, both excluded.
    distance = other - start
    lowest = -((distance + second_page - 1) // stride)
    highest = (first_page - 1 - distance) // stride
    return max(lowest, 1 - first.num_blocks) <= min(highest, second.num_blocks - 1)


def _compare_blocks(few: MemoryHandle, few_page: int, many: MemoryHandle, many_page: int) -> bool:
    """Look at each page of `few`, and at the one or two pages of `many` around it."""
    for first in range(0, few.num_blocks, _COMPARED_AT_ONCE):
        blocks = np.arange(first, min(first + _COMPARED_AT_ONCE, few.num_blocks), dtype=np.int64)
        starts = few.offset_bytes - many.offset_bytes + blocks * few.block_stride_bytes
        # The last page of `many` that begins before the end of this one is the only one that can reach it:
        # those before it end earlier.
        last = (starts + few_page - 1) // many.block_stride_bytes
        last = np.minimum(last, many.num_blocks - 1)
        reaches = (last >= 0) & (last * many.block_stride_bytes + many_page > starts)
        if reaches.any():
            return True
    return False


class SharedAllocation:
    """POSIX shared memory of this process, for engines on the CPU and for tests.

    The file lives until `close`, or until whoever opened it finds its exporter dead: this process holds the
    file's lock as long as it lives (a fork shares it).
    """

    def __init__(self, allocation_bytes: int) -> None:
        """Make and back the file, mode 0600, under a random name. Raises OSError (ENOSPC)."""
        self.name = f"kvtier-mem-{secrets.token_hex(16)}"
        self._path = f"{SHARED_DIRECTORY}/{self.name}"
        self._fd = os.open(
            self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            os.posix_fallocate(self._fd, 0, allocation_bytes)
            self._data = np.frombuffer(mmap.mmap(self._fd, allocation_bytes), np.uint8)
        except BaseException:
            self.close()
            raise

    @property
    def data(self) -> Bytes:
        """The memory, shape (allocation_bytes,). Stays valid after `close` as long as it is held."""
        return self._data

    def close(self) -> None:
        """Remove the name; who has opened it keeps the memory. Safe to repeat."""
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1


def export_shared(
    allocation: SharedAllocation, offset_bytes: int, size_bytes: int, block_stride_bytes: int, num_blocks: int
) -> MemoryHandle:
    """Name a tensor in shared memory. Checks nothing: who registers it does."""
    return MemoryHandle(
        MemoryKind.POSIX_SHM,
        b"",
        allocation.name.encode(),
        allocation.data.size,
        offset_bytes,
        size_bytes,
        block_stride_bytes,
        num_blocks,
    )


def open_shared(handle: MemoryHandle) -> Bytes:
    """Map the whole allocation of another process, shape (allocation_bytes,); unmapped with the last view.

    Raises HandleError: unknown, not ours, of another size, or its exporter is dead; its file is removed then.
    """
    path = f"{SHARED_DIRECTORY}/{handle.handle.decode()}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise HandleError(f"handle: {path} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise HandleError(f"handle: {path} is not a regular file of uid {os.geteuid()}")
        if status.st_size != handle.allocation_bytes:
            raise HandleError(
                f"allocation_bytes: {handle.allocation_bytes}, but {path} has {status.st_size} bytes"
            )
        if _is_free(fd):
            remove_shared(handle)
            raise HandleError(f"handle: the process that made {path} is gone")
        return np.frombuffer(mmap.mmap(fd, handle.allocation_bytes), np.uint8)
    finally:
        os.close(fd)


def remove_orphan(handle: MemoryHandle) -> bool:
    """Remove the file of an exporter that died; False if it lives or there is no such file."""
    try:
        fd = os.open(f"{SHARED_DIRECTORY}/{handle.handle.decode()}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        orphaned = _is_free(fd)
        if orphaned:
            remove_shared(handle)
        return orphaned
    finally:
        os.close(fd)


def remove_shared(handle: MemoryHandle) -> None:
    """Remove the file, whoever made it; who has it mapped keeps the memory."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{SHARED_DIRECTORY}/{handle.handle.decode()}")


def _is_free(fd: int) -> bool:
    """Tell whether nobody holds the file's lock any more."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
    """An event of the engine that orders copies after its compute.

    Why the order holds: the engine records the event on its compute stream *before* it asks for the copy, and
    the helper makes its stream wait for the event *after* it has read the request. A wait takes the latest
    record at the time of the call, which is the one before the request, or a later one, and then the copy
    only waits longer. The other way round, the helper answers a job when its own event behind the copy is
    over; an engine that uses the blocks after the answer uses them after the copy. NOT RUN ON A GPU yet.
    """

    def __init__(self) -> None:
        """Make the event in the current context. Raises HandleError."""
        self._driver = driver = _load_driver()
        flags = driver.CUevent_flags
        self._event = _cuda(
            driver.cuEventCreate(int(flags.CU_EVENT_DISABLE_TIMING) | int(flags.CU_EVENT_INTERPROCESS)),
            "event_handle: no event can be made",
        )
        exported = _cuda(driver.cuIpcGetEventHandle(self._event), "event_handle: it cannot be exported")
        self.handle = _handle_bytes(exported)

    def record(self, stream: int) -> None:
        """Mark what the stream (`torch.cuda.current_stream().cuda_stream`) was given so far."""
        _cuda(
            (*self._driver.cuEventRecord(self._event, self._driver.CUstream(stream)), None),
            "event_handle: it cannot be recorded",
        )

    def close(self) -> None:
        """Destroy the event, after the registration that names it was closed. Safe to repeat."""
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
