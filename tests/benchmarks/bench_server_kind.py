"""grpc.server with threads against grpc.aio: which kind of server should the daemon be?

Bare handlers, identity serializers, one client process and sixteen, small and large requests, with 100
open streams beside them. The daemon is of the aio kind; this says what that costs and gains here.

    python -m tests.benchmarks.bench_server_kind [--json FILE] [--calls 400]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import queue
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import grpc

OPTIONS = [("grpc.max_receive_message_length", 8 << 20)]
SIZES = {"1 key": 38, "2,048 keys": 38 * 2048}
REPLY = bytes(6 * 2048)
STREAMS = 100
CLIENTS = (1, 16)


def _serve_threads(path: str, ready: Event) -> None:
    """A thread per open stream, and as many again for unary calls."""
    server = grpc.server(ThreadPoolExecutor(STREAMS + 64), options=OPTIONS)

    def stream(_raw: bytes, context: grpc.ServicerContext):  # type: ignore[no-untyped-def]
        ended = threading.Event()
        context.add_callback(ended.set)
        yield b""
        ended.wait()

    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", {
        "Call": grpc.unary_unary_rpc_method_handler(lambda _raw, _context: REPLY),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }),))  # fmt: skip
    server.add_insecure_port(f"unix:{path}")
    server.start()
    ready.set()
    server.wait_for_termination()


def _serve_aio(path: str, ready: Event) -> None:
    async def main() -> None:
        server = grpc.aio.server(options=OPTIONS)

        async def call(_raw: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return REPLY

        async def stream(_raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            await context.write(b"")
            await asyncio.Event().wait()

        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", {
            "Call": grpc.unary_unary_rpc_method_handler(call),
            "Stream": grpc.unary_stream_rpc_method_handler(stream),
        }),))  # fmt: skip
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        ready.set()
        await server.wait_for_termination()

    asyncio.run(main())


def _client(path: str, size: int, calls: int, times: multiprocessing.Queue[list[float]]) -> None:
    with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/bare.Bare/Call")
        request = bytes(size)
        for _ in range(20):
            call(request)
        spent = []
        for _ in range(calls):
            start = time.perf_counter()
            call(request)
            spent.append((time.perf_counter() - start) * 1e3)
    times.put(spent)


def _measure(path: str, size: int, clients: int, calls: int) -> list[float]:
    context = multiprocessing.get_context("spawn")
    times: multiprocessing.Queue[list[float]] = context.Queue()
    share = max(calls // clients, 50)
    processes = [context.Process(target=_client, args=(path, size, share, times)) for _ in range(clients)]
    for process in processes:
        process.start()
    spent = [value for _ in processes for value in times.get(timeout=120)]
    for process in processes:
        process.join()
    return spent


def run(calls: int) -> list[dict[str, object]]:
    """Measure both kinds in turns."""
    context = multiprocessing.get_context("spawn")
    spent: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        for turn in range(2):
            for kind, serve in (("threads", _serve_threads), ("aio", _serve_aio)):
                path = f"{folder}/{kind}{turn}.sock"
                ready = context.Event()
                server = context.Process(target=serve, args=(path, ready), daemon=True)
                server.start()
                if not ready.wait(30):
                    raise queue.Empty(f"the server of kind {kind} did not start")
                with grpc.insecure_channel(f"unix:{path}") as channel:
                    open_stream: grpc.UnaryStreamMultiCallable[bytes, bytes]
                    open_stream = channel.unary_stream("/bare.Bare/Stream")
                    streams = [open_stream(b"") for _ in range(STREAMS)]
                    for opened in streams:
                        next(opened)
                    for name, size in SIZES.items():
                        for clients in CLIENTS:
                            spent.setdefault((name, kind, clients), []).extend(
                                _measure(path, size, clients, calls // 2)
                            )
                    for opened in streams:
                        opened.cancel()
                server.kill()
                server.join()
    return [
        {
            "request": name,
            "kind": kind,
            "clients": clients,
            "p50_ms": statistics.median(values),
            "p99_ms": sorted(values)[int(len(values) * 0.99)],
        }
        for (name, kind, clients), values in spent.items()
    ]


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--calls", type=int, default=400, help="calls per row (default: 400)")
    args = parser.parse_args()
    rows = run(args.calls)
    print(f"{f'bare gRPC beside {STREAMS} open streams':42}{'clients':>8}{'p50 ms':>9}{'p99 ms':>9}")
    for row in sorted(rows, key=lambda r: (str(r["request"]), int(str(r["clients"])), str(r["kind"]))):
        name = f"{row['request']}, {row['kind']}"
        print(f"{name:42}{row['clients']:>8}{row['p50_ms']:>9.3f}{row['p99_ms']:>9.3f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
