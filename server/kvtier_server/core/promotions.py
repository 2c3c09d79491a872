"""What comes up: which chunks are on their way into the pool, from which tier, and who gave up on them.

Owns the slots that are reserved for tiers to write. Who waits for a promotion is in the books, as for an
unfinished store.

    missing ──> probed, queued, if need be ──> slot reserved, read by the tier ──> published, pinned
                      └─ missing, corrupt, failed: the next tier that may have it, else MISS ─┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count, islice, takewhile

from kvtier_ops.layout import slot_offset
from kvtier_ops.namespace import SpaceName
from kvtier_server.core.books import Books
from kvtier_server.core.events import STORED
from kvtier_server.core.lower_tiers import (
    DAEMON,
    MAX_JOB_BYTES,
    MAX_JOB_CHUNKS,
    ChunkShape,
    LowerTier,
    ShapeOf,
)
from kvtier_server.core.namespaces import GROUP_TAIL_BYTES
from kvtier_server.core.requests import Request
from kvtier_server.policies.base import ChunkId
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.primary.size_classes import SizeClass
from kvtier_server.secondary.base import JobKind, JobResult, Outcome, Presence, TierChunk, TierJob

MAX_PROBES = 256
"""Chunks of one request that are looked for where nobody knows: a cold prompt is not worth thousands."""

MAX_QUEUED_PROMOTIONS = 65_536
"""Chunks that wait for a slot to come up into; what comes beyond it is a miss."""

MAX_QUEUED_UNPACED = 8_192
"""Of them, chunks of tiers that have loaded nothing yet: nobody knows how many they can bring in time."""

SLICE_ENDS = 512
"""Promotions that are given up in one go, at 4 us each."""

SLICE_PROMOTIONS = 1_024
"""Promotions that get a slot in one go; what a long prompt has beyond them does so behind other calls."""

MAX_TIMES = 4_096
"""Times of promotions kept until somebody takes them."""

PublishedListener = Callable[[Chunk, LowerTier], None]
UsedListener = Callable[[KeySpace, Request, Sequence[bytes]], None]


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


class Promotions:
    """Chunks on their way from the tiers below into the pool.

    `on_published` hears of a chunk that a tier has brought, `on_used` of the request that wanted it.
    """

    def __init__(
        self,
        books: Books,
        tiers: Sequence[LowerTier],
        shape_of: ShapeOf,
        job_ids: Iterator[int],
        on_published: PublishedListener,
        on_used: UsedListener,
    ) -> None:
        self._tiers = tiers
        self._books = books
        self._shape_of = shape_of
        self._job_ids = job_ids
        self._on_published = on_published
        self._on_used = on_used
        self._batches: dict[int, _Batch] = {}
        self._promotions: dict[tuple[KeySpace, bytes], _Promotion] = {}
        self._promoting_bytes = 0
        self._queue: deque[_Promotion] = deque()
        """Promotions that wait for a slot, also such as have ended meanwhile."""
        self._now_ns = 0
        self._probe_ends: list[tuple[int, int, _Promotion]] = []
        """Heap of (end, number, promotion): until when somebody waits to hear of it, or did and has heard."""
        self._probe_numbers = count()
        self._late: dict[int, _Promotion] = {}
        """Given up, with a slot that the tier may still write, by that slot."""
        self._late_bytes = 0
        self.times: deque[tuple[str, float]] = deque(maxlen=MAX_TIMES)
        """(tier, seconds from the lookup to the pool), until the metrics take them."""

    # Begin

    def find(
        self, space: KeySpace, request: Request, keys: Sequence[bytes], max_probes: int
    ) -> dict[bytes, LowerTier]:
        """Say which of these keys, which the pool lacks, may come up for the request, and from where.

        At most `max_probes` of them, the first ones, are such that only a probe tells.
        """
        found: dict[bytes, LowerTier] = {}
        left = keys
        for below in self._tiers:
            if not left:
                break
            if not request.may_load_from(below.tier.medium, below.tier.locality):
                continue
            if below.is_being_cleared(space.name):
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

    def begin(
        self,
        space: KeySpace,
        request: Request,
        wanted: Sequence[tuple[bytes, SizeClass, LowerTier]],
        now_ns: int,
        patience_ns: int,
    ) -> list[bytes]:
        """Begin to bring chunks up, the leading ones where there is no room for all. Returns their keys.

        Of many, those beyond a slice wait for `go_on`; somebody must be waiting for them by then.
        From now on they are PENDING for everybody. What a tier would not get to within `patience_ns`, at the
        pace of its last loads, is not begun.
        """
        self._now_ns = now_ns
        most = self._most_to_begin(wanted, patience_ns)
        for _, _, below in wanted[most:]:
            below.counts["promotion:no_slot"] += 1
        begun: list[_Promotion] = []
        shapes: dict[bytes, ChunkShape | None] = {}  # by the key's tail, which names the group
        for key, size_class, below in wanted[:most]:
            tail = key[-GROUP_TAIL_BYTES:]
            if tail not in shapes:
                shapes[tail] = self._shape_of(space, key)
            shape = shapes[tail]
            if shape is None:
                continue
            promotion = _Promotion(space, request, key, size_class, shape, below, now_ns, patience_ns)
            space.writers[key] = space.writers.get(key, 0) + 1
            self._promotions[space, key] = promotion
            begun.append(promotion)
        self._submit(begun, request if request.holds_chunks else None)
        if not self._moving_bytes:
            for promotion in [promotion for promotion in begun if promotion.is_queued]:
                self._end(promotion, "no_slot")  # nothing is under way that would make room
        return [
            promotion.key for promotion in begun if self._promotions.get((space, promotion.key)) is promotion
        ]

    def _most_to_begin(self, wanted: Sequence[tuple[bytes, SizeClass, LowerTier]], patience_ns: int) -> int:
        """Tell how many may be begun at most, so that of a full queue a long prompt is told at once.

        Exact is `_with_slots`; what it refuses has cost several times as much by then.
        """
        if not wanted:
            return 0
        slot_bytes = min(size_class.slot_bytes for size_class in {size_class for _, size_class, _ in wanted})
        most = MAX_PROBES + 1 + max(self._max_bytes - self._moving_bytes, 0) // slot_bytes
        for below in {below for _, _, below in wanted}:
            queued = max(self._max_queued(below) - len(self._queue), 0)
            if below.ns_per_byte:
                in_time = patience_ns / below.ns_per_byte - below.queued_promotion_bytes - self._moving_bytes
                queued = min(queued, max(int(in_time), 0) // slot_bytes + 1)
            most += queued
        return most

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
            for batch in _batches(self._with_slots(there, protected)):
                self._submit_batch(below, batch, JobKind.LOAD)
            unknown = [
                promotion for promotion, has in zip(own, known, strict=True) if has is not Presence.YES
            ]
            for promotion in unknown:
                promotion.probing = True
                promotion.probe_until_ns = self._now_ns + below.rules.probe_wait_ns
                entry = (promotion.probe_until_ns, next(self._probe_numbers), promotion)
                heappush(self._probe_ends, entry)
            for batch in _batches(unknown):
                self._submit_batch(below, batch, JobKind.PROBE)

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

    # Slots, and turns

    def _with_slots(self, promotions: Sequence[_Promotion], protected: object | None) -> list[_Promotion]:
        """Reserve slots for chunks that are known to be there, the leading ones; the others wait or end.

        At most a slice of them, though there be room for more: the others are the first that wait.
        """
        by_class: dict[SizeClass, list[_Promotion]] = {}
        for promotion in promotions:
            if promotion.slot_id is None:
                by_class.setdefault(promotion.size_class, []).append(promotion)
        if by_class:
            self._books.unpin_all()
        left = SLICE_PROMOTIONS
        for size_class, own in by_class.items():
            moving_bytes = self._moving_bytes
            room = max(self._max_bytes - moving_bytes, 0) // size_class.slot_bytes
            # One at a time may be larger than the share: in a small pool no chunk would ever come up.
            room = room if room or moving_bytes else 1
            unclaimed = (
                self._max_bytes - moving_bytes - sum(tier.queued_promotion_bytes for tier in self._tiers)
            )
            wanted = own[: min(room, left)]
            left -= len(wanted)
            self._reserve(size_class, wanted, protected)
            for index in range(len(wanted), len(own)):
                if (index + 1) * size_class.slot_bytes <= unclaimed or self._may_wait(own[index]):
                    self._put_in_queue(own[index])
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
        below = promotion.below
        ahead_ns = (below.queued_promotion_bytes + self._moving_bytes) * below.ns_per_byte
        return len(self._queue) < self._max_queued(below) and ahead_ns <= promotion.patience_ns

    def _max_queued(self, below: LowerTier) -> int:
        return MAX_QUEUED_PROMOTIONS if below.ns_per_byte else MAX_QUEUED_UNPACED

    def _put_in_queue(self, promotion: _Promotion) -> None:
        promotion.is_queued = True
        promotion.below.queued_promotion_bytes += promotion.size_class.slot_bytes
        self._queue.append(promotion)

    @property
    def _max_bytes(self) -> int:
        """Slots that promotions may have at once, in bytes."""
        return int(self._books.primary.slabs.pool_bytes * self._books.limits.promotion_share)

    @property
    def _moving_bytes(self) -> int:
        """Slots they have. What hangs is not counted: other tiers have their turn."""
        return self._promoting_bytes - self._late_bytes

    def _may_go_on(self, promotion: _Promotion, more_bytes: int = 0) -> bool:
        """Tell whether the first in the queue has room beside what has slots, and `more_bytes`."""
        num_bytes = self._moving_bytes + more_bytes
        has_room = not num_bytes or num_bytes + promotion.size_class.slot_bytes <= self._max_bytes
        return has_room or not promotion.is_queued

    @property
    def is_behind(self) -> bool:
        """Whether `go_on` has something to do."""
        return bool(self._books.unawaited) or self._has_next

    @property
    def _has_next(self) -> bool:
        """Whether the first in the queue can be taken out of it."""
        return bool(self._queue) and self._may_go_on(self._queue[0])

    def go_on(self) -> None:
        """Begin with promotions that waited for a slot, in their order, as far as there is room now.

        What nobody waits for any more ends. A slice of them; `is_behind` says whether more could go at once.
        """
        left = self._end_unawaited(SLICE_PROMOTIONS)
        # More than once: what a tier refuses makes room at once.
        while left > 0 and self._has_next:
            ready, left = self._next_in_queue(left)
            request = ready[0].request if ready else None
            is_protected = request is not None and request.holds_chunks
            is_protected = is_protected and all(promotion.request is request for promotion in ready)
            self._submit(ready, request if is_protected else None)

    def _next_in_queue(self, left: int) -> tuple[list[_Promotion], int]:
        """Take out what has room, at most `left`; returns it, and how many were left to look at."""
        ready: list[_Promotion] = []
        num_bytes = 0
        while self._queue and left > 0 and self._may_go_on(self._queue[0], num_bytes):
            promotion = self._queue.popleft()
            left -= 1
            if not promotion.is_queued:
                continue  # it has ended meanwhile
            self._take_off_queue(promotion)
            if not self._books.is_awaited(promotion.space, promotion.key):
                self._end(promotion, "late")
                continue
            num_bytes += promotion.size_class.slot_bytes
            ready.append(promotion)
        return ready, left

    def _take_off_queue(self, promotion: _Promotion) -> None:
        if promotion.is_queued:
            promotion.is_queued = False
            promotion.below.queued_promotion_bytes -= promotion.size_class.slot_bytes

    # End

    def take_end(self, below: LowerTier, job: JobResult, now_ns: int) -> None:
        """Take the end of a load or a probe. `go_on` is to be called when all ends are taken."""
        self._now_ns = now_ns
        batch = self._batches.pop(job.job_id, None)
        assert batch is not None, f"{below.rules.name}: job {job.job_id} is not under way"
        self._loaded(batch, job, now_ns)

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
                    found.append(promotion)
                else:
                    self._try_next(promotion)
                continue
            batch.below.counts[f"promotion:{outcome.name.lower()}"] += 1
            if outcome is not Outcome.DONE:
                self._try_next(promotion)
                continue
            batch.below.counts["promotion_bytes"] += promotion.size_class.slot_bytes
            self.times.append((batch.below.rules.name, (now_ns - promotion.began_ns) / 1e9))
            if self._arrived(promotion, job.checksums[index]):
                arrived.setdefault((promotion.space, promotion.request), []).append(promotion.key)
        for (space, request), keys in arrived.items():
            self._on_used(space, request, keys)
        for some in _batches(self._with_slots(found, None)):
            self._submit_batch(batch.below, some, JobKind.LOAD)
        self._look_again(found)

    def _arrived(self, promotion: _Promotion, checksums: Sequence[int]) -> bool:
        """Publish what a tier has brought; False if the pool has got it otherwise by now."""
        space, key = promotion.space, promotion.key
        assert promotion.slot_id is not None, f"{key.hex()} arrived without a slot"
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
        self._books.events.record(STORED, space.name, "promotion", (key,))
        self._books.resolve(space, key, chunk)
        self._on_published(chunk, promotion.below)
        return True

    def _try_next(self, promotion: _Promotion) -> None:
        """Ask the tiers after this one; where none has it, give the slot back and say so."""
        for below in self._tiers[promotion.below.index + 1 :]:
            space = promotion.space.name
            if not below.is_being_cleared(space) and _may_have(
                below, below.tier.lookup(space, (promotion.key,))[0]
            ):
                promotion.below = below
                self._submit([promotion])
                self._look_again([promotion])
                return
        self._end(promotion)

    def _look_again(self, promotions: Sequence[_Promotion]) -> None:
        """See to it that those do not stay in the queue whose waiters had gone before they came into it."""
        names = [(promotion.space, promotion.key) for promotion in promotions if promotion.is_queued]
        self._books.unawaited += [name for name in names if not self._books.is_awaited(*name)]

    def _end(self, promotion: _Promotion, why: str = "") -> None:
        """Give up: free the slot, if there is one, and tell whoever waits."""
        if why:
            promotion.below.counts[f"promotion:{why}"] += 1
        self._take_out(promotion)
        if promotion.slot_id is not None:
            self._books.primary.free_reserved(promotion.size_class, [promotion.slot_id])
            promotion.slot_id = None  # a probe may still be under way, which does not touch it
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
        self._take_off_queue(promotion)
        if promotion.slot_id is not None:
            self._promoting_bytes -= promotion.size_class.slot_bytes
        space.writers[key] -= 1
        if not space.writers[key]:
            del space.writers[key]

    # Time

    @property
    def probes_end_ns(self) -> int | None:
        """When `end_probes` has something to do; None while nobody waits for a probe."""
        while self._probe_ends and not self._is_probed(*self._probe_ends[0]):
            heappop(self._probe_ends)
        return self._probe_ends[0][0] if self._probe_ends else None

    def _is_probed(self, until_ns: int, _: int, promotion: _Promotion) -> bool:
        """Tell whether an entry of `_probe_ends` is of a probe that somebody waits for."""
        is_same = promotion.probing and promotion.probe_until_ns == until_ns
        return is_same and self._promotions.get((promotion.space, promotion.key)) is promotion

    def end_probes(self, now_ns: int) -> None:
        """Let those go on computing who have waited long enough to hear whether a chunk is there.

        From then on it is as if nobody had asked: it can be stored, and be asked for again. A slice of them.
        """
        for _ in range(SLICE_ENDS):
            until_ns = self.probes_end_ns
            if until_ns is None or until_ns > now_ns:
                break
            _, _, promotion = heappop(self._probe_ends)
            promotion.given_up = True
            self._end(promotion, "probe_late")

    def end_loads(self, now_ns: int) -> None:
        """Give up loads that nobody has the patience for: the chunks can be stored and asked for again.

        A slice of them.
        """
        latest_ns = now_ns - self._books.limits.max_promotion_ns
        began = takewhile(lambda promotion: promotion.began_ns <= latest_ns, self._promotions.values())
        loads = (promotion for promotion in began if not promotion.probing)
        for promotion in list(islice(loads, SLICE_ENDS)):
            self._give_up(promotion)

    def end_waits(self, now_ns: int) -> None:
        """Note the time, and end promotions that wait for a slot and that nobody waits for any more."""
        self._now_ns = now_ns
        self.go_on()

    def _end_unawaited(self, left: int) -> int:
        """Look at keys whose waiters have gone, at most `left`; returns how many were left to look at."""
        unawaited = self._books.unawaited
        while unawaited and left > 0:
            name = unawaited.popleft()
            left -= 1
            promotion = self._promotions.get(name)
            if promotion is not None and promotion.is_queued and not self._books.is_awaited(*name):
                self._end(promotion, "late")
        return left

    # What there is

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or under way."""
        return bool(self._batches or self._queue)

    def coming_from(self, space: KeySpace, key: bytes) -> tuple[str, str] | None:
        """Say which tier is to bring a chunk, and how far that is; None if none is."""
        promotion = self._promotions.get((space, key))
        if promotion is None:
            return None
        how = "it is asked whether it has it" if promotion.probing else "it is being read"
        return promotion.below.rules.name, "it waits for a slot" if promotion.is_queued else how

    def num_coming(self, covers: Callable[[SpaceName], bool]) -> int:
        """Count the chunks of some spaces that are on their way up."""
        return sum(covers(space.name) for space, _ in self._promotions)

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
        queued = [p for p in self._queue if p.is_queued]
        ids = set(map(id, queued))
        assert not under_way & ids, "a promotion waits and is under way"
        assert under_way | ids == {id(p) for p in self._promotions.values()}, "a promotion without a job"
        assert not queued or self._moving_bytes or self.is_behind, "promotions wait for nothing"
        for below in self._tiers:
            num_bytes = sum(p.size_class.slot_bytes for p in queued if p.below is below)
            assert below.queued_promotion_bytes == num_bytes, (below.rules.name, num_bytes)


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
