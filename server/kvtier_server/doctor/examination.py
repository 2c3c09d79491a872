"""All checks, in the order in which one explains the next: installed, meant, there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server.doctor.configuration import read_configuration
from kvtier_server.doctor.finding import Finding, Verdict, failed, skipped, worst
from kvtier_server.doctor.gpu import check_gpus, probe_devices
from kvtier_server.doctor.gpu_copies import EXCHANGE, REGISTER, check_copies
from kvtier_server.doctor.installation import check_installation
from kvtier_server.doctor.limits import check_limits
from kvtier_server.doctor.machine import Machine
from kvtier_server.doctor.numa import check_numa
from kvtier_server.doctor.pool import check_pool
from kvtier_server.doctor.serving import Silence, check_answer, check_no_answer
from kvtier_server.doctor.subject import Subject
from kvtier_server.doctor.tiers import check_tiers

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import GetStatusResponse

Ask = Callable[[str], "GetStatusResponse | Silence"]
"""Asks the daemon at an address for its status."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be examined."""

    flags: Mapping[str, str]
    """Settings by dotted path, as `kvtier serve` takes them."""
    options: tuple[str, ...]
    """The same as they are typed, --config included."""
    config: Path | None
    env: Mapping[str, str]
    address: str
    """Where a client would look for the daemon."""
    uuids: tuple[str, ...] = ()
    """Devices to try; none = all."""
    is_quick: bool = False
    """Leave out what needs a context on the devices."""
    machine: Machine = field(default_factory=Machine)


def examine(request: Request, ask: Ask) -> Iterator[Finding]:
    """Yield every finding as soon as it is known."""
    subject, about_configuration = read_configuration(
        request.flags, request.options, request.config, request.env, request.address
    )
    yield from _guarded("installation", check_installation)
    yield from about_configuration
    answer = ask(subject.address)
    if isinstance(answer, Silence):
        yield check_no_answer(request.machine, subject, answer)
    else:
        meant = subject
        is_asked_for = _is_pool_asked_for(request) and worst(about_configuration) is not Verdict.FAIL
        yield from _guarded(
            "daemon", lambda: check_answer(request.machine, meant, answer, is_asked_for=is_asked_for)
        )
        if not is_asked_for:
            subject = subject.as_served(request.machine, answer)
    served = None if isinstance(answer, Silence) else answer.pool.path
    yield from _guarded("pool", lambda: check_pool(request.machine, subject, served_path=served))
    pid = subject.served_by(request.machine)
    yield from _guarded("limits", lambda: check_limits(request.machine, subject, pid))
    yield from _examine_gpus(request, subject, pid)
    yield from _guarded("tier", lambda: check_tiers(subject.tiers, request.config))


def _is_pool_asked_for(request: Request) -> bool:
    """Tell whether somebody says which pool is meant: otherwise that of the daemon that runs is."""
    names = ("KVTIER_POOL__", "KVTIER_SERVER__NAME")
    return (
        request.config is not None
        or bool(set(request.flags) - {"server.address"})
        or any(variable.startswith(names) for variable in request.env)
    )


def _examine_gpus(request: Request, subject: Subject, pid: int | None) -> Iterator[Finding]:
    gpus = probe_devices()
    addresses = [device.pci_address for device in gpus.devices] or None
    yield from _guarded("numa", lambda: [check_numa(request.machine, subject, pid, addresses)])
    yield from _guarded("gpu", lambda: check_gpus(request.machine, gpus, request.env))
    if request.is_quick:
        yield skipped(REGISTER, "left out by --quick")
        yield skipped(EXCHANGE, "left out by --quick")
    else:
        yield from _guarded("gpu", lambda: check_copies(gpus, subject.pool_directory, request.uuids))


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Go on with the next checks where one has a bug: what they find is no less worth knowing."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - it becomes a finding
        text = f"this check has a bug: {type(error).__name__}: {error}"
        yield failed(name, text, "report it with the output of: kvtier doctor -o json")
