"""Stores in progress: reserved slots, who has written what, and when that makes a chunk.

A chunk becomes visible when every part was reported written, without failure, under one key. The scheduler
never completes a store; it only announces which key goes into which credit slot, before or after the ranks
report. A reserved slot is given back only when nobody can still be writing it: all parts reported, or the
engine says it never handed the slot out.

Owns reservations. Does not own the slots' states (primary tier) or leases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum

from kvtier_server.core.instances import Instance
from kvtier_server.core.leases import Lease
from kvtier_server.core.requests import Request
from kvtier_server.primary.index import KeySpace
from kvtier_server.primary.size_classes import SizeClass


class ItemStatus(IntEnum):
    """What became of an item of Complete; the numbers are the wire's CompleteStatus."""

    OK = 1
    ALREADY = 2
    UNKNOWN = 3
    EXPIRED = 4
    STALE_GENERATION = 5


class Reservation:
    """One reserved slot. `key` is None for a credit nobody has named a key for."""

    __slots__ = (
        "announced",
        "checksums",
        "expired",
        "failed",
        "generation",
        "instance",
        "key",
        "lease",
        "parts_left",
        "request",
        "size_class",
        "slot_id",
        "space",
    )

    def __init__(self, slot_id: int, generation: int, size_class: SizeClass, lease: Lease) -> None:
        self.slot_id = slot_id
        self.generation = generation
        self.size_class = size_class
        self.lease = lease
        self.instance: Instance = lease.instance
        self.space: KeySpace = lease.instance.space
        self.key: bytes | None = None
        self.announced = False
        self.request: Request | None = None
        num_parts = lease.instance.namespace.facts.num_parts
        self.parts_left = (1 << num_parts) - 1
        self.checksums = [0] * num_parts
        self.failed = False
        self.expired = False

    @property
    def untouched(self) -> bool:
        """Whether no rank has reported on it yet."""
        return self.parts_left == (1 << len(self.checksums)) - 1


class Reservations:
    """All reserved slots by id, and how many unfinished stores each key has."""

    def __init__(self) -> None:
        self._by_slot: dict[int, Reservation] = {}
        self.num_named = 0
        """Of those that have a key, which is what is being stored."""

    def __len__(self) -> int:
        return len(self._by_slot)

    @property
    def num_credits(self) -> int:
        """Those without a key. O(1): metrics must not walk over all of them."""
        return len(self._by_slot) - self.num_named

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._by_slot.values())

    def get(self, slot_id: int) -> Reservation | None:
        """Return the reservation of a slot."""
        return self._by_slot.get(slot_id)

    def add(
        self,
        lease: Lease,
        slot_ids: Sequence[int],
        generations: Sequence[int],
        size_class: SizeClass,
        keys: Sequence[bytes] | None,
        request: Request | None,
    ) -> None:
        """Enter reserved slots under a lease, with their keys and request, or as credits (keys None)."""
        num_bytes = len(slot_ids) * size_class.slot_bytes
        lease.instance.inflight_bytes += num_bytes
        if keys is None:
            lease.instance.credit_bytes += num_bytes
        for index, (slot_id, generation) in enumerate(zip(slot_ids, generations, strict=True)):
            reservation = Reservation(slot_id, generation, size_class, lease)
            self._by_slot[slot_id] = reservation
            lease.slot_ids.add(slot_id)
            if keys is not None:
                reservation.request = request
                self._name(reservation, keys[index])

    def name(self, reservation: Reservation, key: bytes) -> None:
        """Give a credit its key. A second, different key makes the store fail."""
        if reservation.key is None:
            reservation.instance.credit_bytes -= reservation.size_class.slot_bytes
            self._name(reservation, key)
        elif reservation.key != key:
            reservation.failed = True

    def _name(self, reservation: Reservation, key: bytes) -> None:
        reservation.key = key
        self.num_named += 1
        writers = reservation.space.writers
        writers[key] = writers.get(key, 0) + 1

    def remove(self, reservation: Reservation) -> bool:
        """Take a reservation out; returns whether its key has no other unfinished store."""
        del self._by_slot[reservation.slot_id]
        reservation.lease.slot_ids.discard(reservation.slot_id)
        reservation.instance.inflight_bytes -= reservation.size_class.slot_bytes
        if reservation.key is None:
            reservation.instance.credit_bytes -= reservation.size_class.slot_bytes
            return False
        self.num_named -= 1
        writers = reservation.space.writers
        writers[reservation.key] -= 1
        if writers[reservation.key]:
            return False
        del writers[reservation.key]
        return True

    def of_lease(self, lease: Lease) -> list[Reservation]:
        """What a store or credit lease still holds."""
        return [self._by_slot[slot_id] for slot_id in lease.slot_ids]
