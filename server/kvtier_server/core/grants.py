"""PrepareLoad, PrepareStore and credits: slots granted, and why not.

Owns the verdicts and the shares of an instance. A grant evicts in the call what it must and never waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from kvtier_server.core.books import Books, LookupStatus, Notice
from kvtier_server.core.instances import Instance, Role, Session
from kvtier_server.core.leases import Lease, LeaseKind
from kvtier_server.core.limits import SECOND_NS
from kvtier_server.core.lookups import LookupAnswer
from kvtier_server.core.namespaces import check_keys
from kvtier_server.core.refused import BadRequest, Inflight, LeaseUnknown, Refused
from kvtier_server.core.requests import Request
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.primary.tier import SLICE_ITEMS


class StoreVerdict(IntEnum):
    """What became of a key in a PrepareStore; the numbers are the wire's."""

    GRANTED = 1
    RESIDENT = 2
    PENDING = 3
    FILTERED = 4
    QUOTA = 5
    FULL = 6
    INFLIGHT = 7


class NotResident(Refused):
    """Some of the keys to load are not in the pool."""

    reason = "NOT_RESIDENT"


@dataclass(frozen=True, slots=True)
class StoreAnswer:
    """One verdict per key; slots and generations of the granted ones, in order; credits per asked group."""

    verdicts: list[int]
    slot_ids: list[int]
    generations: list[int]
    evicted: list[bytes]
    credits: list[tuple[int, list[int], list[int]]]


class Grants:
    """Grants load leases, store leases and credits."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def prepare_load(
        self, session: Session, request: Request, keys: Sequence[bytes], lease_id: int, now_ns: int
    ) -> list[Chunk]:
        """Pin all keys under a load lease, or none. Raises NotResident, Inflight, WorkersMissing."""
        instance = session.for_scheduling()
        check_keys(keys, self._books.limits.max_keys)
        self._books.check_may_lease(instance)
        if not lease_id:
            raise BadRequest("lease_id", "0; the client chooses one")
        known = self._books.leases.get(instance, lease_id)
        if known is not None:
            if known.kind is LeaseKind.LOAD and [chunk.key for chunk in known.chunks] == list(keys):
                return known.chunks  # a repeated call
            raise LeaseUnknown(f"lease {lease_id:#x} holds something else")
        if self._books.leases.is_buried(instance, lease_id):
            raise LeaseUnknown(f"lease {lease_id:#x} was released before it was granted")
        if ("lease", lease_id) in instance.ended:
            raise LeaseUnknown(f"lease {lease_id:#x} has ended; its ranks would not report again")
        found = list(map(instance.space.chunks.get, keys))
        missing = [key for key, chunk in zip(keys, found, strict=True) if chunk is None]
        if missing:
            raise NotResident(
                f"{len(missing)} of {len(keys)} keys are not resident",
                keys=",".join(key.hex() for key in missing[:64]),
            )
        chunks = [chunk for chunk in found if chunk is not None]
        num_bytes = sum(chunk.size_class.slot_bytes for chunk in chunks)
        if instance.pinned_bytes + num_bytes > self._books.max_pinned_bytes(instance):
            raise Inflight(
                f"{num_bytes} bytes more than the {instance.pinned_bytes} the engine has pinned exceed "
                f"its share, {self._books.max_pinned_bytes(instance)} (limits.pin_share)"
            )
        self._books.note_use(instance, request, keys, found, [(0, len(keys))])
        lease = self._books.add_load_lease(instance, lease_id, request.id, now_ns)
        self._books.pin(lease, chunks)
        return chunks

    def prepare_store(
        self,
        session: Session,
        request: Request | None,
        keys: Sequence[bytes],
        asked_credits: Sequence[tuple[int, int]],
        lease_id: int,
        now_ns: int,
        extend: bool = False,
    ) -> StoreAnswer:
        """Reserve a slot per key and slots ahead, evicting what must go. Never waits.

        `asked_credits` are (group, count). A known lease is a repeated call, answered from what it holds;
        with `extend` the keys are further ones of the same call, which came in slices. Raises WorkersMissing,
        Draining, BadRequest; all else is a verdict.
        """
        instance = session.for_scheduling()
        check_keys(keys, self._books.limits.max_keys, at_least=0)
        self._books.check_may_lease(instance)
        if not lease_id:
            raise BadRequest("lease_id", "0; the client chooses one")
        if keys and asked_credits:
            raise BadRequest("credits", "keys and credits in one call; they need leases of their own")
        for group, count in asked_credits:
            if not (
                0 <= group < len(instance.namespace.classes) and 1 <= count <= self._books.limits.max_keys
            ):
                raise BadRequest("credits", f"group {group}, count {count}")
        ranges = instance.namespace.split(keys)
        known = self._books.leases.get(instance, lease_id)
        if known is not None and known.kind not in (LeaseKind.STORE, LeaseKind.CREDIT):
            raise LeaseUnknown(f"lease {lease_id:#x} is a {known.kind} lease")
        # One that was released stays in the book until its slots are free.
        is_void = self._books.leases.is_buried(instance, lease_id) or (known is not None and known.expired)
        if known is not None and not extend and not is_void:
            return self._repeat_store(known, keys, asked_credits)
        if is_void or instance.num_leases >= self._books.limits.max_leases:
            verdict = StoreVerdict.INFLIGHT
            return StoreAnswer(
                [verdict] * len(keys), [], [], [], [(group, [], []) for group, _ in asked_credits]
            )
        if asked_credits:
            return self._grant_credits(instance, lease_id, asked_credits, now_ns)
        assert request is not None, "a store of keys belongs to a request"
        lease = known or Lease(lease_id, LeaseKind.STORE, instance, now_ns, self._books.limits.copy_lease_ns)
        lease.request_id = request.id
        answer = self._grant_keys(lease, request, keys, ranges)
        if known is None and lease.slot_ids:
            self._books.leases.add(lease)
        if StoreVerdict.FULL in answer.verdicts:
            self._ask_credits_back(instance, answer.verdicts.count(StoreVerdict.FULL), now_ns)
        return answer

    def check_wishes(
        self, session: Session, wishes: Sequence[tuple[int, int, int]], store_lease_id: int
    ) -> None:
        """Raise what `for_misses` would refuse, before the lookup has leased anything."""
        instance = session.for_scheduling()
        self._books.check_may_lease(instance)
        if not store_lease_id:
            raise BadRequest("store_lease_id", "0; the client chooses one where it asks for slots")
        known = self._books.leases.get(instance, store_lease_id)
        if known is not None and known.kind is not LeaseKind.CREDIT:
            raise LeaseUnknown(f"lease {store_lease_id:#x} is a {known.kind} lease")
        groups = [group for group, _, _ in wishes]
        if len(set(groups)) < len(groups) or not all(
            group < len(instance.namespace.classes) for group in groups
        ):
            raise BadRequest("slots_for_misses.group", f"{groups}; one entry per group of the namespace")

    def for_misses(
        self,
        session: Session,
        keys: Sequence[bytes],
        answer: LookupAnswer,
        wishes: Sequence[tuple[int, int, int]],
        lease_id: int,
        now_ns: int,
    ) -> list[tuple[int, list[int], list[int]]]:
        """Reserve credits for what a lookup of `keys` has just not found, and return them by group.

        `wishes` are (group, at_most, spare), checked before: a slot per wanted key that is MISS, for
        `at_most` of them, of which the engine has `spare` already.
        """
        ranges = session.instance.namespace.split(keys)
        needed = []
        for group, at_most, spare in wishes:
            first, end = ranges[group]
            missing = answer.statuses[first:end].count(int(LookupStatus.MISS))
            missing -= sum(first <= index < end for index in answer.unwanted)
            if (count := min(missing, at_most) - spare) > 0:
                needed.append((group, count))
        if not needed:
            return []
        return self.prepare_store(session, None, (), needed, lease_id, now_ns).credits

    def _grant_keys(
        self, lease: Lease, request: Request, keys: Sequence[bytes], ranges: Sequence[tuple[int, int]]
    ) -> StoreAnswer:
        self._books.unpin_all()
        instance = lease.instance
        space = instance.space
        verdicts = self._verdicts(space, request, keys)
        if StoreVerdict.RESIDENT in verdicts:
            # What is said to be there must not make room for the rest of this very call.
            resident = [space.chunks[key] for key in keys if key in space.chunks]
            self._books.primary.keep_for(request, resident)
            request.holds_chunks = True
        answer = StoreAnswer(verdicts, [], [], [], [])
        for group, (first, end) in enumerate(ranges):
            size_class = instance.namespace.classes[group]
            wanted = [i for i in range(first, end) if verdicts[i] == StoreVerdict.GRANTED]
            room = (
                max(self._books.max_pinned_bytes(instance) - instance.inflight_bytes, 0)
                // size_class.slot_bytes
            )
            for index in wanted[room:]:
                verdicts[index] = int(StoreVerdict.INFLIGHT)
            wanted = wanted[:room]
            if not wanted:
                continue
            granted = [keys[i] for i in wanted]
            reserved = self._books.primary.reserve(
                size_class,
                len(granted),
                instance.nonce,
                partial(list, map(space.chunk_id, granted)),
                request if request.holds_chunks else None,
            )
            count = len(reserved.slot_ids)
            for index in wanted[count:]:
                verdicts[index] = int(StoreVerdict.FULL)
            self._books.reservations.add(
                lease, reserved.slot_ids, reserved.generations, size_class, granted[:count], request
            )
            answer.slot_ids.extend(reserved.slot_ids)
            answer.generations.extend(reserved.generations)
            answer.evicted.extend(chunk.key for chunk in reserved.evicted if chunk.space is space)
        for verdict, count in Counter(verdicts).items():
            if verdict != StoreVerdict.GRANTED:
                self._books.counts[f"refused:{StoreVerdict(verdict).name}"] += count
            if verdict == StoreVerdict.QUOTA:
                self._books.count_quota_refused(lease.instance.tenant, count)
        return answer

    def _verdicts(self, space: KeySpace, request: Request, keys: Sequence[bytes]) -> list[int]:
        """First verdict per key: resident, pending, filtered, or to be granted if there is room."""
        granted, resident, pending = (
            int(StoreVerdict.GRANTED),
            int(StoreVerdict.RESIDENT),
            int(StoreVerdict.PENDING),
        )
        chunks, writers = space.chunks, space.writers
        verdicts = [resident if key in chunks else pending if key in writers else granted for key in keys]
        if len(set(keys)) < len(keys):
            seen: set[bytes] = set()
            for index, key in enumerate(keys):
                if key in seen and verdicts[index] == granted:
                    verdicts[index] = pending  # by its first mention
                seen.add(key)
        if self._books.filter.is_active:
            asked = [index for index, verdict in enumerate(verdicts) if verdict == granted]
            wanted = self._books.filter.offer(
                [space.chunk_id(keys[index]) for index in asked], request.serial
            )
            for index, want in zip(asked, wanted, strict=True):
                if not want:
                    verdicts[index] = int(StoreVerdict.FILTERED)
        return verdicts

    def _grant_credits(
        self, instance: Instance, lease_id: int, asked_credits: Sequence[tuple[int, int]], now_ns: int
    ) -> StoreAnswer:
        """Reserve at most a slice: who needs more asks again, as after any grant that was short."""
        self._books.unpin_all()
        lease = Lease(lease_id, LeaseKind.CREDIT, instance, now_ns, None)
        grants = []
        left = SLICE_ITEMS
        for group, count in asked_credits:
            size_class = instance.namespace.classes[group]
            room = (
                max(self._books.max_credit_bytes(instance) - instance.credit_bytes, 0)
                // size_class.slot_bytes
            )
            self._books.primary.settle()
            available = (
                size_class.num_free
                + len(size_class.policy)
                + self._books.primary.slabs.growable_slots(size_class)
            )
            granted = min(count, room, (available + 1) // 2, left)
            left -= granted
            reserved = self._books.primary.reserve(size_class, granted, instance.nonce)
            self._books.reservations.add(
                lease, reserved.slot_ids, reserved.generations, size_class, None, None
            )
            grants.append((group, reserved.slot_ids, reserved.generations))
        if lease.slot_ids:
            self._books.leases.add(lease)
        return StoreAnswer([], [], [], [], grants)

    def _ask_credits_back(self, needy: Instance, count: int, now_ns: int) -> None:
        """Ask the other engines for unused credits, each at most once a second; they are never taken."""
        for instance in self._books.instances:
            scheduler = instance.sessions.get((Role.SCHEDULER, 0))
            if instance is needy or not instance.credit_bytes or scheduler is None:
                continue
            if now_ns - instance.credits_asked_ns >= SECOND_NS:
                instance.credits_asked_ns = now_ns
                self._books.notices.append(Notice(scheduler.id, "credits_wanted", count=count))

    def _repeat_store(
        self, lease: Lease, keys: Sequence[bytes], asked_credits: Sequence[tuple[int, int]]
    ) -> StoreAnswer:
        """Answer a repeated PrepareStore from what its lease still holds."""
        held_slots = self._books.reservations.of_lease(lease)
        by_key = {reservation.key: reservation for reservation in held_slots}
        space = lease.instance.space
        answer = StoreAnswer([], [], [], [], [])
        for key in keys:
            held = by_key.get(key)
            if held is not None:
                answer.verdicts.append(StoreVerdict.GRANTED)
                answer.slot_ids.append(held.slot_id)
                answer.generations.append(held.generation)
            else:
                answer.verdicts.append(StoreVerdict.RESIDENT if key in space.chunks else StoreVerdict.FULL)
        for group, _ in asked_credits:
            size_class = lease.instance.namespace.classes[group]
            held_credits = [r for r in held_slots if r.key is None and r.size_class is size_class]
            answer.credits.append(
                (group, [r.slot_id for r in held_credits], [r.generation for r in held_credits])
            )
        return answer
