from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from tests.ops.copy_jobs import RandomMemory, copy_slowly, random_copies, random_memory

from kvtier_ops import copy_engine, faults
from kvtier_ops.copy_engine import CopyEngineBroken, CopyJob, CopyResult, HostCopyEngine
from kvtier_ops.fragments import CopyRefused, Direction, PlacedCopy
from kvtier_ops.ipc import HandleError, MemoryHandle, MemoryKind, SharedAllocation, export_shared
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy
from kvtier_ops.pool import Pool
from kvtier_ops.timeline import SharedTimeline

Bytes = npt.NDArray[np.uint8]
POOL_BYTES = 1 << 20
LAYOUT = GroupLayout((TensorLayout("a", 64), TensorLayout("b", 64)), 4)
WAIT_S = 20.0


@pytest.fixture
def memory_of() -> Iterator[Callable[[int], SharedAllocation]]:
    made: list[SharedAllocation] = []

    def make(size: int) -> SharedAllocation:
        made.append(SharedAllocation(size))
        return made[-1]

    yield make
    for allocation in made:
        allocation.close()


@pytest.fixture
def pool_bytes() -> Bytes:
    return np.random.default_rng(1).integers(0, 256, POOL_BYTES, np.uint8)


@pytest.fixture
def engine(pool_bytes: Bytes) -> Iterator[HostCopyEngine]:
    made = HostCopyEngine(pool_bytes)
    yield made
    faults.disarm()
    assert made.close(WAIT_S)


def handles_of(allocation: SharedAllocation) -> list[MemoryHandle]:
    """Two layers of 16 blocks, one after the other."""
    return [export_shared(allocation, i * 1024, 1024, 64, 16) for i in range(2)]


def job(
    job_id: int,
    direction: Direction,
    *block_ids: int,
    part: int = 0,
    memory_id: int = 1,
    first: int = 0,
) -> CopyJob:
    return CopyJob(job_id, direction, memory_id, (PlacedCopy(ChunkCopy(0, 0, first, block_ids), part),))


def wait_for(engine: HostCopyEngine, count: int) -> list[CopyResult]:
    results: list[CopyResult] = []
    while len(results) < count:
        more = engine.wait(WAIT_S)
        assert more, f"{len(results)} of {count} jobs ended"
        results += more
    assert len(results) == count
    return results


class Held:
    """Holds the copies of an engine in front of their first chunk."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self._go = threading.Event()
        faults.arm("copy_engine.before_chunk", self._hold)

    def _hold(self) -> None:
        self.reached.release()
        assert self._go.wait(WAIT_S)

    def release(self) -> None:
        self._go.set()


def export(
    memory: RandomMemory, make: Callable[[int], SharedAllocation]
) -> tuple[list[SharedAllocation], list[list[MemoryHandle]]]:
    allocations = [make(size) for size in memory.allocation_bytes]
    handles = [
        [export_shared(allocations[t.allocation], t.offset, t.size, t.stride, t.num_blocks) for t in tensors]
        for tensors in memory.groups
    ]
    return allocations, handles


@pytest.mark.parametrize("seed", range(20))
def test_fifty_random_jobs_move_the_bytes_that_a_page_by_page_loop_moves(
    seed: int,
    engine: HostCopyEngine,
    pool_bytes: Bytes,
    memory_of: Callable[[int], SharedAllocation],
) -> None:
    """1,000 plans in all: several groups and parts, both directions, begins and ends inside a chunk."""
    rng = random.Random(seed + 100)
    for memory_id in range(50):
        memory = random_memory(rng)
        allocations, handles = export(memory, memory_of)
        for allocation in allocations:
            allocation.data[:] = np.random.default_rng(memory_id).integers(
                0, 256, allocation.data.size, np.uint8
            )
        engine.open_memory(memory_id, handles, memory.layouts)
        copies = random_copies(rng, memory, POOL_BYTES)
        direction = rng.choice(list(Direction))
        expected, expected_pool = [a.data.copy() for a in allocations], pool_bytes.copy()
        copy_slowly(memory, expected, expected_pool, copies, direction)

        engine.submit(CopyJob(memory_id, direction, memory_id, tuple(copies)))
        (result,) = wait_for(engine, 1)
        assert result.ok, result.message
        assert np.array_equal(pool_bytes, expected_pool)
        for got, want in zip(allocations, expected, strict=True):
            assert np.array_equal(got.data, want)
        assert result.nbytes == sum(
            len(p.copy.block_ids) * sum(t.page for t in memory.groups[p.copy.group]) for p in copies
        )
        engine.close_memory(memory_id)


def test_a_job_runs_against_a_mapped_pool(pool: Pool, memory_of: Callable[[int], SharedAllocation]) -> None:
    allocation = memory_of(2048)
    allocation.data[:] = 3
    engine = HostCopyEngine(pool)
    engine.open_memory(1, [handles_of(allocation)], [LAYOUT])
    engine.submit(job(1, Direction.STORE, 0, 1, 2, 3, part=8192))
    (result,) = wait_for(engine, 1)
    assert result.ok
    assert (pool.slot_view(2, LAYOUT.part_bytes) == 3).all()
    assert engine.close(WAIT_S)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (job(1, Direction.LOAD, 0, 16), "block_ids"),
        (job(1, Direction.STORE, 0, 1 << 32), "block_ids"),
        (job(1, Direction.LOAD, 0, part=POOL_BYTES - 511), "part_start"),
        (job(1, Direction.LOAD, 0, 1, first=3), "first_block"),
        (job(1, Direction.LOAD, 0, 0), "block_ids"),
        (job(1, Direction.LOAD, 0, memory_id=2), "memory_id"),
    ],
)
def test_a_job_outside_its_memory_is_refused_and_moves_nothing(
    bad: CopyJob,
    field: str,
    engine: HostCopyEngine,
    pool_bytes: Bytes,
    memory_of: Callable[[int], SharedAllocation],
) -> None:
    allocation, before = memory_of(2048), pool_bytes.copy()
    engine.open_memory(1, [handles_of(allocation)], [LAYOUT])
    with pytest.raises(CopyRefused, match=f"^{field}: "):
        engine.submit(bad)
    engine.submit(job(2, Direction.LOAD))
    assert [result.job_id for result in wait_for(engine, 1)] == [2]
    assert not allocation.data.any()
    assert np.array_equal(pool_bytes, before)


def cuda_handles(handles: Sequence[MemoryHandle]) -> list[MemoryHandle]:
    return [replace(h, kind=MemoryKind.CUDA_IPC, device_uuid=bytes(16), handle=bytes(64)) for h in handles]


def test_memory_that_is_wrong_is_not_opened(
    engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation]
) -> None:
    good = handles_of(memory_of(2048))
    cases: list[tuple[list[list[MemoryHandle]], str]] = [
        ([], "groups: 0 groups"),
        ([good[:1]], "groups: 1 tensors in group 0"),
        ([[good[0], good[0]]], "offset_bytes: tensors 0 and 1 of group 0 overlap"),
        ([[good[0], replace(good[1], num_blocks=17)]], "num_blocks: "),
        ([cuda_handles(good)], "kind: CUDA_IPC; this device takes POSIX_SHM"),
        ([[replace(h, handle=b"kvtier-mem-" + b"0" * 32) for h in good]], "handle: .*No such file"),
    ]
    for groups, message in cases:
        with pytest.raises(HandleError, match=f"^{message}"):
            engine.open_memory(1, groups, [LAYOUT])
    with pytest.raises(HandleError, match=r"^event_handle: "):
        engine.open_memory(1, [good], [LAYOUT], bytes(64))
    engine.open_memory(1, [good], [LAYOUT])
    with pytest.raises(HandleError, match=r"^memory_id: 1 is open already"):
        engine.open_memory(1, [good], [LAYOUT])


def test_a_copy_waits_until_the_engines_compute_has_come_to_its_value(
    engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation], pool_bytes: Bytes
) -> None:
    timeline = SharedTimeline()
    try:
        allocation = memory_of(2048)
        engine.open_memory(1, [handles_of(allocation)], [LAYOUT], timeline.handle)
        first, second = timeline.record(), timeline.record()
        engine.submit(replace(job(1, Direction.STORE, 0), wait_value=second))
        engine.submit(replace(job(2, Direction.LOAD, 1, part=4096), wait_value=first))
        timeline.reach(first)
        assert [result.job_id for result in wait_for(engine, 1)] == [2]
        allocation.data[:64] = 7  # what the compute still writes
        assert not (pool_bytes[:64] == 7).all()
        timeline.reach(second)
        assert [(result.job_id, result.ok) for result in wait_for(engine, 1)] == [(1, True)]
        assert (pool_bytes[:64] == 7).all()
        engine.submit(replace(job(3, Direction.STORE, 0), wait_value=timeline.record()))
        engine.close_memory(1)
        (closed,) = wait_for(engine, 1)
        assert "closed" in closed.message, "memory that is closed waits for nothing"
    finally:
        timeline.close()


def test_a_jobs_time_is_that_of_its_copies_without_the_wait_for_compute(
    engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    waits = threading.Semaphore(0)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 100
        waits.release()
        time.sleep(seconds)

    def copy() -> None:
        nonlocal now
        now += 3

    timeline = SharedTimeline()
    try:
        engine.open_memory(1, [handles_of(memory_of(2048))], [LAYOUT], timeline.handle)
        value = timeline.record()
        monkeypatch.setattr(copy_engine, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
        faults.arm("copy_engine.before_chunk", copy)
        engine.submit(replace(job(1, Direction.STORE, 0), wait_value=value))
        assert waits.acquire(timeout=WAIT_S)
        timeline.reach(value)
        (result,) = wait_for(engine, 1)
        assert result.seconds == 3
    finally:
        timeline.close()


def test_an_engine_that_dies_in_its_compute_holds_nobody_up(
    engine: HostCopyEngine,
    memory_of: Callable[[int], SharedAllocation],
    start_child: Callable[..., subprocess.Popen[str]],
) -> None:
    child = start_child(
        "import sys\nfrom kvtier_ops.timeline import SharedTimeline\n"
        "made = SharedTimeline()\nprint(made.handle.decode(), flush=True)\nsys.stdin.read()"
    )
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    engine.open_memory(1, [handles_of(memory_of(2048))], [LAYOUT], name.encode())
    engine.open_memory(2, [handles_of(memory_of(2048))], [LAYOUT])
    engine.submit(replace(job(1, Direction.STORE, 0), wait_value=1))
    engine.submit(job(2, Direction.STORE, 1, part=4096, memory_id=2))
    assert engine.poll() == []
    child.kill()
    child.wait()
    results = {result.job_id: result for result in wait_for(engine, 2)}
    assert "the engine is gone" in results[1].message
    assert results[2].ok
    assert not os.path.exists(f"/dev/shm/{name}")


def test_a_load_does_not_wait_for_stores(
    engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation]
) -> None:
    engine.open_memory(1, [handles_of(memory_of(2048))], [LAYOUT])
    held = Held()
    engine.submit(job(1, Direction.STORE, 0))
    assert held.reached.acquire(timeout=WAIT_S)
    faults.disarm()
    engine.submit(job(2, Direction.STORE, 1, part=4096))
    engine.submit(job(3, Direction.LOAD, 2, part=8192))
    assert [result.job_id for result in wait_for(engine, 1)] == [3]
    assert engine.poll() == []
    held.release()
    assert [result.job_id for result in wait_for(engine, 2)] == [1, 2]


def test_memory_closed_in_mid_copy_ends_its_jobs_and_is_unmapped_before_the_last_is_reported(
    engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation]
) -> None:
    allocation, other = memory_of(2048), memory_of(2048)
    engine.open_memory(1, [handles_of(allocation)], [LAYOUT])
    engine.open_memory(2, [handles_of(other)], [LAYOUT])
    held = Held()
    engine.submit(job(1, Direction.STORE, 0))
    assert held.reached.acquire(timeout=WAIT_S)
    engine.submit(job(2, Direction.STORE, 1, part=4096))
    engine.submit(job(3, Direction.STORE, 1, part=8192, memory_id=2))
    assert mappings(allocation) == 2
    engine.close_memory(1)
    (waiting,) = wait_for(engine, 1)
    assert (waiting.job_id, waiting.ok) == (2, False)
    assert "closed before the copy began" in waiting.message
    with pytest.raises(CopyRefused, match=r"^memory_id: 1 is not open"):
        engine.submit(job(4, Direction.LOAD, 0))
    held.release()
    running = engine.wait(WAIT_S)[0]
    assert mappings(allocation) == 1, "ours alone"
    assert (running.job_id, running.ok) == (1, True)


@pytest.mark.parametrize("fails", [False, True])
def test_the_mapping_is_gone_when_the_last_job_is_reported_however_it_ended(
    fails: bool, engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation]
) -> None:
    reached, go = threading.Semaphore(0), threading.Semaphore(0)

    def hold() -> None:
        reached.release()
        assert go.acquire(timeout=WAIT_S)
        if fails:
            raise faults.FaultInjected("on purpose")

    faults.arm("copy_engine.before_chunk", hold)
    for memory_id in range(50):
        allocation = memory_of(2048)
        engine.open_memory(memory_id, [handles_of(allocation)], [LAYOUT])
        engine.submit(job(memory_id, Direction.STORE, 0, memory_id=memory_id))
        assert reached.acquire(timeout=WAIT_S)
        engine.close_memory(memory_id)
        go.release()
        (result,) = wait_for(engine, 1)
        assert mappings(allocation) == 1, "ours alone"
        assert result.ok is not fails


def mappings(allocation: SharedAllocation) -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum(allocation.name in line for line in maps)


def test_one_failed_copy_is_one_failed_job(
    engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation]
) -> None:
    def fail() -> None:
        raise faults.FaultInjected("on purpose")

    engine.open_memory(1, [handles_of(memory_of(2048))], [LAYOUT])
    faults.arm("copy_engine.before_chunk", fail)
    engine.submit(job(1, Direction.LOAD, 0))
    (failed,) = wait_for(engine, 1)
    assert (failed.ok, failed.message, failed.nbytes) == (False, "FaultInjected: on purpose", 0)
    faults.disarm()
    engine.submit(job(1, Direction.LOAD, 0))
    assert wait_for(engine, 1)[0].ok


def test_a_job_id_may_come_again_only_after_its_job_has_ended(
    engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation]
) -> None:
    engine.open_memory(1, [handles_of(memory_of(2048))], [LAYOUT])
    held = Held()
    assert engine.oldest_s() == 0
    engine.submit(job(1, Direction.STORE, 0))
    assert held.reached.acquire(timeout=WAIT_S)
    assert engine.oldest_s() > 0
    with pytest.raises(CopyRefused, match=r"^job_id: 1 has not ended"):
        engine.submit(job(1, Direction.LOAD, 0))
    held.release()
    wait_for(engine, 1)
    assert engine.oldest_s() == 0
    engine.submit(job(1, Direction.LOAD, 0))
    wait_for(engine, 1)


def test_closing_ends_what_waits_and_refuses_what_comes(
    engine: HostCopyEngine, memory_of: Callable[[int], SharedAllocation]
) -> None:
    engine.open_memory(1, [handles_of(memory_of(2048))], [LAYOUT])
    held = Held()
    engine.submit(job(1, Direction.STORE, 0))
    assert held.reached.acquire(timeout=WAIT_S)
    engine.submit(job(2, Direction.STORE, 1))
    assert not engine.close(0.0), "a copy is running"
    assert [(r.job_id, r.ok) for r in engine.poll()] == [(2, False)]
    held.release()
    assert engine.close(WAIT_S)
    assert [(r.job_id, r.ok) for r in engine.poll()] == [(1, True)]
    assert engine.wait(WAIT_S) == []
    with pytest.raises(CopyEngineBroken, match="closed"):
        engine.submit(job(3, Direction.STORE, 1))


_ENGINE = """
import sys
from kvtier_ops.ipc import SharedAllocation
allocation = SharedAllocation(2048)
allocation.data[:] = 9
print(allocation.name, flush=True)
sys.stdin.read()
"""


def test_an_engine_killed_in_mid_copy_fails_nobody_else(
    engine: HostCopyEngine,
    pool_bytes: Bytes,
    memory_of: Callable[[int], SharedAllocation],
    start_child: Callable[..., object],
) -> None:
    child = start_child(_ENGINE)
    name = child.stdout.readline().strip()  # type: ignore[attr-defined]
    living = memory_of(2048)
    dying = [replace(handle, handle=name.encode()) for handle in handles_of(living)]
    engine.open_memory(1, [dying], [LAYOUT])
    engine.open_memory(2, [handles_of(living)], [LAYOUT])
    held = Held()
    engine.submit(job(1, Direction.STORE, 0))
    assert held.reached.acquire(timeout=WAIT_S)
    child.kill()  # type: ignore[attr-defined]
    child.wait()  # type: ignore[attr-defined]
    held.release()
    assert wait_for(engine, 1)[0].ok
    assert (pool_bytes[:64] == 9).all(), "the mapping outlives the process"
    engine.close_memory(1)
    assert not os.path.exists(f"/dev/shm/{name}")
    engine.submit(job(2, Direction.LOAD, 0, part=4096, memory_id=2))
    assert wait_for(engine, 1)[0].ok
    assert np.array_equal(living.data[:64], pool_bytes[4096:4160])
