"""The kernels' source is compiled to PTX without a GPU; what runs them is in tests/gpu."""

from __future__ import annotations

import ctypes
import importlib.resources
import importlib.util
import re
from pathlib import Path

import pytest

from kvtier_ops.cuda import KERNEL_NAMES, KERNEL_OPTIONS, kernel_source


def find_nvrtc() -> Path | None:
    """Return the library of one of NVIDIA's wheels, CUDA 13's or 12's."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for pattern in ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12"):
            found = Path(place) / pattern
            if found.exists():
                return found
    return None


NVRTC = find_nvrtc()
needs_nvrtc = pytest.mark.skipif(
    NVRTC is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc (58 MB, needs no GPU)"
)


def compile_to_ptx(source: str, architecture: str) -> tuple[bool, str]:
    """Return whether it compiled, and the PTX or the compiler's words."""
    nvrtc = ctypes.CDLL(str(NVRTC))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    assert created == 0
    try:
        options = [option.encode() for option in (*KERNEL_OPTIONS, f"--gpu-architecture={architecture}")]
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        compiled = status == 0
        read_size = nvrtc.nvrtcGetPTXSize if compiled else nvrtc.nvrtcGetProgramLogSize
        read_text = nvrtc.nvrtcGetPTX if compiled else nvrtc.nvrtcGetProgramLog
        assert read_size(program, ctypes.byref(size)) == 0
        text = ctypes.create_string_buffer(size.value)
        assert read_text(program, text) == 0
        return compiled, text.value.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
def test_the_kernels_compile_to_ptx_with_both_entry_points_and_wide_loads(architecture: str) -> None:
    compiled, ptx = compile_to_ptx(kernel_source(), architecture)
    assert compiled, ptx
    assert set(re.findall(r"\.visible \.entry (\w+)\(", ptx)) == set(KERNEL_NAMES.values())
    assert ptx.count("ld.global.cs.v4") >= 2 * 4, "four loads of 16 bytes under way, in each kernel"
    assert "st.global.cs.v4" in ptx
    assert ".local" not in ptx, "what a thread holds must lie in registers"


@needs_nvrtc
def test_an_error_in_the_source_is_seen() -> None:
    compiled, log = compile_to_ptx(kernel_source().replace("__stcs", "__no_such_store"), "compute_80")
    assert not compiled
    assert "__no_such_store" in log


def test_the_source_is_in_the_package() -> None:
    source = importlib.resources.files("kvtier_ops") / "kernels.cu"
    assert source.read_text(encoding="utf-8") == kernel_source()
    for name in KERNEL_NAMES.values():
        assert f'extern "C" __global__ void {name}(' in kernel_source()
