"""Typed handles of an engine's KV tensors: what they say, how they are checked, made and opened.

Owns the handle, its checks, and POSIX shared memory, which is the path of CUDA IPC without a GPU; the export
of device memory is `cuda_export.py`'s. Moves no byte.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass

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
