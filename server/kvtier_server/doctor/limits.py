"""What the kernel lets one process have: locked memory, open files, CPUs.

Where a daemon holds the pool its own limits are looked at, otherwise those of this shell, which a daemon
started here would get.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from kvtier_ops.cgroup import cgroup_folders
from kvtier_server.doctor.finding import Finding, passed, skipped, warned
from kvtier_server.doctor.machine import UNLIMITED, Machine, format_ranges, parse_ranges
from kvtier_server.doctor.subject import Subject
from kvtier_server.units import format_bytes

CAP_IPC_LOCK = 14
"""The capability that stands above RLIMIT_MEMLOCK."""

FILES_PER_SESSION = 2
"""Its connection, and the lock file of its process."""

OTHER_FILES = 256
"""Open files beside those of sessions: the tiers', the log, the pool, sockets of calls that just came."""

MIN_CPUS = 2
"""One for the thread that answers the engines, one for copies and tiers."""


def check_limits(machine: Machine, subject: Subject, pid: int | None) -> Iterator[Finding]:
    """Look at the limits of process `pid`, of this one by default."""
    yield check_locked_memory(machine, subject, pid)
    yield check_open_files(machine, subject, pid)
    yield check_cpus(machine, subject, pid)


def check_locked_memory(machine: Machine, subject: Subject, pid: int | None) -> Finding:
    """Check that the pool may be locked and pinned."""
    name, found = "limits.memlock", machine.limit("Max locked memory", pid)
    if found is None:
        return skipped(name, "/proc/self/limits does not say")
    soft, hard = found
    if int(machine.status("CapEff", pid) or "0", 16) >> CAP_IPC_LOCK & 1:
        return passed(name, f"{_told(soft)}, and CAP_IPC_LOCK goes beyond it")
    if soft == UNLIMITED or soft >= subject.pool_bytes:
        return passed(name, f"{_told(soft)} for a pool of {format_bytes(subject.pool_bytes)}")
    text = (
        f"{_told(soft)} for a pool of {format_bytes(subject.pool_bytes)}: it cannot be locked, nor "
        "registered for RDMA (systemd: LimitMEMLOCK=infinity)"
    )
    return warned(name, text, _raise_limit("memlock", "-l unlimited", hard == UNLIMITED, subject, pid))


def check_open_files(machine: Machine, subject: Subject, pid: int | None) -> Finding:
    """Check that as many sessions as are allowed can have their files."""
    name, found = "limits.files", machine.limit("Max open files", pid)
    if found is None:
        return skipped(name, "/proc/self/limits does not say")
    soft, hard = found
    needed = FILES_PER_SESSION * subject.sessions + OTHER_FILES
    if soft == UNLIMITED or soft >= needed:
        return passed(name, f"{soft if soft != UNLIMITED else 'unlimited'} open files, {needed} are enough")
    text = (
        f"{soft} open files, and limits.sessions = {subject.sessions} sessions need up to {needed} "
        f"(systemd: LimitNOFILE={needed})"
    )
    return warned(name, text, _raise_limit("nofile", f"-n {needed}", _reaches(hard, needed), subject, pid))


def _raise_limit(limit: str, ulimit: str, is_within_hard: bool, subject: Subject, pid: int | None) -> str:
    """Return what raises a limit: of the process that runs, or of this shell and what it starts."""
    value = ulimit.partition(" ")[2]
    if pid is not None:
        return f"sudo prlimit --pid {pid} --{limit}={value}:{value}"
    if is_within_hard:
        return f"ulimit {ulimit} && {subject.serve()}"
    return f"sudo prlimit --pid $$ --{limit}={value}:{value} && {subject.serve()}"


def _reaches(hard: int, needed: int) -> bool:
    return hard == UNLIMITED or hard >= needed


def _told(num_bytes: int) -> str:
    may = "any amount" if num_bytes == UNLIMITED else format_bytes(num_bytes)
    return f"{may} of memory may be locked"


def check_cpus(machine: Machine, subject: Subject, pid: int | None) -> Finding:
    """Count the CPUs that may be used at once, by affinity and by quota."""
    name, listed = "limits.cpus", machine.status("Cpus_allowed_list", pid)
    if listed is None:
        return skipped(name, "/proc/self/status does not say")
    allowed = parse_ranges(listed)
    online = parse_ranges(machine.read(machine.sys / "devices" / "system" / "cpu" / "online") or listed)
    usable = [cpu for cpu in allowed if cpu in set(online)]
    quota, file, free_value = _quota(machine)
    text = f"{len(usable)} of {len(online)} CPUs ({format_ranges(usable)})"
    if quota is not None:
        text += f", and no more than {quota:.1f} at once by {file}"
    if quota is not None and quota < MIN_CPUS:
        return warned(name, text, f"echo {free_value} | sudo tee {shlex.quote(file)}")
    if len(usable) >= MIN_CPUS:
        return passed(name, text)
    if len(online) < MIN_CPUS:
        return warned(name, text, "none: copies and answers share the only CPU; give the machine another")
    every = format_ranges(online)
    return warned(
        name, text, f"taskset -acp {every} {pid}" if pid else f"taskset -c {every} {subject.serve()}"
    )


def _quota(machine: Machine) -> tuple[float | None, str, str]:
    """Return the smallest quota of CPUs that binds this process, its file, and what lifts it."""
    found: tuple[float | None, str, str] = (None, "", "")
    for folder in cgroup_folders("cpu", machine.proc, machine.cgroup):
        if folder.version == 2:
            file, lifted = folder.path / "cpu.max", "max"
            quota, _, period = (machine.read(file) or "max").partition(" ")
        else:
            file, lifted = folder.path / "cpu.cfs_quota_us", "-1"
            quota = machine.read(file) or lifted
            period = machine.read(folder.path / "cpu.cfs_period_us") or ""
        if quota == lifted or not period.isdigit():
            continue
        cpus = int(quota) / int(period)
        if found[0] is None or cpus < found[0]:
            found = (cpus, str(file), lifted)
    return found
