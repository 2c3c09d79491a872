"""The pool: one shared file mapping that holds the slots and their table.

`MappedPool` is what every process maps. `Pool` is the daemon's, who creates the file, backs its memory and
alone writes its tables. Owns the file and the mapping; which slot holds what is the daemon's core to decide.

A pool file is never truncated and never hole-punched, because a process that still maps it would be killed by
SIGBUS: another size or format is a new file renamed over it, and the old one lives on until its last mapping
is gone.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvtier_ops.capacity import PoolTooLarge, check_capacity
from kvtier_ops.directory import PoolDirectoryError, PoolError, default_pool_directory, open_directory
from kvtier_ops.header import (
    FIRST_GENERATION_BITS,
    HEADER_BYTES,
    PAGE_BYTES,
    POOL_FILE,
    RECORD_BYTES,
    REGISTRY_HALF_BYTES,
    REGISTRY_OFFSET,
    SLAB_TABLE_BYTES,
    SLAB_TABLE_OFFSET,
    SLOT_TABLE_OFFSET,
    PoolFormatError,
    PoolHeader,
    read_header,
)
from kvtier_ops.layout import SLOT_UNIT_BYTES, slot_offset
from kvtier_ops.locks import GATES_DIRECTORY, OWNERS_DIRECTORY, DaemonLock, PoolBusy
from kvtier_ops.registry import Registry
from kvtier_ops.slab_table import SlabTable
from kvtier_ops.slot_table import MAX_KEY_BYTES, MAX_PARTS, SlotRecord, SlotState, SlotTable

__all__ = [
    "MAX_KEY_BYTES",
    "MAX_PARTS",
    "RECORD_BYTES",
    "MappedPool",
    "Pool",
    "PoolBusy",
    "PoolClosed",
    "PoolDirectoryError",
    "PoolError",
    "PoolFormatError",
    "PoolMismatch",
    "PoolTooLarge",
    "SlotRecord",
    "SlotState",
    "check_capacity",
    "default_pool_directory",
]

_NEW_FILE = POOL_FILE + ".new"
_OPEN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC

Bytes = npt.NDArray[np.uint8]


class PoolMismatch(PoolError):
    """The file at the path is a pool, but not the one the daemon named: it was replaced. Attach again."""


class PoolClosed(PoolError):
    """The pool was used after `close`: a bug of the caller."""


class _Areas:
    """The views into one mapping. The mapping lives as long as any of them, or any array cut from them."""

    __slots__ = ("data", "registry", "slabs", "slots")

    def __init__(self, fd: int, header: PoolHeader) -> None:
        mapping = mmap.mmap(fd, header.file_bytes)
        # Only a mark on the mapping (no page is touched); refused where the kernel has no huge pages.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE, header.data_offset, header.file_bytes - header.data_offset)
        whole = np.frombuffer(mapping, np.uint8)
        self.data = whole[header.data_offset : header.data_offset + header.data_bytes]
        table = whole[SLOT_TABLE_OFFSET : SLOT_TABLE_OFFSET + header.slot_table_bytes]
        self.slots = SlotTable(table.view(np.uint64), header.first_generation)
        self.slabs = SlabTable(whole[SLAB_TABLE_OFFSET : SLAB_TABLE_OFFSET + SLAB_TABLE_BYTES])
        self.registry = Registry(whole[REGISTRY_OFFSET : REGISTRY_OFFSET + 2 * REGISTRY_HALF_BYTES])


class MappedPool:
    """A pool mapped read/write into this process. Reading methods may be called from any thread."""

    def __init__(self, path: Path, fd: int, header: PoolHeader) -> None:
        self.path = path
        self.pool_id = header.pool_id
        self.data_bytes = header.data_bytes
        self._header = header
        self._areas: _Areas | None = _Areas(fd, header)

    @classmethod
    def open(cls, path: Path, expected_pool_id: int) -> MappedPool:
        """Map the pool file that the daemon named.

        Raises FileNotFoundError, PoolFormatError or PoolMismatch; nothing stays open then.
        """
        fd, header = _open_file(path)
        try:
            if header.pool_id != expected_pool_id:
                raise PoolMismatch(
                    f"{path} is pool {header.pool_id:#x}, expected {expected_pool_id:#x}: "
                    "the file was replaced; attach again"
                )
            return MappedPool(path, fd, header)
        finally:
            os.close(fd)  # the mapping keeps the file

    def close(self) -> None:
        """Let go of the mapping. Safe while views exist, and safe to repeat.

        The memory is unmapped when the last array cut from it is gone: a copy that still runs on another
        thread finishes on valid memory. After this, the pool's methods raise PoolClosed.
        """
        self._areas = None

    @property
    def data_offset(self) -> int:
        """Where the data area begins in the file, a multiple of a page."""
        return self._header.data_offset

    @property
    def data(self) -> Bytes:
        """The data area, shape (data_bytes,), uint8."""
        return self._open_areas().data

    @property
    def slots(self) -> SlotTable:
        return self._open_areas().slots

    @property
    def slabs(self) -> SlabTable:
        return self._open_areas().slabs

    @property
    def registry(self) -> Registry:
        return self._open_areas().registry

    def slot_view(self, slot_id: int, nbytes: int) -> Bytes:
        """Return the first `nbytes` of a slot, shape (nbytes,). Raises IndexError outside the data area."""
        return self.part_view(slot_id, 0, nbytes)

    def part_view(self, slot_id: int, part_offset: int, nbytes: int) -> Bytes:
        """Return `nbytes` of a slot from `part_offset` on. Raises IndexError outside the data area."""
        start = slot_offset(slot_id) + part_offset
        if slot_id < 0 or part_offset < 0 or nbytes < 0 or start + nbytes > self.data_bytes:
            raise IndexError(
                f"slot {slot_id}: {nbytes} bytes at offset {start} leave the pool of {self.data_bytes} bytes"
            )
        return self._open_areas().data[start : start + nbytes]

    def generation(self, slot_id: int) -> int:
        """Return the slot's generation with one aligned 8-byte load."""
        return self._open_areas().slots.generation(slot_id)

    def part_checksum(self, slot_id: int, part: int) -> int:
        """Return the recorded checksum of a part; 0 = not recorded."""
        return self._open_areas().slots.part_checksum(slot_id, part)

    def _open_areas(self) -> _Areas:
        areas = self._areas
        if areas is None:
            raise PoolClosed(f"the pool {self.path} is closed")
        return areas


class Pool(MappedPool):
    """The daemon's pool: holds the directory's daemon lock, creates the file and backs its memory.

    `kept` tells whether the file is the one an earlier daemon left, with its records and generations.
    """

    def __init__(self, directory: Path, fd: int, header: PoolHeader, lock: DaemonLock, kept: bool) -> None:
        super().__init__(directory / POOL_FILE, fd, header)
        self.directory = directory
        self.kept = kept
        self._fd = fd
        self._lock = lock

    @classmethod
    def create(cls, directory: Path, data_bytes: int, *, fresh: bool = False) -> Pool:
        """Take the directory's daemon lock and open its pool, or make a new one.

        A file of the same format and size is kept unless `fresh`; anything else is replaced by a new file
        renamed over it. `data_bytes` is rounded down to a multiple of 4 KiB. No data memory is backed yet.
        Raises PoolBusy, PoolStillWritten, PoolDirectoryError, OSError (ENOSPC); the present file is then
        unchanged.
        """
        data_bytes -= data_bytes % SLOT_UNIT_BYTES
        if data_bytes <= 0:
            raise ValueError(f"a pool needs at least {SLOT_UNIT_BYTES} bytes")
        directory_fd = open_directory(directory, create=True)
        try:
            lock = DaemonLock.acquire(directory)
            try:
                found = None if fresh else _find_file(directory / POOL_FILE, data_bytes)
                fd, header = found or _make_file(directory_fd, data_bytes)
                try:
                    return cls(directory, fd, header, lock, kept=found is not None)
                except BaseException:
                    os.close(fd)
                    raise
            except BaseException:
                lock.release()
                raise
        finally:
            os.close(directory_fd)

    @property
    def lock_fd(self) -> int:
        """A lock for processes of the daemon's own that map the pool: see DaemonLock.copies_fd."""
        return self._lock.copies_fd

    @property
    def is_in_place(self) -> bool:
        """Whether the path still leads to this file. Somebody may remove or replace it; the mapping stays."""
        try:
            return os.path.samestat(os.fstat(self._open_fd()), self.path.lstat())
        except OSError:
            return False

    def back(self, offset: int, length: int) -> None:
        """Give memory to a piece of the data area, so that it can never SIGBUS; keeps what is there.

        Releases the GIL; about 4 GB/s, so give it pieces. Raises OSError (ENOSPC), IndexError.
        """
        if offset < 0 or length <= 0 or offset + length > self.data_bytes:
            raise IndexError(
                f"{length} bytes at offset {offset} are outside the pool ({self.data_bytes} bytes)"
            )
        os.posix_fallocate(self._open_fd(), self._header.data_offset + offset, length)

    def back_records(self, slot_ids: Sequence[int] | range) -> None:
        """Give memory to the records of these slots, and map it; keeps what is there.

        Call it before any other use of these records: touching a record without memory is a SIGBUS when the
        file system is full. Raises OSError (ENOSPC), IndexError.
        """
        fd = self._open_fd()
        slots = self.slots
        for page in slots.pages(slot_ids, PAGE_BYTES).tolist():
            os.posix_fallocate(fd, SLOT_TABLE_OFFSET + page, PAGE_BYTES)
            slots.touch(page)

    def close(self) -> None:
        """Let go of the mapping (see MappedPool.close) and of the daemon lock. The file stays."""
        self._close(unlink_lock=False)

    def remove(self) -> None:
        """Unlink the pool with all its files, and close it. Processes that still map it keep their memory.

        The directory goes too, unless somebody else's files are in it.
        """
        for name in (POOL_FILE, _NEW_FILE):
            (self.directory / name).unlink(missing_ok=True)
        for name in (OWNERS_DIRECTORY, GATES_DIRECTORY):
            locks = self.directory / name
            if locks.is_dir():
                for path in locks.iterdir():
                    path.unlink(missing_ok=True)
                locks.rmdir()
        self._close(unlink_lock=True)
        try:
            self.directory.rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise

    def _close(self, *, unlink_lock: bool) -> None:
        super().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.release(unlink=unlink_lock)

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise PoolClosed(f"the pool {self.path} is closed")
        return self._fd


def _open_file(path: Path) -> tuple[int, PoolHeader]:
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise PoolFormatError(f"{path} cannot be opened as a pool: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PoolFormatError(f"{path} is not a regular file of uid {os.geteuid()}")
        try:
            return fd, read_header(os.pread(fd, HEADER_BYTES, 0), status.st_size)
        except PoolFormatError as error:
            raise PoolFormatError(f"{path} is not usable: {error}; run: kvtier serve --fresh") from None
    except BaseException:
        os.close(fd)
        raise


def _find_file(path: Path, data_bytes: int) -> tuple[int, PoolHeader] | None:
    """Open the pool file that is there if it can be kept."""
    try:
        fd, header = _open_file(path)
    except (FileNotFoundError, PoolFormatError):
        return None
    if header.data_bytes == data_bytes:
        return fd, header
    os.close(fd)
    return None


def _make_file(directory_fd: int, data_bytes: int) -> tuple[int, PoolHeader]:
    """Write a new pool file beside the present one, then rename it over."""
    pool_id, first_generation = secrets.randbits(64) or 1, secrets.randbits(FIRST_GENERATION_BITS)
    header = PoolHeader(pool_id, data_bytes, first_generation)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_NEW_FILE, dir_fd=directory_fd)
    fd = os.open(_NEW_FILE, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory_fd)
    try:
        os.ftruncate(fd, header.file_bytes)
        os.posix_fallocate(fd, 0, SLOT_TABLE_OFFSET)
        # By mapping, because hugetlbfs has no write().
        with mmap.mmap(fd, SLOT_TABLE_OFFSET) as front:
            front[:HEADER_BYTES] = header.pack()
        os.rename(_NEW_FILE, POOL_FILE, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_NEW_FILE, dir_fd=directory_fd)
        raise
    return fd, header
