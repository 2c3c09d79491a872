"""The tiers below the pool, in their order: what goes down, what comes up, and which slots that takes.

Owns cascades and promotions: what is queued, what is pinned or reserved for I/O, and what its end means. The
order of the tiers is the order in which they are asked. Does no I/O: it gives jobs to tiers and hears of
their ends in `collect`. Who waits for a promotion is in the books, as for an unfinished store.

    published, used or cold ──> queued ──> pinned, written by the tier ──> unpinned, held below
    missing   ──> probed, queued, if need be ──> slot reserved, read by the tier ──> published, pinned
                        └─ missing, corrupt, failed: the next tier that may have it, else MISS ─┘
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import count, takewhile

from kvtier_ops.layout import slot_offset
from kvtier_ops.namespace import SpaceName
from kvtier_server.core.books import Books
from kvtier_server.core.requests import Request
from kvtier_server.policies.base import ChunkId
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.primary.size_classes import SizeClass
from kvtier_server.secondary.base import (
    ClearJob,
    ClearResult,
    JobKind,
    JobResult,
    Outcome,
    Presence,
    Removal,
    SecondaryTier,
    TierChunk,
    TierJob,
)

DAEMON = 0
"""Owner of slots that the daemon itself writes: no engine has this nonce."""

MAX_JOB_BYTES = 16 << 20
MAX_JOB_CHUNKS = 64
"""A batch is over when its slowest chunk is: small enough that the first chunks of a prompt do not wait long
for the last, large enough that a job costs little."""

MAX_PROBES = 256
"""Chunks of one request that are looked for where nobody knows: a cold prompt is not worth thousands."""

MAX_TIMES = 4_096
"""Times of promotions kept until somebody takes them."""

SLICE_CHUNKS = 256
"""Chunks of cascades that are looked at in one go, so that a flood of stores never holds the core."""

MAX_CLEARS = 64
"""Clearings under way, and those of one tier that chunks in its queue have still to pass."""

MAX_UNTOLD_USES = 65_536
"""Keys whose uses the tiers have not been told of. Beyond it the oldest are forgotten: only order suffers."""

MAX_COLD_CHUNKS = 4_096
"""Of one size class: as far as a look at what would be evicted goes, about a millisecond."""

MAX_QUEUED_PROMOTIONS = 65_536
"""Chunks that wait for a slot to come up into; what comes beyond it is a miss."""

PACE_WEIGHT = 0.25
"""Of the newest load in the average pace of a tier."""

COLD_STEPS = 16
"""How often that look is taken while as many chunks are stored as it covers."""


class CascadeWhen(StrEnum):
    """When a chunk goes down."""

    PUBLISHED = "published"
    """At once: every chunk is below before it can be evicted, if the tier keeps up."""
    USED = "used"
    """After `min_uses` uses: what nobody asks for again is not worth the writing."""
    COLD = "cold"
    """Before it is evicted: of the chunks that go next, `clean_share` of the pool's slots, all are below."""
    NEVER = "never"
    """The tier is read only."""


@dataclass(frozen=True, slots=True)
class TierRules:
    """How one tier is used. Sizes in bytes."""

    name: str
    cascade: CascadeWhen = CascadeWhen.PUBLISHED
    max_queued_bytes: int = 1 << 30
    """Chunks that wait to go down, without holding their slots; what comes beyond it is dropped."""
    max_running_bytes: int = 64 << 20
    """Chunks that are being written, and so cannot be evicted."""
    min_uses: int = 1
    """Of USED: requests that used a chunk after it was stored."""
    clean_share: float = 0.125
    """Of COLD: so much of a size class is free or has a copy below, for stores to take without a loss."""
    probe_wait_ns: int = 20_000_000
    """How long a request waits to hear whether a chunk is there; if it is, the load has its own time."""


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """What a tier must know of a chunk's inside."""

    part_bytes: int
    num_parts: int
    geometry: bytes


ShapeOf = Callable[[KeySpace, bytes], ChunkShape | None]


class LowerTier:
    """One tier, its rules, what waits to go there, and what happened. `bit` marks chunks that it holds."""

    def __init__(self, tier: SecondaryTier, rules: TierRules, index: int) -> None:
        self.tier = tier
        self.rules = rules
        self.index = index
        self.bit = 1 << index
        self.waiting: deque[Chunk] = deque()
        self.waiting_bytes = 0
        self.num_taken = 0
        """Chunks that have left the queue so far."""
        self.cleared: list[tuple[int, ClearJob]] = []
        """Clearings, each with the number of the last chunk in the queue that it covers."""
        self.running_bytes = 0
        self.queued_promotion_bytes = 0
        """Chunks it has that wait for a slot to come up into."""
        self.ns_per_byte = 0.0
        """Average pace of loads; 0 = none was seen yet."""
        self.last_load_ns = 0
        """When a load ended last."""
        self.counts: Counter[str] = Counter()
        """cascade:<outcome> and promotion:<outcome> in chunks, cascade_bytes, promotion_bytes, dropped."""

    def holds(self, space: KeySpace, key: bytes) -> bool:
        """Tell whether the tier is known to have a chunk."""
        return self.tier.lookup(space.name, (key,))[0] is Presence.YES

    def note_load(self, num_bytes: int, began_ns: int, now_ns: int) -> None:
        """Learn from a load how fast chunks come up, all loads together."""
        took_ns = now_ns - max(began_ns, self.last_load_ns)
        self.last_load_ns = now_ns
        if num_bytes:
            pace = took_ns / num_bytes
            self.ns_per_byte += (pace - self.ns_per_byte) * (PACE_WEIGHT if self.ns_per_byte else 1.0)

    def was_cleared(self, chunk: Chunk) -> bool:
        """Tell whether the chunk that has just left the queue was cleared while it waited."""
        if self.cleared:
            self.cleared = [(last, job) for last, job in self.cleared if last >= self.num_taken]
        return any(job.covers(chunk.space.name) for _, job in self.cleared)


@dataclass(slots=True)
class _Cascade:
    below: LowerTier
    chunks: list[Chunk]
    num_bytes: int


@dataclass(slots=True)
class _Promotion:
    """One chunk on its way up; its slot is reserved until the last I/O on it is over.

    It gets one when a tier is known to have it: what is only asked for evicts nothing.
    """

    space: KeySpace
    request: Request
    """The first one that asked for it."""
    key: bytes
    size_class: SizeClass
    shape: ChunkShape
    below: LowerTier
    began_ns: int
    patience_ns: int
    """How long that request waits."""
    slot_id: int | None = None
    generation: int = 0
    probing: bool = False
    probe_until_ns: int = 0
    is_queued: bool = False
    given_up: bool = False
    """It took too long: what comes changes nothing any more, but that its slot is free then."""


@dataclass(slots=True)
class _Batch:
    """Promotions of one job."""

    below: LowerTier
    promotions: list[_Promotion]
    began_ns: int


@dataclass(slots=True)
class _Clear:
    """A clearing of one tier. It begins when the cascades in `behind` are over, which would undo it."""

    below: LowerTier
    job: ClearJob
    on_ended: Callable[[ClearResult], None]
    behind: set[int]
    is_begun: bool = False


class Below:
    """Moves chunks between the pool and the tiers below it."""

    def __init__(
        self,
        books: Books,
        tiers: Sequence[tuple[SecondaryTier, TierRules]],
        shape_of: ShapeOf,
    ) -> None:
        self.tiers = [LowerTier(tier, rules, index) for index, (tier, rules) in enumerate(tiers)]
        self._books = books
        self._shape_of = shape_of
        self._job_ids = count(1)
        self._cascades: dict[int, _Cascade] = {}
        self._batches: dict[int, _Batch] = {}
        self._clears: dict[int, _Clear] = {}
        self._promotions: dict[tuple[KeySpace, bytes], _Promotion] = {}
        self._promoting_bytes = 0
        self._queue: deque[_Promotion] = deque()
        """Promotions that wait for a slot, also such as have ended meanwhile."""
        self._now_ns = 0
        self._probing: dict[tuple[KeySpace, bytes], _Promotion] = {}
        """Those of them that somebody waits to hear of."""
        self._late: dict[int, _Promotion] = {}
        """Given up, with a slot that the tier may still write, by that slot."""
        self._late_bytes = 0
        self._uses: deque[tuple[KeySpace, Request, Sequence[bytes]]] = deque()
        self._num_uses = 0
        self._cold_tiers = [below for below in self.tiers if below.rules.cascade is CascadeWhen.COLD]
        self._num_published: Counter[SizeClass] = Counter()
        """Since a look was taken at what would be evicted."""
        self._look_after: dict[SizeClass, int] = {}
        """How many it may become; 1 where none was taken yet."""
        self._to_look_at: set[SizeClass] = set()
        self.promotion_times: deque[tuple[str, float]] = deque(maxlen=MAX_TIMES)
        """(tier, seconds from the lookup to the pool), until the metrics take them."""

    # Down

    def published(self, chunk: Chunk, held_by: LowerTier | None = None) -> None:
        """Queue a chunk for every tier that is to have it and does not."""
        if held_by is not None:
            chunk.below |= held_by.bit
        else:
            chunk.counted = chunk.user
        for below in self.tiers:
            if below.rules.cascade is CascadeWhen.PUBLISHED:
                self._offer(below, chunk)
        if self._cold_tiers:
            size_class = chunk.size_class
            self._num_published[size_class] += 1
            if self._num_published[size_class] >= self._look_after.get(size_class, 1):
                self._to_look_at.add(size_class)

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

    def _offer_cold(self) -> None:
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

    def pump(self) -> bool:
        """Hand the tiers what they may take now, a slice of it; True if more could go at once."""
        left = SLICE_CHUNKS - self._tell_uses(SLICE_CHUNKS)
        self._offer_cold()
        for below in self.tiers:
            while below.waiting and left > 0:
                chunks, looked_at = self._next_batch(below, left)
                left -= looked_at
                if not chunks:
                    if looked_at:
                        continue
                    break
                if not self._submit_store(below, chunks):
                    break
        return left <= 0 and self.is_behind

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
        if below.was_cleared(chunk):
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
        self._cascades[job.id] = _Cascade(below, chunks, num_bytes)
        return True

    def _stored(self, cascade: _Cascade, job: JobResult) -> None:
        below = cascade.below
        below.running_bytes -= cascade.num_bytes
        stored: dict[KeySpace, list[bytes]] = {}
        for chunk, outcome in zip(cascade.chunks, job.outcomes, strict=True):
            below.counts[f"cascade:{outcome.name.lower()}"] += 1
            if outcome is Outcome.DONE:
                below.counts["cascade_bytes"] += chunk.size_class.slot_bytes
                chunk.below |= below.bit
                stored.setdefault(chunk.space, []).append(chunk.key)
            elif outcome is Outcome.FAILED:
                self._may_offer_again(below, [chunk])
            elif outcome is Outcome.CORRUPT and not chunk.dropped:
                self._books.counts["checksum:corrupt"] += 1
                self._books.primary.condemn(chunk, owner=DAEMON)
        for space, keys in stored.items():
            self._books.events.record("stored", space.name, "cascade", keys, below.rules.name)
        self._books.primary.unpin(cascade.chunks)

    @staticmethod
    def _may_offer_again(below: LowerTier, chunks: Sequence[Chunk]) -> None:
        """Note that a tier has not had its say: a later use, or a look at what is cold, offers them again."""
        for chunk in chunks:
            chunk.offered &= ~below.bit

    # Up

    def find(
        self, space: KeySpace, request: Request, keys: Sequence[bytes], max_probes: int
    ) -> dict[bytes, LowerTier]:
        """Say which of these keys, which the pool lacks, may come up for the request, and from where.

        At most `max_probes` of them, the first ones, are such that only a probe tells.
        """
        found: dict[bytes, LowerTier] = {}
        left = keys
        for below in self.tiers:
            if not left:
                break
            if not request.may_load_from(below.tier.medium, below.tier.locality):
                continue
            known = below.tier.lookup(space.name, left)
            for key, presence in zip(left, known, strict=True):
                if presence is Presence.YES:
                    found[key] = below
                elif max_probes > 0 and _may_have(below, presence):
                    found[key] = below
                    max_probes -= 1
            left = [key for key in left if key not in found]
        return found

    def promote(
        self,
        space: KeySpace,
        request: Request,
        wanted: Sequence[tuple[bytes, SizeClass, LowerTier]],
        now_ns: int,
        patience_ns: int,
    ) -> list[bytes]:
        """Begin to bring chunks up, the leading ones where there is no room for all. Returns their keys.

        From now on they are PENDING for everybody. What a tier would not get to within `patience_ns`, at the
        pace of its last loads, is not begun.
        """
        self._now_ns = now_ns
        begun: list[_Promotion] = []
        for key, size_class, below in wanted:
            shape = self._shape_of(space, key)
            if shape is None:
                continue
            promotion = _Promotion(space, request, key, size_class, shape, below, now_ns, patience_ns)
            space.writers[key] = space.writers.get(key, 0) + 1
            self._promotions[space, key] = promotion
            begun.append(promotion)
        self._submit(begun, request if request.holds_chunks else None)
        self._go_on()
        return [
            promotion.key for promotion in begun if self._promotions.get((space, promotion.key)) is promotion
        ]

    def _submit(self, promotions: Sequence[_Promotion], protected: object | None = None) -> None:
        """Give each promotion's tier its load, or the probe before it."""
        # Sorted first: one that is refused moves on to the next tier, and must not be met there again.
        by_tier: dict[LowerTier, list[_Promotion]] = {}
        for promotion in promotions:
            by_tier.setdefault(promotion.below, []).append(promotion)
        for below, own in by_tier.items():
            known = below.tier.lookup(own[0].space.name, [promotion.key for promotion in own])
            there = [promotion for promotion, has in zip(own, known, strict=True) if has is Presence.YES]
            for promotion in there:
                promotion.probing = False
                self._probing.pop((promotion.space, promotion.key), None)
            for batch in _batches(self._with_slots(there, protected)):
                self._submit_batch(below, batch, JobKind.LOAD)
            unknown = [
                promotion for promotion, has in zip(own, known, strict=True) if has is not Presence.YES
            ]
            for promotion in unknown:
                promotion.probing = True
                if not promotion.probe_until_ns:
                    promotion.probe_until_ns = promotion.began_ns + below.rules.probe_wait_ns
                    self._probing[promotion.space, promotion.key] = promotion
            for batch in _batches(unknown):
                self._submit_batch(below, batch, JobKind.PROBE)

    def _with_slots(self, promotions: Sequence[_Promotion], protected: object | None) -> list[_Promotion]:
        """Reserve slots for chunks that are known to be there, the leading ones; the others wait or end."""
        max_bytes = int(self._books.primary.slabs.pool_bytes * self._books.limits.promotion_share)
        by_class: dict[SizeClass, list[_Promotion]] = {}
        for promotion in promotions:
            if promotion.slot_id is None:
                by_class.setdefault(promotion.size_class, []).append(promotion)
        if by_class:
            self._books.unpin_all()
        for size_class, own in by_class.items():
            room = max(max_bytes - self._promoting_bytes, 0) // size_class.slot_bytes
            # One at a time may be larger than the share: in a small pool no chunk would ever come up.
            wanted = own[: room if room or self._promoting_bytes else 1]
            self._reserve(size_class, wanted, protected)
            for promotion in own[len(wanted) :]:
                promotion.is_queued = self._may_wait(promotion)
                if promotion.is_queued:
                    promotion.below.queued_promotion_bytes += size_class.slot_bytes
                    self._queue.append(promotion)
        for promotion in promotions:
            if promotion.slot_id is None and not promotion.is_queued:
                self._end(promotion, "no_slot")
        return [promotion for promotion in promotions if promotion.slot_id is not None]

    def _reserve(
        self, size_class: SizeClass, promotions: Sequence[_Promotion], protected: object | None
    ) -> None:
        if not promotions:
            return
        reserved = self._books.primary.reserve(
            size_class, len(promotions), DAEMON, partial(_chunk_ids, promotions), protected
        )
        slots = zip(reserved.slot_ids, reserved.generations, strict=True)
        for promotion, (slot_id, generation) in zip(promotions, slots, strict=False):
            promotion.slot_id, promotion.generation = slot_id, generation
            self._promoting_bytes += size_class.slot_bytes

    def _may_wait(self, promotion: _Promotion) -> bool:
        """Tell whether it is likely to be its turn while somebody waits."""
        if self._promoting_bytes <= self._late_bytes:
            return False  # what holds the share hangs
        below = promotion.below
        ahead_ns = (below.queued_promotion_bytes + self._promoting_bytes) * below.ns_per_byte
        return len(self._queue) < MAX_QUEUED_PROMOTIONS and ahead_ns <= promotion.patience_ns

    def _go_on(self) -> None:
        """Begin with promotions that waited for a slot, in their order, as far as there is room now."""
        # More than once: what a tier refuses makes room at once.
        while ready := self._next_in_queue():
            self._submit(ready)

    def _next_in_queue(self) -> list[_Promotion]:
        max_bytes = int(self._books.primary.slabs.pool_bytes * self._books.limits.promotion_share)
        ready: list[_Promotion] = []
        num_bytes = self._promoting_bytes
        while self._queue:
            promotion = self._queue[0]
            is_over = self._promotions.get((promotion.space, promotion.key)) is not promotion
            if not is_over and num_bytes and num_bytes + promotion.size_class.slot_bytes > max_bytes:
                break
            self._queue.popleft()
            if is_over:
                continue
            self._take_off_queue(promotion)
            if not self._books.is_awaited(promotion.space, promotion.key):
                self._end(promotion, "late")
                continue
            num_bytes += promotion.size_class.slot_bytes
            ready.append(promotion)
        return ready

    def _take_off_queue(self, promotion: _Promotion) -> None:
        if promotion.is_queued:
            promotion.is_queued = False
            promotion.below.queued_promotion_bytes -= promotion.size_class.slot_bytes

    def _submit_batch(self, below: LowerTier, batch: list[_Promotion], kind: JobKind) -> None:
        job = TierJob(next(self._job_ids), kind, tuple(map(self._named, batch)))
        self._batches[job.id] = _Batch(below, batch, self._now_ns)
        submit = below.tier.submit_load if kind is JobKind.LOAD else below.tier.submit_probe
        if not submit(job):
            del self._batches[job.id]
            for promotion in batch:
                below.counts["promotion:refused"] += 1
                self._try_next(promotion)

    def _named(self, promotion: _Promotion) -> TierChunk:
        shape = promotion.shape
        return TierChunk(
            promotion.space.name,
            promotion.key,
            shape.geometry,
            shape.part_bytes,
            shape.num_parts,
            0 if promotion.slot_id is None else slot_offset(promotion.slot_id),
        )

    def _loaded(self, batch: _Batch, job: JobResult, now_ns: int) -> None:
        brought = sum(
            promotion.size_class.slot_bytes
            for promotion, outcome in zip(batch.promotions, job.outcomes, strict=True)
            if outcome is Outcome.DONE and not promotion.probing
        )
        batch.below.note_load(brought, batch.began_ns, now_ns)
        arrived: dict[tuple[KeySpace, Request], list[bytes]] = {}
        found: list[_Promotion] = []
        for index, (promotion, outcome) in enumerate(zip(batch.promotions, job.outcomes, strict=True)):
            if promotion.given_up:
                self._free_late(promotion)
                continue
            if promotion.probing:
                if outcome is Outcome.DONE:
                    promotion.probing = False
                    self._probing.pop((promotion.space, promotion.key), None)
                    found.append(promotion)
                else:
                    self._try_next(promotion)
                continue
            batch.below.counts[f"promotion:{outcome.name.lower()}"] += 1
            if outcome is not Outcome.DONE:
                self._try_next(promotion)
                continue
            batch.below.counts["promotion_bytes"] += promotion.size_class.slot_bytes
            self.promotion_times.append((batch.below.rules.name, (now_ns - promotion.began_ns) / 1e9))
            if self._arrived(promotion, job.checksums[index]):
                arrived.setdefault((promotion.space, promotion.request), []).append(promotion.key)
        for (space, request), keys in arrived.items():
            self._books.events.record("stored", space.name, "promotion", keys)
            self.used(space, request, keys)
        for some in _batches(self._with_slots(found, None)):
            self._submit_batch(batch.below, some, JobKind.LOAD)

    def _arrived(self, promotion: _Promotion, checksums: Sequence[int]) -> bool:
        """Publish what a tier has brought; False if the pool has got it otherwise by now."""
        space, key = promotion.space, promotion.key
        assert promotion.slot_id is not None, f"{key!r} arrived without a slot"
        self._take_out(promotion)
        primary = self._books.primary
        if key in space.chunks:
            primary.free_reserved(promotion.size_class, [promotion.slot_id])
            return False
        stamp = promotion.request.stamp_of(key)
        if stamp is None:
            stamp = primary.issue_stamps(1)
        chunk = primary.publish(
            space,
            key,
            promotion.slot_id,
            promotion.generation,
            promotion.size_class,
            checksums,
            stamp,
            None,
        )
        self._books.resolve(space, key, chunk)
        self.published(chunk, held_by=promotion.below)
        return True

    def _try_next(self, promotion: _Promotion) -> None:
        """Ask the tiers after this one; where none has it, give the slot back and say so."""
        for below in self.tiers[promotion.below.index + 1 :]:
            if _may_have(below, below.tier.lookup(promotion.space.name, (promotion.key,))[0]):
                promotion.below = below
                self._submit([promotion])
                return
        self._end(promotion)

    def _end(self, promotion: _Promotion, why: str = "") -> None:
        """Give up: free the slot, if there is one, and tell whoever waits."""
        if why:
            promotion.below.counts[f"promotion:{why}"] += 1
        self._take_out(promotion)
        if promotion.slot_id is not None:
            self._books.primary.free_reserved(promotion.size_class, [promotion.slot_id])
        self._tell_miss(promotion)

    def _give_up(self, promotion: _Promotion) -> None:
        """Make it as if nobody had asked, but for the slot: it is the tier's until the I/O is over."""
        promotion.given_up = True
        promotion.below.counts["promotion:late"] += 1
        self._take_out(promotion)
        if promotion.slot_id is not None:
            self._promoting_bytes += promotion.size_class.slot_bytes
            self._late_bytes += promotion.size_class.slot_bytes
            self._late[promotion.slot_id] = promotion
        self._tell_miss(promotion)

    def _free_late(self, promotion: _Promotion) -> None:
        if promotion.slot_id is not None:
            del self._late[promotion.slot_id]
            self._promoting_bytes -= promotion.size_class.slot_bytes
            self._late_bytes -= promotion.size_class.slot_bytes
            self._books.primary.free_reserved(promotion.size_class, [promotion.slot_id])

    def _tell_miss(self, promotion: _Promotion) -> None:
        if promotion.key not in promotion.space.writers and promotion.key not in promotion.space.chunks:
            self._books.resolve(promotion.space, promotion.key, None)

    def _take_out(self, promotion: _Promotion) -> None:
        space, key = promotion.space, promotion.key
        del self._promotions[space, key]
        self._probing.pop((space, key), None)
        self._take_off_queue(promotion)
        if promotion.slot_id is not None:
            self._promoting_bytes -= promotion.size_class.slot_bytes
        space.writers[key] -= 1
        if not space.writers[key]:
            del space.writers[key]

    # Both

    def collect(self, now_ns: int) -> None:
        """Take the ends of jobs, and what the tiers have let go of."""
        self._now_ns = now_ns
        for below in self.tiers:
            for removal in below.tier.get_removed():
                self._removed(below, removal)
            for job in below.tier.get_finished():
                cascade = self._cascades.pop(job.job_id, None)
                if cascade is not None:
                    self._stored(cascade, job)
                    self._no_longer_behind(job.job_id)
                    continue
                batch = self._batches.pop(job.job_id, None)
                assert batch is not None, f"{below.rules.name}: job {job.job_id} is not under way"
                self._loaded(batch, job, now_ns)
            for result in below.tier.get_cleared():
                self._clears.pop(result.job_id).on_ended(result)
        self._go_on()

    def clear(
        self,
        below: LowerTier,
        namespace: str,
        tenant: str | None,
        on_ended: Callable[[ClearResult], None],
        *,
        others: bool = False,
    ) -> None:
        """Have a tier remove chunks; `on_ended` is called once, within `collect` or at once.

        What waits to go down does not any more; what comes later may be removed too, until it begins.
        """
        job = ClearJob(next(self._job_ids), namespace, tenant, others)
        behind = {
            job_id
            for job_id, cascade in self._cascades.items()
            if cascade.below is below and any(job.covers(chunk.space.name) for chunk in cascade.chunks)
        }
        if below.waiting:
            below.cleared.append((below.num_taken + len(below.waiting), job))
        self._clears[job.id] = _Clear(below, job, on_ended, behind)
        self._begin_clear(self._clears[job.id])

    def may_clear(self, below: LowerTier) -> bool:
        """Tell whether one more clearing may wait for this tier."""
        return len(self._clears) < MAX_CLEARS and len(below.cleared) < MAX_CLEARS

    def _begin_clear(self, clear: _Clear) -> None:
        if clear.behind or clear.is_begun:
            return
        clear.is_begun = True
        if not clear.below.tier.submit_clear(clear.job):
            del self._clears[clear.job.id]
            clear.on_ended(ClearResult(clear.job.id, 0, 0, clear.below.tier.stats().num_chunks))

    def _no_longer_behind(self, job_id: int) -> None:
        for clear in list(self._clears.values()):
            clear.behind.discard(job_id)
            self._begin_clear(clear)

    def num_coming(self, covers: Callable[[SpaceName], bool]) -> int:
        """Count the chunks of some spaces that are on their way up."""
        return sum(covers(space.name) for space, _ in self._promotions)

    def _removed(self, below: LowerTier, removal: Removal) -> None:
        space = self._books.primary.spaces.get(removal.space)
        if space is not None:
            for key in removal.keys:
                if (chunk := space.chunks.get(key)) is not None:
                    chunk.below &= ~below.bit
        below.counts[f"removed:{removal.reason}"] += len(removal.keys)
        self._books.events.record("removed", removal.space, removal.reason, removal.keys, below.rules.name)

    def used(self, space: KeySpace, request: Request, keys: Sequence[bytes]) -> None:
        """Note a request's uses of chunks, also of those that the pool has.

        The tiers hear of them when there is time.
        """
        if not self.tiers or not keys:
            return
        self._uses.append((space, request, keys))
        self._num_uses += len(keys)
        while self._num_uses > MAX_UNTOLD_USES:
            self._num_uses -= len(self._uses.popleft()[2])

    def _tell_uses(self, max_keys: int) -> int:
        """Tell the tiers of about `max_keys` uses; how many were told."""
        told = 0
        while self._uses and told < max_keys:
            space, request, keys = self._uses.popleft()
            piece, rest = keys[: max_keys - told], keys[max_keys - told :]
            if rest:
                self._uses.appendleft((space, request, rest))
            told += len(piece)
            self._count_uses(space, request, piece)
            stamped = [(key, stamp) for key in piece if (stamp := request.stamp_of(key)) is not None]
            if stamped:
                for below in self.tiers:
                    below.tier.touch(space.name, *zip(*stamped, strict=True))
        self._num_uses -= told
        return told

    def _count_uses(self, space: KeySpace, request: Request, keys: Sequence[bytes]) -> None:
        """Queue chunks that have been used often enough by now."""
        for key in keys:
            chunk = space.chunks.get(key)
            if chunk is None or chunk.counted is request:
                continue
            chunk.counted = request
            chunk.uses += 1
            for below in self.tiers:
                if below.rules.cascade is CascadeWhen.USED and chunk.uses >= below.rules.min_uses:
                    self._offer(below, chunk)

    @property
    def probes_end_ns(self) -> int | None:
        """When `end_probes` has something to do; None while nobody waits for a probe."""
        return min((promotion.probe_until_ns for promotion in self._probing.values()), default=None)

    def end_waits(self, now_ns: int) -> None:
        """End promotions that wait for a slot and that nobody waits for any more."""
        self._now_ns = now_ns
        for promotion in [p for p in self._queue if p.is_queued]:
            if not self._books.is_awaited(promotion.space, promotion.key):
                self._end(promotion, "late")
        self._go_on()

    def end_probes(self, now_ns: int) -> None:
        """Let those go on computing who have waited long enough to hear whether a chunk is there.

        From then on it is as if nobody had asked: it can be stored, and be asked for again.
        """
        for promotion in list(self._probing.values()):
            if promotion.probe_until_ns <= now_ns:
                promotion.given_up = True
                self._end(promotion, "probe_late")

    def end_loads(self, now_ns: int) -> None:
        """Give up loads that nobody has the patience for: the chunks can be stored and asked for again."""
        latest_ns = now_ns - self._books.limits.max_promotion_ns
        began = takewhile(lambda promotion: promotion.began_ns <= latest_ns, self._promotions.values())
        for promotion in [promotion for promotion in began if not promotion.probing]:
            self._give_up(promotion)

    @property
    def is_behind(self) -> bool:
        """Whether `pump` may have something to hand out."""
        return bool(self._uses or self._to_look_at) or any(below.waiting for below in self.tiers)

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or under way."""
        return bool(self._cascades or self._batches or self._queue) or any(b.waiting for b in self.tiers)

    # For `Core.check_integrity`

    def pins(self) -> Iterator[Chunk]:
        """Chunks that cascades pin, once per pin."""
        for cascade in self._cascades.values():
            yield from cascade.chunks

    def coming(self) -> Iterator[tuple[KeySpace, bytes, SizeClass | None]]:
        """What promotions are to bring, and the class of the slot that is reserved for it, if one is."""
        for promotion in self._promotions.values():
            has_slot = promotion.slot_id is not None
            yield promotion.space, promotion.key, promotion.size_class if has_slot else None

    def late(self) -> Iterator[SizeClass]:
        """Classes of the slots that are reserved for what was given up."""
        for promotion in self._late.values():
            yield promotion.size_class

    def check_integrity(self) -> None:
        """Assert that the sums are right."""
        slots = [p.size_class.slot_bytes for p in self._promotions.values() if p.slot_id is not None]
        slots += [size_class.slot_bytes for size_class in self.late()]
        assert self._promoting_bytes == sum(slots), (self._promoting_bytes, slots)
        under_way = {id(p) for batch in self._batches.values() for p in batch.promotions if not p.given_up}
        queued = {id(p) for p in self._queue if p.is_queued}
        assert not under_way & queued, "a promotion waits and is under way"
        assert under_way | queued == {id(p) for p in self._promotions.values()}, "a promotion without a job"
        assert not queued or self._promoting_bytes, "promotions wait for nothing"
        for below in self.tiers:
            assert below.waiting_bytes == sum(chunk.size_class.slot_bytes for chunk in below.waiting)
            queued_bytes = sum(
                p.size_class.slot_bytes for p in self._queue if p.is_queued and p.below is below
            )
            assert below.queued_promotion_bytes == queued_bytes, (below.rules.name, queued_bytes)
            running = sum(c.num_bytes for c in self._cascades.values() if c.below is below)
            assert below.running_bytes == running, (below.rules.name, below.running_bytes, running)


def _chunk_ids(promotions: Sequence[_Promotion]) -> list[ChunkId]:
    return [promotion.space.chunk_id(promotion.key) for promotion in promotions]


def _may_have(below: LowerTier, presence: Presence) -> bool:
    return presence is Presence.YES or (presence is Presence.UNKNOWN and below.tier.is_shared)


def _batches(promotions: Sequence[_Promotion]) -> Iterator[list[_Promotion]]:
    """Cut promotions into jobs, in their order."""
    batch: list[_Promotion] = []
    num_bytes = 0
    for promotion in promotions:
        size = promotion.size_class.slot_bytes
        if batch and (num_bytes + size > MAX_JOB_BYTES or len(batch) >= MAX_JOB_CHUNKS):
            yield batch
            batch, num_bytes = [], 0
        batch.append(promotion)
        num_bytes += size
    if batch:
        yield batch
