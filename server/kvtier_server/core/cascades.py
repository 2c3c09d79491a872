"""What goes down: which chunks wait for which tier, and which are being written.

Owns the pins that keep a chunk in its slot while a tier reads it.

    published, used or cold ──> queued ──> pinned, written by the tier ──> unpinned, held below
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvtier_ops.layout import slot_offset
from kvtier_ops.namespace import SpaceName
from kvtier_server.core.books import Books
from kvtier_server.core.lower_tiers import (
    DAEMON,
    MAX_JOB_BYTES,
    MAX_JOB_CHUNKS,
    CascadeWhen,
    LowerTier,
    ShapeOf,
)
from kvtier_server.core.requests import Request
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.primary.size_classes import SizeClass
from kvtier_server.secondary.base import JobKind, JobResult, Outcome, Presence, TierChunk, TierJob

MAX_COLD_CHUNKS = 4_096
"""Of one size class: as far as a look at what would be evicted goes, about a millisecond."""

COLD_STEPS = 16
"""How often that look is taken while as many chunks are stored as it covers."""


@dataclass(slots=True)
class _Cascade:
    below: LowerTier
    chunks: list[Chunk]
    num_bytes: int


class Cascades:
    """Chunks on their way from the pool to the tiers below it."""

    def __init__(
        self, books: Books, tiers: Sequence[LowerTier], shape_of: ShapeOf, job_ids: Iterator[int]
    ) -> None:
        self._tiers = tiers
        self._books = books
        self._shape_of = shape_of
        self._job_ids = job_ids
        self._running: dict[int, _Cascade] = {}
        self._counts_uses = any(below.rules.cascade is CascadeWhen.USED for below in tiers)
        self._cold_tiers = [below for below in tiers if below.rules.cascade is CascadeWhen.COLD]
        self._num_published: Counter[SizeClass] = Counter()
        """Since a look was taken at what would be evicted."""
        self._look_after: dict[SizeClass, int] = {}
        """How many it may become; 1 where none was taken yet."""
        self._to_look_at: set[SizeClass] = set()

    # What is offered

    def published(self, chunk: Chunk, held_by: LowerTier | None = None) -> None:
        """Queue a chunk for every tier that is to have it and does not."""
        if held_by is not None:
            chunk.below |= held_by.bit
        else:
            chunk.counted = chunk.user
        for below in self._tiers:
            if below.rules.cascade is CascadeWhen.PUBLISHED:
                self._offer(below, chunk)
        if self._cold_tiers:
            size_class = chunk.size_class
            self._num_published[size_class] += 1
            if self._num_published[size_class] >= self._look_after.get(size_class, 1):
                self._to_look_at.add(size_class)

    def count_uses(self, space: KeySpace, request: Request, keys: Sequence[bytes]) -> None:
        """Queue chunks that have been used often enough by now."""
        if not self._counts_uses:
            return
        for key in keys:
            chunk = space.chunks.get(key)
            if chunk is None or chunk.counted is request:
                continue
            chunk.counted = request
            chunk.uses += 1
            for below in self._tiers:
                if below.rules.cascade is CascadeWhen.USED and chunk.uses >= below.rules.min_uses:
                    self._offer(below, chunk)

    def offer_cold(self) -> None:
        """Look at what stores would evict next, and queue what is not below yet."""
        while self._to_look_at:
            size_class = self._to_look_at.pop()
            num_slots = size_class.num_slots + self._books.primary.slabs.growable_slots(size_class)
            num_free = num_slots - size_class.num_published - size_class.num_reserved
            clean = [
                min(math.ceil(t.rules.clean_share * num_slots), MAX_COLD_CHUNKS) for t in self._cold_tiers
            ]
            self._num_published[size_class] = 0
            self._look_after[size_class] = max(1, max(clean) // COLD_STEPS)
            if num_free >= max(clean):
                continue  # stores find room without evicting anything
            self._books.unpin_all()
            self._books.primary.settle()
            coldest = size_class.policy.coldest(max(clean) - num_free)
            chunks = list(map(self._books.primary.chunk, coldest))
            for below, num_clean in zip(self._cold_tiers, clean, strict=True):
                for chunk in chunks[: max(num_clean - num_free, 0)]:
                    if not self._offer(below, chunk):
                        break

    def _offer(self, below: LowerTier, chunk: Chunk) -> bool:
        """Queue a chunk for a tier that has not had it yet; False if the queue is full."""
        if (chunk.below | chunk.offered) & below.bit:
            return True
        num_bytes = chunk.size_class.slot_bytes
        if below.waiting_bytes + num_bytes > below.rules.max_queued_bytes:
            below.counts["dropped:queue_full"] += 1
            return False
        chunk.offered |= below.bit
        below.waiting.append(chunk)
        below.waiting_bytes += num_bytes
        return True

    @staticmethod
    def _may_offer_again(below: LowerTier, chunks: Sequence[Chunk]) -> None:
        """Note that a tier has not had its say: a later use, or a look at what is cold, offers them again."""
        for chunk in chunks:
            chunk.offered &= ~below.bit

    # What is handed out, and its end

    def submit(self, max_chunks: int) -> int:
        """Hand the tiers what they may take now of the first `max_chunks`; how many were looked at."""
        left = max_chunks
        for below in self._tiers:
            while below.waiting and left > 0:
                chunks, looked_at = self._next_batch(below, left)
                left -= looked_at
                if not chunks:
                    if looked_at:
                        continue
                    break
                if not self._submit_store(below, chunks):
                    break
        return max_chunks - left

    def _next_batch(self, below: LowerTier, max_chunks: int) -> tuple[list[tuple[Chunk, TierChunk]], int]:
        """Take chunks off the queue for one job, as far as they may run; how many were looked at."""
        batch: list[tuple[Chunk, TierChunk]] = []
        batch_bytes = looked_at = 0
        while below.waiting and looked_at < max_chunks and len(batch) < MAX_JOB_CHUNKS:
            chunk = below.waiting[0]
            num_bytes = chunk.size_class.slot_bytes
            fits = below.running_bytes + batch_bytes + num_bytes <= below.rules.max_running_bytes
            if not fits and (below.running_bytes or batch_bytes):
                break
            if batch and batch_bytes + num_bytes > MAX_JOB_BYTES:
                break
            below.waiting.popleft()
            below.num_taken += 1
            below.waiting_bytes -= num_bytes
            looked_at += 1
            described = self._describe(below, chunk)
            if described is not None:
                batch.append((chunk, described))
                batch_bytes += num_bytes
        return batch, looked_at

    def _describe(self, below: LowerTier, chunk: Chunk) -> TierChunk | None:
        """Name a chunk for a tier; None if it need not or cannot go there any more."""
        if chunk.dropped:
            below.counts["dropped:evicted"] += 1
            return None
        if below.was_cleared(chunk) or below.is_being_cleared(chunk.space.name):
            chunk.offered &= ~below.bit
            below.counts["dropped:cleared"] += 1
            return None
        if below.tier.lookup(chunk.space.name, (chunk.key,))[0] is Presence.YES:
            chunk.below |= below.bit
            return None
        shape = self._shape_of(chunk.space, chunk.key)
        if shape is None:
            below.counts["dropped:unknown_shape"] += 1
            chunk.offered &= ~below.bit
            return None
        return TierChunk(
            chunk.space.name,
            chunk.key,
            shape.geometry,
            shape.part_bytes,
            shape.num_parts,
            slot_offset(chunk.slot_id),
            self._books.primary.checksums(chunk.slot_id, shape.num_parts),
            chunk.stamp,
        )

    def _submit_store(self, below: LowerTier, batch: Sequence[tuple[Chunk, TierChunk]]) -> bool:
        chunks = [chunk for chunk, _ in batch]
        job = TierJob(next(self._job_ids), JobKind.STORE, tuple(named for _, named in batch))
        num_bytes = sum(chunk.size_class.slot_bytes for chunk in chunks)
        # Before it is submitted: the tier's threads may begin at once.
        self._books.primary.pin(chunks)
        if not below.tier.submit_store(job):
            self._books.primary.unpin(chunks)
            self._may_offer_again(below, chunks)
            below.counts["dropped:refused"] += len(chunks)
            return False
        below.running_bytes += num_bytes
        self._running[job.id] = _Cascade(below, chunks, num_bytes)
        return True

    def take_end(self, job: JobResult) -> bool:
        """Take the end of a job; False if it was no cascade's."""
        cascade = self._running.pop(job.job_id, None)
        if cascade is not None:
            self._stored(cascade, job)
        return cascade is not None

    def _stored(self, cascade: _Cascade, job: JobResult) -> None:
        below = cascade.below
        below.running_bytes -= cascade.num_bytes
        for chunk, outcome in zip(cascade.chunks, job.outcomes, strict=True):
            below.counts[f"cascade:{outcome.name.lower()}"] += 1
            if outcome is Outcome.DONE:
                below.counts["cascade_bytes"] += chunk.size_class.slot_bytes
                if below.holds(chunk.space, chunk.key):  # it may have made room for another by now
                    chunk.below |= below.bit
            elif outcome is Outcome.FAILED:
                self._may_offer_again(below, [chunk])
            elif outcome is Outcome.CORRUPT and not chunk.dropped:
                self._books.counts["checksum:corrupt"] += 1
                self._books.condemn(chunk, owner=DAEMON)
        self._books.primary.unpin(cascade.chunks)

    # What there is

    @property
    def is_behind(self) -> bool:
        """Whether there may be something to hand out."""
        return bool(self._to_look_at) or any(below.waiting for below in self._tiers)

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or under way."""
        return bool(self._running) or any(below.waiting for below in self._tiers)

    def jobs_with(self, below: LowerTier, covers: Callable[[SpaceName], bool]) -> set[int]:
        """Ids of the jobs of a tier that write chunks of some spaces."""
        return {
            job_id
            for job_id, cascade in self._running.items()
            if cascade.below is below and any(covers(chunk.space.name) for chunk in cascade.chunks)
        }

    def pins(self) -> Iterator[Chunk]:
        """Chunks that are pinned for tiers to read, once per pin."""
        for cascade in self._running.values():
            yield from cascade.chunks

    def check_integrity(self) -> None:
        """Assert that the sums are right."""
        for below in self._tiers:
            assert below.waiting_bytes == sum(chunk.size_class.slot_bytes for chunk in below.waiting)
            running = sum(c.num_bytes for c in self._running.values() if c.below is below)
            assert below.running_bytes == running, (below.rules.name, below.running_bytes, running)
