"""What watchers of events cost the engines: calls with none, with one, with 64, and during snapshots.

One engine looks up, stores into a full pool, and reports, so that every store is two events for each watcher.
The watchers are streams of their own connections in a process of its own, which reads and does nothing else:
what they cost here is the daemon's work for them, and the CPU that their reading takes from two cores. The
conditions take turns within one run and are told as ratios to "no watcher": the machines that run this are
noisy.

    python -m tests.benchmarks.bench_watchers [--json FILE] [--rounds 12]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import grpc

from kvtier.v1 import events_pb2 as pb

from ..daemon_process import CHANNEL_OPTIONS, DaemonProcess
from ..raw_engine import RawEngine, to_keys

POOL_CHUNKS = 65_536
CHUNK_BYTES = 4_096
ResultT = TypeVar("ResultT")
BATCH = 64
CALLS = 60
CONDITIONS = ("0", "1", "64", "snapshots")
NO_WATCHER = "0"


def _watch(address: str, control: Connection) -> None:
    """Open as many streams as is asked for, in place of those that are open, until asked for None."""

    async def read(path: str, request: bytes, begun: asyncio.Semaphore, *, again: bool) -> None:
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            while True:
                async for _ in call(request):
                    begun.release()
                if not again:
                    return

    async def main() -> None:
        loop = asyncio.get_running_loop()
        while (condition := await loop.run_in_executor(None, control.recv)) is not None:
            begun = asyncio.Semaphore(0)
            if condition == "snapshots":
                path, request = "/kvtier.v1.EventsService/Snapshot", pb.SnapshotRequest().SerializeToString()
            else:
                path, request = "/kvtier.v1.EventsService/Watch", pb.WatchRequest().SerializeToString()
            count = 1 if condition == "snapshots" else int(condition)
            tasks = [
                asyncio.create_task(read(path, request, begun, again=condition == "snapshots"))
                for _ in range(count)
            ]
            for _ in range(count):
                await begun.acquire()
            control.send(condition)
            await loop.run_in_executor(None, control.recv)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            control.send(condition)

    asyncio.run(main())


class WatcherBench:
    """Takes the times of an engine's calls."""

    def __init__(self, engine: RawEngine) -> None:
        self._engine = engine
        self._next = 0
        self.times: dict[str, dict[str, list[float]]] = {
            condition: {"lookup 64": [], "prepare store 64": [], "report 64": []} for condition in CONDITIONS
        }

    def store(self, times: dict[str, list[float]] | None = None) -> None:
        """Store a batch of new chunks."""
        keys = to_keys(range(self._next, self._next + BATCH))
        request = f"store-{self._next}"
        self._next += BATCH
        spent, granted = _timed(lambda: self._engine.prepare_store(keys, request_id=request))
        report, _ = _timed(lambda: self._engine.report_stores(granted.slot_ids, granted.generations, keys))
        self._engine.complete(finished_request_ids=[request])
        if times is not None:
            times["prepare store 64"].append(spent)
            times["report 64"].append(report)

    def measure(self, condition: str) -> None:
        """Make calls for a while under a condition that holds already."""
        times = self.times[condition]
        for number in range(CALLS):
            first = max(self._next - BATCH * (1 + number), 0)
            keys = to_keys(range(first, first + BATCH))
            request = f"lookup-{self._next}"
            times["lookup 64"].append(_timed(lambda: self._engine.lookup(keys, request_id=request))[0])  # noqa: B023
            self._engine.complete(finished_request_ids=[request])
            self.store(times)


def _timed(call: Callable[[], ResultT]) -> tuple[float, ResultT]:
    began = time.perf_counter()
    result = call()
    return (time.perf_counter() - began) * 1e3, result


def run(rounds: int) -> list[dict[str, object]]:
    """Measure, the conditions in turns."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        DaemonProcess(Path(folder), POOL_CHUNKS * CHUNK_BYTES) as daemon,
    ):
        daemon.start()
        process = context.Process(target=_watch, args=(daemon.address, theirs), daemon=True)
        process.start()
        with RawEngine(daemon.address) as engine:
            bench = WatcherBench(engine.attach())
            for _ in range(POOL_CHUNKS // BATCH):
                bench.store()
            for number in range(rounds):
                # Another one first each time: what the round before left behind is not always the same one's.
                for position in range(len(CONDITIONS)):
                    condition = CONDITIONS[(number + position) % len(CONDITIONS)]
                    for word in (condition, "end"):
                        ours.send(word)
                        assert ours.recv() == condition
                        if word != "end":
                            bench.measure(condition)
        ours.send(None)
        process.join(10)
    rows: list[dict[str, object]] = []
    for condition, calls in bench.times.items():
        for call, times in calls.items():
            base = bench.times[NO_WATCHER][call]
            p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
            rows.append(
                {
                    "watchers": condition,
                    "call": call,
                    "p50_ms": p50,
                    "p99_ms": p99,
                    "p50_ratio": p50 / statistics.median(base),
                    "p99_ratio": p99 / statistics.quantiles(base, n=100)[98],
                }
            )
    return rows


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    rows = run(args.rounds)
    print(f"{'watchers':12}{'call':20}{'p50 ms':>8}{'p99 ms':>8}{'p50 ratio':>11}{'p99 ratio':>11}")
    for row in rows:
        print(
            f"{row['watchers']:12}{row['call']:20}{row['p50_ms']:8.2f}{row['p99_ms']:8.2f}"
            f"{row['p50_ratio']:11.2f}{row['p99_ratio']:11.2f}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
