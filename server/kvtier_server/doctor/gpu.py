"""The NVIDIA driver, its devices, and the libraries that the daemon's copies need.

Everything that calls the driver runs in a child process with a deadline (`child.py`, `cuda_probe.py`). As
with every CUDA program, the first call may make the driver load its kernel module or make its device files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvtier_server.doctor.child import ChildFailed, run_child
from kvtier_server.doctor.finding import Finding, Verdict, failed, passed, skipped, warned
from kvtier_server.doctor.installation import installed_version
from kvtier_server.doctor.machine import Machine
from kvtier_server.units import format_bytes

DEADLINE_S = 30.0
"""For each child: far above a context's start on a busy node."""

PROBE = (sys.executable, "-P", "-m", "kvtier_server.doctor.cuda_probe")

MIN_CUDA = 12
"""Oldest major version that an extra of kvtier is for."""

CUPY = {"cupy-cuda12x": 12, "cupy-cuda13x": 13}
"""Distributions of cupy, and the oldest major version of CUDA in a driver that they run on."""

LIBRARIES = (
    "cuda-bindings",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime-cu13",
    "torch",
)
"""Told of beside cupy: what they have of CUDA is what the engine has."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device that this process may use."""

    uuid: str
    name: str
    pci_address: str
    total_bytes: int


@dataclass(frozen=True, slots=True)
class CudaFailure:
    """A call of the driver that was refused, or a child that gave no answer (`name` is "" then)."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Gpus:
    """What the driver says. `missing`: why there is none, "" where there is one."""

    missing: str = ""
    version: int = 0
    devices: Sequence[Device] = field(default=())
    failure: CudaFailure | None = None


@dataclass(frozen=True, slots=True)
class Cure:
    """What an error of the driver means, and what helps. `{uuid}` is the device's."""

    verdict: Verdict
    meaning: str
    fix: str


CURES: Mapping[str, Cure] = {
    "CUDA_ERROR_SYSTEM_NOT_READY": Cure(
        Verdict.FAIL, "the fabric manager does not run", "sudo systemctl start nvidia-fabricmanager"
    ),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": Cure(
        Verdict.FAIL, "libcuda and the kernel module are of different versions", "sudo reboot"
    ),
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": Cure(
        Verdict.FAIL, "a cuda-compat package stands before the driver's own libcuda", "unset LD_LIBRARY_PATH"
    ),
    "CUDA_ERROR_UNKNOWN": Cure(
        Verdict.FAIL,
        "most often /dev/nvidia-uvm is missing",
        "sudo modprobe nvidia_uvm && sudo nvidia-modprobe -u",
    ),
    "CUDA_ERROR_DEVICE_UNAVAILABLE": Cure(
        Verdict.FAIL,
        "the device lets only one process in (compute mode), and kvtier copies in one of its own",
        "sudo nvidia-smi -i {uuid} -c DEFAULT",
    ),
    "CUDA_ERROR_OUT_OF_MEMORY": Cure(
        Verdict.WARN,
        "an engine has taken nearly all memory of the device, and kvtier needs some 500 MiB for a context",
        "give the engine a smaller --gpu-memory-utilization, then: kvtier doctor --device {uuid}",
    ),
}


def probe_devices(command: Sequence[str] = PROBE, deadline_s: float = DEADLINE_S) -> Gpus:
    """Ask the driver what there is."""
    try:
        return parse_devices(run_child([*command, "devices"], deadline_s))
    except ValueError as error:
        return Gpus(failure=CudaFailure("", f"the driver was asked for its devices: no JSON ({error})"))
    except ChildFailed as error:
        return Gpus(failure=CudaFailure("", f"the driver was asked for its devices: {error}"))


def parse_devices(text: str) -> Gpus:
    """Read what `cuda_probe devices` has printed."""
    said = json.loads(text)
    if "missing" in said:
        return Gpus(missing=said["missing"])
    found = [
        Device(each["uuid"], each["name"], each["pci_address"], each["total_bytes"])
        for each in said.get("devices", [])
    ]
    return Gpus(version=said.get("version", 0), devices=found, failure=parse_failure(said))


def parse_failure(said: Mapping[str, object]) -> CudaFailure | None:
    """Read the refused call in a child's answer, if there is one."""
    error = said.get("error")
    if not isinstance(error, Mapping):
        return None
    name = str(error["name"])
    return CudaFailure(name, f"{error['call']}: {name} ({error['code']}), {error['meaning']}")


def check_gpus(machine: Machine, gpus: Gpus, env: Mapping[str, str]) -> Iterator[Finding]:
    """Judge driver, devices, their visibility, and the libraries for them."""
    yield check_driver(machine, gpus)
    yield from check_devices(gpus, env)
    yield check_visibility(machine, gpus, env)
    yield check_libraries(gpus)


def check_driver(machine: Machine, gpus: Gpus) -> Finding:
    """Say which driver there is; on a machine without one that is no defect."""
    name = "gpu.driver"
    slots = len(list(machine.gpu_slots()))
    module = _module_version(machine)
    if gpus.missing:
        there = f"; {slots} NVIDIA devices on the PCI bus" if slots else ""
        if module:
            there += f"; the kernel module {module} is loaded: a container needs --gpus all"
        return skipped(name, f"{gpus.missing}{there}")
    if not gpus.version:
        text = gpus.failure.text if gpus.failure else "the driver does not tell its version"
        return failed(name, text, "nvidia-smi; sudo dmesg | grep -i nvrm")
    text = f"CUDA {format_version(gpus.version)}" + (f", kernel module {module}" if module else "")
    if gpus.version // 1000 < MIN_CUDA:
        fix = "install a driver of release 525 or newer: https://www.nvidia.com/drivers"
        return warned(name, f"{text}; kvtier's GPU extras begin with CUDA {MIN_CUDA}", fix)
    return passed(name, text)


def _module_version(machine: Machine) -> str:
    """Return the version of the loaded kernel module, "" where there is none."""
    text = machine.read(machine.proc / "driver" / "nvidia" / "version") or ""
    words = text.partition("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def check_devices(gpus: Gpus, env: Mapping[str, str]) -> Iterator[Finding]:
    """List the devices, or say why there is none to use."""
    name = "gpu.device"
    if gpus.missing or not gpus.version:
        yield skipped(name, "no driver")
        return
    for device in gpus.devices:
        text = f"{device.uuid} {device.name}, {format_bytes(device.total_bytes)}, PCI {device.pci_address}"
        yield passed(name, text)
    failure = gpus.failure
    if failure is None and not gpus.devices:
        yield skipped(name, f"the driver has no device here{_hidden(env)}")
    elif failure is not None and failure.name == "CUDA_ERROR_NO_DEVICE":
        yield skipped(name, f"{failure.text}{_hidden(env)}")
    elif failure is not None:
        yield judge(name, failure, "nvidia-smi; sudo dmesg | grep -i nvrm")


def judge(name: str, failure: CudaFailure, otherwise: str, uuid: str = "") -> Finding:
    """Turn a refused call into a finding; `otherwise` is what to type where nothing more is known."""
    cure = CURES.get(failure.name, Cure(Verdict.FAIL, "", otherwise))
    text = f"{failure.text}: {cure.meaning}" if cure.meaning else failure.text
    device = f"{uuid} " if uuid else ""
    return Finding(name, cure.verdict, f"{device}{text}", cure.fix.replace("{uuid}", uuid))


def _hidden(env: Mapping[str, str]) -> str:
    visible = env.get("CUDA_VISIBLE_DEVICES")
    return f"; CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else ""


def check_visibility(machine: Machine, gpus: Gpus, env: Mapping[str, str]) -> Finding:
    """Say whether a daemon started here would see every device that engines may use."""
    name, visible = "gpu.visible", env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return passed(name, "CUDA_VISIBLE_DEVICES is not set: every device may be used")
    slots = len(list(machine.gpu_slots()))
    text = f"CUDA_VISIBLE_DEVICES={visible}: {len(gpus.devices)} of {slots} devices"
    if slots <= len(gpus.devices):
        return passed(name, text)
    return warned(name, f"{text}; engines on the others cannot use CUDA IPC", "unset CUDA_VISIBLE_DEVICES")


HERE = "in kvtier's directory: "


def check_libraries(gpus: Gpus) -> Finding:
    """Check that cupy is there, once, and of a CUDA that the driver can serve."""
    name = "gpu.libraries"
    cupy = {each: version for each in (*CUPY, "cupy") if (version := installed_version(each)) is not None}
    others = [f"{each} {version}" for each in LIBRARIES if (version := installed_version(each)) is not None]
    text = ", ".join([*(f"{each} {version}" for each, version in cupy.items()), *others]) or "none installed"
    if not gpus.devices:
        return skipped(name, f"{text}; only needed beside a device")
    major = gpus.version // 1000
    install = f"pip install '.[cuda{min(max(major, MIN_CUDA), max(CUPY.values()))}]'"
    if not cupy:
        return warned(name, f"{text}: without cupy the daemon cannot copy by CUDA IPC", f"{HERE}{install}")
    if len(cupy) > 1:
        return failed(
            name,
            f"{text}: two builds of cupy break each other",
            f"{HERE}pip uninstall -y {' '.join(cupy)} && {install}",
        )
    (build,) = cupy
    if CUPY.get(build, 0) > major:
        text = f"{text}: {build} needs a driver of CUDA {CUPY[build]}, here is {format_version(gpus.version)}"
        return failed(name, text, f"{HERE}pip uninstall -y {build} && {install}")
    return passed(name, text)


def format_version(version: int) -> str:
    """Write a version as people do: 12080 is 12.8."""
    return f"{version // 1000}.{version % 1000 // 10}"
