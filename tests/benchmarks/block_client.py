"""A scheduler's and a worker's client in one process, for benchmarks and replays: no engine, no torch.

Owns the smallest set of facts that attaches. The bytes of a chunk follow from its number, so that whatever
is loaded can be checked.
"""

from __future__ import annotations

import hashlib
from types import TracebackType
from typing import Self

import numpy as np

from kvtier_client.client import OffloadClient
from kvtier_client.listener import ClientListener
from kvtier_client.options import ClientOptions, EngineIdentity, Role, new_instance_nonce
from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts
from kvtier_ops.pool import MappedPool

from ..daemon_process import wait_until

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
    ) -> None:
        """`listener` is the scheduler's."""
        self.part_bytes = part_bytes
        facts = NamespaceFacts(
            model="blocks",
            weights_id="0",
            kv_dtype="uint8",
            hash_algorithm="number",
            tokens_per_hash=16,
            blocks_per_chunk=1,
            kv_cache_layout="rows",
            groups=(GroupFacts(tokens_per_block=16, part_bytes=part_bytes),),
        )
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
            geometry=[[TensorLayout("rows", part_bytes)]],
            options=PATIENT,
        )

    def __enter__(self) -> Self:
        for client in (self.worker, self.scheduler):
            client.start()
        self.wait_attached()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.scheduler.close()
        self.worker.close()

    def wait_attached(self) -> None:
        """Wait until both sessions are open and each knows of the other."""
        for client in (self.worker, self.scheduler):
            if not client.wait_attached(30):
                raise RuntimeError(f"cannot attach: {client.away_reason}")
        wait_until(lambda: self.scheduler.ready, "the scheduler knows that its worker is attached")

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
