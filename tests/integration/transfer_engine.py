"""An engine whose device memory is shared memory, and which has the daemon copy: bare stubs, real bytes."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from kvtier.v1 import offload_pb2 as pb
from kvtier.v1 import transfer_pb2 as tpb
from kvtier.v1 import transfer_pb2_grpc
from kvtier_ops.ipc import MemoryHandle, SharedAllocation, export_shared

from ..daemon_process import WAIT_S
from ..raw_engine import PART_BYTES, RawEngine

PAGE_BYTES = PART_BYTES // 2
NUM_BLOCKS = 64

STORE, LOAD = tpb.TRANSFER_DIRECTION_STORE, tpb.TRANSFER_DIRECTION_LOAD


def message_of(tensor: MemoryHandle, /, **changes: object) -> tpb.MemoryHandle:
    """Return a handle for the wire; `changes` replace fields."""
    told: dict[str, object] = {name: getattr(tensor, name) for name in MemoryHandle.__slots__}
    return tpb.MemoryHandle(**{**told, **changes})  # type: ignore[arg-type]


class TransferEngine:
    """A raw engine with two tensors of 64 blocks, registered with the daemon, and a Transfer stream."""

    def __init__(self, engine: RawEngine) -> None:
        self.engine = engine
        self.stub = transfer_pb2_grpc.TransferServiceStub(engine.channel)
        self.memory = SharedAllocation(2 * NUM_BLOCKS * PAGE_BYTES)
        self.tensors = self.memory.data.reshape(2, NUM_BLOCKS, PAGE_BYTES)
        self.memory_id = 0
        self.lock_file = self.gate_file = ""
        self._job_ids = count(1)
        self._requests: queue.SimpleQueue[tpb.TransferRequest | None] = queue.SimpleQueue()
        self._call: grpc.Call | None = None
        self._answers: Iterator[tpb.TransferResponse] = iter(())

    @property
    def session_id(self) -> str:
        return self.engine.workers[0].id

    def handles(self) -> list[MemoryHandle]:
        """The tensors, one behind the other in one allocation."""
        size = NUM_BLOCKS * PAGE_BYTES
        return [export_shared(self.memory, layer * size, size, PAGE_BYTES, NUM_BLOCKS) for layer in range(2)]

    def register_request(self, *tensors: tpb.MemoryHandle) -> tpb.RegisterMemoryRequest:
        """Ask for these tensors, or its own."""
        return tpb.RegisterMemoryRequest(
            session_id=self.session_id,
            groups=[tpb.GroupMemory(tensors=tensors or map(message_of, self.handles()))],
        )

    def register(self) -> None:
        """Register the tensors."""
        answer = self.stub.RegisterMemory(self.register_request(), timeout=WAIT_S)
        self.memory_id, self.lock_file = answer.memory_id, answer.lock_file
        self.gate_file = answer.gate_file

    def open_stream(self) -> None:
        """Open the stream, and wait until the daemon has it."""
        call = self.stub.Transfer(iter(self._requests.get, None))
        self._call, self._answers = call, iter(call)
        self._requests.put(tpb.TransferRequest(session_id=self.session_id))
        assert next(self._answers).ok

    def close_stream(self) -> None:
        """End the stream at once, with whatever is under way."""
        if self._call is not None:
            self._call.cancel()
        self._requests.put(None)

    def send(
        self,
        direction: tpb.TransferDirection.ValueType,
        slot_ids: Sequence[int],
        generations: Sequence[int],
        block_ids: Sequence[int],
        **changes: object,
    ) -> int:
        """Ask for a copy of one block a slot; returns the job's id."""
        told: dict[str, object] = {
            "session_id": self.session_id,
            "job_id": next(self._job_ids),
            "direction": direction,
            "memory_id": self.memory_id,
            "slot_ids": slot_ids,
            "generations": generations,
            "block_ids": block_ids,
            "group_sizes": [len(block_ids)],
            "block_indices": [0],
            "verify": direction == LOAD,
        }
        request = tpb.TransferRequest(**{**told, **changes})  # type: ignore[arg-type]
        self._requests.put(request)
        return request.job_id

    def answer(self) -> tpb.TransferResponse:
        """Wait for the next answer."""
        return next(self._answers)

    def wait_begun(self) -> None:
        """Wait until the daemon has taken all that was sent: the next stream it answers comes behind it."""
        opened = tpb.TransferRequest(session_id=self.session_id)
        self._requests.put(opened)
        assert self.answer().job_id == 0

    def copy(self, *args: Any, **changes: Any) -> tpb.TransferResponse:
        """Ask for a copy as `send` does, and wait for its end."""
        job_id = self.send(*args, **changes)
        answer = self.answer()
        assert answer.job_id == job_id
        return answer

    def fill(self, block_ids: Sequence[int], seed: int) -> npt.NDArray[np.uint8]:
        """Write random bytes into blocks; returns them, shape (tensors, blocks, page)."""
        rows = np.random.default_rng(seed).integers(0, 256, (2, len(block_ids), PAGE_BYTES), np.uint8)
        self.tensors[:, list(block_ids)] = rows
        return rows

    def store(self, keys: Sequence[bytes], block_ids: Sequence[int]) -> tpb.TransferResponse:
        """Store blocks under keys, through to their publication."""
        granted = self.engine.prepare_store(keys)
        assert set(granted.verdicts) == {pb.STORE_VERDICT_GRANTED}, granted.verdicts
        answer = self.copy(STORE, granted.slot_ids, granted.generations, block_ids)
        assert answer.ok, answer
        self.engine.complete(
            self.engine.workers[0],
            store_reports=[
                pb.StoreReport(
                    slot_ids=granted.slot_ids,
                    generations=granted.generations,
                    keys=keys,
                    checksums=answer.checksums,
                )
            ],
        )
        return answer

    def load(self, keys: Sequence[bytes], block_ids: Sequence[int]) -> tpb.TransferResponse:
        """Load chunks into blocks."""
        found = self.engine.lookup(keys, lease_id=self.engine.new_lease_id())
        assert len(found.slot_ids) == len(keys), found
        return self.copy(LOAD, found.slot_ids, found.generations, block_ids)

    def close(self) -> None:
        """Let go of everything."""
        self.close_stream()
        self.memory.close()
