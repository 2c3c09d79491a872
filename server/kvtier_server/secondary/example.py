"""A tier in the daemon's own memory: the template for a tier of your own.

It is real - it stores, loads, verifies, evicts and tells - and as short as one can be. The README walks
through it. What a tier has to decide is here; threads, queues, deadlines and backpressure are `TierWorkers`,
to which `WorkedTier` hands the jobs.

    [[tiers]]
    type = "example"
    capacity = "256MiB"
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from kvtier_ops.namespace import SpaceName
from kvtier_server.config_values import Bytes
from kvtier_server.secondary.base import (
    Change,
    ClearJob,
    ClearResult,
    EvictJob,
    JobKind,
    Locality,
    Medium,
    OffloadingSpec,
    Outcome,
    Presence,
    Removal,
    TierChunk,
    TierStats,
)
from kvtier_server.secondary.chunk_file import checksums_to_store, part_checksums
from kvtier_server.secondary.holdings import Holdings, Name
from kvtier_server.secondary.parameters import TierParameters
from kvtier_server.secondary.workers import ChunkResult, TierWorkers, WorkedTier

DEADLINE_S = 10.0
MAX_QUEUED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Stored:
    data: bytes
    geometry: bytes
    checksums: tuple[int, ...]
    place: int
    """Among the holdings."""


class ExampleParameters(TierParameters):
    """The one key that this tier has beyond those of every tier."""

    capacity: Bytes = 256 << 20
    """Bytes of chunks, beside the pool."""


class ExampleTier(WorkedTier):
    """Keeps the chunks that were used last, up to `capacity` bytes."""

    medium = Medium.CPU
    locality = Locality.LOCAL
    can_clear = True
    can_evict = True
    can_list = True
    Parameters = ExampleParameters

    def __init__(
        self,
        spec: OffloadingSpec,
        pool: memoryview,
        tier_type: str,
        on_finished: Callable[[], None],
        parameters: ExampleParameters,
    ) -> None:
        super().__init__(spec, pool, tier_type, on_finished, parameters)
        self._capacity = parameters.capacity
        # The index is the core's to read at any time; the workers change it under the lock, in one step.
        self._lock = Lock()
        self._stored: OrderedDict[Name, _Stored] = OrderedDict()
        self._holdings = Holdings()
        self._used_bytes = 0
        self._removed: list[Removal] = []
        self._cleared: list[ClearResult] = []
        self._workers = TierWorkers(
            tier_type,
            self._run,
            on_finished,
            num_readers=1,
            num_writers=1,
            max_queued_bytes=MAX_QUEUED_BYTES,
            deadline_s=DEADLINE_S,
        )

    # The core's side: from memory, at once

    def lookup(self, space: SpaceName, keys: Sequence[bytes]) -> Sequence[Presence]:
        with self._lock:
            return [Presence.YES if (space, key) in self._stored else Presence.NO for key in keys]

    def get_removed(self) -> Sequence[Removal]:
        with self._lock:
            removed, self._removed = self._removed, []
        return removed

    def get_changes(self, max_changes: int) -> Sequence[Change] | None:
        return self._holdings.get_changes(max_changes)

    def list_chunks(self, place: int, num_places: int) -> tuple[Sequence[Name], int | None]:
        return self._holdings.chunks_from(place, num_places)

    def touch(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        with self._lock:  # in the order in which it hears of them: a tier that lasts would keep the stamps
            for key in reversed(keys):  # the head of a prefix is to stay longest
                if (space, key) in self._stored:
                    self._stored.move_to_end((space, key))

    def submit_clear(self, job: ClearJob) -> bool:
        with self._lock:
            used_bytes = self._used_bytes
            covered = [name for name in self._stored if job.covers(name[0])]
            for name in covered:
                self._remove(name, "clear")
            self._cleared.append(ClearResult(job.id, len(covered), used_bytes - self._used_bytes))
        self.on_finished()
        return True

    def submit_evict(self, job: EvictJob) -> bool:
        with self._lock:
            used_bytes, num_chunks = self._used_bytes, len(self._stored)
            while self._stored and used_bytes - self._used_bytes < job.num_bytes:
                self._remove(next(iter(self._stored)), "admin")
            removed = (num_chunks - len(self._stored), used_bytes - self._used_bytes)
            self._cleared.append(ClearResult(job.id, *removed))
        self.on_finished()
        return True

    def get_cleared(self) -> Sequence[ClearResult]:
        with self._lock:
            cleared, self._cleared = self._cleared, []
        return cleared

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                self._capacity,
                self._used_bytes,
                len(self._stored),
                self._workers.backpressure.queued_bytes,
                self._workers.problem,
                io_errors=self._workers.io_errors,
            )

    def shutdown(self, timeout_s: float) -> bool:
        return self._workers.stop(timeout_s)

    # The workers' side: one chunk at a time

    def _run(self, kind: JobKind, chunk: TierChunk) -> ChunkResult:
        return self._store(chunk) if kind is JobKind.STORE else self._load(chunk)

    def _store(self, chunk: TierChunk) -> ChunkResult:
        if chunk.num_bytes > self._capacity:
            return ChunkResult(Outcome.REFUSED)
        # Copied first and verified then: nothing that changes meanwhile gets in.
        data = bytes(self.pool[chunk.offset : chunk.offset + chunk.num_bytes])
        found = checksums_to_store(memoryview(data), chunk)
        if found is None:
            return ChunkResult(Outcome.CORRUPT)
        name = (chunk.space, chunk.key)
        with self._lock:
            if name in self._stored:
                self._remove(name, "replaced", tell=False)
            while self._used_bytes + len(data) > self._capacity:
                self._remove(next(iter(self._stored)), "evict")
            self._stored[name] = _Stored(data, chunk.geometry, found, self._holdings.add(name, "cascade"))
            self._used_bytes += len(data)
        return ChunkResult(Outcome.DONE)

    def _load(self, chunk: TierChunk) -> ChunkResult:
        name = (chunk.space, chunk.key)
        with self._lock:
            stored = self._stored.get(name)
        if stored is None or stored.geometry != chunk.geometry or len(stored.data) != chunk.num_bytes:
            return ChunkResult(Outcome.MISSING)
        if part_checksums(memoryview(stored.data), chunk) != stored.checksums:
            with self._lock:
                if self._stored.get(name) is stored:
                    self._remove(name, "corrupt")
            return ChunkResult(Outcome.CORRUPT)
        self.pool[chunk.offset : chunk.offset + chunk.num_bytes] = stored.data
        return ChunkResult(Outcome.DONE, stored.checksums)

    def _remove(self, name: Name, reason: str, *, tell: bool = True) -> None:
        """Let go of one chunk, with the lock held."""
        space, key = name
        gone = self._stored.pop(name)
        self._holdings.remove(gone.place, reason)
        self._used_bytes -= len(gone.data)
        if tell:
            self._removed.append(Removal(space, (key,), reason))
