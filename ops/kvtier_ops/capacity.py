"""Does a pool of this size fit? Asked before anything is created, so that too much is one clear message.

Compares with the file system, the machine and the memory cgroup (v1 and v2). Owns no state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
class _Limit:
    name: str
    free_bytes: int


def check_capacity(
    directory: Path,
    data_bytes: int,
    *,
    proc_root: Path = Path("/proc"),
    cgroup_root: Path = Path("/sys/fs/cgroup"),
) -> None:
    """Raise PoolTooLarge if a pool of `data_bytes` in `directory` would not fit.

    What an existing pool file there already holds counts as available, because it is kept or replaced. The
    directory itself may be missing. The two roots are parameters for tests only.
    """
    held_bytes = _held_bytes(directory / POOL_FILE)
    limits = [
        _Limit(name, free_bytes + held_bytes - DATA_ALIGN_BYTES)
        for name, free_bytes in _free_bytes(directory, proc_root, cgroup_root)
    ]
    available_bytes = max(0, min(limit.free_bytes for limit in limits))
    if data_bytes <= available_bytes:
        return
    figures = ", ".join(f"{limit.name} {_gib(max(0, limit.free_bytes))}" for limit in limits)
    raise PoolTooLarge(
        f"a pool of {_gib(data_bytes)} does not fit in {directory}: available are {figures} "
        f"(with {_gib(held_bytes)} that the present pool file holds); "
        f"ask for at most {_gib(available_bytes)}",
        available_bytes,
    )


def _gib(value: int) -> str:
    return f"{value / _GIB:.2f} GiB ({value} bytes)"


def _held_bytes(path: Path) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def _free_bytes(directory: Path, proc_root: Path, cgroup_root: Path) -> Iterator[tuple[str, int]]:
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    file_system = os.statvfs(existing)
    yield f"file system {existing}", file_system.f_bavail * file_system.f_frsize
    for line in (proc_root / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield "MemAvailable", int(line.split()[1]) * 1024
    cgroups = [
        free
        for folder, limit_file, usage_file in _cgroup_folders(proc_root, cgroup_root)
        if (free := _cgroup_free(folder, limit_file, usage_file)) is not None
    ]
    if cgroups:
        yield "memory cgroup", min(cgroups)


def _cgroup_folders(proc_root: Path, cgroup_root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield every folder whose limit binds this process: its own cgroup and all above it, v2 then v1."""
    try:
        lines = (proc_root / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, own_path = line.split(":", 2)
        if number == "0" and not controllers:
            root, files = cgroup_root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = cgroup_root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside a container the path may name folders that only the host sees; the root is always ours.
        folder = root / own_path.lstrip("/")
        for candidate in (folder, *folder.parents):
            if candidate.is_relative_to(root):
                yield candidate, *files


def _cgroup_free(folder: Path, limit_file: str, usage_file: str) -> int | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        used = int((folder / usage_file).read_text())
    except OSError:
        return None
    if not limit.isdigit() or int(limit) >= _NO_LIMIT_BYTES:
        return None  # v2 writes "max", v1 a number near 2**63
    return int(limit) - used + _reclaimable_bytes(folder)


def _reclaimable_bytes(folder: Path) -> int:
    """Page cache that the kernel drops before it kills: counted as used, but free for us."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stats = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(stats.get("total_inactive_file", stats.get("inactive_file", "0")))
