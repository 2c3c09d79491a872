"""Lookup and PrepareStore through a real client and daemon, against bare gRPC with the same byte counts.

What is measured, and how, is `kvtier_client.bench.lookups`, as in `kvtier bench lookup`; here with a full
pool, with stores that evict, and with limits. Told as ratios of medians: the machines that run this are
noisy.

    python -m tests.benchmarks.bench_lookup [--json FILE] [--calls 400]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import grpc

from kvtier_client.bench.bare_server import bare_channel
from kvtier_client.bench.block_client import BlockClient, chunk_key
from kvtier_client.bench.figures import timing
from kvtier_client.bench.lookups import (
    CHUNK_BYTES,
    FLOOR,
    LookupBench,
    bare_methods,
    case_name,
    publish,
)
from kvtier_client.context import ReqContext
from kvtier_client.reports import StoreReportItem

from ..daemon_process import DaemonProcess, wait_until

POOL_CHUNKS = 65_536
COUNTS = (64, 2048)
LIMITS = {"lookup 64": 1.4, "lookup 64 leased": None, "lookup 2048": 2.5, "lookup 2048 leased": 3.5}
"""At most this many bare round trips."""

PREPARE_STORE_LIMIT_MS = 10.0


def _prepare_store(blocks: BlockClient, calls: int, first: int) -> list[float]:
    """Times in ms of PrepareStore of 2,048 new keys into a full pool."""
    times = []
    for number in range(calls):
        ctx = ReqContext(f"store-{first}-{number}", None)
        keys = [chunk_key(first + number * 2048 + i) for i in range(2048)]
        start = time.perf_counter()
        grant = blocks.scheduler.prepare_store(ctx, keys)
        times.append((time.perf_counter() - start) * 1e3)
        assert len(grant.slot_ids) == 2048, grant.reason
        blocks.worker.report_store(StoreReportItem(0, grant.slot_ids, grant.generations, keys))
        blocks.scheduler.finish(ctx.req_id)
        blocks.flush()
    return times


def _pin(blocks: BlockClient, numbers: range) -> None:
    """Pin chunks under lookup leases that stay."""
    for start in range(numbers.start, numbers.stop, 4096):
        keys = [chunk_key(number) for number in range(start, min(start + 4096, numbers.stop))]
        answer = blocks.scheduler.lookup(ReqContext(f"pin-{start}", None), keys)
        assert len(answer.slot_ids) == len(keys), answer


def run(calls: int) -> dict[str, object]:
    """Measure everything."""
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        bare_channel(Path(folder), bare_methods(COUNTS)) as channel,
        DaemonProcess(Path(folder), POOL_CHUNKS * CHUNK_BYTES) as daemon,
    ):
        daemon.start()
        wait_until(lambda: daemon.status().pool.backed_bytes == POOL_CHUNKS * CHUNK_BYTES, "backed")
        with BlockClient(daemon.address, CHUNK_BYTES) as blocks:
            return _measure(blocks, channel, calls)


def _measure(blocks: BlockClient, channel: grpc.Channel, calls: int) -> dict[str, object]:
    publish(blocks, 0, POOL_CHUNKS)
    bench = LookupBench(blocks, channel)
    rows: dict[str, object] = {}
    newest = POOL_CHUNKS - 2048
    for count in COUNTS:
        keys = [chunk_key(newest + i) for i in range(count)]
        for leased in (False, True):
            name = case_name(count, lease=leased)
            row = timing(name, FLOOR, *bench.compare(name, keys, leased, calls))
            rows[name] = {
                "p50_ms": row.p50_ms,
                "p99_ms": row.p99_ms,
                "bare_p50_ms": row.floor_p50_ms,
                "ratio": row.ratio,
                "limit": LIMITS[name],
            }
    stores = max(calls // 20, 10)
    rows["prepare_store 2048, full pool"] = {
        "p50_ms": statistics.median(_prepare_store(blocks, stores, 1 << 32)),
        "limit_ms": PREPARE_STORE_LIMIT_MS,
    }
    oldest = (1 << 32) + stores * 2048 - 30_000
    _pin(blocks, range(max(oldest, 1 << 32), (1 << 32) + stores * 2048))
    rows["prepare_store 2048, full pool, 30,000 pinned"] = {
        "p50_ms": statistics.median(_prepare_store(blocks, stores, 1 << 33)),
        "limit_ms": PREPARE_STORE_LIMIT_MS,
    }
    return rows


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--calls", type=int, default=400, help="calls per row (default: 400)")
    args = parser.parse_args()
    rows = run(args.calls)
    print(f"{'through OffloadClient':46}{'p50 ms':>9}{'p99 ms':>9}{'bare ms':>9}{'ratio':>8}{'limit':>8}")
    for name, row in rows.items():
        assert isinstance(row, dict)
        limit = (
            f"{row['limit']:.1f}x"
            if row.get("limit")
            else f"{row['limit_ms']:.0f} ms"
            if "limit_ms" in row
            else ""
        )
        p99 = f"{row['p99_ms']:.3f}" if "p99_ms" in row else ""
        bare = f"{row['bare_p50_ms']:.3f}" if "bare_p50_ms" in row else ""
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        print(f"{name:46}{row['p50_ms']:>9.3f}{p99:>9}{bare:>9}{ratio:>8}{limit:>8}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
