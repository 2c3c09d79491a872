"""CudaCopyEngine against a page-by-page loop, on memory of another process. NOT RUN ON A GPU yet."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from tests.gpu.device_helper import as_blocks
from tests.gpu.processes import EngineProcess, engine_process, start, why_no_gpu
from tests.ops.copy_jobs import RandomMemory, copy_slowly, random_copies, random_memory

from kvtier_ops.copy_engine import CopyJob, CopyResult
from kvtier_ops.cuda import CudaCopyEngine
from kvtier_ops.cuda_export import export_cuda
from kvtier_ops.fragments import CopyRefused, Direction, Means, PlacedCopy
from kvtier_ops.ipc import HandleError, MemoryHandle
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy

NO_GPU = why_no_gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]

Bytes = npt.NDArray[np.uint8]
POOL_BYTES = 1 << 20
BUFFER_BYTES = 512 << 10
MAX_ALLOCATIONS = 16
LAYOUT = GroupLayout((TensorLayout("a", 4096),), 2)
WAIT_S = 30.0
MEANS = {
    "what the device has": None,
    "kernel": Means(kernel_below_bytes=1 << 40),
    "batch": Means(kernel_below_bytes=0, batch=True),
    "pitched": Means(kernel_below_bytes=0),
    "plain": Means(kernel_below_bytes=0, max_pitch_bytes=0),
}


@pytest.fixture(scope="module")
def engine_side() -> Iterator[EngineProcess]:
    with engine_process() as process:
        yield process


@pytest.fixture(scope="module")
def buffers(engine_side: EngineProcess) -> list[MemoryHandle]:
    return engine_side.allocate(*[BUFFER_BYTES] * MAX_ALLOCATIONS)


@pytest.fixture
def pool() -> Bytes:
    memory = np.frombuffer(mmap.mmap(-1, POOL_BYTES), np.uint8)
    memory[:] = np.random.default_rng(1).integers(0, 256, POOL_BYTES, np.uint8)
    return memory


def open_engine(pool: Bytes, device: bytes, means: Means | None = None) -> CudaCopyEngine:
    """Pinned in pieces of 256 KiB, so that jobs cross their boundaries."""
    engine = CudaCopyEngine(pool, device, means, piece_bytes=256 << 10)
    assert engine.pinned.wait(WAIT_S), engine.pinned.error
    return engine


@pytest.fixture
def engine(pool: Bytes, buffers: list[MemoryHandle]) -> Iterator[CudaCopyEngine]:
    made = open_engine(pool, buffers[0].device_uuid)
    yield made
    assert made.close(WAIT_S)


def finish(engine: CudaCopyEngine, job: CopyJob) -> CopyResult:
    engine.submit(job)
    (result,) = engine.wait(WAIT_S)
    return result


def handles_of(memory: RandomMemory, buffers: list[MemoryHandle]) -> list[list[MemoryHandle]]:
    return [
        [
            replace(
                buffers[t.allocation],
                offset_bytes=buffers[t.allocation].offset_bytes + t.offset,
                size_bytes=t.size,
                block_stride_bytes=t.stride,
                num_blocks=t.num_blocks,
            )
            for t in tensors
        ]
        for tensors in memory.groups
    ]


class DeviceView:
    """The allocations as this process has them open, copied in and out."""

    def __init__(self, engine: CudaCopyEngine, memory_id: int, memory: RandomMemory) -> None:
        places = engine._memories[memory_id].groups
        self._runtime = engine._runtime
        self._sizes = memory.allocation_bytes
        self._addresses = {
            tensor.allocation: place.address - tensor.offset
            for tensors, group in zip(memory.groups, places, strict=True)
            for tensor, place in zip(tensors, group.tensors, strict=True)
        }

    def read(self) -> list[Bytes]:
        seen = [np.empty(size, np.uint8) for size in self._sizes]
        for index, array in enumerate(seen):
            self._runtime.memcpy(array.ctypes.data, self._addresses[index], array.size, 2)
        return seen

    def write(self, contents: list[Bytes]) -> None:
        for index, array in enumerate(contents):
            self._runtime.memcpy(self._addresses[index], array.ctypes.data, array.size, 1)
        self._runtime.deviceSynchronize()


@pytest.mark.parametrize("means", list(MEANS))
def test_two_hundred_random_jobs_move_the_bytes_that_a_page_by_page_loop_moves(
    means: str, pool: Bytes, buffers: list[MemoryHandle]
) -> None:
    """1,000 plans in all: several groups and parts, both directions, begins and ends inside a chunk."""
    rng = random.Random(means)
    engine = open_engine(pool, buffers[0].device_uuid, MEANS[means])
    if means == "batch" and engine._bindings is None:
        engine.close(WAIT_S)
        pytest.skip("cuda-bindings or the driver has no cudaMemcpyBatchAsync")
    for memory_id in range(200):
        memory = random_memory(rng)
        engine.open_memory(memory_id, handles_of(memory, buffers), memory.layouts)
        device = DeviceView(engine, memory_id, memory)
        numbers = np.random.default_rng(memory_id)
        before = [numbers.integers(0, 256, size, np.uint8) for size in memory.allocation_bytes]
        device.write(before)
        copies = random_copies(rng, memory, POOL_BYTES)
        direction = rng.choice(list(Direction))
        expected_pool = pool.copy()
        copy_slowly(memory, before, expected_pool, copies, direction)

        result = finish(engine, CopyJob(memory_id, direction, memory_id, tuple(copies)))
        assert result.ok, result.message
        assert np.array_equal(pool, expected_pool)
        for got, want in zip(device.read(), before, strict=True):
            assert np.array_equal(got, want)
        engine.close_memory(memory_id)
    assert engine._allocations._opened == {}
    assert engine.close(WAIT_S)


def test_a_copy_waits_for_the_engines_event(
    engine: CudaCopyEngine, pool: Bytes, engine_side: EngineProcess, buffers: list[MemoryHandle]
) -> None:
    engine_side.ask("fill", 0x11)
    event = bytes.fromhex(engine_side.ask("event", 0))
    engine.open_memory(1, [[as_blocks(buffers[0], 4096)]], [LAYOUT], event)
    engine_side.ask("spin", 300)
    job = CopyJob(1, Direction.STORE, 1, (PlacedCopy(ChunkCopy(0, 0, 0, (3, 9)), 0),))
    assert finish(engine, job).ok
    assert (pool[:8192] == 0xEE).all()


def one_job(job_id: int, *block_ids: int) -> CopyJob:
    return CopyJob(job_id, Direction.STORE, 1, (PlacedCopy(ChunkCopy(0, 0, 0, block_ids), 0),))


def test_memory_that_is_wrong_is_refused_and_the_engine_goes_on(
    engine: CudaCopyEngine, pool: Bytes, buffers: list[MemoryHandle]
) -> None:
    good = as_blocks(buffers[0], 4096)
    smaller = BUFFER_BYTES // 2
    cases = [
        (replace(good, handle=bytes(64)), "handle"),
        (replace(good, handle=good.handle[::-1]), "handle"),
        (replace(good, device_uuid=bytes(16)), "device_uuid"),
        (replace(good, allocation_bytes=good.allocation_bytes + 4096), "allocation_bytes"),
        (
            replace(good, allocation_bytes=smaller, size_bytes=smaller, num_blocks=smaller // 4096),
            "allocation_bytes",
        ),
        (replace(good, num_blocks=good.num_blocks + 1), "num_blocks"),
    ]
    for bad, field in cases:
        with pytest.raises(HandleError, match=rf"^{field}: "):
            engine.open_memory(1, [[bad]], [LAYOUT])
    two = GroupLayout((TensorLayout("a", 4096), TensorLayout("b", 4096)), 2)
    with pytest.raises(HandleError, match="overlap"):
        engine.open_memory(1, [[good, good]], [two])
    before = pool.copy()
    engine.open_memory(1, [[good]], [LAYOUT])
    with pytest.raises(CopyRefused, match=r"^block_ids: "):
        engine.submit(one_job(1, good.num_blocks))
    assert np.array_equal(pool, before)
    assert finish(engine, one_job(2, 0)).ok
    assert engine.broken == ""


def test_an_unknown_device_is_refused_naming_those_that_there_are(pool: Bytes) -> None:
    with pytest.raises(HandleError, match=r"^device_uuid: ff.* is not a device that this process sees"):
        CudaCopyEngine(pool, b"\xff" * 16)


def test_one_allocation_is_opened_once_and_closed_with_its_last_registration(
    engine: CudaCopyEngine, buffers: list[MemoryHandle]
) -> None:
    good = as_blocks(buffers[0], 4096)
    engine.open_memory(1, [[good]], [LAYOUT])
    engine.open_memory(2, [[good]], [LAYOUT])
    ((_, uses),) = engine._allocations._opened.values()
    assert uses == 2
    engine.close_memory(1)
    assert finish(engine, replace(one_job(1, 0), memory_id=2)).ok
    engine.close_memory(2)
    assert engine._allocations._opened == {}


def test_a_handle_of_a_process_that_was_killed_is_refused(engine: CudaCopyEngine) -> None:
    with engine_process() as other:
        (handle,) = other.allocate(BUFFER_BYTES)
        other.kill()
        with pytest.raises(HandleError, match=r"^handle: "):
            engine.open_memory(1, [[as_blocks(handle, 4096)]], [LAYOUT])
    assert engine.broken == ""


_EXPANDABLE = """
import torch
from kvtier_ops.cuda_export import export_cuda
from kvtier_ops.ipc import HandleError
tensor = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
try:
    print(export_cuda(tensor.data_ptr(), 1 << 20, 4096, 256))
except HandleError as error:
    print(error)
"""


@pytest.mark.parametrize("expandable", [True, False])
def test_expandable_segments_are_refused_with_the_fix_and_torchs_other_memory_is_exported(
    expandable: bool,
) -> None:
    pytest.importorskip("torch")
    child = start("-c", _EXPANDABLE, PYTORCH_CUDA_ALLOC_CONF=f"expandable_segments:{expandable}")
    said, _ = child.communicate(timeout=100)
    if expandable:
        assert said.startswith("tensor_ptr: CUDA IPC cannot export this memory")
        assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False" in said
    else:
        assert said.startswith("MemoryHandle(kind=<MemoryKind.CUDA_IPC: 1>")


def test_host_memory_is_not_exported_as_a_devices() -> None:
    with pytest.raises(HandleError, match=r"^tensor_ptr: "):
        export_cuda(np.empty(4096, np.uint8).ctypes.data, 4096, 4096, 1)
