"""Replay a recorded trace through a real client and a real daemon, and check every byte that is loaded.

Per request: one leased Lookup, the leading hits are read from the pool and compared with what they must be,
the missing rest is stored through PrepareStore, the reports go out, the request ends. The hits must be those
of the same policy in a plain loop (`plain_replay.py`), request by request.

    make replay
    python -m tests.benchmarks.replay --policy arc --requests 2000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvtier_client.context import ReqContext
from kvtier_client.reports import LoadReportItem, StoreReportItem
from kvtier_ops.checksum import part_checksum
from kvtier_ops.slot_table import fence
from kvtier_server.policies.loader import make_policy

from ..daemon_process import DaemonProcess
from .block_client import BlockClient, chunk_bytes, chunk_key
from .plain_replay import DEFAULT_TRACE, load_trace, replay

CHUNK_BYTES = 4096
CAPACITY = 1_827
"""1 % of the trace's distinct blocks."""

PUBLISHED = {"lru": (0.0525, 0.00005), "arc": (0.0649, 0.003)}
"""Known hit shares of the whole trace at this capacity, and how near they must be."""

HEAD = "{:8}{:>10}{:>10}{:>9}{:>9}{:>9}{:>10}{:>8}"
ROW = "{:8}{:>10}{:>10}{:>9}{:>9.4f}{:>9.4f}{:>10.1f}{:>8.1f}"

GRANTED = 1
MISS = 4

Slot = tuple[int, int]
"""Slot id and generation."""


@dataclass(slots=True)
class Replayed:
    """Hits and costs of one replay."""

    policy: str
    requests: int = 0
    input_chunks: int = 0
    hit_chunks: int = 0
    stored_chunks: int = 0
    seconds: float = 0.0

    @property
    def hit_share(self) -> float:
        """Share of input chunks that were loaded."""
        return self.hit_chunks / max(self.input_chunks, 1)


class WrongByte(Exception):
    """A loaded chunk had other bytes than were stored under its key. Must never happen."""


class Replayer:
    """Plays requests against one daemon."""

    def __init__(self, blocks: BlockClient, policy: str) -> None:
        self._blocks = blocks
        self.result = Replayed(policy)

    def play(self, hash_ids: Sequence[int]) -> int:
        """Play one request; returns its hits."""
        blocks, result = self._blocks, self.result
        ctx = ReqContext(f"r{result.requests}", None)
        lease_id, slots, missing = self._look_up(ctx, hash_ids)
        if slots:
            self._load(lease_id, hash_ids[: len(slots)], slots)
        if missing:
            self._store(ctx, missing)
        blocks.scheduler.finish(ctx.req_id)
        blocks.flush()
        result.requests += 1
        result.input_chunks += len(hash_ids)
        result.hit_chunks += len(slots)
        return len(slots)

    def _look_up(self, ctx: ReqContext, hash_ids: Sequence[int]) -> tuple[int, list[Slot], list[int]]:
        """Lease the leading run: the lease, the run's slots, and the numbers of what is missing."""
        answer = self._blocks.scheduler.lookup(ctx, [chunk_key(number) for number in hash_ids])
        if answer.reason:
            raise RuntimeError(f"lookup failed: {answer.reason}")
        hits = answer.leased_runs[0][1] if answer.leased_runs and answer.leased_runs[0][0] == 0 else 0
        slots = list(zip(answer.slot_ids[:hits], answer.generations[:hits], strict=True))
        missing = [n for n, status in zip(hash_ids, answer.statuses, strict=True) if status == MISS]
        return answer.lease_id, slots, missing

    def _load(self, lease_id: int, numbers: Sequence[int], slots: Sequence[Slot]) -> None:
        blocks = self._blocks
        load_lease = blocks.scheduler.new_lease_id()
        blocks.scheduler.start_load(lease_id, load_lease, [slot_id for slot_id, _ in slots])
        for number, (slot_id, generation) in zip(numbers, slots, strict=True):
            before = blocks.pool.generation(slot_id)
            loaded = blocks.slot(slot_id).tobytes()
            fence()
            if before != generation or blocks.pool.generation(slot_id) != generation:
                raise WrongByte(f"chunk {number}: slot {slot_id} changed under its lease")
            if loaded != chunk_bytes(number, blocks.part_bytes):
                raise WrongByte(f"chunk {number}: slot {slot_id} holds other bytes")
        blocks.worker.report_load(LoadReportItem(load_lease, num_bytes=len(numbers) * blocks.part_bytes))

    def _store(self, ctx: ReqContext, numbers: Sequence[int]) -> None:
        blocks = self._blocks
        grant = blocks.scheduler.prepare_store(ctx, [chunk_key(number) for number in numbers])
        granted = [n for n, verdict in zip(numbers, grant.verdicts, strict=True) if verdict == GRANTED]
        checksums = []
        for number, slot_id in zip(granted, grant.slot_ids, strict=True):
            content = chunk_bytes(number, blocks.part_bytes)
            blocks.slot(slot_id).data[:] = content
            checksums.append(part_checksum(memoryview(content)))
        self.result.stored_chunks += len(granted)
        keys = [chunk_key(number) for number in granted]
        blocks.worker.report_store(
            StoreReportItem(
                0, grant.slot_ids, grant.generations, keys, checksums, num_bytes=len(keys) * blocks.part_bytes
            )
        )


@contextmanager
def daemon(policy: str, capacity: int = CAPACITY) -> Iterator[DaemonProcess]:
    """A daemon whose pool holds `capacity` chunks."""
    with tempfile.TemporaryDirectory(prefix="kvtier-replay-") as folder:
        running = DaemonProcess(Path(folder), capacity * CHUNK_BYTES, policy=policy)
        with running:
            yield running.start()


def replay_through_daemon(requests: Sequence[Sequence[int]], policy: str, show: bool = False) -> Replayed:
    """Play all requests; raises WrongByte. `show` draws a progress bar on a terminal's stderr."""
    with daemon(policy) as running, BlockClient(running.address, CHUNK_BYTES) as blocks:
        replayer = Replayer(blocks, policy)
        start = time.perf_counter()
        for number, hash_ids in enumerate(requests):
            replayer.play(hash_ids)
            if show and number % 50 == 0:
                draw(policy, number, len(requests), replayer.result.hit_share, time.perf_counter() - start)
        replayer.result.seconds = time.perf_counter() - start
        if show and sys.stderr.isatty():
            print(file=sys.stderr)
        return replayer.result


def draw(what: str, number: int, total: int, hit_share: float, seconds: float) -> None:
    """Draw a progress bar, on a terminal."""
    if not sys.stderr.isatty():
        return
    filled = 30 * number // total
    left = seconds / max(number, 1) * (total - number)
    bar = "#" * filled + "." * (30 - filled)
    print(f"\r{what:4} [{bar}] {number}/{total}  hits {hit_share:.4f}  {left:3.0f} s left ",
          end="", file=sys.stderr, flush=True)  # fmt: skip


def main() -> int:
    """Replay, compare, print a table. Exit code 1 if anything differs, 0 also if there is no trace."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE)
    parser.add_argument("--policy", action="append", choices=("lru", "arc"), help="default: both")
    parser.add_argument("--requests", type=int, default=0, help="only the first N (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    if not args.trace.exists():
        print(f"replay: skipped, there is no trace at {args.trace}; name one with --trace", file=sys.stderr)
        return 0
    requests = load_trace(args.trace)
    whole = not args.requests
    requests = requests[: args.requests] if args.requests else requests
    rows, failures = [], []
    print(HEAD.format("policy", "requests", "chunks", "hits", "share", "plain", "us each", "s"))
    for policy in args.policy or ["lru", "arc"]:
        try:
            result = replay_through_daemon(requests, policy, show=True)
        except WrongByte as error:
            print(f"replay: {policy}: WRONG BYTE: {error}", file=sys.stderr)
            return 1
        plain = replay(requests, make_policy(policy, CAPACITY), CAPACITY)
        micros = result.seconds / max(result.input_chunks, 1) * 1e6
        columns = (policy, result.requests, result.input_chunks, result.hit_chunks)
        print(ROW.format(*columns, result.hit_share, plain.hit_share, micros, result.seconds))
        if result.hit_chunks != plain.hit_blocks:
            failures.append(f"{policy}: {result.hit_chunks} hits, the plain loop has {plain.hit_blocks}")
        known, tolerance = PUBLISHED[policy]
        if whole and abs(result.hit_share - known) > tolerance:
            failures.append(f"{policy}: hit share {result.hit_share:.4f}, published {known}")
        rows.append(
            {
                "policy": policy,
                "requests": result.requests,
                "hits": result.hit_chunks,
                "share": result.hit_share,
                "plain_share": plain.hit_share,
                "seconds": result.seconds,
            }
        )
    for failure in failures:
        print(f"replay: FAILED: {failure}", file=sys.stderr)
    if not failures:
        print("every loaded byte was right, and the hits are those of the plain loop")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
