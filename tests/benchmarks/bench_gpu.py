"""Copies between a GPU's memory and the pinned pool, against plain copies of the same device.

    python -m tests.benchmarks.bench_gpu [--json FILE] [--rounds N]

The device memory is another process's, opened by CUDA IPC: 32 layers, each an allocation of its own, 1 GiB in
all; chunks of 2 MiB, scattered blocks. Every line takes turns with its reference, so that both meet the same
machine; the ratio is the reference's time / the line's time, of medians. A second table has the way of a job
of one chunk through a daemon, against an empty round trip on the same stream; it needs the daemon's packages.

    plain        one pinned cudaMemcpyAsync of 1 GiB, one side contiguous device memory of this process
    engine       CudaCopyEngine as it comes; by kernel, batch, pitched runs: the means forced on it
    per block    one cudaMemcpyAsync per page
    torch        index_select of each layer's blocks and one pinned copy of the outcome
    both         a load and a store at once, against two plain copies at once
    matmul       products of matrices per second in the other process, with the copies beside / without

Exits 0 with the reason where there is no GPU. NOT RUN ON A GPU yet.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ops"))

from tests.gpu.device_helper import as_blocks
from tests.gpu.processes import EngineProcess, engine_process, why_no_gpu

from kvtier_ops.copy_engine import CopyEngine, CopyJob
from kvtier_ops.cuda import CudaCopyEngine
from kvtier_ops.fragments import Direction, Means, PlacedCopy
from kvtier_ops.ipc import MemoryHandle
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import plan_job

LAYERS = 32
TOTAL_BYTES = 1 << 30
CHUNK_BYTES = 2 << 20
PAGES = (64 << 10, 16 << 10)
SWEPT_PAGES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10)
CHUNKS_PER_JOB = 64
WAIT_S = 60.0
MATMUL_S = 4.0
WAY_ROUNDS = 500
FORCED = {
    "kernel": Means(kernel_below_bytes=1 << 40),
    "batch": Means(kernel_below_bytes=0, batch=True),
    "pitched": Means(kernel_below_bytes=0),
    "per block": Means(kernel_below_bytes=0, max_pitch_bytes=0),
}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    page_kib: int
    direction: str
    gib_s: float
    reference_gib_s: float
    ratio: float
    """Speed as a share of the reference's. For matmul: products per second, as a share."""


class Plain:
    """Copies of 1 GiB between device memory of this process and pinned memory; what the link can do."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._device = [int(runtime.malloc(TOTAL_BYTES)) for _ in Direction]
        self._host = [int(runtime.hostAlloc(TOTAL_BYTES, 0)) for _ in Direction]
        self._streams = [int(runtime.streamCreateWithFlags(runtime.streamNonBlocking)) for _ in Direction]

    def run(self, *directions: Direction) -> None:
        """Copy in these directions at once."""
        runtime = self._runtime
        for way in directions:
            place = way.value - 1
            device, host = self._device[place], self._host[place]
            if way is Direction.STORE:
                arguments = (host, device, TOTAL_BYTES, runtime.memcpyDeviceToHost)
            else:
                arguments = (device, host, TOTAL_BYTES, runtime.memcpyHostToDevice)
            runtime.memcpyAsync(*arguments, self._streams[place])
        for way in directions:
            runtime.streamSynchronize(self._streams[way.value - 1])

    def close(self) -> None:
        for address in self._device:
            self._runtime.free(address)
        for address in self._host:
            self._runtime.freeHost(address)


class Case:
    """1 GiB of chunks with one page size, split into jobs."""

    def __init__(self, handles: Sequence[MemoryHandle], page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.blocks_per_chunk = max(1, CHUNK_BYTES // (LAYERS * page_bytes))
        self.layout = GroupLayout(
            tuple(TensorLayout(f"layer.{i}", page_bytes) for i in range(LAYERS)), self.blocks_per_chunk
        )
        self.handles = [as_blocks(handle, page_bytes) for handle in handles]
        num_blocks = TOTAL_BYTES // (LAYERS * page_bytes)
        self.block_ids = random.Random(0).sample(range(num_blocks), num_blocks)
        copies = plan_job(self.block_ids, [num_blocks], [0], self.blocks_per_chunk)
        placed = [PlacedCopy(copy, copy.slot_index * self.layout.part_bytes) for copy in copies]
        self.jobs = [
            tuple(placed[first : first + CHUNKS_PER_JOB]) for first in range(0, len(placed), CHUNKS_PER_JOB)
        ]

    def run(self, engine: CopyEngine, *directions: Direction) -> None:
        """Copy all in these directions at once; the loads and the stores use halves of the pool."""
        number = 0
        for copies in self.jobs:
            for way in directions:
                shift = TOTAL_BYTES if way is Direction.LOAD else 0
                moved = tuple(PlacedCopy(placed.copy, placed.part_start + shift) for placed in copies)
                engine.submit(CopyJob(number, way, way.value, moved))
                number += 1
        while number:
            for result in engine.wait(WAIT_S):
                if not result.ok:
                    raise RuntimeError(result.message)
                number -= 1


def measure(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median seconds of two functions that take turns, after one round unmeasured."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(rounds + 1):
        for function, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if round_number:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def row(what: str, page_bytes: int, direction: str, seconds: float, reference_s: float, gib: float) -> Row:
    return Row(
        what,
        page_bytes >> 10,
        direction,
        round(gib / seconds, 2),
        round(gib / reference_s, 2),
        round(reference_s / seconds, 3),
    )


class Bench:
    """The engines, the memory of the other process, and the rows so far."""

    def __init__(self, process: EngineProcess, rounds: int) -> None:
        self._process = process
        self._rounds = rounds
        # Two sets: a load and a store at once must not touch the same blocks.
        self._handles = [process.allocate(*[TOTAL_BYTES // LAYERS] * LAYERS) for _ in Direction]
        self._pool: Bytes = np.frombuffer(mmap.mmap(-1, 2 * TOTAL_BYTES), np.uint8)
        self._pool[:] = 1
        self.rows: list[Row] = []

    def run(self) -> None:
        self._engines()
        self._sweep()
        self._torch()

    def _open(self, means: Means | None) -> CudaCopyEngine:
        engine = CudaCopyEngine(self._pool, self._handles[0][0].device_uuid, means)
        if not engine.pinned.wait(WAIT_S):
            raise RuntimeError(engine.pinned.error)
        return engine

    def _case(self, engine: CopyEngine, page_bytes: int) -> Case:
        """Register the memory with this page size, one set for each direction."""
        for way in Direction:
            engine.close_memory(way.value)
            case = Case(self._handles[way.value - 1], page_bytes)
            engine.open_memory(way.value, [case.handles], [case.layout])
        return case

    def _engines(self) -> None:
        for name, means in {"engine": None, **FORCED}.items():
            engine = self._open(means)
            plain = Plain(engine._runtime)
            try:
                for page_bytes in PAGES:
                    self._one(name, engine, plain, page_bytes)
                if name == "engine":
                    self._matmul(engine)
            except RuntimeError as error:
                print(f"{name}: {error}")
            finally:
                engine.close(WAIT_S)
                plain.close()

    def _one(self, name: str, engine: CudaCopyEngine, plain: Plain, page_bytes: int) -> None:
        case = self._case(engine, page_bytes)
        ways: list[tuple[Direction, ...]] = [(Direction.STORE,), (Direction.LOAD,)]
        if name == "engine":
            ways.append((Direction.STORE, Direction.LOAD))
        for directions in ways:

            def copy(directions: tuple[Direction, ...] = directions) -> None:
                case.run(engine, *directions)

            def copy_plainly(directions: tuple[Direction, ...] = directions) -> None:
                plain.run(*directions)

            seconds, reference_s = measure(copy, copy_plainly, self._rounds)
            direction = directions[0].name.lower() if len(directions) == 1 else "both"
            self.rows.append(row(name, page_bytes, direction, seconds, reference_s, float(len(directions))))

    def _sweep(self) -> None:
        """Kernel against batch and pitched runs: where they cross, KERNEL_BELOW_BYTES belongs."""
        engine = self._open(None)
        try:
            for page_bytes in SWEPT_PAGES:
                case = self._case(engine, page_bytes)
                for other in ("batch", "pitched"):
                    if other == "pitched" or engine._bindings is not None:
                        for way in Direction:
                            times = self._by_means(engine, case, way, "kernel", other)
                            self.rows.append(
                                row(f"kernel:{other}", page_bytes, way.name.lower(), *times, 1.0)
                            )
        finally:
            engine.close(WAIT_S)

    def _by_means(
        self, engine: CudaCopyEngine, case: Case, way: Direction, *names: str
    ) -> tuple[float, float]:
        def run(name: str) -> None:
            engine._means = FORCED[name]
            case.run(engine, way)

        return measure(lambda: run(names[0]), lambda: run(names[1]), self._rounds)

    def _torch(self) -> None:
        try:
            import torch
        except ImportError as error:
            print(f"torch: {error}")
            return
        if not torch.cuda.is_available():
            print("torch: built without CUDA")
            return
        import cupy

        plain = Plain(cupy.cuda.runtime)
        for page_bytes in PAGES:
            num_blocks = TOTAL_BYTES // (LAYERS * page_bytes)
            layers = [
                torch.ones((num_blocks, page_bytes), dtype=torch.uint8, device="cuda") for _ in range(LAYERS)
            ]
            gathered = torch.empty((num_blocks, page_bytes), dtype=torch.uint8, device="cuda")
            pinned = torch.empty((LAYERS, num_blocks, page_bytes), dtype=torch.uint8, pin_memory=True)
            ids = torch.randperm(num_blocks, device="cuda")

            def store(
                layers: Any = layers, gathered: Any = gathered, pinned: Any = pinned, ids: Any = ids
            ) -> None:
                for number, layer in enumerate(layers):
                    torch.index_select(layer, 0, ids, out=gathered)
                    pinned[number].copy_(gathered, non_blocking=True)
                torch.cuda.synchronize()

            times = measure(store, lambda: plain.run(Direction.STORE), self._rounds)
            self.rows.append(row("torch", page_bytes, "store", *times, 1.0))
        plain.close()

    def _matmul(self, engine: CudaCopyEngine) -> None:
        """Compare the other process's products per second, three times each, in turns."""
        for page_bytes in PAGES:
            case = self._case(engine, page_bytes)
            alone: list[float] = []
            beside: list[float] = []
            for _ in range(3):
                alone.append(self._process.ask("matmul", MATMUL_S))
                stop = threading.Event()
                copying = threading.Thread(target=self._copy_until, args=(engine, case, stop))
                copying.start()
                beside.append(self._process.ask("matmul", MATMUL_S))
                stop.set()
                copying.join()
            per_s, alone_s = statistics.median(beside), statistics.median(alone)
            self.rows.append(Row("matmul", page_bytes >> 10, "both", 0.0, 0.0, round(per_s / alone_s, 3)))

    def _copy_until(self, engine: CudaCopyEngine, case: Case, stop: threading.Event) -> None:
        while not stop.is_set():
            case.run(engine, Direction.STORE, Direction.LOAD)


def print_table(rows: list[Row]) -> None:
    """Print the rows for people."""
    print("what            page     direction   GiB/s  reference  ratio")
    for line in rows:
        print(
            f"{line.what:<14}  {line.page_kib:>3} KiB  {line.direction:<9}  {line.gib_s:>6.2f}  "
            f"{line.reference_gib_s:>9.2f}  {line.ratio:>5.3f}"
        )


def measure_the_way(process: EngineProcess) -> list[dict[str, object]]:
    """Return the rows of jobs of one chunk through a daemon, none where its packages are missing."""
    try:
        from tests.benchmarks import transfer_jobs
        from tests.daemon_process import DaemonProcess
    except ImportError as error:
        print(f"jobs of one chunk: {error}; install it: pip install '.[server]'")
        return []
    handles = process.allocate(*[transfer_jobs.TENSOR_BYTES] * transfer_jobs.NUM_TENSORS)
    pages = [as_blocks(handle, transfer_jobs.PAGE_BYTES) for handle in handles]
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        DaemonProcess(Path(folder), "1GiB") as daemon,
    ):
        daemon.start()
        rows = transfer_jobs.measure_jobs(daemon, pages, WAY_ROUNDS, "GPU")
    transfer_jobs.print_rows(rows)
    return rows


def main() -> None:
    """Measure, or say why not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=5, help="measured passes of each kind (default 5)")
    options = parser.parse_args()
    reason = why_no_gpu()
    if reason:
        print(f"bench_gpu: {reason}")
        return
    with engine_process() as process:
        bench = Bench(process, options.rounds)
        bench.run()
        print_table(bench.rows)
        way = measure_the_way(process)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([*map(asdict, bench.rows), *way], indent=2) + "\n")


if __name__ == "__main__":
    main()
