"""A core with engines around it, one call at a time: what the stories and the model are told with.

`Rig` is the daemon's side (the core over `SlotsInMemory`, a clock, locks) and the ledger of what was ever
completely stored. `Engine` is one engine: processes with locks, sessions, and copies in separate steps.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from kvtier_ops.layout import SLOT_UNIT_BYTES, TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts
from kvtier_server.admission import ReuseFilter
from kvtier_server.core.adoption import KeptSlot, adopt
from kvtier_server.core.books import LookupStatus, Notice
from kvtier_server.core.completions import MismatchReport
from kvtier_server.core.grants import StoreAnswer, StoreVerdict
from kvtier_server.core.instances import Applicant, Role, Session
from kvtier_server.core.limits import Limits
from kvtier_server.core.lookups import LookupAnswer
from kvtier_server.core.namespaces import Geometry
from kvtier_server.core.requests import Request
from kvtier_server.core.stores import ItemStatus
from kvtier_server.core.tiering import Core
from kvtier_server.policies.loader import make_policy
from kvtier_server.primary.index import SpaceName

from .slots_in_memory import CELL_BYTES, FakeClock, FakeLocks, SlotsInMemory, State, checksum

SECOND_NS = 1_000_000_000
HIT, HIT_UNLEASED = LookupStatus.HIT, LookupStatus.HIT_UNLEASED
PENDING, MISS = LookupStatus.PENDING, LookupStatus.MISS


def to_key(number: int, group: int = 0) -> bytes:
    """A key as engines make them: a hash, and the group's index."""
    return b"hash%04d" % number + group.to_bytes(4, "big")


def to_keys(numbers: Iterable[int], group: int = 0) -> list[bytes]:
    return [to_key(number, group) for number in numbers]


def facts(
    model: str = "model",
    units: Sequence[int] = (1,),
    *,
    windows: Sequence[int] = (),
    num_parts: int = 1,
    weights: str = "w0",
) -> NamespaceFacts:
    """A namespace with one group per entry of `units`, its part that many 4 KiB units; 16 tokens a chunk."""
    groups = tuple(
        GroupFacts(16, size * SLOT_UNIT_BYTES, windows[index] if windows else 0)
        for index, size in enumerate(units)
    )
    return NamespaceFacts(model, weights, "bfloat16", "sha256", 16, 1, "NHD", groups, num_parts=num_parts)


def geometry_of(namespace: NamespaceFacts) -> Geometry:
    return tuple(
        (TensorLayout("keys", group.part_bytes // 2), TensorLayout("values", group.part_bytes // 2))
        for group in namespace.groups
    )


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot as a client knows it: granted for writing, or leased for reading."""

    slot_id: int
    generation: int
    key: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """What the ranks reported about one reserved slot, as far as the model cares."""

    space: SpaceName
    parts: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Key and bytes by part, of the parts that were reported ok."""


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
    ) -> None:
        self.clock = FakeClock()
        self.locks = FakeLocks()
        self.slots = SlotsInMemory(num_units)
        self.serial = itertools.count(1)
        self._num_units = num_units
        self._policy = policy
        self._limits = limits
        self._reuse_threshold = reuse_threshold
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
            self.locks.is_free,
            lambda: 1_000 + 2 * next(self.serial),
            self._limits,
            ReuseFilter(self._reuse_threshold),
        )

    def restart_daemon(self) -> None:
        """The daemon is killed, and the next one takes over its pool. Every session is gone."""
        old = self.core.books.primary
        spaces = [(space.id, space.name) for space in old.spaces]
        backed_bytes = old.slabs.backed_bytes
        self.core = self._new_core()
        slabs = self.core.books.primary.slabs
        if any(self.slots.slot_bytes_of_slab):
            slabs.restore(self.slots.slab_bytes, self.slots.slot_bytes_of_slab)
            adopt(self.core.books, spaces, list(self._kept()), set(self.locks.held))
        slabs.backed_bytes = backed_bytes

    def _kept(self) -> Iterator[KeptSlot]:
        for size_class in self.core.books.primary.slabs.classes.values():
            for slab in size_class.slabs.values():
                for slot_id in slab.slot_ids:
                    record = self.slots.record(slot_id)
                    is_settled = record.state in (State.FREE, State.PUBLISHED)
                    kept = KeptSlot(slot_id, size_class.slot_bytes, is_settled, record.generation)
                    if record.state is State.PUBLISHED:
                        kept = replace(kept, space_id=record.space_id, key=record.key)
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
        for lease in books.leases:
            for chunk in lease.chunks:
                if chunk.dropped:
                    condemned = self.slots.record(chunk.slot_id).state is State.QUARANTINED
                    kept = primary.by_slot.get(chunk.slot_id) is chunk
                    assert condemned or kept, f"slot {chunk.slot_id} is leased, and was evicted"

    def assert_nothing_is_held(self) -> None:
        """All slots are free or published (or corrupt), nothing is pinned, leased or reserved."""
        self.check()
        books = self.core.books
        assert not list(books.leases)
        assert not len(books.reservations)
        assert not len(books.quarantine)
        assert not any(space.writers for space in books.primary.spaces)
        assert not any(chunk.pins for chunk in books.primary.by_slot.values())
        assert not books._waiters


class Process:
    """One process of an engine: its lock, and its session while it has one."""

    def __init__(self, rig: Rig, name: str, role: Role, rank: int) -> None:
        self.role = role
        self.rank = rank
        self.lock_file = rig.locks.take(f"{name}-{next(rig.serial)}")
        self.session: Session | None = None
        self.previous_session = ""


class Engine:
    """One engine, its calls and its copies."""

    def __init__(
        self, rig: Rig, name: str, namespace: NamespaceFacts, *, tenant: str = "", world_size: int = 1
    ) -> None:
        self.rig = rig
        self.name = name
        self.namespace = namespace
        self.tenant = tenant
        self.world_size = world_size
        self.epoch = 0
        self.geometry = geometry_of(namespace)
        self.nonce = 0
        self.processes: list[Process] = []
        self.start()

    def start(self) -> None:
        """Start processes anew, with locks of their own and a new nonce."""
        self.nonce = next(self.rig.serial)
        self.epoch = 0
        roles = [(Role.SCHEDULER, 0), *((Role.WORKER, rank) for rank in range(self.world_size))]
        self.processes = [Process(self.rig, f"{self.name}-{role}", role, rank) for role, rank in roles]

    @property
    def space(self) -> SpaceName:
        return SpaceName(self.namespace.digest(), self.tenant, self.epoch)

    @property
    def num_parts(self) -> int:
        return self.namespace.num_parts

    # ----- sessions

    def attach_process(self, process: Process, *, promise: bool = False) -> Session:
        """Attach one process; with `promise` it says that its earlier copies have ended."""
        applicant = Applicant(
            self.name,
            self.nonce,
            process.role,
            process.rank,
            self.world_size,
            self.tenant,
            process.lock_file,
            previous_session=process.previous_session if promise else "",
            epoch=self.epoch if process.role is Role.SCHEDULER else 0,
            geometry=self.geometry if process.role is Role.WORKER else None,
        )
        session_id = f"boot-{next(self.rig.serial)}"
        session = self.rig.core.attach(session_id, applicant, self.namespace, self.rig.clock.now_ns)
        process.session = session
        process.previous_session = session_id
        return session

    def attach(self, *, promise: bool = False) -> None:
        for process in self.processes:
            self.attach_process(process, promise=promise)

    def cut_stream(self, process: Process) -> None:
        """The daemon sees the end of this process's stream."""
        if process.session is not None:
            self.rig.core.end_session(process.session.id, "STREAM_ENDED")

    def die(self, *, locks_freed: bool = True) -> None:
        """All processes are killed; without `locks_freed` something of them still maps the pool."""
        for process in self.processes:
            if locks_freed:
                self.rig.locks.free(process.lock_file)
            self.cut_stream(process)

    @property
    def is_attached(self) -> bool:
        """Whether every process has a living session, all of one instance."""
        sessions = self.rig.core.books.instances.sessions
        return all(p.session is not None and p.session.id in sessions for p in self.processes)

    @property
    def scheduler(self) -> Session:
        session = self.processes[0].session
        assert session is not None
        return session

    def worker(self, rank: int = 0) -> Session:
        session = self.processes[1 + rank].session
        assert session is not None
        return session

    # ----- the scheduler's calls

    def request(self, request_id: str) -> Request:
        return self.rig.core.books.request(self.scheduler.instance, request_id)

    def new_lease_id(self) -> int:
        return next(self.rig.serial)

    def lookup(
        self,
        keys: Sequence[bytes],
        request: str = "r",
        *,
        lease: int = 0,
        wait_s: float = 0,
        first_chunks: Sequence[int] = (),
        max_tokens: int = 0,
    ) -> LookupAnswer:
        return self.rig.core.lookups.lookup(
            self.scheduler,
            self.request(request),
            keys,
            self.rig.clock.now_ns,
            lease,
            first_chunks,
            max_tokens,
            int(wait_s * SECOND_NS),
        )

    def statuses(self, keys: Sequence[bytes], request: str = "look") -> list[int]:
        return self.lookup(keys, request).statuses

    def hits(self, numbers: Iterable[int], request: str = "look") -> list[int]:
        """The numbers of those keys that are resident."""
        wanted = list(numbers)
        statuses = self.statuses(to_keys(wanted), request)
        return [number for number, status in zip(wanted, statuses, strict=True) if status == HIT]

    def leased(self, keys: Sequence[bytes], answer: LookupAnswer) -> list[Slot]:
        """The slots a lookup leased."""
        named = [keys[index] for first, count in answer.leased for index in range(first, first + count)]
        return [
            Slot(slot_id, generation, key)
            for slot_id, generation, key in zip(answer.slot_ids, answer.generations, named, strict=True)
        ]

    def prepare_load(self, keys: Sequence[bytes], lease: int, request: str = "r") -> list[Slot]:
        chunks = self.rig.core.grants.prepare_load(
            self.scheduler, self.request(request), keys, lease, self.rig.clock.now_ns
        )
        return [Slot(chunk.slot_id, chunk.generation, chunk.key) for chunk in chunks]

    def start_load(self, lookup_lease: int, load_lease: int, slots: Sequence[Slot]) -> ItemStatus:
        return self.rig.core.completions.start_load(
            self.scheduler, lookup_lease, load_lease, [slot.slot_id for slot in slots], self.rig.clock.now_ns
        )

    def prepare_store(self, keys: Sequence[bytes], request: str = "r", *, lease: int = 0) -> StoreAnswer:
        return self.rig.core.grants.prepare_store(
            self.scheduler,
            self.request(request),
            keys,
            (),
            lease or self.new_lease_id(),
            self.rig.clock.now_ns,
        )

    def granted(self, keys: Sequence[bytes], answer: StoreAnswer) -> list[Slot]:
        """The slots of the keys that were granted one."""
        pairs = zip(keys, answer.verdicts, strict=True)
        named = [key for key, verdict in pairs if verdict == StoreVerdict.GRANTED]
        return self._reserved(
            [
                Slot(slot_id, generation, key)
                for slot_id, generation, key in zip(answer.slot_ids, answer.generations, named, strict=True)
            ]
        )

    def credits(self, count: int, *, group: int = 0, lease: int = 0) -> list[Slot]:
        """Reserve slots ahead; their keys are not known yet."""
        lease_id = lease or self.new_lease_id()
        answer = self.rig.core.grants.prepare_store(
            self.scheduler, None, (), [(group, count)], lease_id, self.rig.clock.now_ns
        )
        ((_, slot_ids, generations),) = answer.credits
        return self._reserved([Slot(*slot, b"") for slot in zip(slot_ids, generations, strict=True)])

    def _reserved(self, slots: list[Slot]) -> list[Slot]:
        for slot in slots:
            self.rig.written.setdefault((slot.slot_id, slot.generation), Written(self.space))
        return slots

    def announce(self, slots: Sequence[Slot], request: str = "r") -> list[ItemStatus]:
        return self.rig.core.completions.announce(
            self.scheduler,
            request,
            [slot.slot_id for slot in slots],
            [slot.generation for slot in slots],
            [slot.key for slot in slots],
        )

    def return_credits(self, slots: Sequence[Slot]) -> list[ItemStatus]:
        return self.rig.core.completions.return_credits(
            self.scheduler, [slot.slot_id for slot in slots], [slot.generation for slot in slots]
        )

    def release(self, lease: int) -> bool:
        return self.rig.core.release(self.scheduler.instance, lease, self.rig.clock.now_ns)

    def finish(self, request: str = "r") -> None:
        self.rig.core.finish(self.scheduler.instance, request)

    def renew(self, *leases: int) -> list[bool]:
        return self.rig.core.renew(self.scheduler, leases, self.rig.clock.now_ns)

    def touch(self, keys: Sequence[bytes], request: str = "r") -> None:
        self.rig.core.lookups.touch(self.scheduler, self.request(request), keys)

    def reset(self, weights_id: str = "") -> None:
        self.epoch = self.rig.core.reset(self.scheduler, weights_id)

    # ----- the workers' copies and reports

    def part_units(self, key: bytes) -> int:
        groups = self.namespace.groups
        group = int.from_bytes(key[-4:], "big") if len(groups) > 1 else 0
        return groups[group].part_bytes // SLOT_UNIT_BYTES

    def content(self, key: bytes) -> bytes:
        """Fresh bytes for one part: no two are alike."""
        serial = next(self.rig.serial)
        return b"".join(struct.pack(">IHH", serial, 7, cell) for cell in range(self.part_units(key)))

    def write(self, slot: Slot, part: int, cells: bytes, *, first: int = 0, end: int | None = None) -> None:
        """Copy the cells [first, end) of a part into the slot."""
        piece = cells[first * CELL_BYTES : None if end is None else end * CELL_BYTES]
        self.rig.slots.write(slot.slot_id + part * self.part_units(slot.key) + first, piece)

    def report_store(self, rank: int, slot: Slot, cells: bytes, *, failed: bool = False) -> ItemStatus:
        """Report one part of one slot."""
        (status,) = self.rig.core.completions.report_store(
            self.worker(rank),
            rank,
            [slot.slot_id],
            [slot.generation],
            [slot.key],
            [checksum(cells)],
            {0} if failed else set(),
        )
        return status

    def note_written(self, slot: Slot, part: int, cells: bytes) -> None:
        """Enter into the ledger what is about to be reported ok."""
        written = self.rig.written.get((slot.slot_id, slot.generation))
        if written is None:
            return
        written.parts.setdefault(part, (slot.key, cells))
        if len(written.parts) == self.num_parts and {key for key, _ in written.parts.values()} == {slot.key}:
            whole = b"".join(written.parts[part][1] for part in range(self.num_parts))
            slot_units = self.namespace.slot_bytes(self.group_of(slot.key)) // SLOT_UNIT_BYTES
            assert len(whole) == slot_units * CELL_BYTES
            self.rig.may_read.setdefault((written.space, slot.key), set()).add(whole)

    def group_of(self, key: bytes) -> int:
        return int.from_bytes(key[-4:], "big") if len(self.namespace.groups) > 1 else 0

    def write_and_report(self, slots: Sequence[Slot]) -> list[ItemStatus]:
        """Every rank writes its part of every slot and says so. Returns the last rank's statuses."""
        statuses: list[ItemStatus] = []
        for part in range(self.num_parts):
            statuses = []
            for slot in slots:
                cells = self.content(slot.key)
                self.write(slot, part, cells)
                self.note_written(slot, part, cells)
                statuses.append(self.report_store(part, slot, cells))
        return statuses

    def store(self, numbers: Iterable[int], request: str = "r", *, group: int = 0) -> list[int]:
        """Store chunks from beginning to end, four at a time. Returns the verdicts."""
        keys = to_keys(numbers, group)
        verdicts = []
        for first in range(0, len(keys), 4):
            answer = self.prepare_store(keys[first : first + 4], request)
            self.write_and_report(self.granted(keys[first : first + 4], answer))
            verdicts += answer.verdicts
        return verdicts

    def fill(self, numbers: Iterable[int]) -> None:
        """Store chunks of a request of their own each, so that they evict one another and all else."""
        for number in numbers:
            request = f"fill-{number}"
            self.store([number], request)
            self.finish(request)

    def report_load(
        self, rank: int, lease: int, *, torn: int = 0, mismatches: Sequence[MismatchReport] = ()
    ) -> ItemStatus:
        return self.rig.core.completions.report_load(
            self.worker(rank), lease, torn, mismatches, self.rig.clock.now_ns
        )

    def read(self, slot: Slot, *, verify: bool = True) -> bytes | None:
        """Copy a whole slot out between two looks at its generation; None is a failed load."""
        table = self.rig.slots
        if table.generation(slot.slot_id) != slot.generation:
            return None
        units = self.part_units(slot.key)
        parts = [table.read(slot.slot_id + part * units, units) for part in range(self.num_parts)]
        if table.generation(slot.slot_id) != slot.generation:
            return None
        if verify and tuple(map(checksum, parts)) != table.record(slot.slot_id).checksums:
            return None
        return b"".join(parts)

    def may_read(self, key: bytes) -> set[bytes]:
        return self.rig.may_read.get((self.space, key), set())

    def load(self, numbers: Iterable[int], request: str = "r") -> list[bytes | None]:
        """Load chunks from beginning to end, and check that the bytes are what was stored."""
        lease = self.new_lease_id()
        slots = self.prepare_load(to_keys(numbers), lease, request)
        loaded = [self.read(slot) for slot in slots]
        for slot, cells in zip(slots, loaded, strict=True):
            assert cells is None or cells in self.may_read(slot.key), f"{slot.key!r}: wrong bytes"
        for rank in range(self.world_size):
            self.report_load(rank, lease)
        return loaded
