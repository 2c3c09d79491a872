"""What happens: every question an engine or a tick can put to the daemon, in one place.

`Core` is the facade of the state machine. It owns sessions' beginnings and ends, epochs, and time passing;
`lookups`, `grants` and `completions` answer the calls, over the same books.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

from kvtier_ops.namespace import FactsError, NamespaceFacts, SpaceName
from kvtier_server.admission import ReuseFilter
from kvtier_server.core.below import Below
from kvtier_server.core.books import Books, Notice
from kvtier_server.core.clearing import Clearings
from kvtier_server.core.completions import Completions
from kvtier_server.core.endings import Endings
from kvtier_server.core.evicting import Evictions
from kvtier_server.core.explaining import Explainer
from kvtier_server.core.grants import Grants
from kvtier_server.core.instances import Applicant, Instance, Locks, Role, Session
from kvtier_server.core.leases import Lease, LeaseKind
from kvtier_server.core.limits import Limits
from kvtier_server.core.lookups import Lookups
from kvtier_server.core.lower_tiers import CascadeWhen, ChunkShape, TierRules
from kvtier_server.core.namespaces import Geometry, Namespace
from kvtier_server.core.naming import Names
from kvtier_server.core.refused import BadRequest, Draining, Refused
from kvtier_server.core.transfers import Transfers
from kvtier_server.policies.base import CachePolicy
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.primary.size_classes import SizeClass, SlotTable
from kvtier_server.primary.tier import SLICE_ITEMS
from kvtier_server.secondary.base import SecondaryTier


class DoesNotFit(Refused):
    """A chunk is larger than this pool can hold."""

    reason = "POOL_FULL"


class Core:
    """The state machine. One thread at a time; never waits.

    `lookups`, `grants` and `completions` take the calls of attached sessions; `books` is for reading.
    """

    def __init__(
        self,
        pool_bytes: int,
        table: SlotTable,
        make_policy: Callable[[int], CachePolicy],
        locks: Locks,
        random64: Callable[[], int],
        limits: Limits | None = None,
        reuse_filter: ReuseFilter | None = None,
        tiers: Sequence[tuple[SecondaryTier, TierRules]] = (),
    ) -> None:
        """Begin empty. `tiers`: those below the pool, in the order in which they are asked."""
        self.books = Books(
            pool_bytes,
            table,
            make_policy,
            locks,
            limits or Limits(),
            ReuseFilter(0) if reuse_filter is None else reuse_filter,
        )
        self.below = Below(self.books, tiers, self._shape_of)
        self.books.primary.prefers_below = any(rules.cascade is not CascadeWhen.NEVER for _, rules in tiers)
        self.lookups = Lookups(self.books, self.below)
        self.grants = Grants(self.books)
        self.completions = Completions(self.books, self.below)
        self.transfers = Transfers(self.books)
        self._endings = Endings(self.books, self._forget_unused)
        self.namespaces: dict[str, Namespace] = {}
        self.names = Names(self.books, self.below, self.namespaces)
        self.clearings = Clearings(self.books, self.below, self.names, self._forget_unused)
        self.evictions = Evictions(self.books, self.below, self.names)
        self.explainer = Explainer(self.books, self.below, self.names)
        self.known_geometries: dict[str, dict[int, Geometry]] = {}
        self._locks = locks
        self._random64 = random64

    def attach(self, session_id: str, applicant: Applicant, facts: NamespaceFacts, now_ns: int) -> Session:
        """Open a session. Raises a refusal and changes nothing, or replaces the seat's dead holder.

        The lock must be held: it is all that tells when the process can write no more. With its word that
        none of its copies runs, or that it has no pool mapped, slots that waited for its lock are free again.
        """
        if self.books.draining:
            raise Draining("the daemon is stopping; attach again when it is back")
        self.books.events.now_ns = now_ns
        try:
            session = self._attach(session_id, applicant, facts, now_ns)
        except Refused:
            self._forget_unused_classes()
            self._let_go_if_unused(applicant.lock_file)
            raise
        self.books.left_locks.discard(applicant.lock_file)
        self._tell_workers(session.instance)
        return session

    def _attach(self, session_id: str, applicant: Applicant, facts: NamespaceFacts, now_ns: int) -> Session:
        if not self._locks.hold(applicant.lock_file):
            raise BadRequest(
                "lock_file",
                f"nobody holds {applicant.lock_file!r} here; a process creates and locks a file in `owners/` "
                "of the pool's directory, which it shares with the daemon, before it attaches",
            )
        namespace = self._namespace(facts, applicant.world_size)
        self.books.instances.check_same(applicant, namespace)
        holder = self.books.instances.seat_holder(applicant, now_ns)
        if holder is None:
            self.books.instances.check_room(applicant)
        if applicant.role is Role.WORKER:
            if applicant.geometry is None:
                raise BadRequest("geometry", "missing; a worker tells its tensors")
            namespace.register_geometry(applicant.rank, applicant.geometry)
        self.namespaces.setdefault(namespace.digest, namespace)
        namespace.num_engines += 1  # or it would look unused when the seat's holder ends
        if holder is not None:
            self.end_session(holder.id, "REPLACED")
        if applicant.previous_session or not applicant.mapped_pool_id:
            self._clear(applicant.lock_file)
        name = SpaceName(namespace.digest, applicant.tenant, applicant.epoch)
        space = self.books.primary.spaces.get_or_add(name)
        self.known_geometries.pop(namespace.digest, None)
        session = self.books.instances.open(session_id, applicant, namespace, space, now_ns)
        if session.role is Role.SCHEDULER:
            session.instance.space = space  # a worker that came first could not know the epoch
        if len(session.instance.sessions) > 1:
            namespace.num_engines -= 1  # counted with the instance's first session
        else:
            for size_class in namespace.classes:
                size_class.live_engines += 1
        return session

    def _namespace(self, facts: NamespaceFacts, world_size: int) -> Namespace:
        """Return the namespace of these facts, new if need be. Raises BadRequest, DoesNotFit."""
        try:
            facts.validate()
        except FactsError as error:
            raise BadRequest("namespace", str(error)) from error
        if facts.num_parts not in (1, world_size):
            problem = f"{facts.num_parts}; with world_size {world_size} it is that or 1"
            raise BadRequest("namespace.num_parts", problem)
        digest = facts.digest()
        known = self.namespaces.get(digest)
        if known is not None:
            if not known.num_engines and not self._has_chunks(known):
                known.forget_geometries()  # nothing is left that a new geometry could contradict
            return known
        slabs = self.books.primary.slabs
        classes: dict[int, SizeClass] = {}
        for group in sorted(range(len(facts.groups)), key=facts.slot_bytes, reverse=True):
            size_class = slabs.size_class(facts.slot_bytes(group))
            if size_class is None:
                raise DoesNotFit(
                    f"a chunk of group {group} takes {facts.slot_bytes(group)} bytes, but the pool has "
                    f"{slabs.pool_bytes} in slabs of {slabs.slab_bytes}; start the daemon "
                    "with a larger --pool-bytes, or the engine with fewer blocks_per_chunk"
                )
            classes[group] = size_class
        namespace = Namespace(facts, digest, tuple(classes[group] for group in range(len(facts.groups))))
        namespace.geometries.update(self.known_geometries.get(digest, {}))
        return namespace

    def _shape_of(self, space: KeySpace, key: bytes) -> ChunkShape | None:
        """Describe a chunk for a lower tier; None while not every part's geometry is known."""
        namespace = self.namespaces.get(space.name.namespace)
        geometry = namespace.geometry_digest() if namespace is not None else None
        if namespace is None or geometry is None:
            return None
        group = namespace.facts.groups[namespace.group_of(key)]
        return ChunkShape(group.part_bytes, namespace.facts.num_parts, geometry)

    def geometries(self) -> dict[str, dict[int, Geometry]]:
        """Registered geometries by namespace digest and part; those an earlier daemon left included."""
        attached = {digest: namespace.geometries for digest, namespace in self.namespaces.items()}
        return self.known_geometries | attached

    def end_session(self, session_id: str, reason: str) -> None:
        """End a session, and with it its whole instance. Unknown sessions are passed over.

        Loads are unpinned (readers are fenced by generation), unpublished slots are quarantined until the
        workers that may still write them are gone or have drained, and the other sessions are told.
        """
        session = self.books.instances.sessions.get(session_id)
        if session is None:
            return
        instance = session.instance
        self.books.counts[f"session_ended:{reason}"] += 1
        workers = {member.lock_file for (role, _), member in instance.sessions.items() if role is Role.WORKER}
        for member in self.books.instances.remove(instance):
            self.books.left_locks.add(member.lock_file)
            why = reason if member is session else "INSTANCE_LOST"
            self.books.notices.append(Notice(member.id, "ended", reason=why))
        instance.namespace.num_engines -= 1
        for size_class in instance.namespace.classes:
            size_class.live_engines -= 1
        self._endings.begin(instance, workers)

    def _clear(self, lock_file: str) -> None:
        """Free what waits for this lock: its process writes none of it."""
        self._endings.clear(lock_file)
        self.books.quarantine.clear(lock_file)

    def _let_go_if_unused(self, lock_file: str) -> None:
        """Follow a lock no longer whose end nothing waits for."""
        is_of_session = any(s.lock_file == lock_file for s in self.books.instances.sessions.values())
        is_awaited = lock_file in self.books.left_locks or lock_file in self.books.quarantine.guards
        if not (is_of_session or is_awaited):
            self._locks.let_go(lock_file)

    def _has_chunks(self, namespace: Namespace) -> bool:
        return any(
            s.chunks or s.writers for s in self.books.primary.spaces if s.name.namespace == namespace.digest
        )

    def _forget_unused(self) -> None:
        """Keep no namespace, and no key space, that holds nothing and that nobody is attached with."""
        self._forget_unused_spaces()
        for digest, namespace in list(self.namespaces.items()):
            if not namespace.num_engines and not self._has_chunks(namespace):
                del self.namespaces[digest]
        self._forget_unused_classes()

    def _forget_unused_spaces(self) -> None:
        used = {instance.space for instance in self.books.instances}
        for space in [space for space in self.books.primary.spaces if space not in used]:
            if not space.chunks and not space.writers:
                self.books.primary.spaces.forget(space)

    def _forget_unused_classes(self) -> None:
        used = {size_class for namespace in self.namespaces.values() for size_class in namespace.classes}
        self.books.primary.slabs.forget_unused(used)

    def _tell_workers(self, instance: Instance) -> None:
        scheduler = instance.sessions.get((Role.SCHEDULER, 0))
        if scheduler is not None:
            missing = tuple(instance.missing_ranks())
            self.books.notices.append(Notice(scheduler.id, "workers_changed", ranks=missing))

    def finish(self, instance: Instance, request_id: str) -> None:
        """Forget a request: its lookup leases end, running copies go on."""
        request = instance.requests.pop(request_id)
        if request is not None:
            for lease_id in list(request.lookup_leases):
                lease = self.books.leases.get(instance, lease_id)
                if lease is not None:
                    self.books.end_lease(lease)

    def renew(self, session: Session, lease_ids: Sequence[int], now_ns: int) -> list[bool]:
        """Extend lookup leases; False for those that are gone."""
        instance = session.for_scheduling()
        renewed = []
        for lease_id in lease_ids:
            lease = self.books.leases.get(instance, lease_id)
            if lease is not None and lease.kind is LeaseKind.LOOKUP:
                self.books.leases.renew(lease, now_ns, instance.lookup_lease_ns)
            renewed.append(lease is not None)
        return renewed

    def release(self, instance: Instance, lease_id: int, now_ns: int) -> bool:
        """End a lease at the scheduler's word; an unknown id is remembered, and a later grant under it void.

        For a store or credit lease, expired or not, it is the word that slots nobody announced were never
        handed out; many are freed in slices. Running copies go on.
        """
        lease = self.books.leases.get(instance, lease_id)
        if lease is None:
            self.books.leases.bury(instance, lease_id, now_ns)
            return False
        self.books.leases.bury(instance, lease_id, now_ns)
        if lease.kind in (LeaseKind.LOOKUP, LeaseKind.LOAD):
            self.books.end_lease(lease)
            return True
        self.books.put_off(self._endings.take_back_unused(lease))
        return True

    def reset(self, session: Session, weights_id: str) -> int:
        """Move the instance to another epoch: random, or shared by all that reset to `weights_id`.

        Lookup leases end; what is being stored now ends unpublished when its writers have reported.
        """
        instance = session.for_scheduling()
        epoch = self._random64() | 1
        if weights_id:
            epoch = int.from_bytes(hashlib.sha256(weights_id.encode()).digest()[:8], "big") | 1
        for lease in self.books.leases.of_instance(instance):
            if lease.kind is LeaseKind.LOOKUP:
                self.books.end_lease(lease)
            for reservation in self.books.reservations.of_lease(lease):
                reservation.failed = True
        # A stamp belongs to one chunk: in the new space the same key is another one.
        instance.requests.forget_keys()
        name = SpaceName(instance.namespace.digest, instance.tenant, epoch)
        instance.space = self.books.primary.spaces.get_or_add(name)
        self._forget_unused_spaces()
        return epoch

    def tick(self, now_ns: int) -> None:
        """Let time pass: expire leases, tombstones and waits, and try the locks of processes that left."""
        left = SLICE_ITEMS
        self.books.events.now_ns = now_ns
        for lease in self.books.leases.expired(now_ns):
            self._expire(lease)
            left -= 1 + len(lease.slot_ids)
            if left <= 0:
                break  # the next tick goes on
        self.books.end_waits(now_ns)
        self.below.promotions.end_probes(now_ns)
        self.below.promotions.end_loads(now_ns)
        self.below.promotions.end_waits(now_ns)
        self.books.leases.forget_tombstones(now_ns, self.books.limits.max_remembered)
        self._try_locks()
        self.books.settle()

    def _try_locks(self) -> None:
        """Try the locks of processes that left or that slots wait for; what is free is followed no longer."""
        tried = self.books.left_locks.union(self.books.quarantine.guards)
        free = [lock_file for lock_file in tried if self._locks.is_free(lock_file)]
        if not free:
            return
        attached = {session.lock_file for session in self.books.instances.sessions.values()}
        for lock_file in free:
            self.books.left_locks.discard(lock_file)
            self._clear(lock_file)
            if lock_file not in attached:  # else the end of its session is still to come
                self._locks.let_go(lock_file)

    def _expire(self, lease: Lease) -> None:
        """End a lease whose time is over; slots stay under it until nobody can be writing them."""
        self.books.counts[f"lease_expired:{lease.kind}"] += 1
        lease.expired = True
        for reservation in self.books.reservations.of_lease(lease):
            reservation.expired = True
        if not lease.slot_ids:
            self.books.end_lease(lease)

    def check_integrity(self) -> None:
        """Assert that the books agree: states add up to the slots, pins to the leases. O(everything)."""
        while self.books.settle():
            pass
        self.books.primary.check_integrity()
        pins: Counter[Chunk] = Counter()
        for lease in self.books.leases:
            pins.update(lease.chunks)
        pins.update(self.below.pins())
        for chunk in self.books.primary.by_slot.values():
            assert chunk.pins == pins[chunk], f"slot {chunk.slot_id}: {chunk.pins} pins, {pins[chunk]} leases"
        reserved: Counter[int] = Counter(r.size_class.slot_bytes for r in self.books.reservations)
        promotions = self.below.promotions
        reserved.update(size_class.slot_bytes for _, _, size_class in promotions.coming() if size_class)
        reserved.update(size_class.slot_bytes for size_class in promotions.late())
        self.below.check_integrity()
        assert self.books.reservations.num_named == sum(r.key is not None for r in self.books.reservations)
        for slot_bytes, size_class in self.books.primary.slabs.classes.items():
            assert reserved[slot_bytes] == size_class.num_reserved, (
                slot_bytes,
                reserved,
                size_class.num_reserved,
            )
        assert self.books.reservations.num_credits == sum(r.key is None for r in self.books.reservations)
        for instance in self.books.instances:
            own = [r for r in self.books.reservations if r.instance is instance]
            assert instance.inflight_bytes == sum(r.size_class.slot_bytes for r in own)
            assert instance.credit_bytes == sum(r.size_class.slot_bytes for r in own if r.key is None)
            held = [
                chunk for lease in self.books.leases if lease.instance is instance for chunk in lease.chunks
            ]
            assert instance.pinned_bytes == sum(chunk.size_class.slot_bytes for chunk in held)
        for space in self.books.primary.spaces:
            writers = Counter(
                r.key for r in self.books.reservations if r.space is space and r.key is not None
            )
            writers.update(key for coming_into, key, _ in promotions.coming() if coming_into is space)
            assert writers == Counter(space.writers), f"writers of {space.name} do not add up"
