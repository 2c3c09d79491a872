"""A tier whose I/O happens when a test says so, half a chunk at a time.

It keeps every promise of a tier, over the cells of a pool in memory: what it stores is what lies in the slot
while it is copied. What a medium may do wrong, the test asks for by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import (
    Change,
    ClearJob,
    ClearResult,
    EvictJob,
    JobKind,
    JobResult,
    OffloadingSpec,
    Outcome,
    Presence,
    Removal,
    SecondaryTier,
    TierChunk,
    TierJob,
    TierStats,
)
from kvtier_server.secondary.holdings import Holdings
from kvtier_server.secondary.parameters import TierParameters

from .slots_in_memory import CELL_BYTES, SlotsInMemory, checksum

Name = tuple[SpaceName, bytes]


@dataclass(slots=True)
class Running:
    """A job, and how far it is: two steps a chunk."""

    job: TierJob
    step: int = 0
    buffer: bytes = b""
    outcomes: list[Outcome] = field(default_factory=list)
    checksums: list[tuple[int, ...]] = field(default_factory=list)


class SteppedTier(SecondaryTier):
    """Holds what it was given; `step` does the next bit of the I/O."""

    def __init__(self, slots: SlotsInMemory, *, shared: bool = False) -> None:
        spec = OffloadingSpec(len(slots.cells) // CELL_BYTES * SLOT_UNIT_BYTES, SLOT_UNIT_BYTES, 128)
        super().__init__(spec, memoryview(b""), "stepped", lambda: None, TierParameters())
        self.is_shared = shared
        self.slots = slots
        self.stored: dict[Name, tuple[bytes, tuple[int, ...], bytes]] = {}
        self.hidden: set[Name] = set()
        """Stored by somebody else: only a probe finds it."""
        self.holdings = Holdings()
        self._places: dict[Name, int] = {}
        self.running: deque[Running] = deque()
        self.clearing: deque[ClearJob | EvictJob] = deque()
        self.refuses = False
        self.touched: list[tuple[SpaceName, Sequence[bytes], Sequence[int]]] = []
        self._finished: list[JobResult] = []
        self._removed: list[Removal] = []
        self._cleared: list[ClearResult] = []

    def lookup(self, space: SpaceName, keys: Sequence[bytes]) -> Sequence[Presence]:
        there = [(space, key) in self.stored and (space, key) not in self.hidden for key in keys]
        otherwise = Presence.UNKNOWN if self.is_shared else Presence.NO
        return [Presence.YES if known else otherwise for known in there]

    def _submit(self, job: TierJob) -> bool:
        if not self.refuses:
            self.running.append(Running(job))
        return not self.refuses

    submit_store = submit_load = submit_probe = _submit

    def get_finished(self) -> Sequence[JobResult]:
        finished, self._finished = self._finished, []
        return finished

    def get_removed(self) -> Sequence[Removal]:
        removed, self._removed = self._removed, []
        return removed

    can_list = True

    def get_changes(self, max_changes: int) -> Sequence[Change] | None:
        return self.holdings.get_changes(max_changes)

    def list_chunks(self, place: int, num_places: int) -> tuple[Sequence[Name], int | None]:
        return self.holdings.chunks_from(place, num_places)

    def known(self) -> set[Name]:
        """What `lookup` says YES to."""
        return self.stored.keys() - self.hidden

    def _note(self, reason: str) -> None:
        """Bring the holdings in step with what is known."""
        known = self.known()
        for name in self._places.keys() - known:
            self.holdings.remove(self._places.pop(name), reason)
        for name in known - self._places.keys():
            self._places[name] = self.holdings.add(name, reason)

    def hide(self, name: Name) -> None:
        """Know no more that a chunk is there."""
        self.hidden.add(name)
        self._note("forgotten")

    def touch(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        self.touched.append((space, keys, stamps))

    can_clear = True
    can_evict = True

    def submit_clear(self, job: ClearJob) -> bool:
        self.clearing.append(job)
        return True

    def submit_evict(self, job: EvictJob) -> bool:
        self.clearing.append(job)
        return True

    def get_cleared(self) -> Sequence[ClearResult]:
        cleared, self._cleared = self._cleared, []
        return cleared

    def finish_clear(self) -> None:
        """Do the oldest clearing or eviction; a chunk counts as one byte."""
        job = self.clearing.popleft()
        if isinstance(job, EvictJob):
            coldest = list(self.stored)[: job.num_bytes]
            for name in coldest:
                self.lose(name, "admin")
            self._cleared.append(ClearResult(job.id, len(coldest), len(coldest)))
            return
        covered = [name for name in self.stored if job.covers(name[0])]
        for name in covered:
            self.lose(name, "clear")
        self._cleared.append(ClearResult(job.id, len(covered), 0))

    def lose(self, name: Name, reason: str = "evict") -> None:
        """Let go of a chunk."""
        del self.stored[name]
        self.hidden.discard(name)
        self._removed.append(Removal(name[0], (name[1],), reason))
        self._note(reason)

    def has_work(self) -> bool:
        return bool(self.running or self._finished)

    def stats(self) -> TierStats:
        return TierStats(0, len(self.stored), len(self.stored))  # a chunk is a byte, as in submit_evict

    def shutdown(self, timeout_s: float) -> bool:
        self.running.clear()
        return True

    def restart(self) -> None:
        """The daemon was killed: what was under way has not happened."""
        self.running.clear()
        self.clearing.clear()
        self._finished.clear()
        self._removed.clear()
        self._cleared.clear()

    def step(self, which: int = 0, how: str = "ok") -> None:
        """Do the next half of a chunk of one job. `how`: ok, failed, corrupt or missing, from now on."""
        if not self.running:
            return
        running = self.running[which % len(self.running)]
        chunk = running.job.chunks[len(running.outcomes)]
        if how != "ok":
            self._end_chunk(running, {"failed": Outcome.FAILED, "corrupt": Outcome.CORRUPT}.get(how))
            return
        if running.job.kind is JobKind.PROBE:
            is_there = (chunk.space, chunk.key) in self.stored
            self.hidden.discard((chunk.space, chunk.key))
            self._note("found")
            self._end_chunk(running, Outcome.DONE if is_there else Outcome.MISSING)
        elif running.job.kind is JobKind.STORE:
            self._step_store(running, chunk)
        else:
            self._step_load(running, chunk)

    def finish_all(self, how: str = "ok") -> None:
        """Do everything that is to be done."""
        while self.running:
            self.step(0, how)

    def _step_store(self, running: Running, chunk: TierChunk) -> None:
        running.buffer += self._half(running, chunk)
        running.step ^= 1
        if running.step:
            return
        parts = _parts(running.buffer, chunk)
        if tuple(map(checksum, parts)) != chunk.checksums:
            self._end_chunk(running, Outcome.CORRUPT)
            return
        self.stored[chunk.space, chunk.key] = (running.buffer, chunk.checksums, chunk.geometry)
        self._note("cascade")
        self._end_chunk(running, Outcome.DONE)

    def _half(self, running: Running, chunk: TierChunk) -> bytes:
        units = chunk.num_bytes // SLOT_UNIT_BYTES
        first = chunk.offset // SLOT_UNIT_BYTES
        middle = units // 2
        if running.step == 0:
            return self.slots.read(first, middle)
        return self.slots.read(first + middle, units - middle)

    def _step_load(self, running: Running, chunk: TierChunk) -> None:
        found = self.stored.get((chunk.space, chunk.key))
        if found is None or found[2] != chunk.geometry:
            self._end_chunk(running, Outcome.MISSING)
            return
        cells, checksums, _ = found
        first = chunk.offset // SLOT_UNIT_BYTES
        middle = len(cells) // CELL_BYTES // 2
        if running.step == 0:
            self.slots.write(first, cells[: middle * CELL_BYTES])
        else:
            self.slots.write(first + middle, cells[middle * CELL_BYTES :])
            self._end_chunk(running, Outcome.DONE, checksums)
            return
        running.step ^= 1

    def _end_chunk(self, running: Running, outcome: Outcome | None, checksums: tuple[int, ...] = ()) -> None:
        running.outcomes.append(Outcome.MISSING if outcome is None else outcome)
        running.checksums.append(checksums)
        running.step, running.buffer = 0, b""
        if len(running.outcomes) == len(running.job.chunks):
            self.running.remove(running)
            self._finished.append(
                JobResult(running.job.id, tuple(running.outcomes), tuple(running.checksums))
            )


def _parts(cells: bytes, chunk: TierChunk) -> list[bytes]:
    size = len(cells) // chunk.num_parts
    return [cells[part * size : (part + 1) * size] for part in range(chunk.num_parts)]
