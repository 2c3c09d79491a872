"""What the client answers to an engine: columns, as the wire has them, and never an exception.

Owns the values and their reading by index. How an answer came about is told by `reason`:

    ""                 the daemon answered
    "away"             no session: not attached yet, or the daemon is gone
    "breaker_open"     three deadlines were missed in a row; the background thread probes
    "deadline"         no answer in time
    "workers_missing"  a lease was asked before all workers of the instance were attached
    "session_changed"  the session ended while the answer was on its way: its leases are void
    "finishing"        the end of an earlier request of the same id is still on its way
    "resetting"        the engine has new weights and the daemon has not confirmed it yet
    "too_many_keys"    more keys than the daemon takes in one call
    "no_keys", "cancelled", "closed", "forked", "bad_reply"
    anything else      the daemon's own reason in lower case ("draining", "inflight", "not_resident", ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kvtier_ops.pool import MappedPool


class LookupStatus(IntEnum):
    """What became of a key in a lookup. Any other number is to be read as MISS."""

    HIT = 1
    HIT_UNLEASED = 2
    PENDING = 3
    MISS = 4


class StoreVerdict(IntEnum):
    """What became of a key in a prepared store. Any other number is to be read as FULL."""

    GRANTED = 1
    RESIDENT = 2
    PENDING = 3
    FILTERED = 4
    QUOTA = 5
    FULL = 6
    INFLIGHT = 7


class CreditGrant(NamedTuple):
    """Slots of one group to store into, whose keys are announced later."""

    group: int
    slot_ids: Sequence[int]
    generations: Sequence[int]


class SlotsForMisses(NamedTuple):
    """A wish that goes with a lookup: a slot for each key of `group` that is missing and worth storing.

    For `at_most` keys, of which the engine has `spare` slots already.
    """

    group: int
    at_most: int
    spare: int


class LookupAnswer:
    """One status per key, and what is pinned under the lease.

    `statuses[i]` belongs to `keys[i]` (LookupStatus numbers). The pinned keys are the runs `(first, count)`
    of `leased_runs`, ascending and disjoint; `slot_ids` and `generations` belong to them in that order.
    `lease_id` is 0 when there is nothing to release. `pool_id` names the pool that the slots are in.
    `credits` are slots to store what is missing, under the lease `store_lease_id`.
    """

    __slots__ = (
        "_leased",
        "_unwanted",
        "boot_id",
        "credits",
        "generations",
        "lease_id",
        "leased_runs",
        "pool_id",
        "reason",
        "slot_ids",
        "statuses",
        "store_lease_id",
        "unwanted_indexes",
    )

    def __init__(
        self,
        statuses: Sequence[int],
        *,
        lease_id: int = 0,
        leased_runs: tuple[tuple[int, int], ...] = (),
        slot_ids: Sequence[int] = (),
        generations: Sequence[int] = (),
        unwanted_indexes: Sequence[int] = (),
        reason: str = "",
        boot_id: str = "",
        pool_id: int = 0,
        credits: Sequence[CreditGrant] = (),  # noqa: A002 - the word of the protocol
        store_lease_id: int = 0,
    ) -> None:
        self.statuses = statuses
        self.lease_id = lease_id
        self.leased_runs = leased_runs
        self.slot_ids = slot_ids
        self.generations = generations
        self.unwanted_indexes = unwanted_indexes
        self.reason = reason
        self.boot_id = boot_id
        self.pool_id = pool_id
        self.credits = credits
        self.store_lease_id = store_lease_id
        self._leased: dict[int, tuple[int, int]] | None = None
        self._unwanted: frozenset[int] | None = None

    @classmethod
    def missed(cls, num_keys: int, reason: str, boot_id: str = "") -> LookupAnswer:
        """Answer MISS for every key."""
        return cls([int(LookupStatus.MISS)] * num_keys, reason=reason, boot_id=boot_id)

    @property
    def unwanted(self) -> frozenset[int]:
        """Indexes of MISS keys whose store would be refused now. Built when first asked."""
        if self._unwanted is None:
            self._unwanted = frozenset(self.unwanted_indexes)
        return self._unwanted

    @property
    def leased(self) -> dict[int, tuple[int, int]]:
        """Index of each pinned key -> (slot_id, generation). Built when asked; the columns cost less."""
        if self._leased is None:
            indexes = (index for first, count in self.leased_runs for index in range(first, first + count))
            self._leased = dict(zip(indexes, zip(self.slot_ids, self.generations, strict=True), strict=True))
        return self._leased

    def __repr__(self) -> str:
        return (
            f"LookupAnswer(keys={len(self.statuses)}, hits={self.statuses.count(LookupStatus.HIT)}, "
            f"leased={len(self.slot_ids)}, lease_id={self.lease_id:#x}, reason={self.reason!r})"
        )


@dataclass(frozen=True, slots=True)
class LoadGrant:
    """All keys are pinned under a load lease, in pool `pool_id`. Columns in the order of the keys."""

    lease_id: int
    slot_ids: list[int]
    generations: list[int]
    pool_id: int


@dataclass(frozen=True, slots=True)
class StoreGrant:
    """One verdict per key (StoreVerdict numbers); slots of the GRANTED keys, in the order of the keys.

    The slots are in pool `pool_id`.
    """

    verdicts: Sequence[int]
    lease_id: int = 0
    slot_ids: Sequence[int] = ()
    generations: Sequence[int] = ()
    evicted_keys: Sequence[bytes] = ()
    reason: str = ""
    pool_id: int = 0

    @classmethod
    def refused(cls, num_keys: int, reason: str) -> StoreGrant:
        """Refuse every key."""
        return cls([int(StoreVerdict.FULL)] * num_keys, reason=reason)


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What the daemon takes from this session, as far as a client has to heed it; announced in Attach."""

    max_keys: int
    max_params_bytes: int
    lookup_lease_ms: int
    max_credit_bytes: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """An open session. When `epoch` or `missing_ranks` change, `OffloadClient.session` is a new value.

    `pool` is mapped in workers and None in schedulers. `slot_bytes`: one per group, padding included.
    """

    session_id: str
    boot_id: str
    pool: MappedPool | None
    pool_id: int
    slot_bytes: tuple[int, ...]
    limits: SessionLimits
    epoch: int
    missing_ranks: tuple[int, ...]
