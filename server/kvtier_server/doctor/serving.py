"""Whether a daemon serves at the address, how it is, and what stands there when it does not."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server import __version__
from kvtier_server.address import socket_path
from kvtier_server.doctor.finding import Finding, failed, passed, warned
from kvtier_server.doctor.machine import Machine
from kvtier_server.doctor.subject import Subject, stop_first
from kvtier_server.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import GetStatusResponse

NAME = "daemon"


@dataclass(frozen=True, slots=True)
class Silence:
    """Why there is no status. `is_listening`: somebody took the call, and did not answer it."""

    problem: str
    is_listening: bool


def check_no_answer(machine: Machine, subject: Subject, silence: Silence) -> Finding:
    """Say why nobody answers, as far as the socket's file tells."""
    problem = silence.problem
    path = socket_path(subject.address)
    owner = _socket_owner(path) if path is not None else None
    if not silence.is_listening and (path is None or owner is None):
        return warned(NAME, problem.partition("; start one")[0], subject.serve())
    if path is None or owner is None:
        return failed(NAME, problem, f"kvtier status --address {shlex.quote(subject.address)}")
    if owner != os.geteuid() and not os.access(path, os.W_OK):
        fix = f"sudo -u '#{owner}' kvtier doctor --address {shlex.quote(subject.address)}"
        return failed(NAME, problem, fix)
    pid = machine.lock_holder(Path(f"{path}.lock"))
    if pid is not None:
        return failed(NAME, f"{problem}; it is process {pid}", stop_first(pid) + subject.serve())
    if not silence.is_listening:
        text = f"{path} is left of a daemon that is gone; the next one takes its place"
        return warned(NAME, text, subject.serve())
    return failed(NAME, problem, f"kvtier status --address {shlex.quote(subject.address)}")


def check_answer(
    machine: Machine, subject: Subject, status: GetStatusResponse, *, is_asked_for: bool
) -> Iterator[Finding]:
    """Judge a daemon that answers. `is_asked_for`: somebody has said what pool it should have."""
    told = f"{status.state} at {subject.address}, up {format_seconds(status.uptime_seconds)}"
    fix = shlex.join(["kvtier", "status", "--address", subject.address])
    if status.state == "serving":
        yield passed(NAME, told)
    else:
        unwell = [f"{tier.name}: {tier.health}" for tier in status.tiers if tier.health not in ("", "ok")]
        yield warned(NAME, "; ".join([told, *unwell]), fix)
    served = subject.as_served(machine, status)
    again = stop_first(served.served_by(machine)) + (subject if is_asked_for else served).serve()
    if status.version != __version__:
        text = f"the daemon is kvtier {status.version}, this installation {__version__}"
        yield warned("daemon.version", text, again)
    is_other = (served.pool_directory, served.pool_bytes) != (subject.pool_directory, subject.pool_bytes)
    if is_asked_for and is_other and subject.pool_bytes:
        text = (
            f"it serves {served.pool_directory} of {format_bytes(served.pool_bytes)}, the configuration asks "
            f"for {subject.pool_directory} of {format_bytes(subject.pool_bytes)}"
        )
        yield warned("daemon.pool", text, again)


def _socket_owner(path: Path) -> int | None:
    """Return whose socket it is, None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_uid if stat.S_ISSOCK(status.st_mode) else None
