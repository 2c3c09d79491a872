"""A scheduler's and a worker's client in one process, for benchmarks and replays: no engine, no torch.

Owns the smallest set of facts that attaches. The bytes of a chunk follow from its number, so that whatever
is loaded can be checked.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import grpc
import numpy as np

from kvtier.v1 import admin_pb2, admin_pb2_grpc
from kvtier_client.client import OffloadClient
from kvtier_client.listener import ClientListener
from kvtier_client.options import ClientOptions, EngineIdentity, Role, new_instance_nonce
from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts
from kvtier_ops.pool import MappedPool

PATIENT = ClientOptions(lookup_deadline_ms=10_000, prepare_deadline_ms=10_000)
"""Deadlines for measuring: a machine that hesitates must show as a slow call, not as a miss."""

GROUP_TAIL = bytes(4)


def chunk_key(number: int) -> bytes:
    """OffloadKey of chunk `number`: 32 bytes and group 0."""
    return number.to_bytes(32, "big") + GROUP_TAIL


def chunk_bytes(number: int, num_bytes: int) -> bytes:
    """Content of chunk `number`."""
    return hashlib.shake_128(number.to_bytes(8, "big")).digest(num_bytes)


class BlockClient:
    """Both sessions of an engine whose chunks are `part_bytes` of one tensor. A context manager."""

    def __init__(
        self,
        address: str,
        part_bytes: int,
        engine_id: str = "bench",
        listener: ClientListener | None = None,
        *,
        weights_id: str = "0",
        tensors: Sequence[TensorLayout] = (),
        attach_timeout_s: float = 30.0,
    ) -> None:
        """`listener` is the scheduler's. `tensors`: what a chunk is made of, default one of `part_bytes`."""
        self.part_bytes = part_bytes
        self._address = address
        self._attach_timeout_s = attach_timeout_s
        facts = NamespaceFacts(
            model="blocks",
            weights_id=weights_id,
            kv_dtype="uint8",
            hash_algorithm="number",
            tokens_per_hash=16,
            blocks_per_chunk=1,
            kv_cache_layout="rows",
            groups=(GroupFacts(tokens_per_block=16, part_bytes=part_bytes),),
        )
        self.namespace = facts.digest()
        nonce = new_instance_nonce()
        self.scheduler = OffloadClient(
            address,
            EngineIdentity(engine_id, nonce, Role.SCHEDULER),
            facts,
            options=PATIENT,
            listener=listener,
        )
        self.worker = OffloadClient(
            address,
            EngineIdentity(engine_id, nonce, Role.WORKER),
            facts,
            geometry=[list(tensors) or [TensorLayout("rows", part_bytes)]],
            options=PATIENT,
        )

    def __enter__(self) -> Self:
        for client in (self.worker, self.scheduler):
            client.start()
        try:
            self.wait_attached()
        except RuntimeError:
            self.scheduler.close()
            self.worker.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.scheduler.close()
        self.worker.close()

    def wait_attached(self) -> None:
        """Wait until both sessions are open and each knows of the other."""
        for client in (self.worker, self.scheduler):
            if not client.wait_attached(self._attach_timeout_s):
                raise RuntimeError(f"cannot attach: {client.away_reason}")
        deadline = time.monotonic() + self._attach_timeout_s
        while not self.scheduler.ready:  # the scheduler does not know yet that its worker is attached
            if time.monotonic() > deadline:
                raise RuntimeError("the daemon attached both sessions and does not know of both")
            time.sleep(0.005)

    @property
    def pool(self) -> MappedPool:
        """The mapped pool."""
        session = self.worker.session
        if session is None or session.pool is None:
            raise RuntimeError(f"not attached: {self.worker.away_reason}")
        return session.pool

    def slot(self, slot_id: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The part of a slot, shape (part_bytes,)."""
        return self.pool.part_view(slot_id, 0, self.part_bytes)

    def flush(self) -> None:
        """Wait until both sessions have told everything."""
        for client in (self.worker, self.scheduler):
            if not client.flush_and_wait(30):
                raise RuntimeError(f"the daemon has not taken the reports: {client.away_reason}")

    def clear(self) -> bool:
        """Have the daemon drop what this namespace has stored. To be called when the sessions have ended."""
        with grpc.insecure_channel(self._address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                admin_pb2_grpc.AdminServiceStub(channel).Clear(
                    admin_pb2.ClearRequest(namespace=self.namespace, wait_ms=5000), timeout=10.0
                )
            except grpc.RpcError:
                return False
        return True
