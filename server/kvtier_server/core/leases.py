"""Leases: an instance's hold on slots, until it is released, reported ended, expired, or the instance dies.

Owns ids, times to live, tombstones and what has ended. Does not pin: `tiering.py` pins what it puts into a
lease and unpins what it takes out. A time to live is a guard against leaks; whether bytes are right never
rests on it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from enum import StrEnum

from kvtier_server.core.instances import Instance
from kvtier_server.primary.index import Chunk

STALE_ENTRIES = 1_024
"""Entries of ended leases that the book of expiry keeps before it is cleared of them."""


class LeaseKind(StrEnum):
    """What a lease holds: chunks to look at, chunks to load, slots to store into, slots for later."""

    LOOKUP = "lookup"
    LOAD = "load"
    STORE = "store"
    CREDIT = "credit"


class Lease:
    """One lease. Lookup and load leases hold `chunks`, store and credit leases reserved `slot_ids`."""

    __slots__ = (
        "chunks",
        "created_ns",
        "expires_ns",
        "id",
        "instance",
        "kind",
        "pending",
        "pending_until_ns",
        "ranks_left",
        "request_id",
        "slot_ids",
    )

    def __init__(
        self, lease_id: int, kind: LeaseKind, instance: Instance, now_ns: int, ttl_ns: int | None
    ) -> None:
        self.id = lease_id
        self.kind = kind
        self.instance = instance
        self.created_ns = now_ns
        self.expires_ns = None if ttl_ns is None else now_ns + ttl_ns
        self.request_id = ""
        self.chunks: list[Chunk] = []
        self.slot_ids: set[int] = set()
        self.ranks_left: set[int] = set()
        self.pending: set[bytes] = set()
        self.pending_until_ns = 0


class LeaseBook:
    """The leases of all instances, by instance and id."""

    def __init__(self, tombstone_ns: int) -> None:
        self._leases: dict[tuple[int, int], Lease] = {}
        self._expiry: list[tuple[int, int, Lease]] = []
        self._tombstones: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._tombstone_ns = tombstone_ns
        self._serial = 0

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, instance: Instance, lease_id: int) -> Lease | None:
        """Return a living lease of this instance."""
        return self._leases.get((instance.serial, lease_id))

    def add(self, lease: Lease) -> None:
        """Enter a new lease. Its id must not be known for this instance."""
        key = (lease.instance.serial, lease.id)
        assert key not in self._leases, f"lease {lease.id:#x} exists"
        self._leases[key] = lease
        lease.instance.num_leases += 1
        self._schedule(lease)

    def remove(self, lease: Lease) -> None:
        """Take a lease out of the book."""
        del self._leases[(lease.instance.serial, lease.id)]
        lease.instance.num_leases -= 1

    def renew(self, lease: Lease, now_ns: int, ttl_ns: int) -> None:
        """Let the lease live `ttl_ns` from now."""
        lease.expires_ns = now_ns + ttl_ns
        # The entry in the heap is found too early and put back by `expired`: no second one is needed.

    def _schedule(self, lease: Lease) -> None:
        if lease.expires_ns is None:
            return
        if len(self._expiry) > 2 * len(self._leases) + STALE_ENTRIES:
            # Most leases end long before their time; their entries would stay until then.
            self._expiry = [entry for entry in self._expiry if self._is_current(entry[2])]
            heapq.heapify(self._expiry)
        self._serial += 1
        heapq.heappush(self._expiry, (lease.expires_ns, self._serial, lease))

    def _is_current(self, lease: Lease) -> bool:
        return self._leases.get((lease.instance.serial, lease.id)) is lease

    def expired(self, now_ns: int) -> list[Lease]:
        """Leases whose time is over; they are still in the book."""
        over = []
        while self._expiry and self._expiry[0][0] <= now_ns:
            _, _, lease = heapq.heappop(self._expiry)
            if not self._is_current(lease) or lease.expires_ns is None:
                continue
            if lease.expires_ns <= now_ns:
                over.append(lease)
            else:
                self._schedule(lease)
        return over

    def of_instance(self, instance: Instance) -> list[Lease]:
        """All leases of one instance. O(leases)."""
        return [lease for lease in self._leases.values() if lease.instance is instance]

    # A release may overtake the grant it ends (the reply was lost, the retry came first): the id is
    # remembered for a while, and a grant under it is void.

    def bury(self, instance: Instance, lease_id: int, now_ns: int) -> None:
        """Remember that this unknown id was released."""
        key = (instance.serial, lease_id)
        self._tombstones[key] = now_ns + self._tombstone_ns
        self._tombstones.move_to_end(key)

    def is_buried(self, instance: Instance, lease_id: int) -> bool:
        """Whether a grant under this id would be void."""
        return (instance.serial, lease_id) in self._tombstones

    def forget_tombstones(self, now_ns: int, max_tombstones: int) -> None:
        """Drop tombstones that are old, or too many."""
        while self._tombstones:
            key, until = next(iter(self._tombstones.items()))
            if until > now_ns and len(self._tombstones) <= max_tombstones:
                return
            del self._tombstones[key]
