from __future__ import annotations

import json

import pytest

from kvtier_server.doctor import gpu
from kvtier_server.doctor.cuda_driver import CudaDriver, DriverMissing
from kvtier_server.doctor.finding import Verdict
from kvtier_server.doctor.gpu import (
    CURES,
    CudaFailure,
    Device,
    Gpus,
    check_devices,
    check_driver,
    check_gpus,
    check_libraries,
    check_visibility,
    format_version,
    judge,
    parse_devices,
    probe_devices,
)

from .conftest import MadeMachine

H200 = Device("GPU-1", "NVIDIA H200", "0000:8a:00.0", 141 << 30)
NO_DEVICE = CudaFailure("CUDA_ERROR_NO_DEVICE", "cuInit: CUDA_ERROR_NO_DEVICE (100), none")


def with_device(version: int = 13000) -> Gpus:
    return Gpus(version=version, devices=[H200])


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    there = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(gpu, "installed_version", there.get)


def test_a_machine_without_a_driver_has_no_defect(made: MadeMachine) -> None:
    found = list(check_gpus(made.machine, Gpus(missing="libcuda.so.1: cannot open"), {}))
    assert {each.verdict for each in found} <= {Verdict.SKIP, Verdict.PASS}
    assert found[0].text == "libcuda.so.1: cannot open"


def test_this_machine_answers_or_says_why_not() -> None:
    """The real library, where there is one."""
    gpus = probe_devices()
    try:
        CudaDriver.load()
    except DriverMissing:
        assert "libcuda.so.1" in gpus.missing
    else:
        assert gpus.version >= 10000


def test_a_container_that_lacks_only_the_library_is_told_so(made: MadeMachine) -> None:
    made.gpu("0000:8a:00.0", node=0)
    made.write(
        "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed\n"
    )
    found = check_driver(made.machine, Gpus(missing="no library"))
    assert found.verdict is Verdict.SKIP
    assert found.text == (
        "no library; 1 NVIDIA devices on the PCI bus; the kernel module 580.82.07 is loaded: a container "
        "needs --gpus all"
    )


def test_driver_and_devices_are_told(made: MadeMachine) -> None:
    made.gpu("0000:8a:00.0", node=0)
    made.write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module  580.82.07  Wed\n")
    assert check_driver(made.machine, with_device()).text == "CUDA 13.0, kernel module 580.82.07"
    (found,) = check_devices(with_device(), {})
    assert (found.verdict, found.text) == (Verdict.PASS, "GPU-1 NVIDIA H200, 141GiB, PCI 0000:8a:00.0")


def test_a_driver_older_than_the_extras_is_a_warning(made: MadeMachine) -> None:
    assert check_driver(made.machine, with_device(11080)).verdict is Verdict.WARN
    assert check_driver(made.machine, with_device(12000)).verdict is Verdict.PASS


def test_a_driver_that_gives_no_answer_fails(made: MadeMachine) -> None:
    silent = Gpus(failure=CudaFailure("", "no answer within 30 s"))
    found = check_driver(made.machine, silent)
    assert (found.verdict, found.text) == (Verdict.FAIL, "no answer within 30 s")
    assert [each.verdict for each in check_devices(silent, {})] == [Verdict.SKIP]


@pytest.mark.parametrize("failure", [NO_DEVICE, None])
def test_a_driver_without_devices_is_skipped_with_what_may_hide_them(failure: CudaFailure | None) -> None:
    (found,) = check_devices(Gpus(version=13000, failure=failure), {"CUDA_VISIBLE_DEVICES": ""})
    assert (found.verdict, found.text.endswith("; CUDA_VISIBLE_DEVICES is ''")) == (Verdict.SKIP, True)


@pytest.mark.parametrize("name", CURES)
def test_an_error_that_is_known_has_its_cure(name: str) -> None:
    found = judge("gpu.ipc", CudaFailure(name, "refused"), "something else", "GPU-1")
    assert found.verdict is CURES[name].verdict
    assert CURES[name].meaning in found.text
    assert found.fix == CURES[name].fix.replace("{uuid}", "GPU-1")
    assert "{" not in found.fix


def test_any_other_error_fails_with_what_helps_in_general() -> None:
    found = judge("gpu.ipc", CudaFailure("CUDA_ERROR_ILLEGAL_ADDRESS", "refused"), "nvidia-smi")
    assert (found.verdict, found.text, found.fix) == (Verdict.FAIL, "refused", "nvidia-smi")


def test_devices_that_are_hidden_from_a_daemon_are_a_warning(made: MadeMachine) -> None:
    made.gpu("0000:8a:00.0", node=0)
    assert (
        check_visibility(made.machine, with_device(), {"CUDA_VISIBLE_DEVICES": "0"}).verdict is Verdict.PASS
    )
    made.gpu("0000:8b:00.0", node=0)
    found = check_visibility(made.machine, with_device(), {"CUDA_VISIBLE_DEVICES": "0"})
    assert (found.verdict, found.fix) == (Verdict.WARN, "unset CUDA_VISIBLE_DEVICES")
    assert found.text.startswith("CUDA_VISIBLE_DEVICES=0: 1 of 2 devices")
    assert check_visibility(made.machine, with_device(), {}).verdict is Verdict.PASS


def test_without_a_device_no_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert check_libraries(Gpus(version=13000)).verdict is Verdict.SKIP


@pytest.mark.parametrize(
    ("version", "there", "verdict", "fix"),
    [
        (13000, {}, Verdict.WARN, "in kvtier's directory: pip install '.[cuda13]'"),
        (12080, {}, Verdict.WARN, "in kvtier's directory: pip install '.[cuda12]'"),
        (14010, {}, Verdict.WARN, "in kvtier's directory: pip install '.[cuda13]'"),
        (13000, {"cupy_cuda13x": "14.0"}, Verdict.PASS, ""),
        (13000, {"cupy_cuda12x": "13.6", "torch": "2.11"}, Verdict.PASS, ""),
        (
            12080,
            {"cupy_cuda13x": "14.0"},
            Verdict.FAIL,
            "in kvtier's directory: pip uninstall -y cupy-cuda13x && pip install '.[cuda12]'",
        ),
        (
            13000,
            {"cupy_cuda12x": "13.6", "cupy_cuda13x": "14.0"},
            Verdict.FAIL,
            "in kvtier's directory: pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install '.[cuda13]'",
        ),
    ],
)
def test_cupy_is_there_once_and_not_newer_than_the_driver(
    monkeypatch: pytest.MonkeyPatch, version: int, there: dict[str, str], verdict: Verdict, fix: str
) -> None:
    install(monkeypatch, **there)
    found = check_libraries(with_device(version))
    assert (found.verdict, found.fix) == (verdict, fix)
    assert all(f"{name.replace('_', '-')} {each}" in found.text for name, each in there.items())


def test_an_answer_is_read_field_by_field() -> None:
    error = {"call": "cuInit", "code": 100, "name": "CUDA_ERROR_NO_DEVICE", "meaning": "none"}
    assert parse_devices(json.dumps({"version": 12080, "error": error})) == Gpus(
        version=12080, devices=[], failure=NO_DEVICE
    )
    assert parse_devices(json.dumps({"missing": "no library"})) == Gpus(missing="no library")


@pytest.mark.parametrize(("version", "text"), [(12080, "12.8"), (13000, "13.0"), (11040, "11.4")])
def test_a_version_is_written_as_people_do(version: int, text: str) -> None:
    assert format_version(version) == text
