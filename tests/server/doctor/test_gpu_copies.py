"""The processes of the deep checks, over a double of the driver's library; real devices: tests/gpu."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier_server.doctor.finding import Finding, Verdict
from kvtier_server.doctor.gpu import CudaFailure, Gpus, probe_devices
from kvtier_server.doctor.gpu_copies import WITHOUT_IPC, check_copies

from . import cuda_double

DOUBLE = (sys.executable, cuda_double.__file__)
UUID = "GPU-00000000-0000-0000-0000-00000000000"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the double's devices have their memory: its path must fit a handle."""
    roots = Path(cuda_double.__file__).parents[3]
    monkeypatch.setenv(
        "PYTHONPATH", ":".join(str(roots / root) for root in ("proto", "ops", "server", "client"))
    )
    with tempfile.TemporaryDirectory(prefix="kvtier-run-") as directory:
        monkeypatch.setenv("CUDA_DOUBLE", directory)
        yield Path(directory)


def check(directory: Path, *uuids: str, deadline_s: float = 60.0) -> list[Finding]:
    gpus = probe_devices(DOUBLE, 60.0)
    return list(check_copies(gpus, directory, uuids, command=DOUBLE, deadline_s=deadline_s))


def test_the_driver_names_its_devices() -> None:
    gpus = probe_devices(DOUBLE, 60.0)
    assert (gpus.missing, gpus.failure, gpus.version) == ("", None, 12080)
    (device,) = gpus.devices
    assert (device.uuid, device.name) == (UUID + "0", "Double")
    assert (device.pci_address, device.total_bytes) == ("0000:8a:00.0", 141 << 30)


def test_two_processes_exchange_every_byte_and_leave_nothing(tmp_path: Path, memory: Path) -> None:
    pinned, exchanged = check(tmp_path / "pool" / "not made yet")
    assert (pinned.name, pinned.verdict) == ("gpu.register", Verdict.PASS)
    assert "2MiB of the pool's file system pinned in " in pinned.text
    assert (exchanged.name, exchanged.verdict) == ("gpu.ipc", Verdict.PASS)
    assert exchanged.text.startswith(f"{UUID}0 1MiB both ways between two processes, every byte equal: ")
    assert exchanged.text.count("GiB/s") == 2
    assert list(memory.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_one_wrong_byte_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_DOUBLE_FAULT", "flip")
    _, exchanged = check(tmp_path)
    assert (exchanged.verdict, exchanged.fix) == (Verdict.FAIL, WITHOUT_IPC)
    assert (
        f"2 of {2 * cuda_double.EXCHANGE_BYTES} bytes arrived wrong: 1 to the host, 1 to the device"
        in exchanged.text
    )


@pytest.mark.parametrize(
    ("fault", "verdict", "text", "fix"),
    [
        ("cuIpcOpenMemHandle_v2=201", Verdict.FAIL, "CUDA_ERROR_INVALID_CONTEXT (201)", WITHOUT_IPC),
        ("cuIpcGetMemHandle=999", Verdict.FAIL, "cuIpcGetMemHandle: error 999 (999)", WITHOUT_IPC),
        ("cuMemAlloc_v2=2", Verdict.WARN, "an engine has taken", f"kvtier doctor --device {UUID}0"),
        ("cuDevicePrimaryCtxRetain=46", Verdict.FAIL, "compute mode", f"nvidia-smi -i {UUID}0 -c DEFAULT"),
        ("cuMemcpyDtoH_v2=die", Verdict.FAIL, "SIGSEGV", "nvidia-smi"),
        ("cuMemAlloc_v2=die", Verdict.FAIL, "has ended without a word", WITHOUT_IPC),
        ("cuMemHostRegister_v2=201", Verdict.WARN, "could not be pinned", "ulimit -l unlimited"),
    ],
)
def test_what_goes_wrong_is_told_with_its_error_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, verdict: Verdict, text: str, fix: str
) -> None:
    monkeypatch.setenv("CUDA_DOUBLE_FAULT", fault)
    _, exchanged = check(tmp_path)
    assert (exchanged.name, exchanged.verdict) == ("gpu.ipc", verdict)
    assert text in exchanged.text
    assert fix in exchanged.fix


@pytest.mark.parametrize("call", ["cuMemcpyDtoH_v2", "cuIpcGetMemHandle"])
def test_a_driver_that_hangs_hangs_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    """In either of the two processes; the deadline is far below the test's own."""
    gpus = probe_devices(DOUBLE, 60.0)
    monkeypatch.setenv("CUDA_DOUBLE_FAULT", f"{call}=hang")
    findings = list(check_copies(gpus, tmp_path, (), command=DOUBLE, deadline_s=3.0))
    assert (findings[1].verdict, "no answer within 3 s" in findings[1].text) == (Verdict.FAIL, True)


def test_a_driver_that_hangs_at_once_is_a_failure_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DOUBLE_FAULT", "cuInit=hang")
    gpus = probe_devices(DOUBLE, 1.0)
    assert gpus.failure == CudaFailure("", "the driver was asked for its devices: no answer within 1 s")


def test_a_driver_that_refuses_to_begin_still_tells_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DOUBLE_FAULT", "cuInit=802")
    gpus = probe_devices(DOUBLE, 60.0)
    assert (gpus.version, gpus.devices) == (12080, [])
    assert gpus.failure is not None
    assert gpus.failure.name == "CUDA_ERROR_SYSTEM_NOT_READY"


def test_one_device_of_several_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_DOUBLE_DEVICES", "2")
    findings = check(tmp_path, UUID + "1")
    assert [each.verdict for each in findings] == [Verdict.PASS, Verdict.PASS]
    assert all(UUID + "1" in each.text for each in findings)


def test_a_device_that_is_not_there_fails_with_those_that_are(tmp_path: Path) -> None:
    (found,) = check(tmp_path, "GPU-none")
    assert (found.verdict, found.fix) == (Verdict.FAIL, "nvidia-smi -L")
    assert found.text == f"there is no device GPU-none; there are: {UUID}0"


def test_without_a_device_both_are_skipped(tmp_path: Path) -> None:
    found = list(check_copies(Gpus(missing="no libcuda"), tmp_path, (), command=DOUBLE))
    assert [each.verdict for each in found] == [Verdict.SKIP, Verdict.SKIP]
