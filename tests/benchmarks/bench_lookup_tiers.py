"""Lookups of resident keys while chunks go down and come up flat out, against a copy-and-write loop.

Two daemons of one machine take turns. The first has a filesystem tier; an engine in another process has
stored more new 4 MiB chunks than the tier can write in the time, and asks again and again for old ones that
are on disk only, so that the tier's writers and readers never rest. The second has no tier; another process
beside it copies, writes and reads as many bytes a second in chunks of the same size, with as many threads and
the same flags. The same lookups, by a client of its own, are timed in both, and told as the ratio of their
p99.

    python -m tests.benchmarks.bench_lookup_tiers [--directory DIR] [--rounds 12] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from threading import Thread

import numpy as np
import numpy.typing as npt

from kvtier_client.bench.block_client import BlockClient, chunk_key
from kvtier_client.context import ReqContext
from kvtier_client.reports import StoreReportItem
from kvtier_server.secondary.chunk_file import HEADER_BYTES

from ..daemon_process import DaemonProcess, wait_until
from .bench_filesystem import file_system, has_direct
from .replay_tiers import PENDING, Resolutions

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES = 4 << 20
POOL_CHUNKS = 256
SMALL_BYTES = 4096
"""Chunks that are looked up: their own size does not matter to a lookup."""

SMALL_CHUNKS = 2_048
POOL_BYTES = POOL_CHUNKS * CHUNK_BYTES + (64 << 20)
OLD_CHUNKS = 512
"""On disk before anything is timed; twice the pool, so that each promotion has to read."""

TIER_BYTES = 5 << 30
WRITERS, READERS = 2, 4
"""The tier's defaults."""

BURST = 192
"""New chunks of one window, 768 MiB: more than is written in that time while there are as many reads."""

OLD_BATCH, OLD_EVERY_S = 16, 0.2
"""The pace at which the old ones are stored: each has to arrive."""

LOAD_BATCH = 16
"""Half of what promotions may have reserved at once."""

WINDOW_S = 1.0
SETTLE_S = 0.3
"""From the start of a load until lookups are timed."""

RATIO_LIMIT = 1.5
WORST_LIMIT_MS = 50.0
WAIT_S = 60.0
HEAD = "{:18}{:>7}{:>10}{:>10}{:>10}{:>10}{:>8}{:>7}{:>12}{:>11}{:>8}"
ROW = "{:18}{:>7}{:>10.2f}{:>10.2f}{:>10.2f}{:>10.2f}{:>7.2f}x{:>6.1f}x{:>12.1f}{:>11.1f}{:>5.0f} ms"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times in ms."""

    keys: int
    calls: int
    plain_p50_ms: float
    tier_p50_ms: float
    plain_p99_ms: float
    tier_p99_ms: float
    ratio: float
    plain_worst_ms: float
    worst_ms: float
    limit: float = RATIO_LIMIT
    worst_limit_ms: float = WORST_LIMIT_MS


class Switch:
    """Turns what another process does on and off, and tells it how fast to be. Shared between processes."""

    def __init__(self, context: multiprocessing.context.SpawnContext) -> None:
        self._on, self._off = context.Event(), context.Event()
        self.ready = context.Event()
        self.write_rate = context.Value("d", 0.0)
        self.read_rate = context.Value("d", 0.0)
        """Bytes a second."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Have it work as long as this lasts."""
        self._off.clear()
        self._on.set()
        try:
            yield
        finally:
            self._on.clear()
            self._off.set()

    def wait(self) -> None:
        """Wait until it is on."""
        self._on.wait()

    def wait_off(self) -> None:
        """Wait until it is off."""
        self._off.wait()


def drive_tier(address: str, switch: Switch) -> None:
    """Keep the tier's writers and readers busy: body of the engine's process.

    The engine copies nothing, so that what is measured is what the daemon does.
    """
    resolutions = Resolutions()
    with (
        BlockClient(address, CHUNK_BYTES, "storer") as storer,
        BlockClient(address, CHUNK_BYTES, "loader", listener=resolutions) as loader,
    ):
        for first in range(0, OLD_CHUNKS, OLD_BATCH):
            _store(storer, range(first, first + OLD_BATCH))
            time.sleep(OLD_EVERY_S)  # a pace: that it was kept is seen when they are loaded
        switch.ready.set()
        Thread(target=_load_forever, args=(loader, resolutions, switch), daemon=True).start()
        for first in count(OLD_CHUNKS, BURST):
            switch.wait()
            _store(storer, range(first, first + BURST))
            switch.wait_off()


def _store(blocks: BlockClient, numbers: range) -> None:
    keys = [chunk_key(number) for number in numbers]
    ctx = ReqContext(f"store-{numbers.start}", None)
    grant = blocks.scheduler.prepare_store(ctx, keys)
    keys = keys[: len(grant.slot_ids)]
    blocks.worker.report_store(StoreReportItem(0, grant.slot_ids, grant.generations, keys))
    blocks.scheduler.finish(ctx.req_id)
    blocks.flush()


def _load_forever(blocks: BlockClient, resolutions: Resolutions, switch: Switch) -> None:
    for number in count():
        switch.wait()
        first = number * LOAD_BATCH % OLD_CHUNKS
        keys = [chunk_key(old) for old in range(first, first + LOAD_BATCH)]
        ctx = ReqContext(f"load-{number}", None)
        answer = blocks.scheduler.lookup(ctx, keys, pending_wait_ms=1_900)
        pending = [key for key, status in zip(keys, answer.statuses, strict=True) if status == PENDING]
        resolutions.wait_for(answer.lease_id, pending)
        blocks.scheduler.finish(ctx.req_id)
        blocks.scheduler.flush()


def copy_and_write(directory: str, direct: bool, switch: Switch) -> None:
    """Copy and write, read and copy at the rates that are asked for: body of the other process."""
    flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    source = np.frombuffer(mmap.mmap(-1, POOL_CHUNKS * CHUNK_BYTES), np.uint8).reshape(POOL_CHUNKS, -1)
    source[:] = np.random.default_rng(5).integers(0, 256, CHUNK_BYTES, np.uint8)

    def write(worker: int, number: int, buffer: Bytes) -> None:
        np.copyto(buffer[HEADER_BYTES:], source[number % POOL_CHUNKS])
        name = f"{directory}/{worker}-{number}"
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600)
        try:
            os.pwritev(fd, [buffer.data], 0)
        finally:
            os.close(fd)
        if number >= POOL_CHUNKS:
            os.unlink(f"{directory}/{worker}-{number - POOL_CHUNKS}")

    def read(worker: int, number: int, buffer: Bytes) -> None:
        fd = os.open(f"{directory}/old-{(number * READERS + worker) % OLD_CHUNKS}", os.O_RDONLY | flags)
        try:
            os.preadv(fd, [buffer.data], 0)
        finally:
            os.close(fd)
        np.copyto(source[number % POOL_CHUNKS], buffer[HEADER_BYTES:])

    def work(action: Callable[[int, int, Bytes], None], worker: int, num_workers: int, rate: object) -> None:
        buffer = aligned_buffer()
        due = time.monotonic()
        for number in count():
            switch.wait()
            bytes_per_s = max(rate.value, 1e6) / num_workers  # type: ignore[attr-defined]
            # What it is behind it may make up for, but not over a pause.
            due = max(due, time.monotonic() - SETTLE_S) + CHUNK_BYTES / bytes_per_s
            action(worker, number, buffer)
            if number % (LOAD_BATCH // READERS) == 0 or num_workers == WRITERS:
                time.sleep(max(0.0, due - time.monotonic()))

    buffer = aligned_buffer()
    for number in range(OLD_CHUNKS):
        fd = os.open(f"{directory}/old-{number}", os.O_WRONLY | os.O_CREAT | flags, 0o600)
        os.pwritev(fd, [buffer.data], 0)
        os.close(fd)
    threads = [
        Thread(target=work, args=(action, worker, num_workers, rate))
        for action, num_workers, rate in (
            (write, WRITERS, switch.write_rate),
            (read, READERS, switch.read_rate),
        )
        for worker in range(num_workers)
    ]
    for thread in threads:
        thread.start()
    switch.ready.set()
    threads[0].join()


def aligned_buffer() -> Bytes:
    """Memory for a header and a chunk that O_DIRECT can use."""
    return np.frombuffer(mmap.mmap(-1, HEADER_BYTES + CHUNK_BYTES), np.uint8)


def io_bytes(pid: int) -> tuple[int, int]:
    """Bytes that a process and its children have written to and read from disks."""
    pids = [pid]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        pids += map(int, (thread / "children").read_text().split())
    written = read = 0
    for each in pids:
        fields = dict(line.split(": ") for line in Path(f"/proc/{each}/io").read_text().splitlines())
        written += int(fields["write_bytes"])
        read += int(fields["read_bytes"])
    return written, read


class Side:
    """A daemon with small resident chunks, what is done beside it, and the times of lookups there."""

    def __init__(self, blocks: BlockClient, switch: Switch, pid: int) -> None:
        self._blocks = blocks
        self._switch = switch
        self._pid = pid
        self._serial = 0
        self.times: dict[int, list[float]] = {64: [], SMALL_CHUNKS: []}
        self.written: list[float] = []
        self.read: list[float] = []
        """Bytes a second of each window, by whoever does the I/O."""
        self._publish()

    def _publish(self) -> None:
        keys = [chunk_key(number) for number in range(SMALL_CHUNKS)]
        grant = self._blocks.scheduler.prepare_store(ReqContext("fill", None), keys)
        assert len(grant.slot_ids) == SMALL_CHUNKS, grant.reason
        self._blocks.worker.report_store(StoreReportItem(0, grant.slot_ids, grant.generations, keys))
        self._blocks.scheduler.finish("fill")
        self._blocks.flush()

    def window(self) -> None:
        """Have the other process work, and time lookups meanwhile."""
        with self._switch.on():
            self._spin(SETTLE_S, timed=False)
            before, began = io_bytes(self._pid), time.monotonic()
            self._spin(WINDOW_S, timed=True)
            seconds = time.monotonic() - began
            after = io_bytes(self._pid)
        self.written.append((after[0] - before[0]) / seconds)
        self.read.append((after[1] - before[1]) / seconds)
        # What is under way ends, and the other side's window begins on a machine at rest.
        wait_until(self._is_at_rest, "the disk is at rest")

    def _is_at_rest(self) -> bool:
        before = io_bytes(self._pid)
        time.sleep(0.1)
        return io_bytes(self._pid) == before

    def _spin(self, seconds: float, *, timed: bool) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for num_keys, times in self.times.items():
                spent = self._lookup(num_keys)
                if timed:
                    times.append(spent)

    def _lookup(self, num_keys: int) -> float:
        """Time one leased lookup in ms; the end of its request is outside the time."""
        self._serial += 1
        ctx = ReqContext(f"lookup-{self._serial}", None)
        keys = [chunk_key(number) for number in range(num_keys)]
        start = time.perf_counter()
        answer = self._blocks.scheduler.lookup(ctx, keys)
        spent = (time.perf_counter() - start) * 1e3
        assert len(answer.slot_ids) == num_keys, "a resident key was evicted"
        self._blocks.scheduler.finish(ctx.req_id)
        assert self._blocks.scheduler.flush_and_wait(10)
        return spent


def compare(tier: Side, plain: Side, switch: Switch, rounds: int) -> list[Row]:
    """Take turns; the plain loop is as fast as the tier was just before."""
    for _ in range(rounds):
        tier.window()
        switch.write_rate.value, switch.read_rate.value = tier.written[-1], tier.read[-1]
        plain.window()
    rows = []
    for num_keys, with_tier in tier.times.items():
        without = plain.times[num_keys]
        rows.append(
            Row(
                num_keys,
                min(len(with_tier), len(without)),
                statistics.median(without),
                statistics.median(with_tier),
                p99(without),
                p99(with_tier),
                p99(with_tier) / p99(without),
                max(without),
                max(with_tier),
            )
        )
    return rows


def p99(times: Sequence[float]) -> float:
    """The time that one call in a hundred exceeds."""
    return sorted(times)[int(len(times) * 0.99)]


def run(directory: Path, rounds: int) -> tuple[list[Row], Side, Side]:
    """Measure everything."""
    config = (
        f'[[tiers]]\ntype = "filesystem"\nname = "disk"\nroot = "{directory}/root"\n'
        f'state_directory = "{directory}/state"\ncapacity = {TIER_BYTES}\nreserve_free = 0.0\n'
        f"writers = {WRITERS}\nreaders = {READERS}\n"
    )
    (directory / "plain").mkdir()
    context = multiprocessing.get_context("spawn")
    drive, loop = Switch(context), Switch(context)
    with contextlib.ExitStack() as stack:
        with_tier = stack.enter_context(DaemonProcess(directory / "a", POOL_BYTES, config=config)).start()
        without = stack.enter_context(DaemonProcess(directory / "b", POOL_BYTES)).start()
        processes = [
            context.Process(target=drive_tier, args=(with_tier.address, drive), daemon=True),
            context.Process(
                target=copy_and_write, args=(f"{directory}/plain", has_direct(directory), loop), daemon=True
            ),
        ]
        for process in processes:
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
        for switch in (drive, loop):
            assert switch.ready.wait(WAIT_S), "a process did not get ready"
        loop_pid = processes[1].pid
        assert loop_pid is not None
        tier = Side(stack.enter_context(BlockClient(with_tier.address, SMALL_BYTES)), drive, with_tier.pid)
        plain = Side(stack.enter_context(BlockClient(without.address, SMALL_BYTES)), loop, loop_pid)
        return compare(tier, plain, loop, rounds), tier, plain


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--directory", type=Path, help="where the files go (default: the temporary directory)"
    )
    parser.add_argument("--rounds", type=int, default=12, help="windows of each side (default: 12)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="kvtier-bench-", dir=args.directory))
    try:
        kind = file_system(directory)
        rows, tier, plain = run(directory, args.rounds)
    finally:
        shutil.rmtree(directory)
    print(f"beside {WRITERS} writers and {READERS} readers of 4 MiB chunks on {kind}, median MiB/s:")
    for name, side in (("tier", tier), ("copy and write", plain)):
        written, read = statistics.median(side.written) / 2**20, statistics.median(side.read) / 2**20
        print(f"  {name:16} {written:5.0f} down, {read:5.0f} up")
    print(HEAD.format("leased lookup", "calls", "plain p50", "tier p50", "plain p99", "tier p99", "ratio",
                      "limit", "plain worst", "tier worst", "limit"))  # fmt: skip
    for row in rows:
        print(
            ROW.format(
                f"{row.keys} resident keys", row.calls, row.plain_p50_ms, row.tier_p50_ms, row.plain_p99_ms,
                row.tier_p99_ms, row.ratio, row.limit, row.plain_worst_ms, row.worst_ms, row.worst_limit_ms,
            )
        )  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
