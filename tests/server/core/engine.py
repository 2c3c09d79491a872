"""An engine as the core meets it: processes with locks, sessions, calls, and copies in separate steps.

What it writes goes into the rig's ledger, so that every load can be compared with what was stored.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtier_ops.layout import SLOT_UNIT_BYTES, TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts, SpaceName
from kvtier_server.core.books import LookupStatus
from kvtier_server.core.completions import MismatchReport
from kvtier_server.core.grants import StoreAnswer, StoreVerdict
from kvtier_server.core.instances import Applicant, Role, Session
from kvtier_server.core.lookups import LookupAnswer
from kvtier_server.core.namespaces import Geometry
from kvtier_server.core.requests import Request
from kvtier_server.core.stores import ItemStatus

from .slots_in_memory import CELL_BYTES, SECOND_NS, checksum

if TYPE_CHECKING:
    from .rig import Rig

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


class Process:
    """One process of an engine: its lock, and its session while it has one."""

    def __init__(self, rig: Rig, name: str, role: Role, rank: int) -> None:
        self.role = role
        self.rank = rank
        self.lock_file = rig.locks.take(f"{name}-{next(rig.serial)}")
        self.session: Session | None = None
        self.previous_session = ""
        self.maps_pool = False


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

    # Sessions.

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
            int(process.maps_pool),
            previous_session=process.previous_session if promise else "",
            epoch=self.epoch if process.role is Role.SCHEDULER else 0,
            geometry=self.geometry if process.role is Role.WORKER else None,
        )
        session_id = f"boot-{next(self.rig.serial)}"
        session = self.rig.core.attach(session_id, applicant, self.namespace, self.rig.clock.now_ns)
        process.session = session
        process.previous_session = session_id
        process.maps_pool = process.role is Role.WORKER
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

    # The scheduler's calls.

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

    def slots_for_misses(
        self, keys: Sequence[bytes], *wishes: tuple[int, int, int], request: str = "r", lease: int = 0
    ) -> dict[int, list[Slot]]:
        """Look keys up, and have slots come along for what is missing, by group."""
        grants, lease_id = self.rig.core.grants, lease or self.new_lease_id()
        grants.check_wishes(self.scheduler, wishes, lease_id)
        granted = grants.for_misses(
            self.scheduler, keys, self.lookup(keys, request), wishes, lease_id, self.rig.clock.now_ns
        )
        return {
            group: self._reserved([Slot(*slot, b"") for slot in zip(slot_ids, generations, strict=True)])
            for group, slot_ids, generations in granted
        }

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

    # The workers' copies and reports.

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

    def grant(self, *numbers: int, request: str = "r", lease: int = 0) -> list[Slot]:
        """Prepare to store chunks; returns the slots granted."""
        keys = to_keys(numbers)
        return self.granted(keys, self.prepare_store(keys, request, lease=lease))

    def write_part(self, slot: Slot, rank: int = 0, *, failed: bool = False) -> ItemStatus:
        """Write one rank's part and report it."""
        cells = self.content(slot.key)
        self.write(slot, rank, cells)
        if not failed:
            self.note_written(slot, rank, cells)
        return self.report_store(rank, slot, cells, failed=failed)

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
