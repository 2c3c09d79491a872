"""What Complete brings: announcements, load starts, the ranks' reports, credits given back.

Owns when a store becomes a chunk and when a load is over. The order between a scheduler's announcement and
a rank's report does not matter: whichever comes second finds what the first left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier_server.core.below import Below
from kvtier_server.core.books import Books, HashRequest
from kvtier_server.core.events import STORED
from kvtier_server.core.instances import Instance, Role, Session
from kvtier_server.core.leases import Lease, LeaseKind
from kvtier_server.core.refused import BadRequest
from kvtier_server.core.stores import ItemStatus, Reservation
from kvtier_server.primary.index import KeySpace

MAX_EARLY_LOADS = 4_096
"""Load reports kept whose load start has not come yet, per instance; both travel within one step."""

MAX_HASHES = 1_024
"""Hashes under way at once; further complaints are passed over."""


@dataclass(frozen=True, slots=True)
class MismatchReport:
    """A reader found other bytes than the checksum says."""

    slot_id: int
    generation: int


class Completions:
    """Takes the items of Complete, one after the other."""

    def __init__(self, books: Books, below: Below) -> None:
        self._books = books
        self._below = below
        self._stored: dict[KeySpace, list[bytes]] = {}
        """What the report at hand has published, until it is recorded; nothing is removed meanwhile."""
        self._hashing: set[tuple[int, int, int]] = set()
        """(slot, generation, part) of the hashes that were asked for and are not there yet."""

    def announce(
        self,
        session: Session,
        request_id: str,
        slot_ids: Sequence[int],
        generations: Sequence[int],
        keys: Sequence[bytes],
    ) -> list[ItemStatus]:
        """Name the keys of credit slots, so that others see them PENDING."""
        request = session.instance.requests.get(request_id)
        statuses = []
        for slot_id, generation, key in zip(slot_ids, generations, keys, strict=True):
            found = self._reservation(session.instance, slot_id, generation, None)
            if isinstance(found, Reservation):
                found.announced = True
                found.request = found.request or request
                self._name(found, key)
                found = ItemStatus.OK
            elif found is ItemStatus.ALREADY:
                found = ItemStatus.OK  # the ranks were faster than the announcement
            statuses.append(found)
        return statuses

    def start_load(
        self, session: Session, lookup_lease_id: int, load_lease_id: int, slot_ids: Sequence[int], now_ns: int
    ) -> ItemStatus:
        """Move pins from a lookup lease to a load lease. Without the former the load rests on its fence."""
        instance = session.instance
        leases = self._books.leases
        if not load_lease_id:
            return ItemStatus.UNKNOWN  # the client chooses one; other items of the call may be done already
        if leases.get(instance, load_lease_id) is not None or ("lease", load_lease_id) in instance.ended:
            return ItemStatus.ALREADY
        lookup = leases.get(instance, lookup_lease_id)
        if lookup is None or lookup.kind is not LeaseKind.LOOKUP or leases.is_buried(instance, load_lease_id):
            return ItemStatus.UNKNOWN
        wanted = set(slot_ids)
        moved = [chunk for chunk in lookup.chunks if chunk.slot_id in wanted]
        lookup.chunks = [chunk for chunk in lookup.chunks if chunk.slot_id not in wanted]
        load = self._books.add_load_lease(instance, load_lease_id, lookup.request_id, now_ns)
        load.chunks = moved
        if not load.ranks_left:
            self._load_ended(load)
        return ItemStatus.OK

    def return_credits(
        self, session: Session, slot_ids: Sequence[int], generations: Sequence[int]
    ) -> list[ItemStatus]:
        """Free credits that were never handed to a worker."""
        statuses = []
        for slot_id, generation in zip(slot_ids, generations, strict=True):
            found = self._reservation(session.instance, slot_id, generation, None)
            returned = ("returned", slot_id, generation)
            if isinstance(found, Reservation):
                if found.announced or not self._books.is_untouched(found):
                    statuses.append(ItemStatus.UNKNOWN)  # it was handed out: its ranks will report
                    continue
                self._conclude(found)
                session.instance.remember_ended(returned, self._books.limits.max_remembered)
                found = ItemStatus.OK
            elif returned in session.instance.ended:
                found = ItemStatus.ALREADY
            statuses.append(found)
        self._books.free_ended()
        return statuses

    def check_store_report(self, session: Session, part: int) -> None:
        """Raise BadRequest unless this session may report stores of this part."""
        instance = self._worker(session, "store_reports")
        if part != session.rank:
            raise BadRequest("store_reports.part", f"{part}; rank {session.rank} writes its own part")
        if part >= instance.namespace.facts.num_parts:
            raise BadRequest("store_reports.part", f"{part}; ranks hold equal bytes, so only rank 0 stores")

    def check_load_report(self, session: Session) -> None:
        """Raise BadRequest unless this session may report loads."""
        self._worker(session, "load_reports")

    def report_store(
        self,
        session: Session,
        part: int,
        slot_ids: Sequence[int],
        generations: Sequence[int],
        keys: Sequence[bytes],
        checksums: Sequence[int],
        failed: set[int],
    ) -> list[ItemStatus]:
        """Note that a rank has ended writing its part of each slot; `failed` are indexes. Publishes."""
        self.check_store_report(session, part)
        instance = session.instance
        statuses = []
        for index, (slot_id, generation, key, checksum) in enumerate(
            zip(slot_ids, generations, keys, checksums, strict=True)
        ):
            found = self._reservation(instance, slot_id, generation, part)
            if isinstance(found, Reservation) and (slot_id, part) in self._books.being_written:
                # Its copy is not over: what it reports cannot be true, and the slot cannot be let go.
                found = ItemStatus.UNKNOWN
            if isinstance(found, Reservation):
                found = self._take_part(found, part, key, checksum, index in failed)
            statuses.append(found)
        for space, stored in self._stored.items():
            self._books.events.record(STORED, space.name, "store", stored)
        self._stored.clear()
        self._books.free_ended()
        return statuses

    def _take_part(
        self, reservation: Reservation, part: int, key: bytes, checksum: int, failed: bool
    ) -> ItemStatus:
        if not reservation.parts_left >> part & 1:
            return ItemStatus.ALREADY
        reservation.parts_left &= ~(1 << part)
        reservation.checksums[part] = checksum
        reservation.failed = reservation.failed or failed
        if reservation.key != key:
            self._name(reservation, key)
        if not reservation.parts_left:
            self._conclude(reservation)
        return ItemStatus.EXPIRED if reservation.expired else ItemStatus.OK

    def _name(self, reservation: Reservation, key: bytes) -> None:
        """Give a credit its key. One that cannot be in such a slot makes the store fail."""
        namespace = reservation.instance.namespace
        if reservation.key is None and not namespace.fits(key, reservation.size_class):
            reservation.failed = True
        else:
            self._books.reservations.name(reservation, key)

    def _conclude(self, reservation: Reservation) -> None:
        """End a reservation that nobody writes any more: as a chunk, or as a slot for `free_ended`."""
        books = self._books
        instance = reservation.instance
        for part in range(len(reservation.checksums)):
            if not reservation.parts_left >> part & 1:
                ended = ("store", reservation.slot_id, reservation.generation, part)
                instance.remember_ended(ended, books.limits.max_remembered)
        key, space = reservation.key, reservation.space
        whole = not reservation.parts_left and not reservation.failed and not reservation.expired
        if key is None or not whole or key in space.chunks:
            books.counts["store:dropped" if whole else "store:failed"] += key is not None
            books.end_unpublished(reservation)
        else:
            self._publish(reservation, space, key)
        lease = reservation.lease
        if not lease.slot_ids and books.leases.get(instance, lease.id) is lease:
            books.end_lease(lease)

    def _publish(self, reservation: Reservation, space: KeySpace, key: bytes) -> None:
        books = self._books
        books.reservations.remove(reservation)
        request = reservation.request
        stamp = request.stamp_of(key) if request is not None else None
        if stamp is None:
            stamp = books.primary.issue_stamps(1)
        if request is not None:
            request.holds_chunks = True
        chunk = books.primary.publish(
            space,
            key,
            reservation.slot_id,
            reservation.generation,
            reservation.size_class,
            reservation.checksums,
            stamp,
            request,
        )
        books.counts["store:published"] += 1
        self._stored.setdefault(space, []).append(key)
        books.resolve(space, key, chunk)
        self._below.published(chunk)

    def report_load(
        self,
        session: Session,
        lease_id: int,
        num_torn: int,
        mismatches: Sequence[MismatchReport],
        now_ns: int,
    ) -> ItemStatus:
        """Note that a rank has ended reading; with the last rank's report the pins go."""
        self.check_load_report(session)
        instance = session.instance
        books = self._books
        books.counts["load:torn"] += num_torn
        for mismatch in mismatches:
            self._ask_for_hash(mismatch, instance, instance.namespace.part_of(session.rank))
        if ("load", lease_id, session.rank) in instance.ended:
            return ItemStatus.ALREADY
        instance.remember_ended(("load", lease_id, session.rank), books.limits.max_remembered)
        lease = books.leases.get(instance, lease_id)
        if lease is None or lease.kind is not LeaseKind.LOAD:
            if ("lease", lease_id) in instance.ended:
                return ItemStatus.EXPIRED
            instance.early_loads.setdefault(lease_id, set()).add(session.rank)
            if len(instance.early_loads) > MAX_EARLY_LOADS:
                instance.early_loads.popitem(last=False)
            return ItemStatus.UNKNOWN
        lease.ranks_left.discard(session.rank)
        if not lease.ranks_left:
            self._load_ended(lease)
        return ItemStatus.OK

    def _load_ended(self, lease: Lease) -> None:
        self._books.end_lease(lease)
        self._books.counts["load:ended"] += 1

    def _ask_for_hash(self, mismatch: MismatchReport, instance: Instance, part: int) -> None:
        chunk = self._books.primary.by_slot.get(mismatch.slot_id)
        if (
            chunk is None
            or chunk.generation != mismatch.generation
            or chunk.space.name.namespace != instance.space.name.namespace
        ):
            return
        asked = (chunk.slot_id, chunk.generation, part)
        if asked in self._hashing or len(self._hashing) >= MAX_HASHES:
            return  # whoever finds the bytes wrong later says so again
        self._hashing.add(asked)
        group = instance.namespace.group_of(chunk.key)
        part_bytes = instance.namespace.facts.groups[group].part_bytes
        self._books.hash_requests.append(HashRequest(chunk.slot_id, chunk.generation, part, part_bytes))

    def hashed(self, request: HashRequest, matches: bool) -> None:
        """Act on a hash computed over a slot: a real mismatch is quarantined, a false one counted.

        Must be called once per request, whatever came of it.
        """
        self._hashing.discard((request.slot_id, request.generation, request.part))
        chunk = self._books.primary.by_slot.get(request.slot_id)
        if chunk is None or chunk.generation != request.generation or chunk.dropped:
            return
        if matches:
            self._books.counts["checksum:false_alarm"] += 1
            return
        self._books.counts["checksum:corrupt"] += 1
        self._books.condemn(chunk, owner=0)

    @staticmethod
    def _worker(session: Session, field: str) -> Instance:
        if session.role is not Role.WORKER:
            raise BadRequest(field, "a scheduler reports no copies; the ranks do")
        return session.instance

    def _reservation(
        self, instance: Instance, slot_id: int, generation: int, part: int | None
    ) -> Reservation | ItemStatus:
        """Find what is reserved under slot and generation, or say why not."""
        reservation = self._books.reservations.get(slot_id)
        if (
            reservation is not None
            and reservation.generation == generation
            and reservation.instance is instance
        ):
            return reservation
        if ("store", slot_id, generation, part or 0) in instance.ended:
            return ItemStatus.ALREADY
        current = self._books.primary.generation(slot_id)
        if current is not None and generation < current:
            return ItemStatus.STALE_GENERATION
        return ItemStatus.UNKNOWN
