"""FAULTS M1: any order of calls, copies, crashes and time, against what may be read at all.

The model is the rig's ledger: for each space and key, the bytes that were ever completely stored under it.
Four engines share a pool of 64 units in three size classes, so that slabs move: two share a namespace and a
tenant, one has two ranks, one a sliding-window group. Copies are steps of their own: a writer that has begun
goes on whatever the daemon says, until its lock is free; a reader looks at the generation before and after.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.lower_tiers import CascadeWhen, TierRules
from kvtier_server.core.refused import BadRequest, Inflight
from kvtier_server.core.stores import ItemStatus

from .engine import HIT, HIT_UNLEASED, MISS, Engine, facts, to_keys
from .rig import Rig
from .slots_in_memory import State
from .watcher import Watcher
from .world import StoreJob, User, World

REQUESTS = st.sampled_from(["r1", "r2", "r3"])
WHICH = st.integers(0, 7)
"""Picks one of whatever there is, modulo how many."""
STARTS = st.integers(0, 5)
COUNTS = st.sampled_from([1, 2, 3, 5, 8, 20])
STEPS_S = st.sampled_from([0, 0.5, 5, 31, 61, 301, 7 * 86_400])


class CoreMachine(World, RuleBasedStateMachine):
    """The rules, and what must hold after each."""

    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)
        World.__init__(self)

    @initialize(
        policy=st.sampled_from(["lru", "arc"]),
        num_units=st.sampled_from([40, 64, 100]),
        backed=st.sampled_from([1.0, 0.5, 0.0]),
        reuse_threshold=st.sampled_from([0, 0, 0, 2]),
        num_stored=st.sampled_from([8, 20, 0]),
        cascades=st.sampled_from(
            ["", "published", "published published", "cold", "published used", "used cold"]
        ),
        shared=st.booleans(),
    )
    def start(
        self,
        policy: str,
        num_units: int,
        backed: float,
        reuse_threshold: int,
        num_stored: int,
        cascades: str,
        shared: bool,
    ) -> None:
        self.num_units = num_units
        backed_units = int(num_units * backed)
        self.rig = Rig(
            num_units,
            policy=policy,
            reuse_threshold=reuse_threshold,
            backed_units=backed_units,
            rules=[
                TierRules(f"tier{index}", cascade=CascadeWhen(cascade), clean_share=0.25)
                for index, cascade in enumerate(cascades.split())
            ],
            shared_tiers=shared,
        )
        engines = [
            Engine(self.rig, "one", facts("a")),
            Engine(self.rig, "two", facts("a")),
            Engine(self.rig, "wide", facts("b", (1,), num_parts=2), tenant="t", world_size=2),
            Engine(self.rig, "hybrid", facts("c", (3, 1), windows=(0, 32)), tenant="t"),
        ]
        self.watcher = Watcher(self.rig)
        self.users = [User(engine) for engine in engines]
        for user in self.users:
            user.engine.attach()
        if num_stored:
            for which in range(len(self.users)):
                self.store_whole(which, "r1", 0, num_stored)

    # Lookups and loads.

    @rule(which=WHICH, request=REQUESTS, start=STARTS, count=COUNTS, leased=st.booleans(), wait=st.booleans())
    def look_up(self, which: int, request: str, start: int, count: int, leased: bool, wait: bool) -> None:
        """Each key's status is what it must be, and what is leased is there."""
        if (user := self.user(which)) is None:
            return
        engine, keys = user.engine, self.keys(user, start, count)
        lease = engine.new_lease_id() if leased else 0
        answer = engine.lookup(
            keys, request, lease=lease, wait_s=wait, first_chunks=[start] * len(engine.namespace.groups)
        )
        resident = self.rig.resident()
        for key, status in zip(keys, answer.statuses, strict=True):
            is_there = (engine.space, key) in resident
            assert is_there == (status in (HIT, HIT_UNLEASED)), f"{key!r}: {status}, resident: {is_there}"
            assert not is_there or engine.may_read(key), f"{key!r} was never wholly stored"
        assert all(answer.statuses[index] == MISS for index in answer.unwanted)
        slots = engine.leased(keys, answer)
        assert all(resident[engine.space, slot.key] == slot.slot_id for slot in slots)
        if slots:
            user.lookups[lease] = slots

    @rule(which=WHICH, request=REQUESTS, start=STARTS, count=COUNTS)
    def prepare_load(self, which: int, request: str, start: int, count: int) -> None:
        if (user := self.user(which)) is None:
            return
        engine = user.engine
        keys = [key for space, key in self.rig.resident() if space == engine.space][start:][:count]
        if not keys:
            return
        lease = engine.new_lease_id()
        try:
            slots = engine.prepare_load(keys, lease, request)
        except Inflight:
            return
        self.begin_load(user, lease, slots)

    @rule(
        which=WHICH,
        request=REQUESTS,
        take_all=st.booleans(),
        is_known=st.sampled_from([True, True, True, False]),
        early=st.booleans(),
    )
    def start_load(self, which: int, request: str, take_all: bool, is_known: bool, early: bool) -> None:
        """Turn a lookup into a load; `early`: a rank's report overtakes the scheduler's word."""
        user = self.user(which)
        if user is None:
            return
        engine = user.engine
        if not user.lookups:
            self.look_up(which, request, 0, 5, leased=True, wait=False)
        if not user.lookups:
            return
        lookup = next(iter(user.lookups))
        slots = user.lookups.pop(lookup)
        lease = engine.new_lease_id()
        wanted = slots if take_all else slots[:1]
        if early:
            engine.report_load(0, lease)
        status = engine.start_load(lookup if is_known else 0, lease, wanted)
        assert is_known or status == ItemStatus.UNKNOWN
        self.begin_load(user, lease, wanted, reported={0} if early else set())

    @precondition(lambda self: self.load_jobs)
    @rule(which=WHICH, verify=st.booleans(), whole=st.booleans())
    def copy_out(self, which: int, verify: bool, whole: bool) -> None:
        """Take the next step of a load: the first half, or the rest and the second look."""
        job = self.load_jobs[which % len(self.load_jobs)]
        self.read(job, verify)
        if whole and job in self.load_jobs:
            self.read(job, verify)

    @rule(which=WHICH)
    def report_load(self, which: int) -> None:
        user = self.user(which)
        if user is None or not user.loads:
            return
        lease = next(iter(user.loads))
        left = user.loads[lease]
        if left:
            rank = left.pop()
            self.load_jobs = [job for job in self.load_jobs if (job.lease, job.rank) != (lease, rank)]
            user.engine.report_load(rank, lease)
        if not left:
            del user.loads[lease]

    # Stores.

    @rule(which=WHICH, request=REQUESTS, start=STARTS, count=COUNTS)
    def prepare_store(self, which: int, request: str, start: int, count: int) -> None:
        if (user := self.user(which)) is None:
            return
        self.grant(user, request, self.keys(user, start, count))

    @rule(which=WHICH, group=st.integers(0, 1), count=COUNTS)
    def ask_for_credits(self, which: int, group: int, count: int) -> None:
        if (user := self.user(which)) is None:
            return
        engine = user.engine
        lease = engine.new_lease_id()
        slots = engine.credits(count, group=group % len(engine.namespace.groups), lease=lease)
        if slots:
            keys = to_keys(range(count), group % len(engine.namespace.groups))
            user.grants[lease] = [
                replace(slot, key=key) for slot, key in zip(slots, keys[: len(slots)], strict=True)
            ]

    @rule(
        which=WHICH,
        announce=st.sampled_from(["before", "never", "later"]),
        request=REQUESTS,
        start=STARTS,
        begin=st.booleans(),
    )
    def hand_out(self, which: int, announce: str, request: str, start: int, begin: bool) -> None:
        """Give the slots of a lease to the workers, who may begin at once; credits have their keys by now."""
        user = self.user(which)
        if user is None:
            return
        engine = user.engine
        if not user.grants:
            self.grant(user, request, self.keys(user, start, 3))
        if not user.grants:
            return
        lease = next(iter(user.grants))
        slots = user.grants.pop(lease)
        if announce == "before":
            assert set(engine.announce(slots, request)) == {ItemStatus.OK}
        elif announce == "later":
            user.to_announce = slots
        for slot in slots:
            for part in range(engine.num_parts):
                process = engine.processes[1 + part]
                self.store_jobs.append(StoreJob(user, process, slot, part, engine.content(slot.key)))
                if begin:
                    self.step(self.store_jobs[-1])

    @precondition(lambda self: self.store_jobs)
    @rule(which=WHICH, whole=st.booleans())
    def copy_in(self, which: int, whole: bool) -> None:
        """Take the next step of a store, dead or alive: half the bytes, or the rest."""
        job = self.store_jobs[which % len(self.store_jobs)]
        self.step(job)
        if whole:
            self.step(job)

    @precondition(lambda self: self.store_jobs)
    @rule(
        which=WHICH,
        how=st.sampled_from(["ok", "ok", "ok", "failed", "other key", "other generation"]),
        twice=st.booleans(),
    )
    def report_store(self, which: int, how: str, twice: bool) -> None:
        job = self.store_jobs[which % len(self.store_jobs)]
        self.user(0)  # bring the users up to date
        user = job.user
        if job.process.session is None or user.instance is not job.process.session.instance:
            return
        if job.step == 0:
            self.step(job)
        if job.step == 1:
            self.step(job)
        self.store_jobs.remove(job)
        self.report(job, how)
        if twice:
            status = user.engine.report_store(job.process.rank, job.slot, job.cells)
            assert status not in (ItemStatus.OK, ItemStatus.EXPIRED), f"the second report was {status!r}"

    @rule(which=WHICH, request=REQUESTS, start=STARTS, count=COUNTS)
    def store(self, which: int, request: str, start: int, count: int) -> None:
        self.store_whole(which, request, start, count)

    # Ends.

    @rule(which=WHICH, kind=st.sampled_from(["credits", "lookups", "grants", "loads", "unknown"]))
    def give_back(self, which: int, kind: str) -> None:
        """Return slots that were never handed out, or release a lease."""
        if (user := self.user(which)) is None:
            return
        engine = user.engine
        if kind == "credits":
            if user.grants:
                _, slots = user.grants.popitem()
                assert set(engine.return_credits(slots)) == {ItemStatus.OK}
            return
        held: dict[int, object] = {} if kind == "unknown" else getattr(user, kind)
        if held:
            lease = next(iter(held))
            del held[lease]
            engine.release(lease)
            return
        lease = engine.new_lease_id()
        assert not engine.release(lease), "an unknown lease was released"
        answer = engine.prepare_store(self.keys(user, 0, 3), lease=lease)
        assert StoreVerdict.GRANTED not in answer.verdicts, "a grant came after its release"

    @rule(
        which=WHICH,
        kind=st.sampled_from(["finish", "renew", "touch", "announce"]),
        request=REQUESTS,
        start=STARTS,
    )
    def small_talk(self, which: int, kind: str, request: str, start: int) -> None:
        if (user := self.user(which)) is None:
            return
        match kind:
            case "finish":
                user.engine.finish(request)
            case "renew":
                user.engine.renew(*user.lookups)
            case "announce":
                user.engine.announce(user.to_announce, request)
                user.to_announce = []
            case _:
                user.engine.touch(self.keys(user, start, 4), request)

    @rule(which=WHICH, weights_id=st.sampled_from(["", "w1", "w2"]))
    def reset(self, which: int, weights_id: str) -> None:
        if (user := self.user(which)) is None:
            return
        engine = user.engine
        engine.reset(weights_id)
        user.lookups.clear()
        if not weights_id:
            assert engine.hits(range(30)) == [], "a fresh epoch has chunks"

    @rule(seconds=STEPS_S)
    def tick(self, seconds: float) -> None:
        self.rig.tick(seconds)

    # Crashes, and what comes after.

    @rule(
        kind=st.sampled_from(["attached twice", "process", "engine", "daemon", "flipped byte"]),
        which=WHICH,
        rank=st.integers(0, 2),
        noticed=st.booleans(),
        freed=st.booleans(),
    )
    def trouble(self, kind: str, which: int, rank: int, noticed: bool, freed: bool) -> None:
        writing = [user for user in self.users if any(job.user is user for job in self.store_jobs)]
        user = (writing or self.users)[which % len(writing or self.users)]
        match kind:
            case "process":
                self.crash_a_process(user.engine, rank, noticed, freed)
            case "engine":
                self.restart_an_engine(user.engine, noticed, freed)
            case "daemon":
                self.crash_the_daemon()
            case "attached twice":
                self.attach_again(user.engine, min(rank, 1))
            case _:
                self.flip_a_byte(which)
        # Half of the time life goes on at once, and the others take what has become free.
        if which % 2:
            self.store_whole(which // 2, "r2", 0, 20)

    @precondition(lambda self: len(self.zombies) > 1)
    @rule(which=WHICH)
    def end_a_zombie(self, which: int) -> None:
        self.free_the_lock(self.zombies[which % len(self.zombies)])

    @rule(which=WHICH, promise=st.booleans())
    def attach(self, which: int, promise: bool) -> None:
        """Attach what is not attached. Who promises has let its copies end."""
        self.attach_user(self.users[which % len(self.users)], promise)

    @rule(which=WHICH)
    def background(self, which: int) -> None:
        """What the daemon's threads bring: hashes of complained-about slots, more backed memory."""
        self.rig.hash_asked()
        if which > 4:
            self.rig.back(self.num_units)

    @rule(which=WHICH, num_units=st.sampled_from([1, 5, 1_000]))
    def operate(self, which: int, num_units: int) -> None:
        """Evict a part of the pool; then what a key is said to be is what it is."""
        eviction = self.rig.core.evictions.begin(num_units * SLOT_UNIT_BYTES, "", lambda: None)
        for _ in eviction.pool:
            pass
        assert eviction.is_over
        user = self.users[which % len(self.users)]
        engine, keys = user.engine, self.keys(user, 0, 20)
        resident = self.rig.resident()
        try:
            asked = self.rig.core.explainer.begin(
                engine.namespace.digest(), engine.tenant, keys, self.rig.clock.now_ns
            )
        except BadRequest:  # nobody is attached, and nothing is left
            assert not any(space == engine.space for space, _ in resident)
            return
        for _ in asked.steps:
            pass
        for told in asked.keys:
            assert told.is_hit or (engine.space, told.key) not in resident, told

    # Tiers below the pool.

    @precondition(lambda self: self.rig.tiers)
    @rule(
        which=WHICH,
        what=st.sampled_from(["pump", "step", "step", "step", "all", "collect", "lose", "hide", "refuse"]),
        how=st.sampled_from(["ok", "ok", "ok", "ok", "failed", "corrupt", "missing"]),
    )
    def tier(self, which: int, what: str, how: str) -> None:
        """Give the tiers work, let them do a bit of it, hear of it; or let one of them change its mind."""
        tier = self.rig.tiers[which % len(self.rig.tiers)]
        match what:
            case "pump":
                self.rig.core.below.pump()
            case "step":
                tier.step(which, how)
            case "all":
                tier.finish_all(how)
                self.rig.core.below.collect(self.rig.clock.now_ns)
            case "collect":
                self.rig.core.below.collect(self.rig.clock.now_ns)
            case "refuse":
                tier.refuses = not tier.refuses
            case _ if not tier.stored:
                pass
            case "lose":
                tier.lose(list(tier.stored)[which % len(tier.stored)])
            case _:
                tier.hide(list(tier.stored)[which % len(tier.stored)])

    @rule(tenant=st.sampled_from(["", "t", None]), tiers_end=st.booleans())
    def clear(self, tenant: str | None, tiers_end: bool) -> None:
        """An operator clears the pool, and the tiers when they get to it."""
        core = self.rig.core
        if not any(below.being_cleared for below in core.below.tiers):
            for _ in core.clearings.begin("", tenant, "", lambda: None).pool:
                pass
        for tier in self.rig.tiers if tiers_end else ():
            while tier.clearing:
                tier.finish_clear()

    # Watchers.

    @rule(num_steps=st.integers(1, 6), slice_items=st.sampled_from([1, 3, 50]))
    def take_a_snapshot(self, num_steps: int, slice_items: int) -> None:
        """Go on with a snapshot, or begin one; with the events since its beginning it is the index."""
        self.watcher.go_on(num_steps, slice_items)

    # What always holds.

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.rig.check()

    @invariant()
    def a_mirror_of_the_events_is_the_index(self) -> None:
        self.watcher.check()

    @invariant()
    def no_slot_is_given_to_others_while_it_may_be_written(self) -> None:
        for job in self.store_jobs:
            if job.step != 1 or job.is_stale:
                continue
            record = self.rig.slots.record(job.slot.slot_id)
            is_own = record.state is State.RESERVED and record.generation == job.slot.generation
            assert is_own or record.state is State.QUARANTINED, (
                f"slot {job.slot.slot_id} is {record.state} while {job.process.lock_file} writes it"
            )

    def teardown(self) -> None:
        self.store_jobs.clear()
        for user in self.users:
            user.engine.die()
        for process in list(self.zombies):
            self.free_the_lock(process)
        for session_id in list(self.rig.core.books.instances.sessions):
            self.rig.core.end_session(session_id, "STREAM_ENDED")
        for tier in self.rig.tiers:
            tier.refuses = False
        self.rig.move()
        self.rig.tick(400)
        self.rig.assert_nothing_is_held()
