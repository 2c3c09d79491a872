"""The daemon's side of the stories and the model: a core over a pool in memory, and the ledger.

The ledger is what was ever completely stored under a key. `check` asks after every step whether the core's
books, the slot table and the bytes of every resident chunk agree with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.namespace import NamespaceFacts, SpaceName
from kvtier_server.admission import ReuseFilter
from kvtier_server.core.adoption import KeptSlot, adopt
from kvtier_server.core.books import Notice
from kvtier_server.core.limits import Limits
from kvtier_server.core.lower_tiers import DAEMON, TierRules
from kvtier_server.core.tiering import Core
from kvtier_server.policies.loader import make_policy
from kvtier_server.secondary.base import JobKind

from .engine import Engine, Written, facts
from .slots_in_memory import CELL_BYTES, FakeClock, FakeLocks, SlotsInMemory, State
from .stepped_tier import SteppedTier


class Rig:
    """A daemon's core over a pool in memory."""

    def __init__(
        self,
        num_units: int = 64,
        *,
        policy: str = "lru",
        limits: Limits | None = None,
        reuse_threshold: int = 0,
        backed_units: int | None = None,
        num_tiers: int = 0,
        shared_tiers: bool = False,
        rules: Sequence[TierRules] = (),
    ) -> None:
        """`num_tiers` tiers below the pool; `rules` for each, or the defaults."""
        self.clock = FakeClock()
        self.locks = FakeLocks()
        self.slots = SlotsInMemory(num_units)
        self.serial = itertools.count(1)
        self._num_units = num_units
        self._policy = policy
        self._limits = limits
        self._reuse_threshold = reuse_threshold
        self.rules = rules or [TierRules(f"tier{index}") for index in range(num_tiers)]
        self.tiers = [SteppedTier(self.slots, shared=shared_tiers) for _ in self.rules]
        self.core = self._new_core()
        self.back(num_units if backed_units is None else backed_units)
        self.may_read: dict[tuple[SpaceName, bytes], set[bytes]] = {}
        """All bytes that were ever completely stored under a key."""
        self.written: dict[tuple[int, int], Written] = {}
        self.flipped: set[tuple[int, int]] = set()
        """(slot, generation) of which a byte was flipped behind everybody's back."""

    def _new_core(self) -> Core:
        return Core(
            self._num_units * SLOT_UNIT_BYTES,
            self.slots,
            lambda capacity: make_policy(self._policy, capacity),
            self.locks,
            lambda: 1_000 + 2 * next(self.serial),
            self._limits,
            ReuseFilter(self._reuse_threshold),
            list(zip(self.tiers, self.rules, strict=True)),
        )

    def restart_daemon(self) -> None:
        """The daemon is killed, and the next one takes over its pool. Every session is gone."""
        old = self.core.books.primary
        spaces = [(space.id, space.name) for space in old.spaces]
        backed_bytes = old.slabs.backed_bytes
        geometries = self.core.geometries()
        for tier in self.tiers:
            tier.restart()
        self.core = self._new_core()
        self.core.known_geometries = geometries
        slabs = self.core.books.primary.slabs
        if any(self.slots.slot_bytes_of_slab):
            slabs.restore(self.slots.slab_bytes, self.slots.slot_bytes_of_slab)
            adopt(self.core.books, spaces, list(self._kept()), set(self.locks.held))
        self.locks.followed = set(self.core.books.quarantine.guards)
        slabs.backed_bytes = backed_bytes

    def _kept(self) -> Iterator[KeptSlot]:
        for size_class in self.core.books.primary.slabs.classes.values():
            for slab in size_class.slabs.values():
                for slot_id in slab.slot_ids:
                    record = self.slots.record(slot_id)
                    is_settled = record.state in (State.FREE, State.PUBLISHED) or (
                        # What the daemon itself was writing died with it.
                        record.state is State.RESERVED and record.owner == DAEMON
                    )
                    kept = KeptSlot(slot_id, size_class.slot_bytes, is_settled, record.generation)
                    if record.state is State.PUBLISHED:
                        kept = replace(kept, space_id=record.space_id, key=record.key, recency=record.recency)
                    yield kept

    def back(self, num_units: int) -> None:
        self.core.books.primary.slabs.backed_bytes = num_units * SLOT_UNIT_BYTES

    def engine(
        self,
        name: str = "engine",
        namespace: NamespaceFacts | None = None,
        *,
        tenant: str = "",
        world_size: int = 1,
    ) -> Engine:
        """An engine with all its processes attached."""
        engine = Engine(self, name, namespace or facts(), tenant=tenant, world_size=world_size)
        engine.attach()
        return engine

    def tick(self, seconds: float = 0) -> None:
        self.core.tick(self.clock.advance(seconds))

    def notices(self, kind: str) -> list[Notice]:
        """Take the notices out; return those of one kind."""
        taken = [notice for notice in self.core.books.notices if notice.kind == kind]
        self.core.books.notices.clear()
        return taken

    def pump(self) -> None:
        """Hand the tiers what is to go down, as the daemon does after a call."""
        while self.core.below.pump():
            pass

    def move(self, how: str = "ok") -> None:
        """Let all that goes up and down arrive, or fail as `how` says."""
        self.pump()
        while self.core.below.has_work:
            for tier in self.tiers:
                tier.finish_all(how)
            self.core.below.collect(self.clock.now_ns)
            self.pump()

    def hash_asked(self) -> list[bool]:
        """Hash what readers complained about, as the daemon's threads do. Returns what matched."""
        books, answers = self.core.books, []
        while books.hash_requests:
            asked = books.hash_requests.popleft()
            units = asked.part_bytes // SLOT_UNIT_BYTES
            found = self.slots.checksum(asked.slot_id + asked.part * units, units)
            answers.append(found == self.slots.record(asked.slot_id).checksums[asked.part])
            self.core.completions.hashed(asked, matches=answers[-1])
        return answers

    def flip(self, slot_id: int, generation: int) -> None:
        self.slots.cells[slot_id * CELL_BYTES] ^= 1
        self.flipped.add((slot_id, generation))

    def resident(self) -> dict[tuple[SpaceName, bytes], int]:
        """Slot ids by space and key."""
        spaces = self.core.books.primary.spaces
        return {(space.name, key): chunk.slot_id for space in spaces for key, chunk in space.chunks.items()}

    def check(self) -> None:
        """Assert what must hold after every step."""
        self.core.check_integrity()
        books = self.core.books
        primary = books.primary
        attached = {session.lock_file for session in books.instances.sessions.values()}
        awaited = books.left_locks.union(books.quarantine.guards)
        assert attached <= self.locks.followed <= attached | awaited, "a lock is lost, or kept for nothing"
        for space in primary.spaces:
            for key, chunk in space.chunks.items():
                record = self.slots.record(chunk.slot_id)
                assert record.state is State.PUBLISHED, f"{key!r} is filed in a {record.state} slot"
                assert (record.space_id, record.key) == (space.id, key)
                assert record.generation == chunk.generation
                cells = self.slots.read(chunk.slot_id, chunk.size_class.slot_bytes // SLOT_UNIT_BYTES)
                allowed = self.may_read.get((space.name, key), set())
                assert (chunk.slot_id, chunk.generation) in self.flipped or cells in allowed, (
                    f"{key!r} in {space.name}: its slot holds what was never wholly stored under it"
                )
        for size_class in primary.slabs.classes.values():
            for slot_id in size_class.free:
                assert self.slots.record(slot_id).state is State.FREE, f"slot {slot_id} is free to be granted"
        for reservation in books.reservations:
            record = self.slots.record(reservation.slot_id)
            assert (record.state, record.generation) == (State.RESERVED, reservation.generation)
        self._check_tiers()
        for lease in books.leases:
            for chunk in lease.chunks:
                if chunk.dropped:
                    condemned = self.slots.record(chunk.slot_id).state is State.QUARANTINED
                    kept = primary.by_slot.get(chunk.slot_id) is chunk
                    assert condemned or kept, f"slot {chunk.slot_id} is leased, and was evicted"

    def _check_tiers(self) -> None:
        """Assert that what tiers read and write is nobody else's meanwhile."""
        for tier in self.tiers:
            for running in tier.running:
                for moving in running.job.chunks[len(running.outcomes) :]:
                    if running.job.kind is JobKind.PROBE:
                        continue
                    state = self.slots.record(moving.offset // SLOT_UNIT_BYTES).state
                    if running.job.kind is JobKind.STORE:
                        assert state in (State.PUBLISHED, State.QUARANTINED), f"a {state} slot is read"
                    else:
                        assert state is State.RESERVED, f"a {state} slot is written"

    def assert_nothing_is_held(self) -> None:
        """All slots are free or published (or corrupt), nothing is pinned, leased or reserved."""
        self.check()
        books = self.core.books
        assert not list(books.leases)
        assert not len(books.reservations)
        waiting = [batch for batches in books.quarantine._batches_of.values() for batch in batches]
        assert all(batch.condemned is not None for batch in waiting)
        assert not books.quarantine.has_unguarded
        assert not any(space.writers for space in books.primary.spaces)
        assert not any(chunk.pins for chunk in books.primary.by_slot.values())
        assert not books._waiters
