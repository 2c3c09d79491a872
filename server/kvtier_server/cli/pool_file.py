"""Reading and removing a pool's files from beside its daemon, without disturbing it.

Owns no format: that is kvtier_ops'. Takes no lock that a starting daemon could trip over.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtier_ops.directory import PoolError, open_directory
from kvtier_ops.header import (
    HEADER_BYTES,
    POOL_FILE,
    RECORD_BYTES,
    SLOT_TABLE_OFFSET,
    PoolFormatError,
    read_header,
)
from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.locks import OWNERS_DIRECTORY, daemon_pid
from kvtier_ops.pool import MappedPool, Pool
from kvtier_ops.slot_table import SlotTable

UNREADABLE = "unreadable"
"""State of a record that does not verify; a daemon takes it for a quarantined slot."""


@dataclass(frozen=True, slots=True)
class SlotCount:
    """Slots of one size in one state."""

    slot_bytes: int
    state: str
    count: int


@dataclass(frozen=True, slots=True)
class PoolContents:
    """What a pool file holds."""

    path: str
    pool_id: int
    data_bytes: int
    memory_bytes: int
    """Memory the file takes, tables included."""
    slab_bytes: int
    num_slabs: int
    free_slabs: int
    slots: tuple[SlotCount, ...]
    daemon_pid: int | None
    """None where no daemon holds it, 0 where one does that cannot be named."""
    owner_locks: int
    """Lock files of engine processes; those of dead ones stay until the next daemon looks."""

    def to_dict(self) -> dict[str, object]:
        """Return it for JSON; the id as text, since a double does not hold 64 bits."""
        return {**dataclasses.asdict(self), "pool_id": f"{self.pool_id:016x}"}


def read_contents(directory: Path) -> PoolContents:
    """Read header, slab table and slot records. Raises FileNotFoundError, PoolError."""
    os.close(open_directory(directory))
    path = directory / POOL_FILE
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        try:
            header = read_header(os.pread(fd, HEADER_BYTES, 0), status.st_size)
        except PoolFormatError as error:
            raise PoolFormatError(f"{path} is not usable: {error}; run: kvtier serve --fresh") from None
        pool = MappedPool.open(path, header.pool_id)
        try:
            slab_bytes, sizes = pool.slabs.read()
        finally:
            pool.close()
        return PoolContents(
            path=str(path),
            pool_id=header.pool_id,
            data_bytes=header.data_bytes,
            memory_bytes=status.st_blocks * 512,
            slab_bytes=slab_bytes,
            num_slabs=len(sizes),
            free_slabs=sizes.count(0),
            slots=_count_slots(fd, header.data_bytes, slab_bytes, sizes),
            daemon_pid=daemon_pid(directory),
            owner_locks=_count_owner_locks(directory),
        )
    finally:
        os.close(fd)


def _count_slots(fd: int, data_bytes: int, slab_bytes: int, sizes: list[int | None]) -> tuple[SlotCount, ...]:
    """Count slots by size and state.

    Records are read with pread, not through the mapping: reading a hole there would give it memory, and kill
    this process with SIGBUS where there is none left.
    """
    counts: Counter[tuple[int, str]] = Counter()
    for slab, slot_bytes in enumerate(sizes):
        if not slot_bytes:
            continue
        end = min((slab + 1) * slab_bytes, data_bytes)
        for offset in range(slab * slab_bytes, end - slot_bytes + 1, slot_bytes):
            slot_id = offset // SLOT_UNIT_BYTES
            raw = os.pread(fd, RECORD_BYTES, SLOT_TABLE_OFFSET + slot_id * RECORD_BYTES)
            record = SlotTable(np.frombuffer(raw, np.uint64)).read(0)
            counts[slot_bytes, record.state.name.lower() if record else UNREADABLE] += 1
    return tuple(SlotCount(size, state, count) for (size, state), count in sorted(counts.items()))


def _count_owner_locks(directory: Path) -> int:
    try:
        return len(os.listdir(directory / OWNERS_DIRECTORY))
    except FileNotFoundError:
        return 0


def remove_pool(directory: Path) -> int:
    """Remove the pool and return the bytes of memory it took. Raises PoolBusy if a daemon holds it.

    Engines that still map it keep their memory until they let go.
    """
    path = directory / POOL_FILE
    try:
        status = os.lstat(path)
        memory_bytes = status.st_blocks * 512
        with path.open("rb") as file:
            data_bytes = read_header(file.read(HEADER_BYTES), status.st_size).data_bytes
    except FileNotFoundError:
        memory_bytes, data_bytes = 0, SLOT_UNIT_BYTES
    except PoolFormatError:
        data_bytes = SLOT_UNIT_BYTES  # what cannot be read is replaced by the smallest pool, then removed
    try:
        Pool.create(directory, data_bytes).remove()
    except OSError as error:
        raise PoolError(
            f"{directory} cannot be removed: {error.strerror}; look at it: ls -la {directory}"
        ) from error
    return memory_bytes
