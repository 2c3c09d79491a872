"""Lookup and PrepareStore through a real client and daemon, against bare gRPC with the same byte counts.

The bare server is of the daemon's kind (grpc.aio) in a process of its own, with identity serializers and a
handler that returns a prepared reply of the size of the real one. Calls are interleaved in one run and told
as ratios of medians: the machines that run this are noisy.

    python -m tests.benchmarks.bench_lookup [--json FILE] [--calls 400]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from kvtier.v1 import offload_pb2 as pb
from kvtier_client.context import ReqContext
from kvtier_client.reports import StoreReportItem

from ..daemon_process import DaemonProcess, wait_until
from .block_client import BlockClient, chunk_key

CHUNK_BYTES = 4096
POOL_CHUNKS = 65_536
MESSAGE_OPTIONS = [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20)]
LIMITS = {"lookup 64": 1.4, "lookup 64 leased": None, "lookup 2048": 2.5, "lookup 2048 leased": 3.5}
"""At most this many bare round trips."""

PREPARE_STORE_LIMIT_MS = 10.0


def _serve_bare(path: str, reply_sizes: dict[str, int], ready: multiprocessing.synchronize.Event) -> None:
    async def main() -> None:
        server = grpc.aio.server(options=MESSAGE_OPTIONS)

        def answer(size: int) -> grpc.RpcMethodHandler[bytes, bytes]:
            reply = secrets.token_bytes(size)

            async def call(_raw: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
                return reply

            return grpc.unary_unary_rpc_method_handler(call)

        methods = {name: answer(size) for name, size in reply_sizes.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", methods),))
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        ready.set()
        await server.wait_for_termination()

    asyncio.run(main())


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _publish(blocks: BlockClient, first: int, count: int) -> None:
    """Fill the pool with chunks whose bytes nobody reads."""
    for start in range(first, first + count, 4096):
        numbers = range(start, min(start + 4096, first + count))
        ctx = ReqContext(f"fill-{start}", None)
        keys = [chunk_key(number) for number in numbers]
        grant = blocks.scheduler.prepare_store(ctx, keys)
        assert len(grant.slot_ids) == len(keys), grant.reason
        blocks.worker.report_store(StoreReportItem(0, grant.slot_ids, grant.generations, keys))
        blocks.flush()
        blocks.scheduler.finish(ctx.req_id)
    blocks.flush()


class LookupBench:
    """Interleaves real lookups with bare round trips."""

    def __init__(self, blocks: BlockClient, bare: grpc.Channel) -> None:
        self._blocks = blocks
        self._bare = bare
        self._serial = 0

    def real(self, keys: list[bytes], lease: bool) -> float:
        """Time one lookup by a request of its own; the request ends outside the time."""
        self._serial += 1
        ctx = ReqContext(f"bench-{self._serial}", None)
        scheduler = self._blocks.scheduler
        spent = _timed(lambda: scheduler.lookup(ctx, keys, lease=lease))
        scheduler.finish(ctx.req_id)
        assert scheduler.flush_and_wait(10)
        return spent

    def compare(
        self, name: str, keys: list[bytes], lease: bool, calls: int
    ) -> tuple[list[float], list[float]]:
        """Times of real and bare calls in ms, taken in turns."""
        bare: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._bare.unary_unary(f"/bare.Bare/{name}")
        size = pb.LookupRequest(session_id="s" * 33, keys=keys, lease_id=1).ByteSize()
        request = secrets.token_bytes(size)
        for _ in range(20):
            bare(request)
            self.real(keys, lease)
        times = [(self.real(keys, lease), _timed(lambda: bare(request))) for _ in range(calls)]
        return [real for real, _ in times], [plain for _, plain in times]


def _reply_bytes(keys: int, leased: bool) -> int:
    """Size of a reply in which every key hits."""
    reply = pb.LookupResponse(boot_id="b" * 16, statuses=bytes([pb.LOOKUP_STATUS_HIT]) * keys)
    if leased:
        reply.leased.add(first=0, count=keys)
        reply.slot_ids.extend(range(30_000, 30_000 + keys))
        reply.generations.extend([1] * keys)
    return reply.ByteSize()


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
    sizes = {f"lookup {n}{' leased' if leased else ''}": _reply_bytes(n, leased)
             for n in (64, 2048) for leased in (False, True)}  # fmt: skip
    methods = {name.replace(" ", ""): size for name, size in sizes.items()}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        ready = context.Event()
        bare_path = f"{folder}/bare.sock"
        bare = context.Process(target=_serve_bare, args=(bare_path, methods, ready), daemon=True)
        bare.start()
        assert ready.wait(30), "the bare server did not start"
        try:
            with (
                DaemonProcess(Path(folder), POOL_CHUNKS * CHUNK_BYTES) as daemon,
                grpc.insecure_channel(f"unix:{bare_path}", options=MESSAGE_OPTIONS) as channel,
            ):
                daemon.start()
                wait_until(lambda: daemon.status().pool.backed_bytes == POOL_CHUNKS * CHUNK_BYTES, "backed")
                with BlockClient(daemon.address, CHUNK_BYTES) as blocks:
                    return _measure(blocks, channel, calls)
        finally:
            bare.kill()
            bare.join()


def _measure(blocks: BlockClient, channel: grpc.Channel, calls: int) -> dict[str, object]:
    _publish(blocks, 0, POOL_CHUNKS)
    bench = LookupBench(blocks, channel)
    rows: dict[str, object] = {}
    newest = POOL_CHUNKS - 2048
    for count in (64, 2048):
        keys = [chunk_key(newest + i) for i in range(count)]
        for leased in (False, True):
            name = f"lookup {count}{' leased' if leased else ''}"
            real, plain = bench.compare(name.replace(" ", ""), keys, leased, calls)
            p50, bare = statistics.median(real), statistics.median(plain)
            rows[name] = {
                "p50_ms": p50,
                "p99_ms": sorted(real)[int(len(real) * 0.99)],
                "bare_p50_ms": bare,
                "ratio": p50 / bare,
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
