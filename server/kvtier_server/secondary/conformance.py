"""What every tier below the pool must do, as tests for any class, out-of-tree ones too.

    from kvtier_server.secondary.conformance import TierConformance

    class TestMyTier(TierConformance):
        def make_tier(self, spec, pool, on_finished):
            return MyTier(spec, pool, "MyTier", on_finished, MyTier.Parameters())

pytest collects the inherited tests; each gets a new tier and shuts it down. The tier must have room for 8
chunks of 12 KiB. Owns no tier and imports no test library.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from threading import Event

from kvtier_ops.checksum import part_checksum
from kvtier_ops.layout import SLOT_UNIT_BYTES, part_offset, slot_bytes
from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import (
    ClearJob,
    ClearResult,
    EvictJob,
    JobKind,
    JobResult,
    OffloadingSpec,
    Outcome,
    Presence,
    SecondaryTier,
    TierChunk,
    TierJob,
)

SPACE = SpaceName("n" * 64, "tenant", 7)
GEOMETRY = bytes(range(16))
NUM_SLOTS = 16
SLOT_BYTES = 4 * SLOT_UNIT_BYTES
PART_BYTES = 3_000
NUM_PARTS = 3
"""Parts that do not end on a slot's or a cache line's border, so that padding and the rest of a slot show."""

WAIT_S = 20.0
FILLER = 0xEE


class Bench:
    """A pool, a tier over it, and jobs with names for what they do."""

    def __init__(self, tier: SecondaryTier, pool: mmap.mmap, finished: Event) -> None:
        self.tier = tier
        self.pool = pool
        self._finished = finished
        self._ids = count(1)
        self._random = random.Random(11)

    def fill(self, slot: int) -> bytes:
        """Put new bytes into a slot; returns what is the chunk's of it."""
        data = self._random.randbytes(chunk_bytes())
        self.pool[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = bytes([FILLER]) * SLOT_BYTES
        self.pool[slot * SLOT_BYTES : slot * SLOT_BYTES + len(data)] = data
        return data

    def slot(self, slot: int) -> bytes:
        """All bytes of a slot."""
        return bytes(self.pool[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES])

    def chunk(
        self, number: int, slot: int, *, space: SpaceName = SPACE, geometry: bytes = GEOMETRY
    ) -> TierChunk:
        """Name a chunk in a slot, without checksums."""
        return TierChunk(space, key_of(number), geometry, PART_BYTES, NUM_PARTS, slot * SLOT_BYTES)

    def hashed(self, chunk: TierChunk) -> TierChunk:
        """Return it with the checksums of what lies in its slot now."""
        data = bytes(self.pool[chunk.offset : chunk.offset + chunk.num_bytes])
        return TierChunk(
            chunk.space,
            chunk.key,
            chunk.geometry,
            chunk.part_bytes,
            chunk.num_parts,
            chunk.offset,
            checksums_of(data),
        )

    def submit(self, kind: JobKind, chunks: Sequence[TierChunk]) -> int:
        """Begin a job, trying again while the tier has too much to do; returns its id."""
        job = TierJob(next(self._ids), kind, tuple(chunks))
        methods: dict[JobKind, Callable[[TierJob], bool]] = {
            JobKind.STORE: self.tier.submit_store,
            JobKind.LOAD: self.tier.submit_load,
            JobKind.PROBE: self.tier.submit_probe,
        }
        until(lambda: methods[kind](job), f"the tier takes a {kind} job")
        return job.id

    def results(self, *job_ids: int) -> dict[int, JobResult]:
        """Wait for jobs; each must end exactly once, and no other may."""
        ended: dict[int, JobResult] = {}
        deadline = time.monotonic() + WAIT_S
        while set(job_ids) - set(ended):
            # Cleared before looking: what ends in between sets it again.
            self._finished.clear()
            for result in self.tier.get_finished():
                assert result.job_id in job_ids, f"job {result.job_id} ended, which nobody began"
                assert result.job_id not in ended, f"job {result.job_id} ended twice"
                ended[result.job_id] = result
            if set(job_ids) - set(ended):
                left = deadline - time.monotonic()
                assert left > 0, f"jobs {set(job_ids) - set(ended)} have not ended in {WAIT_S:.0f} s"
                self._finished.wait(left)
        return ended

    def run(self, kind: JobKind, *chunks: TierChunk) -> JobResult:
        """Do one job from beginning to end."""
        job_id = self.submit(kind, chunks)
        return self.results(job_id)[job_id]

    def clear(self, job: ClearJob) -> ClearResult:
        """Clear, and wait for the end; what the tier lets go of meanwhile is left for `get_removed`."""
        assert self.tier.submit_clear(job)
        return self._end_of(job.id)

    def evict(self, job: EvictJob) -> ClearResult:
        """Evict, and wait for the end, likewise."""
        assert self.tier.submit_evict(job)
        return self._end_of(job.id)

    def _end_of(self, job_id: int) -> ClearResult:
        ended: list[ClearResult] = []

        def has_ended() -> bool:
            ended.extend(self.tier.get_cleared())
            return bool(ended)

        until(has_ended, "the clearing ends")
        (result,) = ended
        assert result.job_id == job_id
        return result

    def store(self, number: int, slot: int = 0, *, space: SpaceName = SPACE) -> bytes:
        """Store a chunk of new bytes; returns them."""
        data = self.fill(slot)
        result = self.run(JobKind.STORE, self.hashed(self.chunk(number, slot, space=space)))
        assert result.outcomes == (Outcome.DONE,), result
        return data


class TierBench:
    """Makes benches, for tests of one tier beyond the contract. Define `make_tier`."""

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> SecondaryTier:
        """Return a new, empty tier."""
        raise NotImplementedError("define make_tier in the derived class")

    @contextmanager
    def bench(self) -> Iterator[Bench]:
        """Open a bench over a new tier; the tier is shut down after."""
        # A file in memory, aligned to pages, as the daemon's is.
        fd = os.memfd_create("pool", os.MFD_CLOEXEC)
        os.ftruncate(fd, NUM_SLOTS * SLOT_BYTES)
        pool = mmap.mmap(fd, NUM_SLOTS * SLOT_BYTES)
        pool[:] = bytes([FILLER]) * len(pool)
        finished = Event()
        spec = OffloadingSpec(len(pool), SLOT_UNIT_BYTES, 128, f"/proc/{os.getpid()}/fd/{fd}")
        try:
            tier = self.make_tier(spec, memoryview(pool), finished.set)
        finally:
            os.close(fd)
        try:
            yield Bench(tier, pool, finished)
        finally:
            tier.shutdown(WAIT_S)


class TierConformance(TierBench):
    """The contract. Derive from it, and define `make_tier`."""

    def test_what_was_stored_is_loaded_into_another_slot_and_nothing_else_is_written(self) -> None:
        with self.bench() as bench:
            data = bench.store(1, slot=0)
            before = bench.slot(6), bench.slot(8)
            result = bench.run(JobKind.LOAD, bench.chunk(1, slot=7))
            assert result.outcomes == (Outcome.DONE,)
            assert result.checksums == (checksums_of(data),)
            assert parts_of(bench.slot(7)) == parts_of(data)
            rest = bench.slot(7)[chunk_bytes() :]
            assert rest == bytes([FILLER]) * len(rest), "only the group's bytes move"
            assert (bench.slot(6), bench.slot(8)) == before

    def test_a_stored_chunk_is_known_and_another_one_is_not(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            there, not_there = bench.tier.lookup(SPACE, [key_of(1), key_of(2)])
            assert there is Presence.YES
            assert not_there is not Presence.YES
            assert not bench.tier.lookup(SPACE, [])

    def test_what_was_never_stored_is_missing_and_leaves_the_slot_alone(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            before = bench.slot(3)
            assert bench.run(JobKind.LOAD, bench.chunk(2, slot=3)).outcomes == (Outcome.MISSING,)
            assert bench.slot(3) == before

    def test_equal_keys_of_another_namespace_tenant_or_epoch_are_other_chunks(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            for other in (
                SpaceName("m" * 64, "tenant", 7),
                SpaceName("n" * 64, "other", 7),
                SpaceName("n" * 64, "", 7),
                SpaceName("n" * 64, "tenant", 8),
            ):
                assert bench.tier.lookup(other, [key_of(1)])[0] is not Presence.YES, other
                result = bench.run(JobKind.LOAD, bench.chunk(1, slot=2, space=other))
                assert result.outcomes == (Outcome.MISSING,), other

    def test_equal_keys_of_another_layout_are_other_chunks(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            other = bench.chunk(1, slot=2, geometry=b"another layout..")
            assert bench.run(JobKind.LOAD, other).outcomes == (Outcome.MISSING,)
            longer = TierChunk(SPACE, key_of(1), GEOMETRY, PART_BYTES + 64, NUM_PARTS, 2 * SLOT_BYTES)
            assert bench.run(JobKind.LOAD, longer).outcomes == (Outcome.MISSING,)

    def test_bytes_that_do_not_match_their_checksums_are_not_stored(self) -> None:
        with self.bench() as bench:
            bench.fill(0)
            chunk = bench.hashed(bench.chunk(1, slot=0))
            bench.pool[part_offset(PART_BYTES, 1) + 5] ^= 0x10
            assert bench.run(JobKind.STORE, chunk).outcomes == (Outcome.CORRUPT,)
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=2)).outcomes == (Outcome.MISSING,)

    def test_a_chunk_without_checksums_gets_them(self) -> None:
        with self.bench() as bench:
            data = bench.fill(0)
            unhashed = TierChunk(
                SPACE, key_of(1), GEOMETRY, PART_BYTES, NUM_PARTS, 0, checksums=(0,) * NUM_PARTS
            )
            assert bench.run(JobKind.STORE, unhashed).outcomes == (Outcome.DONE,)
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=2)).checksums == (checksums_of(data),)

    def test_a_job_tells_for_each_chunk_what_became_of_it_in_order(self) -> None:
        with self.bench() as bench:
            data = {number: bench.store(number, slot=number) for number in (1, 3)}
            chunks = [bench.chunk(number, slot=8 + number) for number in (1, 2, 3, 4)]
            result = bench.run(JobKind.LOAD, *chunks)
            done, missing = Outcome.DONE, Outcome.MISSING
            assert result.outcomes == (done, missing, done, missing)
            for number, stored in data.items():
                assert parts_of(bench.slot(8 + number)) == parts_of(stored)

    def test_storing_again_is_no_error_and_leaves_one_chunk(self) -> None:
        with self.bench() as bench:
            data = bench.store(1)
            again = bench.hashed(bench.chunk(1, slot=0))
            assert bench.run(JobKind.STORE, again, again).outcomes == (Outcome.DONE,) * 2
            assert bench.tier.stats().num_chunks == 1
            bench.run(JobKind.LOAD, bench.chunk(1, slot=4))
            assert parts_of(bench.slot(4)) == parts_of(data)

    def test_keys_of_every_length_are_told_apart(self) -> None:
        with self.bench() as bench:
            keys = [b"k" * length for length in (5, 6, 36, 127, 128)] + [b"k" * 127 + b"\0", b"\0/../\xff"]
            stored = {}
            for slot, key in enumerate(keys):
                stored[key] = bench.fill(slot)
                chunk = TierChunk(SPACE, key, GEOMETRY, PART_BYTES, NUM_PARTS, slot * SLOT_BYTES)
                assert bench.run(JobKind.STORE, bench.hashed(chunk)).outcomes == (Outcome.DONE,)
            for key, data in stored.items():
                chunk = TierChunk(SPACE, key, GEOMETRY, PART_BYTES, NUM_PARTS, 9 * SLOT_BYTES)
                assert bench.run(JobKind.LOAD, chunk).outcomes == (Outcome.DONE,)
                assert parts_of(bench.slot(9)) == parts_of(data)

    def test_many_jobs_at_once_end_once_each_with_their_own_bytes(self) -> None:
        with self.bench() as bench:
            half = NUM_SLOTS // 2
            data = [bench.fill(slot) for slot in range(half)]
            stores = [
                bench.submit(JobKind.STORE, [bench.hashed(bench.chunk(slot, slot))]) for slot in range(half)
            ]
            assert all(r.outcomes == (Outcome.DONE,) for r in bench.results(*stores).values())
            loads = [bench.submit(JobKind.LOAD, [bench.chunk(slot, half + slot)]) for slot in range(half)]
            assert all(r.outcomes == (Outcome.DONE,) for r in bench.results(*loads).values())
            for slot in range(half):
                assert parts_of(bench.slot(half + slot)) == parts_of(data[slot])
            assert not bench.tier.has_work()

    def test_what_is_cleared_is_told_and_gone_and_other_namespaces_and_tenants_stay(self) -> None:
        later_epoch = SpaceName(SPACE.namespace, SPACE.tenant, SPACE.epoch + 1)
        others = (SpaceName(SPACE.namespace, "other", 7), SpaceName("m" * 64, SPACE.tenant, 7))
        with self.bench() as bench:
            if not bench.tier.can_clear:
                return
            for number, space in enumerate((SPACE, later_epoch, *others)):
                bench.store(number, slot=number, space=space)
            before = bench.tier.stats().used_bytes
            result = bench.clear(ClearJob(7, SPACE.namespace, SPACE.tenant))
            assert (result.num_removed, result.num_kept) == (2, 0)
            assert result.removed_bytes == before - bench.tier.stats().used_bytes > 0
            gone = {(r.space, key, r.reason) for r in bench.tier.get_removed() for key in r.keys}
            assert gone == {(SPACE, key_of(0), "clear"), (later_epoch, key_of(1), "clear")}
            assert bench.tier.lookup(SPACE, [key_of(0)])[0] is not Presence.YES
            assert bench.run(JobKind.LOAD, bench.chunk(0, slot=5)).outcomes == (Outcome.MISSING,)
            for number, space in enumerate(others, 2):
                assert bench.tier.lookup(space, [key_of(number)])[0] is Presence.YES

    def test_a_tier_that_was_cleared_wholly_is_empty_and_takes_chunks_again(self) -> None:
        with self.bench() as bench:
            if not bench.tier.can_clear:
                return
            for number in range(3):
                bench.store(number)
            assert bench.clear(ClearJob(7)).num_removed == 3
            assert bench.clear(ClearJob(8)) == ClearResult(8, 0, 0)
            stats = bench.tier.stats()
            assert (stats.num_chunks, stats.used_bytes) == (0, 0)
            bench.store(1)

    def test_what_is_evicted_at_a_word_was_used_longest_ago_and_is_told(self) -> None:
        with self.bench() as bench:
            if not bench.tier.can_evict:
                return
            for number in range(4):
                bench.store(number, slot=number)
            bench.tier.touch(SPACE, [key_of(0)], [1 << 30])
            before = bench.tier.stats().used_bytes
            result = bench.evict(EvictJob(7, before // 4 + 1))
            assert (result.num_removed, result.num_kept) == (2, 0)
            assert result.removed_bytes == before - bench.tier.stats().used_bytes == before // 2
            gone = {(r.space, key, r.reason) for r in bench.tier.get_removed() for key in r.keys}
            assert gone == {(SPACE, key_of(number), "admin") for number in (1, 2)}
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=5)).outcomes == (Outcome.MISSING,)
            for number in (0, 3):
                assert bench.run(JobKind.LOAD, bench.chunk(number, slot=5)).outcomes == (Outcome.DONE,)
            assert bench.evict(EvictJob(8, 1 << 40)).num_removed == 2
            assert bench.evict(EvictJob(9, 1)) == ClearResult(9, 0, 0)
            bench.store(1)

    def test_its_changes_and_its_list_are_what_it_knows(self) -> None:
        with self.bench() as bench:
            if not bench.tier.can_list:
                return
            mirror: set[tuple[SpaceName, bytes]] = set()
            jobs: list[int] = []
            for slot in range(NUM_SLOTS):  # some tiers have room for 8
                bench.fill(slot)
                jobs.append(bench.submit(JobKind.STORE, [bench.hashed(bench.chunk(slot, slot))]))
                apply_changes(bench.tier, mirror, max_changes=3)
            bench.results(*jobs)
            assert_known(bench.tier, mirror)
            bench.run(
                JobKind.LOAD, *[bench.chunk(number, slot) for slot, number in enumerate((1, 14, 15, 77))]
            )
            assert_known(bench.tier, mirror)
            if bench.tier.can_clear:
                bench.clear(ClearJob(7))
                assert_known(bench.tier, mirror)
                assert not mirror

    def test_it_says_what_it_holds(self) -> None:
        with self.bench() as bench:
            assert bench.tier.stats().num_chunks == 0
            bench.store(1)
            stats = bench.tier.stats()
            assert stats.num_chunks == 1
            assert stats.used_bytes >= chunk_bytes()
            assert stats.problem == ""

    def test_uses_of_chunks_that_are_not_there_are_no_error(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            bench.tier.touch(SPACE, [key_of(1), key_of(2)], [2, 1])
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=4)).outcomes == (Outcome.DONE,)

    def test_after_the_end_nothing_is_taken_and_ending_twice_is_no_error(self) -> None:
        with self.bench() as bench:
            bench.fill(0)
            bench.tier.shutdown(WAIT_S)
            job = TierJob(99, JobKind.STORE, (bench.hashed(bench.chunk(1, slot=0)),))
            assert not bench.tier.submit_store(job)
            assert not bench.tier.submit_load(job)

    def test_what_is_queued_at_the_end_fails_or_is_done(self) -> None:
        with self.bench() as bench:
            for slot in range(8):
                bench.fill(slot)
            job_ids = [
                bench.submit(JobKind.STORE, [bench.hashed(bench.chunk(slot, slot))]) for slot in range(8)
            ]
            bench.tier.shutdown(WAIT_S)
            outcomes = {result.outcomes[0] for result in bench.results(*job_ids).values()}
            assert outcomes <= {Outcome.DONE, Outcome.FAILED}


def key_of(number: int) -> bytes:
    """A key as engines make them: a hash, and the group's index."""
    return number.to_bytes(32, "big") + bytes(4)


def chunk_bytes() -> int:
    """Bytes of a chunk that move."""
    assert slot_bytes(PART_BYTES, NUM_PARTS) <= SLOT_BYTES
    return part_offset(PART_BYTES, NUM_PARTS - 1) + PART_BYTES


def parts_of(data: bytes) -> list[bytes]:
    """The parts, without the padding between them."""
    starts = [part_offset(PART_BYTES, part) for part in range(NUM_PARTS)]
    return [bytes(data[start : start + PART_BYTES]) for start in starts]


def checksums_of(data: bytes) -> tuple[int, ...]:
    """The checksums of the parts."""
    return tuple([part_checksum(memoryview(part)) for part in parts_of(data)])


def apply_changes(tier: SecondaryTier, mirror: set[tuple[SpaceName, bytes]], max_changes: int) -> int:
    """Take some changes into a mirror, in their order; returns how many."""
    changes = tier.get_changes(max_changes)
    assert changes is not None, "some were lost"
    assert len(changes) <= max_changes
    for change in changes:
        (mirror.add if change.is_held else mirror.discard)((change.space, change.key))
    return len(changes)


def assert_known(tier: SecondaryTier, mirror: set[tuple[SpaceName, bytes]]) -> None:
    """Take all changes; then mirror, list and lookup agree."""
    while apply_changes(tier, mirror, max_changes=5):
        pass
    listed: list[tuple[SpaceName, bytes]] = []
    place: int | None = 0
    while place is not None:
        some, place = tier.list_chunks(place, 3)
        listed += some
    assert len(set(listed)) == len(listed), "a chunk is listed twice"
    assert set(listed) == mirror
    keys = [key_of(number) for number in range(100)]
    known = zip(keys, tier.lookup(SPACE, keys), strict=True)
    assert {(SPACE, key) for key, presence in known if presence is Presence.YES} == mirror


def until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition` holds; fail, saying `what` did not happen."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s in vain for this: {what}"
        time.sleep(0.001)
