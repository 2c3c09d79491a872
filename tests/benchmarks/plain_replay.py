"""Eviction policies over a request trace in a plain loop: no daemon, no bytes, no clock.

Owns the order of policy calls that one request makes in the daemon, and nothing of the daemon: its
hit share is what a daemon with the same policy must reach on the same trace.

    PYTHONPATH=proto:ops:server:client python tests/benchmarks/plain_replay.py --policy lru --policy arc
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier_client.bench.traces import load_trace, num_distinct
from kvtier_server.policies.base import CachePolicy, ChunkId
from kvtier_server.policies.loader import make_policy

DEFAULT_TRACE = Path(__file__).parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl"

# Shares of the distinct blocks, in percent.
DEFAULT_SHARES = (1, 2, 5, 10, 20, 40)


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Blocks served by the longest cached prefix, and blocks asked for."""

    hit_blocks: int
    input_blocks: int

    @property
    def hit_share(self) -> float:
        return self.hit_blocks / self.input_blocks if self.input_blocks else 0.0


def replay(requests: Iterable[Sequence[int]], policy: CachePolicy, capacity: int) -> ReplayResult:
    """Serve the requests one after another from a cache of `capacity` blocks that starts empty.

    Leaves what is cached in `policy`, which must be empty at the start.
    """
    resident: set[ChunkId] = set()
    hit_blocks = input_blocks = 0
    for blocks in requests:
        chunk_ids = [ChunkId(block.to_bytes(8, "big")) for block in blocks]
        hit_blocks += _serve(chunk_ids, input_blocks, resident, policy, capacity)
        input_blocks += len(chunk_ids)
    return ReplayResult(hit_blocks, input_blocks)


def _serve(
    chunk_ids: Sequence[ChunkId], base: int, resident: set[ChunkId], policy: CachePolicy, capacity: int
) -> int:
    """Look up, load, compute and store one request; return its hits."""
    # One run of stamps for the whole request, the head's the largest: its touches and its later
    # inserts share it, so the tail is the coldest part wherever the hits ended.
    num_blocks = len(chunk_ids)
    stamps = range(base + num_blocks, base, -1)

    # Lookup: the leading run is used and pinned. Blocks behind a hole are resident but of no use to
    # this request, so they are not touched.
    hits = next((i for i, chunk_id in enumerate(chunk_ids) if chunk_id not in resident), num_blocks)
    leading = chunk_ids[:hits]
    policy.touch(leading[::-1], stamps[:hits][::-1])
    policy.pin(leading)

    # PrepareStore: what is missing, the leading part if not all fit; never by evicting its own blocks.
    missing = [i for i in range(hits, num_blocks) if chunk_ids[i] not in resident]
    policy.incoming([chunk_ids[i] for i in missing])
    short = len(resident) + len(missing) - capacity
    if short > 0:
        own = set(chunk_ids)
        victims = policy.evict(short, lambda chunk_id: chunk_id not in own)
        resident.difference_update(victims)
        del missing[len(missing) - (short - len(victims)) :]

    # Publish, and the end of the lookup's lease.
    for i in reversed(missing):
        policy.insert(chunk_ids[i], stamps[i])
        resident.add(chunk_ids[i])
    policy.unpin(leading)
    return hits


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per capacity and policy: capacity, hit share, seconds."""
    parser = argparse.ArgumentParser(description="hit shares of eviction policies over a request trace")
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE, help="default: %(default)s")
    parser.add_argument("--policy", action="append", help="name or package.module:ClassName; may be repeated")
    parser.add_argument("--capacity", action="append", type=int, help="blocks; may be repeated")
    options = parser.parse_args(arguments)
    if not options.trace.exists():
        print(f"skipped: no trace at {options.trace}; name one with --trace", file=sys.stderr)
        return 0
    requests = load_trace(options.trace)
    distinct = num_distinct(requests)
    print(f"{len(requests)} requests, {sum(map(len, requests))} blocks, {distinct} distinct")
    for capacity in options.capacity or [distinct * share // 100 for share in DEFAULT_SHARES]:
        for name in options.policy or ["lru", "arc"]:
            start = time.perf_counter()
            result = replay(requests, make_policy(name, capacity), capacity)
            print(f"{capacity:>8} {name:<8} {result.hit_share:.4f} {time.perf_counter() - start:6.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
