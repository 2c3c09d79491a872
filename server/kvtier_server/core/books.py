"""The books of the core: what every room reads and a few may write, and the moves they share.

Owns the state, the shares of the pool, pins through leases, and who waits for a key. The rules of the calls
are in `lookups.py`, `grants.py`, `completions.py`; the order of a daemon's life in `tiering.py`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from itertools import count

from kvtier_server.admission import ReuseFilter
from kvtier_server.core.events import REMOVED, EventLog
from kvtier_server.core.instances import Instance, Instances, Locks, Role, WorkersMissing
from kvtier_server.core.leases import Lease, LeaseBook, LeaseKind
from kvtier_server.core.limits import Limits
from kvtier_server.core.quarantine import Quarantine
from kvtier_server.core.refused import BadRequest, Draining
from kvtier_server.core.requests import Request
from kvtier_server.core.stores import Reservation, Reservations
from kvtier_server.policies.base import CachePolicy
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.primary.size_classes import SizeClass, SlotTable
from kvtier_server.primary.tier import SLICE_ITEMS, PrimaryTier

MAX_COUNTED_TENANTS = 32
"""Tenants whose refusals by quota are counted one by one."""
OTHER_TENANTS = "other"
"""Those beyond it, together."""

MAX_REQUEST_ID_CHARS = 256

SETTLE_AT_ITEMS = 16_384
"""Uses and pins put off before they are settled out of turn: 4 ms that a PrepareStore may find left to do."""

SETTLE_AT_LEASES = 256
"""Ended leases whose chunks wait to be unpinned, likewise."""


STEP_WAITS, WAIT_COST = 128, 4
"""Waits that end in one go, a fraction of a slice, and what the end of each costs, as items of a slice."""


class LookupStatus(IntEnum):
    """What became of a key in a Lookup; the numbers are the wire's."""

    HIT = 1
    HIT_UNLEASED = 2
    PENDING = 3
    MISS = 4


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to tell a session on its stream.

    `kind`: resolved, credits_wanted, workers_changed, ended. `lease_id`, `key`, `status`, `slot_id` and
    `generation` belong to resolved; `ranks` to workers_changed; `reason` to ended; `count` to credits_wanted.
    """

    session_id: str
    kind: str
    lease_id: int = 0
    key: bytes = b""
    status: int = 0
    slot_id: int = 0
    generation: int = 0
    ranks: tuple[int, ...] = ()
    reason: str = ""
    count: int = 0


@dataclass(frozen=True, slots=True)
class HashRequest:
    """A part whose bytes somebody should hash, off the core's thread: a reader says they are wrong."""

    slot_id: int
    generation: int
    part: int
    part_bytes: int


class Books:
    """State of the core. Not a facade: callers outside the core use `tiering.Core`."""

    def __init__(
        self,
        pool_bytes: int,
        table: SlotTable,
        make_policy: Callable[[int], CachePolicy],
        locks: Locks,
        limits: Limits,
        reuse_filter: ReuseFilter,
    ) -> None:
        self.limits = limits
        self.counts: Counter[str] = Counter()
        self.events = EventLog(limits.max_events, limits.max_event_keys, limits.max_keys_per_event)
        self.primary = PrimaryTier(pool_bytes, table, make_policy, self._on_removed)
        self.instances = Instances(limits, locks)
        self.leases = LeaseBook(limits.tombstone_ns)
        self.reservations = Reservations()
        self.being_written: Counter[tuple[int, int]] = Counter()
        """(slot, part) of reserved slots -> copies into them that the daemon's own processes make now."""
        self.quarantine = Quarantine(self.primary)
        self.left_locks: set[str] = set()
        """Lock files of processes whose sessions have ended: trying one removes its file once it is free."""
        self.filter = reuse_filter
        self.quota_refused: Counter[str] = Counter()
        """Keys that a quota kept out, by tenant; bounded by `count_quota_refused`."""
        self.draining = False
        self.notices: deque[Notice] = deque()
        self.hash_requests: deque[HashRequest] = deque()
        """For the daemon's threads; `completions` sees to it that they are few, and different."""
        self.unawaited: deque[tuple[KeySpace, bytes]] = deque()
        """Keys whose last waiter has gone without them, until `promotions` has looked at them."""
        self._waiters: dict[tuple[KeySpace, bytes], list[Lease]] = {}
        self._waits: list[tuple[int, int, Lease]] = []
        """Heap of (end, number, lease), also of leases that wait for nothing any more."""
        self._wait_numbers = count()
        self._now_ns = 0
        self._is_ending_waits = False
        self._ended_slots: dict[SizeClass, list[int]] = {}
        self._unpinning: deque[list[Chunk]] = deque()
        self._put_off: deque[Iterator[int]] = deque()

    def set_limits(self, limits: Limits) -> None:
        """Go by other limits from now on; what is beyond them stays as it is.

        The size of the log of events, and what instances that exist may remember, stay as they were.
        """
        self.limits = limits
        self.instances.set_limits(limits)
        self.leases.tombstone_ns = limits.tombstone_ns

    def check_may_lease(self, instance: Instance) -> None:
        """Raise Draining, or WorkersMissing before all ranks are attached.

        Only the scheduler's session can ask (`Session.for_scheduling`), so the scheduler is.
        """
        if self.draining:
            raise Draining("the daemon is stopping; nothing new is leased")
        if len(instance.sessions) <= instance.world_size:
            missing = instance.missing_ranks()
            if missing:
                ranks = ",".join(map(str, missing))
                raise WorkersMissing(
                    f"worker ranks {ranks} are not attached; nothing is leased before", ranks=ranks
                )

    def request(self, instance: Instance, request_id: str, params: bytes | None = None) -> Request:
        """Return the request, new if need be; parameters are kept from the call that brings them."""
        if not request_id or len(request_id) > MAX_REQUEST_ID_CHARS:
            raise BadRequest(
                "context.request_id", f"{len(request_id)} characters; 1 to {MAX_REQUEST_ID_CHARS} are allowed"
            )
        if params is not None and len(params) > self.limits.max_params_bytes:
            raise BadRequest(
                "context.params_json", f"{len(params)} bytes; at most {self.limits.max_params_bytes}"
            )
        request = instance.requests.get_or_add(request_id)
        if params is not None:
            request.params = params
        return request

    def count_quota_refused(self, tenant: str, num_keys: int) -> None:
        """Count keys that a tenant's quota kept out; from MAX_COUNTED_TENANTS on, tenants together."""
        if tenant not in self.quota_refused and len(self.quota_refused) >= MAX_COUNTED_TENANTS:
            tenant = OTHER_TENANTS
        self.quota_refused[tenant] += num_keys

    def note_use(
        self,
        instance: Instance,
        request: Request,
        keys: Sequence[bytes],
        found: Sequence[Chunk | None],
        ranges: Sequence[tuple[int, int]],
        used: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Count the request's use of what it found, once; the tail of a prefix is older than its head.

        Every key gets its stamp, for a later publish; only chunks in the ranges `used` (all, if not given)
        count as used now.
        """
        if request.runs:
            fresh = [i for i, key in enumerate(keys) if request.stamp_of(key) is None]
            keys = [keys[i] for i in fresh]
            found = [found[i] for i in fresh]
            ranges, used = [(0, len(keys))], None
        if not keys:
            return
        first = self.primary.issue_stamps(len(keys))
        stamps: Sequence[int] = range(first + len(keys) - 1, first - 1, -1)
        if len(ranges) > 1:
            # Interleave the groups by position, or all chunks of the last group would go first.
            order = sorted(
                (i - start, g, i) for g, (start, end) in enumerate(ranges) for i in range(start, end)
            )
            by_key = [0] * len(keys)
            for stamp, (_, _, i) in zip(stamps, order, strict=True):
                by_key[i] = stamp
            stamps = by_key
        instance.requests.add_run(request, keys, stamps)
        for start, end in ranges if used is None else used:
            part = found[start:end]
            if part.count(None) < len(part):
                request.holds_chunks = True
                self.primary.use(request, part, stamps[start:end])

    def max_pinned_bytes(self, instance: Instance) -> int:
        """Bytes of slots one instance may have pinned, and as many again reserved."""
        share = int(self.primary.slabs.pool_bytes * self.limits.pin_share)
        return max(share, *(size_class.slot_bytes for size_class in instance.namespace.classes))

    def max_credit_bytes(self, instance: Instance) -> int:
        """Bytes of slots one instance may hold as credits."""
        pool_bytes = self.primary.slabs.pool_bytes
        slot_bytes = max(size_class.slot_bytes for size_class in instance.namespace.classes)
        few = min(self.limits.min_credit_slots * slot_bytes, pool_bytes // 4)
        return max(int(pool_bytes * self.limits.credit_share), few, slot_bytes)

    def pin(self, lease: Lease, chunks: Sequence[Chunk]) -> None:
        """Put chunks under a lookup or load lease."""
        lease.chunks.extend(chunks)
        lease.instance.pinned_bytes += lease.instance.namespace.slot_bytes_of(chunks)
        self.primary.pin(chunks)

    def end_lease(self, lease: Lease) -> None:
        """Take a lease out: pins go, waiting ends. Reservations are the caller's to end."""
        self.leases.remove(lease)
        lease.instance.pinned_bytes -= lease.instance.namespace.slot_bytes_of(lease.chunks)
        self._unpinning.append(lease.chunks)
        lease.chunks = []
        if lease.kind is LeaseKind.LOAD:
            lease.instance.remember_ended(("lease", lease.id), self.limits.max_remembered)
        for key in lease.pending:
            self._stop_waiting(lease, key)
        lease.pending = set()
        if lease.kind is LeaseKind.LOOKUP:
            request = lease.instance.requests.get(lease.request_id)
            if request is not None:
                lease.instance.requests.remove_lease(request, lease.id)

    def add_load_lease(self, instance: Instance, lease_id: int, request_id: str, now_ns: int) -> Lease:
        """Enter a load lease that every rank has to report the end of; reports that came early count."""
        lease = Lease(lease_id, LeaseKind.LOAD, instance, now_ns, self.limits.copy_lease_ns)
        lease.request_id = request_id
        lease.ranks_left = set(range(instance.world_size)) - instance.early_loads.pop(lease_id, set())
        self.leases.add(lease)
        return lease

    def is_untouched(self, reservation: Reservation) -> bool:
        """Tell whether no rank has written its part, or has it written now."""
        parts = range(len(reservation.checksums))
        return reservation.untouched and not any(
            (reservation.slot_id, part) in self.being_written for part in parts
        )

    def end_unpublished(self, reservation: Reservation) -> None:
        """End a reservation whose slot nobody can still be writing; `free_ended` frees the slot."""
        if self.reservations.remove(reservation) and reservation.key is not None:
            self.resolve(reservation.space, reservation.key, None)
        self._ended_slots.setdefault(reservation.size_class, []).append(reservation.slot_id)

    def free_ended(self) -> None:
        """Free what was ended unpublished, with one call of the table per class: each costs as 100 slots.

        Whoever ends reservations must call it before the core is left.
        """
        while self._ended_slots:
            size_class, slot_ids = self._ended_slots.popitem()
            self.primary.free_reserved(size_class, slot_ids)

    def condemn(self, chunk: Chunk, owner: int) -> None:
        """Take a corrupt chunk out. Its slot waits for all that map the pool now: any may have written it."""
        if self.primary.condemn(chunk, owner):
            workers = {s.lock_file for s in self.instances.sessions.values() if s.role is Role.WORKER}
            self.quarantine.add_condemned(chunk, workers | self.left_locks)

    def wait_for(self, lease: Lease, keys: set[bytes], until_ns: int) -> None:
        """Let a lookup lease wait for unfinished stores of `keys`."""
        lease.pending = keys
        heappush(self._waits, (until_ns, next(self._wait_numbers), lease))
        for key in keys:
            self._waiters.setdefault((lease.instance.space, key), []).append(lease)

    def resolve(self, space: KeySpace, key: bytes, chunk: Chunk | None) -> None:
        """Tell whoever waits for `key` that it is there, pinned under their lease, or will not come."""
        for lease in self._waiters.pop((space, key), []):
            lease.pending.discard(key)
            scheduler = lease.instance.sessions.get((Role.SCHEDULER, 0))
            status = LookupStatus.MISS
            if chunk is not None:
                room = self.max_pinned_bytes(lease.instance) - lease.instance.pinned_bytes
                status = LookupStatus.HIT_UNLEASED
                if room >= chunk.size_class.slot_bytes:
                    status = LookupStatus.HIT
                    self.pin(lease, [chunk])
            if scheduler is None:
                continue
            slot_id, generation = (chunk.slot_id, chunk.generation) if chunk is not None else (0, 0)
            self.notices.append(Notice(scheduler.id, "resolved", lease.id, key, status, slot_id, generation))

    def is_awaited(self, space: KeySpace, key: bytes) -> bool:
        """Tell whether anybody waits for `key`."""
        return (space, key) in self._waiters

    def end_waits(self, now_ns: int) -> None:
        """Resolve to MISS what has been waited for long enough; many waits end in slices."""
        self._now_ns = now_ns
        if not self._is_ending_waits and self._waits and self._waits[0][0] <= now_ns:
            self._is_ending_waits = True
            self.put_off(self._end_waits())

    def _end_waits(self) -> Iterator[int]:
        try:
            while self._waits and self._waits[0][0] <= self._now_ns:
                _, _, lease = heappop(self._waits)
                yield 1
                # What is left is looked at anew: others resolve keys, and end leases, between two slices.
                while lease.pending:
                    num_keys = min(len(lease.pending), STEP_WAITS)
                    for _ in range(num_keys):
                        self._resolve_late(lease, lease.pending.pop())
                    yield num_keys * WAIT_COST
        finally:
            self._is_ending_waits = False

    def _resolve_late(self, lease: Lease, key: bytes) -> None:
        self._stop_waiting(lease, key)
        scheduler = lease.instance.sessions.get((Role.SCHEDULER, 0))
        if scheduler is not None:
            self.notices.append(Notice(scheduler.id, "resolved", lease.id, key, LookupStatus.MISS))

    def _stop_waiting(self, lease: Lease, key: bytes) -> None:
        name = (lease.instance.space, key)
        waiters = self._waiters[name]
        waiters.remove(lease)
        if not waiters:
            del self._waiters[name]
            self.unawaited.append(name)

    @property
    def should_settle(self) -> bool:
        """Whether so much was put off that it should not wait for the next tick.

        Waiting pays: a chunk pinned and unpinned between two settlements costs the policies nothing.
        """
        if self.primary.num_unsettled >= SETTLE_AT_ITEMS or len(self._unpinning) >= SETTLE_AT_LEASES:
            return True
        return bool(self._put_off) or self.quarantine.has_unguarded or self.primary.is_draining

    def put_off(self, work: Iterator[int]) -> None:
        """Do a slice of what was put off now, and `work` behind the rest of it.

        It is advanced until it ends; each value it yields says how many items it has done since the last.
        """
        self._put_off.append(work)
        self._go_on(SLICE_ITEMS)

    def _go_on(self, max_items: int) -> int:
        left = max_items
        while self._put_off and left > 0:
            done = next(self._put_off[0], None)
            if done is None:
                self._put_off.popleft()
            else:
                left -= done
        return left

    def settle(self) -> bool:
        """Do a slice of what was put off: ends of sessions, quarantines, unpins, policies, slabs on the move.

        False when all is done.
        """
        left = self.quarantine.free_slice(self._go_on(SLICE_ITEMS))
        while self._unpinning and left > 0:
            chunks = self._unpinning.popleft()
            left -= len(chunks)
            self.primary.unpin(chunks)
        left = self.primary.settle(left)
        if left > 0:
            self.primary.drain_slice(left)
        if self._put_off or self.quarantine.has_unguarded:
            return True
        return bool(self._unpinning or self.primary.has_unsettled or self.primary.is_draining)

    def unpin_all(self) -> None:
        """Do every unpin that was put off: before victims are looked for."""
        while self._unpinning:
            self.primary.unpin(self._unpinning.popleft())

    def _on_removed(self, space: KeySpace, keys: Sequence[bytes], reason: str) -> None:
        self.counts[f"removed:{reason}"] += len(keys)
        self.events.record(REMOVED, space.name, reason, keys)
