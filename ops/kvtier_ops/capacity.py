"""Does a pool of this size fit? Asked before anything is created, so that too much is one clear message.

Compares with the file system, the machine and the memory cgroup (v1 and v2). Owns no state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvtier_ops.cgroup import CGROUP_ROOT, PROC_ROOT, CgroupFolder, cgroup_folders
from kvtier_ops.directory import PoolError
from kvtier_ops.header import DATA_ALIGN_BYTES, POOL_FILE

_GIB = 1 << 30
_NO_LIMIT_BYTES = 1 << 60


class PoolTooLarge(PoolError):
    """The pool does not fit. The message has every figure; `available_bytes` would fit."""

    def __init__(self, message: str, available_bytes: int) -> None:
        super().__init__(message)
        self.available_bytes = available_bytes


@dataclass(frozen=True, slots=True)
class PoolLimit:
    """What one thing leaves for a pool. `free_bytes` may be negative."""

    kind: Literal["filesystem", "memory", "cgroup"]
    name: str
    free_bytes: int


def pool_limits(
    directory: Path, *, proc_root: Path = PROC_ROOT, cgroup_root: Path = CGROUP_ROOT
) -> list[PoolLimit]:
    """Return the largest pool that file system, machine and cgroup each allow in `directory`.

    What an existing pool file there already holds counts as available, because it is kept or replaced. The
    directory itself may be missing. Raises OSError where it cannot be looked into.
    """
    held_bytes = held_pool_bytes(directory)
    return [
        PoolLimit(limit.kind, limit.name, limit.free_bytes + held_bytes - DATA_ALIGN_BYTES)
        for limit in _free_bytes(directory, proc_root, cgroup_root)
    ]


def check_capacity(
    directory: Path, data_bytes: int, *, proc_root: Path = PROC_ROOT, cgroup_root: Path = CGROUP_ROOT
) -> None:
    """Raise PoolTooLarge if a pool of `data_bytes` in `directory` would not fit, by `pool_limits`."""
    limits = pool_limits(directory, proc_root=proc_root, cgroup_root=cgroup_root)
    available_bytes = max(0, min(limit.free_bytes for limit in limits))
    if data_bytes <= available_bytes:
        return
    figures = ", ".join(f"{limit.name} {_gib(max(0, limit.free_bytes))}" for limit in limits)
    raise PoolTooLarge(
        f"a pool of {_gib(data_bytes)} does not fit in {directory}: available are {figures} "
        f"(with {_gib(held_pool_bytes(directory))} that the present pool file holds); "
        f"ask for at most {_gib(available_bytes)}",
        available_bytes,
    )


def held_pool_bytes(directory: Path) -> int:
    """Return the memory that the pool file in `directory` takes, 0 where there is none. Raises OSError."""
    try:
        return os.lstat(directory / POOL_FILE).st_blocks * 512
    except FileNotFoundError:
        return 0


def _gib(value: int) -> str:
    return f"{value / _GIB:.2f} GiB ({value} bytes)"


def _free_bytes(directory: Path, proc_root: Path, cgroup_root: Path) -> Iterator[PoolLimit]:
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    file_system = os.statvfs(existing)
    free_bytes = file_system.f_bavail * file_system.f_frsize
    yield PoolLimit("filesystem", f"file system {existing}", free_bytes)
    for line in (proc_root / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield PoolLimit("memory", "MemAvailable", int(line.split()[1]) * 1024)
    cgroups = [
        free
        for folder in cgroup_folders("memory", proc_root, cgroup_root)
        if (free := _cgroup_free(folder)) is not None
    ]
    if cgroups:
        yield PoolLimit("cgroup", "memory cgroup", min(cgroups))


def _cgroup_free(folder: CgroupFolder) -> int | None:
    limit_file, usage_file = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }[folder.version]
    try:
        limit = (folder.path / limit_file).read_text().strip()
        used = int((folder.path / usage_file).read_text())
    except OSError:
        return None
    if not limit.isdigit() or int(limit) >= _NO_LIMIT_BYTES:
        return None  # v2 writes "max", v1 a number near 2**63
    return int(limit) - used + _reclaimable_bytes(folder.path)


def _reclaimable_bytes(folder: Path) -> int:
    """Page cache that the kernel drops before it kills: counted as used, but free for us."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stats = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(stats.get("total_inactive_file", stats.get("inactive_file", "0")))
