"""CudaCopyEngine's own code: its queues, caches, orders and ends, on a device that is this process's memory.

What a driver and a GPU do is in tests/gpu.
"""

from __future__ import annotations

import mmap
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from tests.ops.copy_jobs import copy_slowly, random_copies, random_memory
from tests.ops.device_without_gpu import DEVICE_UUID, WAIT_S, Bindings, Cupy, Driver, Runtime

from kvtier_ops import copy_engine, cuda
from kvtier_ops.copy_engine import CopyEngineBroken, CopyJob, CopyResult
from kvtier_ops.cuda import CudaCopyEngine
from kvtier_ops.fragments import CopyRefused, Direction, Means, PlacedCopy
from kvtier_ops.ipc import HandleError, MemoryHandle, MemoryKind
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy

Bytes = npt.NDArray[np.uint8]
POOL_BYTES = 1 << 20
LAYOUT = GroupLayout((TensorLayout("a", 64),), 4)
EVENT = b"e" * 64


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    module = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    made: Runtime = module.cuda.runtime
    monkeypatch.setattr(cuda, "Driver", lambda: Driver(made))
    monkeypatch.setattr(cuda, "_batch_bindings", lambda _: Bindings(made))
    return made


@pytest.fixture
def pool() -> Bytes:
    memory = np.frombuffer(mmap.mmap(-1, POOL_BYTES), np.uint8)
    memory[:] = np.random.default_rng(2).integers(0, 256, POOL_BYTES, np.uint8)
    return memory


def open_engine(pool: Bytes, means: Means | None = None) -> CudaCopyEngine:
    engine = CudaCopyEngine(pool, DEVICE_UUID, means, piece_bytes=256 << 10)
    assert engine.pinned.wait(WAIT_S)
    return engine


@pytest.fixture
def engine(runtime: Runtime, pool: Bytes) -> Iterator[CudaCopyEngine]:
    made = open_engine(pool)
    yield made
    assert made.close(WAIT_S)
    assert not any((runtime.streams, runtime.registered, runtime.events, runtime.opened))


def export(runtime: Runtime, memory: Bytes) -> MemoryHandle:
    """Name memory as another process's: blocks of 64 bytes."""
    name = f"{memory.ctypes.data:064x}".encode()
    runtime.memory_of_others.append(memory)
    runtime.exported[name] = (memory.ctypes.data, memory.size)
    return MemoryHandle(
        MemoryKind.CUDA_IPC, DEVICE_UUID, name, memory.size, 0, memory.size, 64, memory.size // 64
    )


def job(job_id: int, direction: Direction, *block_ids: int, part: int = 0, memory_id: int = 1) -> CopyJob:
    return CopyJob(job_id, direction, memory_id, (PlacedCopy(ChunkCopy(0, 0, 0, block_ids), part),))


def wait_for(engine: CudaCopyEngine, count: int) -> list[CopyResult]:
    results: list[CopyResult] = []
    while len(results) < count:
        more = engine.wait(WAIT_S)
        assert more
        results += more
    return results


@pytest.mark.parametrize(
    ("means", "used"),
    [
        (None, "gather"),
        (Means(kernel_below_bytes=1 << 40), "scatter"),
        (Means(kernel_below_bytes=0), "pitched"),
        (Means(kernel_below_bytes=0, max_pitch_bytes=0), "plain"),
        (Means(kernel_below_bytes=200, batch=True), "batch"),
    ],
)
def test_two_hundred_random_jobs_move_the_bytes_that_a_page_by_page_loop_moves(
    means: Means | None, used: str, runtime: Runtime, pool: Bytes
) -> None:
    rng = random.Random(str(means))
    engine = open_engine(pool, means)
    for memory_id in range(200):
        memory = random_memory(rng)
        numbers = np.random.default_rng(memory_id)
        allocations = [numbers.integers(0, 256, size, np.uint8) for size in memory.allocation_bytes]
        exported = [export(runtime, allocation) for allocation in allocations]
        handles = [
            [
                replace(
                    exported[t.allocation],
                    offset_bytes=t.offset,
                    size_bytes=t.size,
                    block_stride_bytes=t.stride,
                    num_blocks=t.num_blocks,
                )
                for t in tensors
            ]
            for tensors in memory.groups
        ]
        engine.open_memory(memory_id, handles, memory.layouts)
        copies = random_copies(rng, memory, POOL_BYTES)
        direction = rng.choice(list(Direction))
        expected, expected_pool = [a.copy() for a in allocations], pool.copy()
        copy_slowly(memory, expected, expected_pool, copies, direction)
        engine.submit(CopyJob(memory_id, direction, memory_id, tuple(copies)))
        (result,) = wait_for(engine, 1)
        assert result.ok, result.message
        assert np.array_equal(pool, expected_pool)
        for got, want in zip(allocations, expected, strict=True):
            assert np.array_equal(got, want)
        engine.close_memory(memory_id)
        runtime.exported.clear()
    assert used in runtime.copies
    assert engine.close(WAIT_S)
    assert runtime.opened == set()
    assert runtime.events == {}


def test_a_copy_begins_after_the_engines_event(engine: CudaCopyEngine, runtime: Runtime, pool: Bytes) -> None:
    memory = np.zeros(4096, np.uint8)
    recorded = runtime.events_of_others[EVENT] = threading.Event()
    engine.open_memory(1, [[export(runtime, memory)]], [LAYOUT], EVENT)
    engine.submit(job(1, Direction.STORE, 3, 9))
    engine.submit(job(2, Direction.LOAD, 20, part=4096))
    memory[:] = 5
    recorded.set()
    assert all(result.ok for result in wait_for(engine, 2))
    assert (pool[:128] == 5).all()


def test_a_jobs_time_is_its_copies_without_the_wait_for_compute_and_the_jobs_before_it(
    runtime: Runtime, pool: Bytes
) -> None:
    engine = open_engine(pool, Means(kernel_below_bytes=0, max_pitch_bytes=0))  # each block a plain copy
    recorded = runtime.events_of_others[EVENT] = threading.Event()
    engine.open_memory(1, [[export(runtime, np.zeros(1024, np.uint8))]], [LAYOUT], EVENT)
    engine.open_memory(2, [[export(runtime, np.zeros(1024, np.uint8))]], [LAYOUT])
    engine.submit(job(1, Direction.STORE, 0, 2))
    assert runtime.told_to_wait.acquire(timeout=WAIT_S)
    engine.submit(job(2, Direction.STORE, 0, 2, 4, part=4096, memory_id=2))
    recorded.set()
    results = wait_for(engine, 2)
    assert [(result.job_id, result.seconds) for result in results] == [(1, 2.0), (2, 3.0)]
    assert engine.close(WAIT_S)


def test_the_job_under_way_is_as_old_as_the_end_of_the_one_before_it(
    engine: CudaCopyEngine, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(copy_engine, "time", SimpleNamespace(monotonic=lambda: now))
    events = [threading.Event(), threading.Event()]
    for index, event in enumerate(events):
        name = bytes([index]) * 64
        runtime.events_of_others[name] = event
        engine.open_memory(index, [[export(runtime, np.zeros(1024, np.uint8))]], [LAYOUT], name)
        engine.submit(job(index, Direction.STORE, index, part=4096 * index, memory_id=index))
        assert runtime.told_to_wait.acquire(timeout=WAIT_S)
    now += 25
    assert engine.oldest_s() == 25, "the wait for compute is the job's"
    events[0].set()
    assert [result.job_id for result in wait_for(engine, 1)] == [0]
    now += 10
    assert engine.oldest_s() == 10
    events[1].set()
    wait_for(engine, 1)
    assert engine.oldest_s() == 0
    monkeypatch.undo()  # closing looks at the clock


def test_closing_waits_with_the_mapping_for_the_last_job(engine: CudaCopyEngine, runtime: Runtime) -> None:
    memory = np.zeros(4096, np.uint8)
    recorded = runtime.events_of_others[EVENT] = threading.Event()
    engine.open_memory(1, [[export(runtime, memory)]], [LAYOUT], EVENT)
    for number in range(20):
        engine.submit(job(number, Direction.STORE, number, part=4096 * number))
    assert runtime.told_to_wait.acquire(timeout=WAIT_S), "one has begun"
    engine.close_memory(1)
    assert runtime.opened == {memory.ctypes.data}
    recorded.set()
    results = wait_for(engine, 20)
    assert len({result.job_id for result in results}) == 20
    assert {result.message for result in results if not result.ok} <= {
        "memory_id: the memory was closed before the copy began"
    }
    assert runtime.opened == set()


def test_one_allocation_is_opened_once_for_all_its_registrations(
    engine: CudaCopyEngine, runtime: Runtime
) -> None:
    handle = export(runtime, np.zeros(4096, np.uint8))
    engine.open_memory(1, [[handle], [handle]], [LAYOUT, LAYOUT])
    engine.open_memory(2, [[handle]], [LAYOUT])
    engine.close_memory(1)
    assert len(runtime.opened) == 1
    engine.close_memory(2)
    assert runtime.opened == set()


def test_memory_that_is_wrong_leaves_nothing_open(engine: CudaCopyEngine, runtime: Runtime) -> None:
    good = export(runtime, np.zeros(4096, np.uint8))
    two = GroupLayout((TensorLayout("a", 64), TensorLayout("b", 64)), 4)
    cases = [
        ([good, replace(good, handle=bytes(64))], "handle: CUDA does not open it"),
        ([good, replace(good, handle=bytes(64), device_uuid=bytes(16))], "device_uuid: the memory is on"),
        ([good, good], "offset_bytes: tensors 0 and 1 of group 0 overlap"),
    ]
    for handles, message in cases:
        with pytest.raises(HandleError, match=rf"^{message}"):
            engine.open_memory(1, [handles], [two])
    larger = replace(good, allocation_bytes=8192)
    with pytest.raises(HandleError, match=r"^allocation_bytes: 8192, but the driver opened 4096"):
        engine.open_memory(1, [[larger]], [LAYOUT])
    for event in (b"short", EVENT):
        with pytest.raises(HandleError, match=r"^event_handle: "):
            engine.open_memory(1, [[good]], [LAYOUT], event)
    assert runtime.opened == set()
    with pytest.raises(CopyRefused, match=r"^memory_id: 1 is not open"):
        engine.submit(job(1, Direction.LOAD, 0))


def test_a_copy_that_the_driver_refuses_fails_its_job_alone(runtime: Runtime, pool: Bytes) -> None:
    engine = open_engine(pool, Means(kernel_below_bytes=0, max_pitch_bytes=0))
    memory = np.zeros(4096, np.uint8)
    engine.open_memory(1, [[export(runtime, memory)]], [LAYOUT])
    runtime.fail_copy_number = 2
    engine.submit(job(1, Direction.STORE, 0, 2, 4, 6))
    (failed,) = wait_for(engine, 1)
    assert (failed.ok, failed.nbytes) == (False, 0)
    assert "cudaErrorInvalidValue" in failed.message
    assert engine.broken == ""
    runtime.fail_copy_number = -1
    engine.submit(job(2, Direction.STORE, 0, 2, 4, 6))
    assert wait_for(engine, 1)[0].ok
    assert engine.close(WAIT_S)


def test_a_lost_context_fails_every_job_and_says_so(engine: CudaCopyEngine, runtime: Runtime) -> None:
    engine.open_memory(1, [[export(runtime, np.zeros(4096, np.uint8))]], [LAYOUT])
    runtime.lost = True
    for number in range(3):
        try:
            engine.submit(job(number, Direction.STORE, number, part=4096 * number))
        except CopyEngineBroken:
            break
    else:
        number = 3
    results = wait_for(engine, number)
    assert not any(result.ok for result in results)
    assert "the context is lost: cudaErrorIllegalAddress" in engine.broken
    with pytest.raises(CopyEngineBroken, match="the context is lost"):
        engine.submit(job(9, Direction.LOAD, 0))
    runtime.lost = False
    runtime.events.clear()  # those of a lost context are gone with it


def test_memory_that_is_not_pinned_yet_is_copied_all_the_same(runtime: Runtime, pool: Bytes) -> None:
    go = threading.Event()
    register = runtime.hostRegister

    def register_late(address: int, nbytes: int, flags: int) -> None:
        assert go.wait(WAIT_S)
        register(address, nbytes, flags)

    runtime.hostRegister = register_late  # type: ignore[method-assign]
    engine = CudaCopyEngine(pool, DEVICE_UUID, piece_bytes=256 << 10)
    memory = np.full(4096, 7, np.uint8)
    engine.open_memory(1, [[export(runtime, memory)]], [LAYOUT])
    engine.submit(job(1, Direction.STORE, 0, 2, part=(256 << 10) - 64))
    assert wait_for(engine, 1)[0].ok
    assert (pool[(256 << 10) - 64 :][:128] == 7).all()
    assert set(runtime.copies) == {"plain"}
    go.set()
    assert engine.pinned.wait(WAIT_S)
    engine.submit(job(2, Direction.STORE, 0, 2))
    assert wait_for(engine, 1)[0].ok
    assert "gather" in runtime.copies
    assert engine.close(WAIT_S)
