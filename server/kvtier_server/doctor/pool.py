"""The pool: its directory, what is left of memory for it, huge pages, pools without a daemon."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from kvtier_ops.capacity import PoolLimit, held_pool_bytes, pool_limits
from kvtier_ops.directory import SHARED_MEMORY_ROOT, PoolDirectoryError, open_directory
from kvtier_ops.header import POOL_FILE
from kvtier_ops.locks import daemon_pid
from kvtier_server.address import socket_path
from kvtier_server.doctor.finding import Finding, failed, passed, skipped, warned
from kvtier_server.doctor.machine import Machine, Mount
from kvtier_server.doctor.subject import Subject, stop_first
from kvtier_server.units import format_bytes

MEMORY_FILE_SYSTEMS = ("tmpfs", "hugetlbfs", "ramfs", "devtmpfs")

HUGE_OPTIONS = ("always", "within_size")
"""Under which a tmpfs has huge pages for us. Not "advise": a pool's memory is taken by posix_fallocate, which
knows no mapping, and so no advice."""

MAX_ORPHANS = 20
"""Pools that are named; what is beyond them is one line."""

MIB = 1 << 20


def check_pool(
    machine: Machine, subject: Subject, root: Path = SHARED_MEMORY_ROOT, *, served_path: str | None = None
) -> Iterator[Finding]:
    """Look at one daemon's pool, and at what others have left below `root`.

    `served_path`: the pool's file as a daemon has named it that answers now.
    """
    path = subject.pool_directory / POOL_FILE
    is_served = served_path is not None and Path(served_path) == path
    yield check_directory(subject) if not is_served or path.exists() else _removed(machine, subject, path)
    yield check_medium(machine, subject)
    yield from check_limits(machine, subject)
    yield check_huge_pages(machine, subject)
    yield from check_orphans(subject, root)


def check_directory(subject: Subject) -> Finding:
    """Check that the directory is ours alone, and say what is in it."""
    name, directory = "pool.directory", subject.pool_directory
    try:
        os.close(open_directory(directory))
        held = format_bytes(held_pool_bytes(directory))
        pid = daemon_pid(directory)
    except FileNotFoundError:
        return _check_parent(name, directory)
    except PoolDirectoryError as error:
        status = directory.lstat()
        is_ours = status.st_uid == os.geteuid() and directory.is_dir() and not directory.is_symlink()
        quoted = shlex.quote(str(directory))
        fix = f"chmod 700 {quoted}" if is_ours else subject.serve("--name", f"{subject.name}-2")
        return failed(name, str(error), fix)
    except OSError as error:
        fix = f"ls -ld {shlex.quote(str(directory))}"
        return failed(name, f"{directory} cannot be opened: {error.strerror}", fix)
    if pid is not None:
        state = f"{held} held by the daemon with pid {pid or 'unknown'}"
    else:
        state = f"{held} kept for a warm start (kvtier pool remove frees it)" if held != "0B" else "empty"
    return passed(name, f"{directory}, mode 0700, of this user; {state}")


def _removed(machine: Machine, subject: Subject, path: Path) -> Finding:
    """Say what it means that a daemon serves a file that is not there."""
    text = (
        f"a daemon serves {path}, and it is not here: no engine can attach any more. A cleaner took it, or "
        "systemd's RemoveIPC at this user's logout (loginctl enable-linger); or the daemon has a /dev/shm of "
        "its own (containers: ipc)"
    )
    socket = socket_path(subject.address)
    pid = machine.lock_holder(Path(f"{socket}.lock")) if socket is not None else None
    return failed("pool.directory", text, stop_first(pid) + subject.serve())


def _check_parent(name: str, directory: Path) -> Finding:
    parent = directory.parent
    if not parent.is_dir():
        return failed(
            name, f"{directory} cannot be made: no {parent}", f"mkdir -p {shlex.quote(str(parent))}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        fix = f"sudo install -d -m 0700 -o {os.geteuid()} {shlex.quote(str(directory))}"
        return failed(name, f"{directory} cannot be made: uid {os.geteuid()} may not write to {parent}", fix)
    return passed(name, f"{directory} is made at the first start")


def check_medium(machine: Machine, subject: Subject) -> Finding:
    """Check that the pool lies in memory, and not on a disk."""
    name, mount = "pool.medium", machine.mount_of(subject.pool_directory)
    if mount is None:
        return skipped(name, "/proc/self/mountinfo does not say what the pool lies on")
    if mount.kind not in MEMORY_FILE_SYSTEMS:
        text = f"{mount.path} is {mount.kind}: the pool's pages are written to a disk"
        return warned(name, text, "remove pool.directory from the configuration; its default is in /dev/shm")
    return passed(name, f"{mount.path} is {mount.kind}")


def check_limits(machine: Machine, subject: Subject) -> Iterator[Finding]:
    """Compare the pool with the file system, the machine's memory and the control group."""
    if not subject.pool_bytes:
        yield skipped("pool.filesystem", "nobody says how large the pool is to be; try --pool-bytes")
        return
    try:
        limits = pool_limits(subject.pool_directory, proc_root=machine.proc, cgroup_root=machine.cgroup)
    except OSError as error:
        yield skipped("pool.filesystem", f"{error.filename} cannot be read: {error.strerror}")
        return
    available_bytes = max(0, min(limit.free_bytes for limit in limits))
    for limit in limits:
        yield _check_limit(machine, subject, limit, available_bytes)
    if not any(limit.kind == "cgroup" for limit in limits):
        yield passed("pool.cgroup", "no control group limits this process's memory")


def _check_limit(machine: Machine, subject: Subject, limit: PoolLimit, available_bytes: int) -> Finding:
    name, wanted = f"pool.{limit.kind}", format_bytes(subject.pool_bytes)
    text = f"{limit.name} has {format_bytes(max(0, limit.free_bytes))} for a pool of {wanted}"
    if limit.free_bytes >= subject.pool_bytes:
        return passed(name, text)
    if available_bytes >= MIB:
        smaller = subject.serve("--pool-bytes", f"{available_bytes // MIB}MiB")
    else:
        smaller = "ps aux --sort=-rss | head"
    mount = machine.mount_of(subject.pool_directory)
    if limit.kind != "filesystem" or mount is None or "size" not in mount.options:
        return failed(name, text, smaller)
    file_system = os.statvfs(mount.path)
    missing_bytes = subject.pool_bytes - limit.free_bytes
    size_mib = -(-(file_system.f_blocks * file_system.f_frsize + missing_bytes) // MIB)
    larger = f"sudo mount -o remount,size={size_mib}m {shlex.quote(str(mount.path))}"
    return failed(name, text, f"{larger}   or: {smaller}")


def check_huge_pages(machine: Machine, subject: Subject) -> Finding:
    """Say whether the pool gets huge pages: fewer entries for the TLB, and for the driver to pin."""
    name, mount = "pool.hugepages", machine.mount_of(subject.pool_directory)
    transparent = machine.sys / "kernel" / "mm" / "transparent_hugepage"
    if mount is not None and mount.kind == "hugetlbfs":
        return passed(name, f"{mount.path} is hugetlbfs, pages of {mount.options.get('pagesize', '2M')}")
    setting = _chosen(machine.read(transparent / "shmem_enabled"))
    if mount is None or mount.kind != "tmpfs" or not setting:
        return skipped(name, "not a tmpfs, or a kernel without transparent huge pages for it")
    option = mount.options.get("huge", "never")
    told = f"{mount.path} is mounted with huge={option}, the kernel's shmem_enabled is {setting}"
    told += _hugetlbfs(machine.mounts())
    if setting == "force" or (setting != "deny" and option in HUGE_OPTIONS):
        return passed(name, told)
    remount = f"sudo mount -o remount,huge=within_size {shlex.quote(str(mount.path))}"
    if setting == "deny":
        file = shlex.quote(str(transparent / "shmem_enabled"))
        remount = f"echo never | sudo tee {file} && {remount}"
    return warned(name, f"{told}: small pages (a remount is for pools made after it)", remount)


def _chosen(text: str | None) -> str:
    """Return the word in brackets of "always [never] deny"."""
    return text.partition("[")[2].partition("]")[0] if text else ""


def _hugetlbfs(mounts: list[Mount]) -> str:
    paths = [str(mount.path) for mount in mounts if mount.kind == "hugetlbfs"]
    return f"; hugetlbfs at {', '.join(paths)}" if paths else ""


def check_orphans(subject: Subject, root: Path) -> Iterator[Finding]:
    """Find pools of this user that hold memory and that no daemon serves, other than the subject's own."""
    prefix = f"kvtier-{os.geteuid()}-"
    orphans = []
    for directory in sorted(root.glob(prefix + "*")):
        try:
            held_bytes = held_pool_bytes(directory)
            is_served = daemon_pid(directory) is not None
        except OSError:
            continue
        if held_bytes and not is_served and directory != subject.pool_directory:
            orphans.append((directory.name.removeprefix(prefix), held_bytes))
    for name, held_bytes in orphans[:MAX_ORPHANS]:
        text = (
            f"{root / (prefix + name) / POOL_FILE} holds {format_bytes(held_bytes)}, and no daemon serves it"
        )
        yield warned("pool.orphans", text, f"kvtier pool remove --name {name}")
    if len(orphans) > MAX_ORPHANS:
        rest = sum(held_bytes for _, held_bytes in orphans[MAX_ORPHANS:])
        text = f"and {len(orphans) - MAX_ORPHANS} more, with {format_bytes(rest)}"
        yield warned("pool.orphans", text, f"ls -d {shlex.quote(str(root / prefix))}*")
    if not orphans:
        yield passed("pool.orphans", f"no pool of this user in {root} is without a daemon and forgotten")
