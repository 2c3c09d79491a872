"""The kernels' source without a GPU: compiled to PTX; and compiled by g++ and run thread after thread.

The threads of the kernels do not speak to one another, so one after the other is as good as at once. What
runs them on a device is in tests/gpu.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import importlib.util
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.ops.copy_jobs import copy_slowly, random_copies, random_memory

from kvtier_ops.cuda import KERNEL_NAMES, KERNEL_OPTIONS, KERNEL_THREADS, kernel_source
from kvtier_ops.fragments import (
    KERNEL_PIECE_BYTES,
    Direction,
    Fragments,
    Means,
    assign_means,
    kernel_descriptors,
    pieces_per_row,
    plan_fragments,
)


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


ON_CPU = """
struct Index { unsigned int x; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static unsigned long long misaligned;
struct alignas(16) uint4 { unsigned int x, y, z, w; };
#define __global__
#define __device__
#define __forceinline__ inline
template <typename T> T __ldcs(const T* place) {
    misaligned += reinterpret_cast<unsigned long long>(place) % sizeof(T) != 0;
    return *place;
}
template <typename T> void __stcs(T* place, T value) {
    misaligned += reinterpret_cast<unsigned long long>(place) % sizeof(T) != 0;
    *place = value;
}
#include "kernels.cu"
extern "C" unsigned long long launch(int to_pool, const Descriptor* rows, unsigned int num_rows,
        unsigned int per_row, unsigned int piece_bytes, unsigned int blocks, unsigned int threads) {
    misaligned = 0;
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            (to_pool ? gather : scatter)(rows, num_rows, per_row, piece_bytes);
    return misaligned;
}
"""

COMPILER = shutil.which("c++")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a library for the CPU: `launch` returns how many accesses were not aligned."""
    if COMPILER is None:
        pytest.skip("no C++ compiler: apt-get install g++")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cu").write_text(kernel_source(), encoding="utf-8")
    source, library = folder / "launch.cpp", folder / "launch.so"
    source.write_text(ON_CPU, encoding="utf-8")
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.launch.restype = ctypes.c_ulonglong
    return loaded


def run_on_cpu(
    library: ctypes.CDLL, fragments: Fragments, base: int, direction: Direction, blocks: int
) -> None:
    rows = kernel_descriptors(fragments, base)
    misaligned = library.launch(
        int(direction is Direction.STORE),
        ctypes.c_void_p(rows.ctypes.data),
        len(rows),
        pieces_per_row(fragments),
        KERNEL_PIECE_BYTES,
        blocks,
        KERNEL_THREADS,
    )
    assert misaligned == 0


def test_the_kernels_move_the_bytes_of_two_hundred_random_plans(on_cpu: ctypes.CDLL) -> None:
    rng = random.Random(3)
    pool_bytes = 1 << 20
    for _ in range(200):
        memory = random_memory(rng)
        numbers = np.random.default_rng(rng.randrange(1 << 32))
        allocations = [numbers.integers(0, 256, size, np.uint8) for size in memory.allocation_bytes]
        pool = numbers.integers(0, 256, pool_bytes, np.uint8)
        copies = random_copies(rng, memory, pool_bytes)
        direction = rng.choice(list(Direction))
        expected, expected_pool = [a.copy() for a in allocations], pool.copy()
        copy_slowly(memory, expected, expected_pool, copies, direction)
        places = memory.places([a.ctypes.data for a in allocations])
        fragments = plan_fragments(places, copies, direction, pool_bytes)
        kernel = assign_means(fragments, Means(1 << 40), pool_bytes).kernel
        if len(kernel):
            run_on_cpu(on_cpu, kernel, pool.ctypes.data, direction, rng.randint(1, 20))
        assert np.array_equal(pool, expected_pool)
        for got, want in zip(allocations, expected, strict=True):
            assert np.array_equal(got, want)


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("shift", [0, 1, 4, 8, 16])
def test_rows_of_many_sizes_are_moved_whole_at_any_alignment(
    shift: int, direction: Direction, on_cpu: ctypes.CDLL
) -> None:
    sizes = [1, 15, 16, 17, 4096, 16383, 16384, 16385, 16400, 40000, 40001, 65536]
    room = 1 << 17
    numbers = np.random.default_rng(shift)
    device = numbers.integers(0, 256, room * len(sizes), np.uint8)
    pool = numbers.integers(0, 256, room * len(sizes), np.uint8)
    starts = np.arange(len(sizes), dtype=np.int64) * room
    rows = Fragments(
        starts + device.ctypes.data + shift, starts + 16, np.array(sizes, np.int64), np.zeros_like(starts)
    )
    expected, expected_pool = device.copy(), pool.copy()
    for start, size in zip(starts.tolist(), sizes, strict=True):
        in_device, in_pool = slice(start + shift, start + shift + size), slice(start + 16, start + 16 + size)
        if direction is Direction.STORE:
            expected_pool[in_pool] = device[in_device]
        else:
            expected[in_device] = pool[in_pool]
    run_on_cpu(on_cpu, rows, pool.ctypes.data, direction, 16)
    assert np.array_equal(device, expected)
    assert np.array_equal(pool, expected_pool)


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
