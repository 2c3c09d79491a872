"""What the model's rules act on: engines, copies under way, dead processes that may still write.

Owns the moves that a rule is made of, and what must hold at each. The rules are `machine.py`'s.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.completions import MismatchReport
from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.instances import Instance, RankTaken
from kvtier_server.core.stores import ItemStatus

from .engine import Engine, Process, Slot, to_keys
from .rig import Rig
from .slots_in_memory import CELL_BYTES


@dataclass(eq=False, slots=True)
class StoreJob:
    """One rank's copy into one slot. `step`: 0 = not begun, 1 = half written, 2 = written."""

    user: User
    process: Process
    slot: Slot
    part: int
    cells: bytes
    step: int = 0
    is_stale: bool = False
    """The worker saw another generation before it began, and wrote nothing."""


@dataclass(eq=False, slots=True)
class LoadJob:
    """One rank's copy out of one slot. `cells` are what has been read, None once it has failed."""

    lease: int
    rank: int
    slot: Slot
    space: SpaceName
    num_units: int
    cells: bytes | None = b""


@dataclass(eq=False)
class User:
    """An engine, and what it believes to hold. Forgotten when its instance ends."""

    engine: Engine
    instance: Instance | None = None
    lookups: dict[int, list[Slot]] = field(default_factory=dict)
    loads: dict[int, set[int]] = field(default_factory=dict)
    """Ranks that have not reported yet, by load lease."""
    grants: dict[int, list[Slot]] = field(default_factory=dict)
    """Granted slots that were not handed to workers, by lease."""
    to_announce: list[Slot] = field(default_factory=list)
    """Handed to workers, the scheduler has still to say so."""

    @property
    def is_current(self) -> bool:
        """Whether the instance that all this belongs to is attached."""
        return self.engine.is_attached and self.engine.scheduler.instance is self.instance

    def forget(self) -> None:
        self.instance = None
        self.lookups.clear()
        self.loads.clear()
        self.grants.clear()
        self.to_announce = []


class World:
    """A daemon and its engines, and what their processes are in the middle of."""

    def __init__(self) -> None:
        self.rig = Rig(16)
        self.users: list[User] = []
        self.store_jobs: list[StoreJob] = []
        self.load_jobs: list[LoadJob] = []
        self.zombies: list[Process] = []
        """Dead processes of which something still maps the pool: their locks are held."""

    def user(self, which: int) -> User | None:
        """An attached engine; most of the time one that is not attached does so now."""
        user = self.users[which % len(self.users)]
        if not user.engine.is_attached and which > 1:
            self.attach_user(user, promise=True)
        for other in self.users:
            instance = other.engine.scheduler.instance if other.engine.is_attached else None
            if other.instance is not instance:
                other.forget()
                other.instance = instance
        return user if user.engine.is_attached else None

    def keys(self, user: User, start: int, count: int) -> list[bytes]:
        """Keys of every group, group by group."""
        groups = len(user.engine.namespace.groups)
        return [key for group in range(groups) for key in to_keys(range(start, start + count), group)]

    def begin_load(self, user: User, lease: int, slots: list[Slot], reported: set[int] | None = None) -> None:
        """Give the leased slots to the ranks that have not reported yet."""
        engine = user.engine
        user.loads[lease] = set(range(engine.world_size)) - (reported or set())
        for rank in user.loads[lease]:
            for slot in slots:
                units = engine.part_units(slot.key) * engine.num_parts
                self.load_jobs.append(LoadJob(lease, rank, slot, engine.space, units))

    def read(self, job: LoadJob, verify: bool) -> None:
        """Read half of a slot or the rest; in the end the bytes are what was stored, or the load failed."""
        user = next((user for user in self.users if job.lease in user.loads), None)
        table, slot = self.rig.slots, job.slot
        is_torn = table.generation(slot.slot_id) != slot.generation
        units = job.num_units
        if job.cells == b"" and units > 1:
            job.cells = None if is_torn else table.read(slot.slot_id, units // 2)
            if job.cells is not None:
                return
        self.load_jobs.remove(job)
        if job.cells is None or is_torn:
            return
        first = len(job.cells) // CELL_BYTES
        cells = job.cells + table.read(slot.slot_id + first, units - first)
        if (slot.slot_id, slot.generation) not in self.rig.flipped:
            allowed = self.rig.may_read.get((job.space, slot.key), set())
            assert cells in allowed, f"a fenced load of {slot.key!r} read what was never stored under it"
        elif verify and user is not None and user.is_current:
            complaint = MismatchReport(slot.slot_id, slot.generation)
            user.engine.report_load(job.rank, job.lease, mismatches=[complaint])
            user.loads[job.lease].discard(job.rank)

    def grant(self, user: User, request: str, keys: list[bytes]) -> list[Slot]:
        """Prepare a store: each verdict is what it must be, and what went is named."""
        engine = user.engine
        before = self.rig.resident()
        lease = engine.new_lease_id()
        answer = engine.prepare_store(keys, request, lease=lease)
        after = self.rig.resident()
        for key, verdict in zip(keys, answer.verdicts, strict=True):
            is_there = (engine.space, key) in after
            assert is_there == (verdict == StoreVerdict.RESIDENT), f"{key!r}: {verdict!r}"
        gone = {key for space, key in before.keys() - after.keys() if space == engine.space}
        assert gone <= set(answer.evicted), "a chunk went and the call did not say so"
        slots = engine.granted(keys, answer)
        if slots:
            user.grants[lease] = slots
        return slots

    def step(self, job: StoreJob) -> None:
        """Take the next step of a store: half the bytes, then the rest, unless it began too late."""
        engine = job.user.engine
        half = len(job.cells) // CELL_BYTES // 2
        if job.step == 0:
            job.is_stale = self.rig.slots.generation(job.slot.slot_id) != job.slot.generation
            if not job.is_stale:
                engine.write(job.slot, job.part, job.cells, end=half)
            job.step = 1
        elif job.step == 1:
            if not job.is_stale:
                engine.write(job.slot, job.part, job.cells, first=half)
            job.step = 2

    def report(self, job: StoreJob, how: str) -> None:
        """Report a part that is written."""
        engine, slot = job.user.engine, job.slot
        if how == "other generation":
            other = Slot(slot.slot_id, slot.generation - 1, slot.key)
            assert engine.report_store(job.part, other, job.cells) != ItemStatus.OK
            how = "ok"
        if how == "other key":
            slot = replace(slot, key=slot.key[:-5] + b"x" + slot.key[-4:])
        has_failed = how == "failed" or job.is_stale
        if not has_failed:
            engine.note_written(slot, job.part, job.cells)
        status = engine.report_store(job.part, slot, job.cells, failed=has_failed)
        assert not (job.is_stale and status == ItemStatus.OK), "a slot went on while a part was still owed"

    def store_whole(self, which: int, request: str, start: int, count: int) -> None:
        """Store a few chunks from beginning to end: what is granted and reported ok is there."""
        if (user := self.user(which)) is None:
            return
        engine = user.engine
        slots = self.grant(user, request, self.keys(user, start, count))
        user.grants = {lease: held for lease, held in user.grants.items() if held is not slots}
        statuses = engine.write_and_report(slots)
        assert all(status == ItemStatus.OK for status in statuses)
        resident = self.rig.resident()
        assert all((engine.space, slot.key) in resident for slot in slots)

    def crash_a_process(self, engine: Engine, rank: int, noticed: bool, freed: bool) -> None:
        """One process dies, and the engine puts another in its place."""
        place = rank % len(engine.processes)
        self.bury(engine.processes[place], engine, noticed, freed)
        role, seat = engine.processes[place].role, engine.processes[place].rank
        engine.processes[place] = Process(self.rig, engine.name, role, seat)

    def restart_an_engine(self, engine: Engine, noticed: bool, freed: bool) -> None:
        """All processes die, and the engine starts anew."""
        for process in engine.processes:
            self.bury(process, engine, noticed, freed)
        engine.start()

    def bury(self, process: Process, engine: Engine, noticed: bool, freed: bool) -> None:
        """Let a process die; `freed`: nothing of it maps the pool; `noticed`: its stream has ended."""
        self.zombies.append(process)
        if freed:
            self.free_the_lock(process)
        if noticed:
            engine.cut_stream(process)

    def free_the_lock(self, process: Process) -> None:
        """The last of a dead process is gone, and its copies with it."""
        self.zombies.remove(process)
        self.store_jobs = [job for job in self.store_jobs if job.process is not process]
        self.rig.locks.free(process.lock_file)

    def attach_user(self, user: User, promise: bool) -> None:
        """Attach the processes that are not. Who promises has let its copies end."""
        sessions = self.rig.core.books.instances.sessions
        for process in user.engine.processes:
            if process.session is not None and process.session.id in sessions:
                continue
            if promise:
                for job in [job for job in self.store_jobs if job.process is process]:
                    while job.step < 2:
                        self.step(job)
                    self.store_jobs.remove(job)
            try:
                user.engine.attach_process(process, promise=promise)
            except RankTaken:
                assert self.zombies, "a seat is taken, and nobody has died"

    def attach_again(self, engine: Engine, role: int) -> None:
        """A process attaches again although its session lives: the daemon has not seen it lose the stream."""
        with contextlib.suppress(RankTaken):
            engine.attach_process(engine.processes[role])

    def crash_the_daemon(self) -> None:
        """The daemon is killed; the next one serves everything that was published."""
        before = self.rig.resident()
        self.rig.restart_daemon()
        for user in self.users:
            user.forget()
        assert self.rig.resident() == before, "a published chunk did not survive the daemon"

    def flip_a_byte(self, which: int) -> None:
        """Damage a resident chunk behind everybody's back."""
        chunks = [chunk for space in self.rig.core.books.primary.spaces for chunk in space.chunks.values()]
        if chunks:
            chunk = chunks[which % len(chunks)]
            self.rig.flip(chunk.slot_id, chunk.generation)
