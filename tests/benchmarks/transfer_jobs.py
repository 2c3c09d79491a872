"""A job of one chunk on a Transfer stream, against an empty round trip on it: what the way costs.

Owns the stream and the measurement; whose memory it is, a GPU's or the CPU's, says who brings the handles.
"""

from __future__ import annotations

import queue
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from kvtier.v1 import offload_pb2 as pb
from kvtier.v1 import transfer_pb2 as tpb
from kvtier.v1 import transfer_pb2_grpc
from kvtier_ops.ipc import MemoryHandle

from ..daemon_process import WAIT_S, DaemonProcess
from ..integration.transfer_engine import message_of
from ..raw_engine import RawEngine, namespace, to_keys

CHUNK_BYTES = 2 << 20
NUM_TENSORS = 2
"""As `raw_engine` has them."""
PAGE_BYTES = CHUNK_BYTES // NUM_TENSORS
NUM_BLOCKS = 64
TENSOR_BYTES = NUM_BLOCKS * PAGE_BYTES

LIMIT = 1.3
"""Of an empty round trip, beside the copy itself."""


def measure_jobs(
    daemon: DaemonProcess, handles: Sequence[MemoryHandle], rounds: int, name: str
) -> list[dict[str, object]]:
    """Time round trips and jobs of one chunk of two tensors of NUM_BLOCKS pages, in turns; returns the rows.

    Of a job the time of the copy itself is taken off, as the copy process has measured it: a checksum, which
    a store always has, stays in.
    """
    facts = namespace(
        weights_id=secrets.token_hex(4), groups=[pb.GroupFacts(tokens_per_block=16, part_bytes=CHUNK_BYTES)]
    )
    with RawEngine(daemon.address, facts=facts) as engine:
        engine.attach()
        stream = _Stream(engine, handles)
        try:
            return stream.measure(rounds, name)
        finally:
            stream.close()


class _Stream:
    def __init__(self, engine: RawEngine, handles: Sequence[MemoryHandle]) -> None:
        self._engine = engine
        self._session_id = engine.workers[0].id
        stub = transfer_pb2_grpc.TransferServiceStub(engine.channel)
        group = tpb.GroupMemory(tensors=map(message_of, handles))
        answer = stub.RegisterMemory(
            tpb.RegisterMemoryRequest(session_id=self._session_id, groups=[group]), timeout=WAIT_S
        )
        self._memory_id = answer.memory_id
        self._requests: queue.SimpleQueue[tpb.TransferRequest | None] = queue.SimpleQueue()
        self._answers = iter(stub.Transfer(iter(self._requests.get, None)))
        self._job_ids = count(1)
        self._checksums: Sequence[int] = ()

    def close(self) -> None:
        self._requests.put(None)

    def ping(self) -> float:
        """Return the seconds of an empty round trip."""
        return self._timed(tpb.TransferRequest(session_id=self._session_id))[0]

    def job(
        self, direction: tpb.TransferDirection.ValueType, slots: pb.PrepareStoreResponse, verify: bool
    ) -> float:
        """Return the seconds of a job of one chunk, without those of its copy."""
        seconds, answer = self._timed(
            tpb.TransferRequest(
                session_id=self._session_id,
                job_id=next(self._job_ids),
                direction=direction,
                memory_id=self._memory_id,
                slot_ids=slots.slot_ids,
                generations=slots.generations,
                block_ids=[7],
                group_sizes=[1],
                block_indices=[0],
                verify=verify,
            )
        )
        if not answer.ok:
            raise RuntimeError(answer.message or f"the job failed: {answer}")
        if direction == tpb.TRANSFER_DIRECTION_STORE:
            self._checksums = answer.checksums
        return seconds - answer.seconds

    def _timed(self, request: tpb.TransferRequest) -> tuple[float, tpb.TransferResponse]:
        start = time.perf_counter()
        self._requests.put(request)
        answer = next(self._answers)
        return time.perf_counter() - start, answer

    def measure(self, rounds: int, name: str) -> list[dict[str, object]]:
        """Measure, after a tenth of the rounds unmeasured."""
        granted = self._engine.prepare_store(to_keys([1]))
        # Stored again and again: until it is reported, the slot is this rank's to write.
        kinds: dict[str, Callable[[], float]] = {
            "empty round trip": self.ping,
            "store of one chunk": lambda: self.job(tpb.TRANSFER_DIRECTION_STORE, granted, verify=False),
        }
        rows = self._take_turns(kinds, rounds, name)
        self._publish(granted)
        kinds = {
            "empty round trip": self.ping,
            "load of one chunk": lambda: self.job(tpb.TRANSFER_DIRECTION_LOAD, granted, verify=False),
            "load of one chunk, verified": lambda: self.job(
                tpb.TRANSFER_DIRECTION_LOAD, granted, verify=True
            ),
        }
        return rows + self._take_turns(kinds, rounds, name)

    def _publish(self, granted: pb.PrepareStoreResponse) -> None:
        report = pb.StoreReport(
            slot_ids=granted.slot_ids,
            generations=granted.generations,
            keys=to_keys([1]),
            checksums=self._checksums,
        )
        self._engine.complete(self._engine.workers[0], store_reports=[report])

    def _take_turns(
        self, kinds: dict[str, Callable[[], float]], rounds: int, name: str
    ) -> list[dict[str, object]]:
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds + rounds // 10):
            for kind, run in kinds.items():
                took = run()
                if number >= rounds // 10:
                    seconds[kind].append(took)
        empty = statistics.median(seconds["empty round trip"])
        return [
            {
                "what": f"{name}: {kind}",
                "p50_us": round(statistics.median(each) * 1e6, 1),
                "p99_us": round(float(np.percentile(each, 99)) * 1e6, 1),
                "ratio": round(statistics.median(each) / empty, 2),
                "limit": None if kind == "empty round trip" else LIMIT,
            }
            for kind, each in seconds.items()
        ]


def print_rows(rows: Sequence[dict[str, object]]) -> None:
    """Print a table for people."""
    print(f"{'without the copy itself':45}{'p50':>10}{'p99':>10}{'ratio':>8}{'limit':>8}")
    for row in rows:
        limit = "" if row["limit"] is None else row["limit"]
        print(f"{row['what']:45}{row['p50_us']:>8} us{row['p99_us']:>8} us{row['ratio']:>7}{limit:>8}")
