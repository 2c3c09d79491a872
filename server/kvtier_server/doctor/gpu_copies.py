"""What only a real device shows: memory that can be pinned, and CUDA IPC between two processes.

Costs a second and, for as long, two contexts on each device (some 500 MiB each).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kvtier_server.doctor.child import ChildFailed, run_child
from kvtier_server.doctor.finding import Finding, failed, passed, skipped, warned
from kvtier_server.doctor.gpu import DEADLINE_S, PROBE, CudaFailure, Gpus, judge, parse_failure
from kvtier_server.units import format_bytes

REGISTER = "gpu.register"
EXCHANGE = "gpu.ipc"

WITHOUT_IPC = """engines can copy through shared memory: "transfer": "shm" in kv_connector_extra_config"""
WITHOUT_PINNING = "ulimit -l unlimited && kvtier doctor"

GIB = 1 << 30


def check_copies(
    gpus: Gpus,
    pool_directory: Path,
    uuids: Sequence[str],
    *,
    command: Sequence[str] = PROBE,
    deadline_s: float = DEADLINE_S,
) -> Iterator[Finding]:
    """Try each device, or those with these UUIDs."""
    chosen = [device.uuid for device in gpus.devices if not uuids or device.uuid in uuids]
    unknown = [uuid for uuid in uuids if uuid not in chosen]
    if not chosen and not unknown:
        yield skipped(REGISTER, "no device")
        yield skipped(EXCHANGE, "no device")
    for uuid in unknown:
        there = ", ".join(device.uuid for device in gpus.devices) or "none"
        yield failed(EXCHANGE, f"there is no device {uuid}; there are: {there}", "nvidia-smi -L")
    directory = _existing(pool_directory)
    for uuid in chosen:
        yield _try(REGISTER, uuid, [*command, "register", uuid, str(directory)], deadline_s, _registered)
        yield _try(EXCHANGE, uuid, [*command, "exchange", uuid], deadline_s, _exchanged)


def _existing(directory: Path) -> Path:
    """Return the directory, or the nearest one above it: of the same file system once it is made."""
    return next(each for each in (directory, *directory.parents) if each.is_dir())


def _try(
    name: str,
    uuid: str,
    command: Sequence[str],
    deadline_s: float,
    succeeded: Callable[[str, Mapping[str, float]], Finding],
) -> Finding:
    otherwise = WITHOUT_IPC if name == EXCHANGE else WITHOUT_PINNING
    try:
        said = json.loads(run_child(command, deadline_s))
    except ChildFailed as error:
        return judge(name, CudaFailure("", str(error)), "nvidia-smi; sudo dmesg | grep -i nvrm", uuid)
    except ValueError:
        return failed(name, f"{uuid} the child's answer is no JSON", otherwise)
    failure = parse_failure(said)
    if failure is not None:
        return judge(name, failure, otherwise, uuid)
    if "missing" in said:
        return failed(name, f"{uuid} {said['missing']}", otherwise)
    return succeeded(uuid, said)


def _registered(uuid: str, said: Mapping[str, float]) -> Finding:
    size = format_bytes(int(said["bytes"]))
    return passed(
        REGISTER, f"{uuid} {size} of the pool's file system pinned in {said['seconds'] * 1e3:.1f} ms"
    )


def _exchanged(uuid: str, said: Mapping[str, float]) -> Finding:
    size = int(said["bytes"])
    wrong = int(said["wrong_here"] + said["wrong_there"])
    if wrong:
        text = f"{uuid} {wrong} of {2 * size} bytes arrived wrong: {said['wrong_here']} to the host, "
        return failed(EXCHANGE, f"{text}{said['wrong_there']} to the device", WITHOUT_IPC)
    to_device, to_host = (size / said[key] / GIB for key in ("to_device_s", "to_host_s"))
    text = (
        f"{uuid} {format_bytes(size)} both ways between two processes, every byte equal: "
        f"{to_device:.1f} GiB/s to the device, {to_host:.1f} GiB/s to the host"
    )
    if not said["pinned"]:
        return warned(EXCHANGE, f"{text}, from memory that could not be pinned", WITHOUT_PINNING)
    return passed(EXCHANGE, text)
