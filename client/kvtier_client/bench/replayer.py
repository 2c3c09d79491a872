"""Plays requests of a trace through a real client against a daemon, and checks every byte that is loaded.

Per request: one leased Lookup, the leading hits are read from the pool and compared with what they must be,
the missing rest is stored through PrepareStore, the reports go out, the request ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier_client.bench.block_client import BlockClient, chunk_bytes, chunk_key
from kvtier_client.context import ReqContext
from kvtier_client.reports import LoadReportItem, StoreReportItem
from kvtier_ops.checksum import part_checksum
from kvtier_ops.slot_table import fence

GRANTED = 1
MISS = 4

Slot = tuple[int, int]
"""Slot id and generation."""


@dataclass(slots=True)
class Replayed:
    """Hits and costs of one replay."""

    policy: str
    requests: int = 0
    input_chunks: int = 0
    hit_chunks: int = 0
    stored_chunks: int = 0
    seconds: float = 0.0

    @property
    def hit_share(self) -> float:
        """Share of input chunks that were loaded."""
        return self.hit_chunks / max(self.input_chunks, 1)


class WrongByte(Exception):
    """A loaded chunk had other bytes than were stored under its key. Must never happen."""


class Replayer:
    """Plays requests against one daemon."""

    def __init__(self, blocks: BlockClient, policy: str) -> None:
        self._blocks = blocks
        self.result = Replayed(policy)

    def play(self, hash_ids: Sequence[int]) -> int:
        """Play one request; returns its hits."""
        blocks, result = self._blocks, self.result
        ctx = ReqContext(f"r{result.requests}", None)
        lease_id, slots, missing = self._look_up(ctx, hash_ids)
        if slots:
            self._load(lease_id, hash_ids[: len(slots)], slots)
        if missing:
            self._store(ctx, missing)
        blocks.scheduler.finish(ctx.req_id)
        blocks.flush()
        result.requests += 1
        result.input_chunks += len(hash_ids)
        result.hit_chunks += len(slots)
        return len(slots)

    def _look_up(self, ctx: ReqContext, hash_ids: Sequence[int]) -> tuple[int, list[Slot], list[int]]:
        """Lease the leading run: the lease, the run's slots, and the numbers of what is missing."""
        answer = self._blocks.scheduler.lookup(ctx, [chunk_key(number) for number in hash_ids])
        if answer.reason:
            raise RuntimeError(f"lookup failed: {answer.reason}")
        hits = answer.leased_runs[0][1] if answer.leased_runs and answer.leased_runs[0][0] == 0 else 0
        slots = list(zip(answer.slot_ids[:hits], answer.generations[:hits], strict=True))
        missing = [n for n, status in zip(hash_ids, answer.statuses, strict=True) if status == MISS]
        return answer.lease_id, slots, missing

    def _load(self, lease_id: int, numbers: Sequence[int], slots: Sequence[Slot]) -> None:
        blocks = self._blocks
        load_lease = blocks.scheduler.new_lease_id()
        blocks.scheduler.start_load(lease_id, load_lease, [slot_id for slot_id, _ in slots])
        copying_s = 0.0
        for number, (slot_id, generation) in zip(numbers, slots, strict=True):
            began = time.perf_counter()
            before = blocks.pool.generation(slot_id)
            loaded = blocks.slot(slot_id).tobytes()
            fence()
            copying_s += time.perf_counter() - began
            if before != generation or blocks.pool.generation(slot_id) != generation:
                raise WrongByte(f"chunk {number}: slot {slot_id} changed under its lease")
            if loaded != chunk_bytes(number, blocks.part_bytes):
                raise WrongByte(f"chunk {number}: slot {slot_id} holds other bytes")
        blocks.worker.report_load(
            LoadReportItem(load_lease, num_bytes=len(numbers) * blocks.part_bytes, seconds=copying_s)
        )

    def _store(self, ctx: ReqContext, numbers: Sequence[int]) -> None:
        blocks = self._blocks
        grant = blocks.scheduler.prepare_store(ctx, [chunk_key(number) for number in numbers])
        granted = [n for n, verdict in zip(numbers, grant.verdicts, strict=True) if verdict == GRANTED]
        checksums = []
        copying_s = 0.0
        for number, slot_id in zip(granted, grant.slot_ids, strict=True):
            content = chunk_bytes(number, blocks.part_bytes)
            began = time.perf_counter()
            blocks.slot(slot_id).data[:] = content
            copying_s += time.perf_counter() - began
            checksums.append(part_checksum(memoryview(content)))
        self.result.stored_chunks += len(granted)
        keys = [chunk_key(number) for number in granted]
        blocks.worker.report_store(
            StoreReportItem(
                0,
                grant.slot_ids,
                grant.generations,
                keys,
                checksums,
                num_bytes=len(keys) * blocks.part_bytes,
                seconds=copying_s,
            )
        )
