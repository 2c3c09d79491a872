"""Replay a recorded trace through a real client and a real daemon, and check every byte that is loaded.

What one request does is `kvtier_client.bench.replayer`'s, as in `kvtier bench replay`. The hits must be those
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
from pathlib import Path

from kvtier_client.bench.block_client import BlockClient
from kvtier_client.bench.replayer import Replayed, Replayer, WrongByte
from kvtier_client.bench.traces import load_trace
from kvtier_server.policies.loader import make_policy

from ..daemon_process import DaemonProcess
from .plain_replay import DEFAULT_TRACE, replay

CHUNK_BYTES = 4096
CAPACITY = 1_827
"""1 % of the trace's distinct blocks."""

PUBLISHED = {"lru": (0.0525, 0.00005), "arc": (0.0649, 0.003)}
"""Known hit shares of the whole trace at this capacity, and how near they must be."""

HEAD = "{:8}{:>10}{:>10}{:>9}{:>9}{:>9}{:>10}{:>8}"
ROW = "{:8}{:>10}{:>10}{:>9}{:>9.4f}{:>9.4f}{:>10.1f}{:>8.1f}"


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
