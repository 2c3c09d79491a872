"""The processes that run Mooncake's client for a daemon: `python -P -m kvtier_server...helper`.

Two roles, each a process of its own:

    segment   lends memory of this node to the store. Knows nothing of the pool.
    transfer  maps the pool and moves chunks between it and the store, in batches of what is asked at a time.

The client is C++ that may wait for ever (its setup does while the master is away), may go on with a transfer
after it has returned an error, and holds a hundred MiB and thirty threads. In a process of its own all of it
ends when the daemon wants it to end, and the memory of the pool is out of its reach from then on. The other
role is apart so that this can happen at any time: who ends a segment ends what other nodes have put there.

Owns the engine's setup and the batches. Settings come as one JSON text, requests over a socket (`wire.py`).
Ends when the daemon ends: at the end of the socket, and by the kernel's signal if that comes late.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from kvtier_server.secondary.mooncake.codes import is_settled
from kvtier_server.secondary.mooncake.listeners import filter_listeners
from kvtier_server.secondary.mooncake.wire import (
    HEADER_BYTES,
    MAX_BYTES,
    READY,
    Operation,
    Request,
    pack_answer,
    unpack_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake.store import MooncakeDistributedStore

MAX_BATCH = 64
"""Objects of one call of the engine; a batch ends when its slowest object does."""

CLOSE_S = 4.0
"""What taking the segment out of the store may take; the master notices a death by itself, later."""

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Run one role until the socket ends. Never returns."""
    settings = json.loads(arguments[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is the daemon's to answer
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = socket.socket(fileno=settings["channel"])
    # Whatever the engine is waiting for: the daemon's end is this process's.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["parent"]:
        os._exit(1)
    store = _begin(settings, channel)
    if settings["role"] == "segment":
        channel.recv(MAX_BYTES)
        threading.Timer(CLOSE_S, os._exit, (1,)).start()
        store.close()
    else:
        Transfers(store, settings, channel).run()
    os._exit(0)  # without the engine's own end, which takes seconds


def _begin(settings: dict[str, Any], channel: socket.socket) -> MooncakeDistributedStore:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup(
        settings["local_hostname"],
        settings["metadata"],
        settings["segment"] if settings["role"] == "segment" else 0,
        settings["buffer"],
        settings["protocol"],
        settings["devices"],
        settings["master"],
    )
    if not code:
        # Before the pool is mapped. Nobody has to connect to a client that lends no memory.
        may_be_reached = settings["role"] == "segment" or settings["protocol"] != "tcp"
        filter_listeners(settings["address"] if may_be_reached else "")
    if code or settings["role"] == "segment":
        channel.send(pack_answer(READY, code))
    if code:
        os._exit(1)
    return store


class Transfers:
    """Takes requests and answers them, in any order. One thread for each kind of call."""

    def __init__(
        self, store: MooncakeDistributedStore, settings: dict[str, Any], channel: socket.socket
    ) -> None:
        """Map the pool and the headers, register both, and say so."""
        from mooncake.store import ReplicateConfig

        self._store = store
        self._channel = channel
        self._replication = ReplicateConfig()
        self._replication.replica_num = settings["replicas"]
        pool_bytes, headers_bytes = settings["pool_bytes"], settings["headers_bytes"]
        # The slots alone: the tables in front of them are nothing to the engine.
        self._mappings = (
            mmap.mmap(settings["pool"], pool_bytes, offset=settings["pool_offset"]),
            mmap.mmap(settings["headers"], headers_bytes),
        )
        self._pool, self._headers = [
            ctypes.addressof(ctypes.c_char.from_buffer(mapping)) for mapping in self._mappings
        ]
        code = store.register_buffer(self._pool, pool_bytes) or store.register_buffer(
            self._headers, headers_bytes
        )
        channel.send(pack_answer(READY, code))
        self._ready = threading.Condition()
        self._waiting: dict[Callable[[list[Request]], list[int]], deque[Request]] = {
            self._put: deque(),
            self._get: deque(),
            self._ask: deque(),
        }

    def run(self) -> None:
        """Work until the socket ends."""
        for call in self._waiting:
            threading.Thread(target=self._work, args=(call,), daemon=True).start()
        calls = {Operation.PUT: self._put, Operation.GET: self._get}
        while message := self._channel.recv(MAX_BYTES):
            request = unpack_request(message)
            with self._ready:
                self._waiting[calls.get(request.operation, self._ask)].append(request)
                self._ready.notify_all()

    def _work(self, call: Callable[[list[Request]], list[int]]) -> None:
        waiting = self._waiting[call]
        while True:
            with self._ready:
                self._ready.wait_for(lambda: waiting)
                batch = [waiting.popleft() for _ in range(min(len(waiting), MAX_BATCH))]
            codes = call(batch)
            is_over = [call == self._ask or is_settled(code) for code in codes]
            for request, code, over in zip(batch, codes, is_over, strict=True):
                if over:
                    self._channel.send(pack_answer(request.id, code))
            if not all(is_over):
                # Bytes may still be on their way: only the end of this process is surely their end.
                os._exit(3)

    def _put(self, batch: list[Request]) -> list[int]:
        names, pointers, sizes = self._described(batch)
        return list(self._store.batch_put_from_multi_buffers(names, pointers, sizes, self._replication))

    def _get(self, batch: list[Request]) -> list[int]:
        return list(self._store.batch_get_into_multi_buffers(*self._described(batch)))

    def _ask(self, batch: list[Request]) -> list[int]:
        gone = [request.name for request in batch if request.operation is Operation.REMOVE]
        asked = [request.name for request in batch if request.operation is Operation.EXISTS]
        removed = iter(self._store.batch_remove(gone, True) if gone else ())
        found = iter(self._store.batch_is_exist(asked) if asked else ())
        return [next(removed if each.operation is Operation.REMOVE else found) for each in batch]

    def _described(self, batch: list[Request]) -> tuple[list[str], list[list[int]], list[list[int]]]:
        """Name each object and its pieces: the header, then the chunk, if any, where it lies in the pool."""
        names, pointers, sizes = [], [], []
        for request in batch:
            num_pieces = 2 if request.num_bytes else 1
            names.append(request.name)
            pointers.append(
                [self._headers + request.header * HEADER_BYTES, self._pool + request.offset][:num_pieces]
            )
            sizes.append([HEADER_BYTES, request.num_bytes][:num_pieces])
        return names, pointers, sizes


if __name__ == "__main__":
    main(sys.argv[1:])
