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
from itertools import chain

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
    """One lease. Lookup and load leases hold `chunks`, store and credit leases reserved `slot_ids`.

    `expired`: nothing under it will be published any more. A store lease stays in the book meanwhile, as long
    as it holds slots: they are taken back when their ranks have reported, or at the scheduler's release.
    """

    __slots__ = (
        "chunks",
        "created_ns",
        "expired",
        "expires_ns",
        "id",
        "instance",
        "kind",
        "pending",
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
        self.expired = False
        self.request_id = ""
        self.chunks: list[Chunk] = []
        self.slot_ids: set[int] = set()
        self.ranks_left: set[int] = set()
        self.pending: set[bytes] = set()


class LeaseBook:
    """The leases of all instances, by instance and id."""

    def __init__(self, tombstone_ns: int) -> None:
        self._of_instance: dict[int, dict[int, Lease]] = {}
        self._of_kind: dict[LeaseKind, dict[Lease, None]] = {kind: {} for kind in LeaseKind}
        """In the order they were made, so that the oldest is the first."""
        self._expiry: list[tuple[int, int, Lease]] = []
        self._tombstones: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.tombstone_ns = tombstone_ns
        """How long an id is remembered that was released before it was known."""
        self._serial = 0

    def __iter__(self) -> Iterator[Lease]:
        return chain.from_iterable(self._of_kind.values())

    def __len__(self) -> int:
        return sum(map(len, self._of_kind.values()))

    def count(self, kind: LeaseKind) -> int:
        """Return the number of leases of this kind."""
        return len(self._of_kind[kind])

    def oldest(self, kind: LeaseKind) -> Lease | None:
        """Return the lease of this kind that was made first."""
        return next(iter(self._of_kind[kind]), None)

    def get(self, instance: Instance, lease_id: int) -> Lease | None:
        """Return a lease of this instance that has not ended."""
        leases = self._of_instance.get(instance.serial)
        return None if leases is None else leases.get(lease_id)

    def add(self, lease: Lease) -> None:
        """Enter a new lease. Its id must not be known for this instance."""
        leases = self._of_instance.setdefault(lease.instance.serial, {})
        assert lease.id not in leases, f"lease {lease.id:#x} exists"
        leases[lease.id] = lease
        self._of_kind[lease.kind][lease] = None
        lease.instance.num_leases += 1
        self._schedule(lease)

    def remove(self, lease: Lease) -> None:
        """Take a lease out of the book."""
        leases = self._of_instance[lease.instance.serial]
        del leases[lease.id], self._of_kind[lease.kind][lease]
        if not leases:
            del self._of_instance[lease.instance.serial]
        lease.instance.num_leases -= 1

    def renew(self, lease: Lease, now_ns: int, ttl_ns: int) -> None:
        """Let the lease live `ttl_ns` from now."""
        lease.expires_ns = now_ns + ttl_ns
        # The entry in the heap is found too early and put back by `expired`: no second one is needed.

    def _schedule(self, lease: Lease) -> None:
        if lease.expires_ns is None:
            return
        if len(self._expiry) > 2 * len(self) + STALE_ENTRIES:
            # Most leases end long before their time; their entries would stay until then.
            self._expiry = [entry for entry in self._expiry if self._is_current(entry[2])]
            heapq.heapify(self._expiry)
        self._serial += 1
        heapq.heappush(self._expiry, (lease.expires_ns, self._serial, lease))

    def _is_current(self, lease: Lease) -> bool:
        return lease in self._of_kind[lease.kind]

    def expired(self, now_ns: int) -> Iterator[Lease]:
        """Leases whose time is over; they are still in the book. What is not taken comes the next time."""
        while self._expiry and self._expiry[0][0] <= now_ns:
            _, _, lease = heapq.heappop(self._expiry)
            if not self._is_current(lease) or lease.expires_ns is None:
                continue
            if lease.expires_ns <= now_ns:
                yield lease
            else:
                self._schedule(lease)

    def of_instance(self, instance: Instance) -> list[Lease]:
        """All leases of one instance."""
        return list(self._of_instance.get(instance.serial, {}).values())

    # A release may overtake the grant it ends (the reply was lost, the retry came first): the id is
    # remembered for a while, and a grant under it is void.

    def bury(self, instance: Instance, lease_id: int, now_ns: int) -> None:
        """Remember that this unknown id was released."""
        key = (instance.serial, lease_id)
        self._tombstones[key] = now_ns + self.tombstone_ns
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
