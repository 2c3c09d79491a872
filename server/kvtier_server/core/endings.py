"""What ended instances and released leases still hold: taken back in slices, behind what others ask for.

For the outside an instance is gone at once, with its sessions. Owns the rest of its end: leases, pins and
reserved slots. A slot that a worker may still be writing is quarantined behind the locks of the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvtier_server.core.books import Books
from kvtier_server.core.instances import Instance
from kvtier_server.core.leases import Lease
from kvtier_server.core.quarantine import Unfinished
from kvtier_server.primary.size_classes import SizeClass

STEP_SLOTS = 256
"""Reserved slots that are taken back in one go, a fraction of a slice."""

SLOT_COST, LEASE_COST, REQUEST_COST = 2, 4, 4
"""What the end of each costs, as items of a slice."""


class Endings:
    """The ends that are not over yet. `on_ended` is called after each."""

    def __init__(self, books: Books, on_ended: Callable[[], None]) -> None:
        self._books = books
        self._on_ended = on_ended
        self._guards: list[set[str]] = []
        """Per end that is not over, the locks its slots are to wait for."""

    def begin(self, instance: Instance, guards: set[str]) -> None:
        """End the leases of an instance, and free its reserved slots or quarantine them behind `guards`."""
        self._guards.append(guards)
        self._books.put_off(self._end(instance, guards))

    def clear(self, guard: str) -> None:
        """Lift a guard from slots that are not quarantined yet."""
        for guards in self._guards:
            guards.discard(guard)

    def take_back_unused(self, lease: Lease) -> Iterator[int]:
        """Free the slots of a released store or credit lease that were never handed out; then end it."""
        books, instance = self._books, lease.instance
        slot_ids = list(lease.slot_ids)
        for first in range(0, len(slot_ids), STEP_SLOTS):
            step = slot_ids[first : first + STEP_SLOTS]
            for slot_id in step:
                reservation = books.reservations.get(slot_id)
                if reservation is None or reservation.lease is not lease:
                    continue  # reported between two slices, or its instance has ended
                if books.is_untouched(reservation) and not reservation.announced:
                    books.end_unpublished(reservation)
            books.free_ended()
            yield len(step) * SLOT_COST
        if not lease.slot_ids and books.leases.get(instance, lease.id) is lease:
            books.end_lease(lease)

    def _end(self, instance: Instance, guards: set[str]) -> Iterator[int]:
        # An expired lease stays in the book while it holds slots: every reservation is found through a lease.
        leases = self._books.leases.of_instance(instance)
        while leases:
            lease = leases.pop()
            slot_ids = list(lease.slot_ids)
            for first in range(0, len(slot_ids), STEP_SLOTS):
                step = slot_ids[first : first + STEP_SLOTS]
                self._take_back(lease, step, guards)
                yield len(step) * SLOT_COST
            if self._books.leases.get(instance, lease.id) is lease:  # or it expired between two slices
                self._books.end_lease(lease)
            yield LEASE_COST
        while instance.requests.pop_oldest() is not None:  # to free many at once takes as long
            yield REQUEST_COST
        self._guards = [others for others in self._guards if others is not guards]
        self._on_ended()

    def _take_back(self, lease: Lease, slot_ids: Sequence[int], guards: set[str]) -> None:
        """End reservations unpublished."""
        books = self._books
        per_class: dict[SizeClass, list[int]] = {}
        unfinished: dict[SizeClass, list[Unfinished]] = {}
        for slot_id in slot_ids:
            reservation = books.reservations.get(slot_id)
            assert reservation is not None, f"slot {slot_id} is under a lease, but not reserved"
            per_class.setdefault(reservation.size_class, []).append(slot_id)
            if reservation.key is not None:
                what = Unfinished(reservation.space.name, reservation.key, lease.instance.engine_id)
                unfinished.setdefault(reservation.size_class, []).append(what)
            if books.reservations.remove(reservation) and reservation.key is not None:
                books.resolve(reservation.space, reservation.key, None)
        for size_class, in_class in per_class.items():
            if guards:
                books.primary.quarantine_reserved(size_class, in_class, lease.instance.nonce)
                books.quarantine.add(size_class, in_class, guards, unfinished.get(size_class, ()))
            else:
                books.primary.free_reserved(size_class, in_class)
