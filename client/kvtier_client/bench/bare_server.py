"""A gRPC server that does nothing, in a process of its own: the floor of every call.

Of the daemon's kind (grpc.aio), with identity serializers and a prepared reply of so many bytes a method.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import grpc

from kvtier_client.bench.figures import BenchFailed

START_TIMEOUT_S = 30.0
OPTIONS = [
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.enable_http_proxy", 0),
]


def _serve(path: str, reply_bytes: Mapping[str, int], ready: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started it, who ends it

    async def main() -> None:
        server = grpc.aio.server(options=OPTIONS)

        def answer(size: int) -> grpc.RpcMethodHandler[bytes, bytes]:
            reply = secrets.token_bytes(size)

            async def call(_raw: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
                return reply

            return grpc.unary_unary_rpc_method_handler(call)

        methods = {name: answer(size) for name, size in reply_bytes.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", methods),))
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        ready.set()
        await server.wait_for_termination()

    asyncio.run(main())


@contextmanager
def bare_channel(directory: Path, reply_bytes: Mapping[str, int]) -> Iterator[grpc.Channel]:
    """Serve the methods "/bare.Bare/<name>" on a socket in `directory`, and give a channel to them."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    path = f"{directory}/bare.sock"
    server = context.Process(target=_serve, args=(path, dict(reply_bytes), ready), daemon=True)
    server.start()
    try:
        if not ready.wait(START_TIMEOUT_S):
            raise BenchFailed(f"the bare gRPC server does not answer after {START_TIMEOUT_S:.0f} s")
        with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
            yield channel
    finally:
        server.kill()
        server.join()
