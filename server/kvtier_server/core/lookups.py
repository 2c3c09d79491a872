"""Lookup: what is there, what a lease pins of it, and which misses are worth storing.

Owns the rule what a lookup lease covers: the longest prefix that all groups can use, as far as the
instance's share of pins goes. Does not copy and does not wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtier_ops.prefix import GroupPresence, first_gap, usable_prefix
from kvtier_server.core.below import Below
from kvtier_server.core.books import Books, LookupStatus
from kvtier_server.core.instances import Instance, Session
from kvtier_server.core.leases import Lease, LeaseKind
from kvtier_server.core.lower_tiers import LowerTier
from kvtier_server.core.namespaces import check_keys, check_number_of_keys
from kvtier_server.core.promotions import MAX_PROBES
from kvtier_server.core.refused import BadRequest, LeaseUnknown
from kvtier_server.core.requests import Request
from kvtier_server.primary.index import Chunk, KeySpace

# As plain ints: converting a list of enum members to the wire costs twice as much.
_HIT, _HIT_UNLEASED = int(LookupStatus.HIT), int(LookupStatus.HIT_UNLEASED)
_PENDING, _MISS = int(LookupStatus.PENDING), int(LookupStatus.MISS)


@dataclass(frozen=True, slots=True)
class LookupAnswer:
    """One status per key; `leased` are runs (first, count) of keys, `slot_ids` and `generations` theirs."""

    statuses: list[int]
    unwanted: list[int] = field(default_factory=list)
    leased: list[tuple[int, int]] = field(default_factory=list)
    slot_ids: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)


class Lookups:
    """Answers Lookup and Touch."""

    def __init__(self, books: Books, below: Below) -> None:
        self._books = books
        self._below = below

    def lookup(
        self,
        session: Session,
        request: Request,
        keys: Sequence[bytes],
        now_ns: int,
        lease_id: int = 0,
        first_chunks: Sequence[int] = (),
        max_tokens: int = 0,
        pending_wait_ns: int = 0,
        lease_hits: bool = False,
    ) -> LookupAnswer:
        """Answer one status per key; with a lease id, pin the longest prefix that all groups can use.

        With `lease_hits` pin every resident key instead, as long as the instance may pin so much. What a
        lower tier has of that prefix begins to come up, and is PENDING under the same lease.
        """
        instance = session.for_scheduling()
        check_number_of_keys(keys, self._books.limits.max_keys)
        if first_chunks and len(first_chunks) != len(instance.namespace.tails):
            raise BadRequest("first_chunks", f"{len(first_chunks)} entries; one per group, or none")
        if lease_id:
            self._books.check_may_lease(instance)
        ranges = instance.namespace.split(keys)
        space = instance.space
        found = list(map(space.chunks.get, keys))
        num_missing = found.count(None)
        if num_missing:
            check_keys(keys, self._books.limits.max_keys)  # what is resident has a key of allowed length
        statuses: list[int] = [_HIT] * len(keys)
        unwanted: list[int] = []
        pending: set[bytes] = set()
        below: dict[bytes, LowerTier] = {}
        if num_missing:
            statuses, pending = self._statuses(space, keys, found)
            unwanted = self._unwanted(space, request, keys, statuses)
            if lease_id and pending_wait_ns:
                below = self._find_below(space, request, keys, statuses, len(ranges))
        self._count(instance, found, ranges, num_missing, len(pending))
        if not lease_id:
            self._books.note_use(instance, request, keys, found, ranges)
            return LookupAnswer(statuses, unwanted)
        if not pending_wait_ns:
            pending = set()  # nobody waits for them: they are holes like any other
        coming = pending | below.keys() if below else pending
        wanted = list(ranges)
        room = self._room(instance, request, found, wanted)
        if not lease_hits or self._need(instance, keys, found, coming, ranges) > room:
            wanted = self._wanted_runs(instance, keys, found, coming, ranges, first_chunks, max_tokens)
        # What lies behind a hole is resident but of no use to this request.
        self._books.note_use(instance, request, keys, found, ranges, wanted)
        if self._below.tiers:
            for first, end in wanted:
                self._below.used(space, request, keys, first, end)
        return self._lease_runs(
            instance,
            request,
            keys,
            found,
            statuses,
            unwanted,
            wanted,
            pending,
            below,
            lease_id,
            now_ns,
            pending_wait_ns,
        )

    def _find_below(
        self,
        space: KeySpace,
        request: Request,
        keys: Sequence[bytes],
        statuses: Sequence[int],
        num_groups: int,
    ) -> dict[bytes, LowerTier]:
        """Say which of the missing keys lower tiers may have, as far as the request may load from them."""
        if not self._below.tiers:
            return {}
        missing = [key for key, status in zip(keys, statuses, strict=True) if status == _MISS]
        # With several groups what may be there must not decide what is leased of what is there.
        return self._below.promotions.find(space, request, missing, MAX_PROBES if num_groups == 1 else 0)

    def _count(
        self,
        instance: Instance,
        found: Sequence[Chunk | None],
        ranges: Sequence[tuple[int, int]],
        num_missing: int,
        num_pending: int,
    ) -> None:
        """Count keys, and tokens by the first group: the others cover the same ones."""
        counts = self._books.counts
        counts["lookup:hit"] += len(found) - num_missing
        counts["lookup:pending"] += num_pending
        counts["lookup:miss"] += num_missing - num_pending
        first, end = ranges[0]
        if len(ranges) > 1:
            num_missing = found[first:end].count(None)
        chunk_tokens = instance.namespace.facts.chunk_tokens(0)
        counts["lookup_tokens"] += (end - first) * chunk_tokens
        counts["hit_tokens"] += (end - first - num_missing) * chunk_tokens

    def _statuses(
        self, space: KeySpace, keys: Sequence[bytes], found: Sequence[Chunk | None]
    ) -> tuple[list[int], set[bytes]]:
        statuses = [_MISS if chunk is None else _HIT for chunk in found]
        pending: set[bytes] = set()
        if space.writers:
            for index, key in enumerate(keys):
                if found[index] is None and key in space.writers:
                    statuses[index] = _PENDING
                    pending.add(key)
        return statuses, pending

    def _unwanted(
        self, space: KeySpace, request: Request, keys: Sequence[bytes], statuses: Sequence[int]
    ) -> list[int]:
        if not self._books.filter.is_active:
            return []
        missing = [index for index, status in enumerate(statuses) if status == _MISS]
        wanted = self._books.filter.offer([space.chunk_id(keys[index]) for index in missing], request.serial)
        return [index for index, want in zip(missing, wanted, strict=True) if not want]

    def _wanted_runs(
        self,
        instance: Instance,
        keys: Sequence[bytes],
        found: Sequence[Chunk | None],
        pending: set[bytes],
        ranges: Sequence[tuple[int, int]],
        first_chunks: Sequence[int],
        max_tokens: int,
    ) -> list[tuple[int, int]]:
        """Index ranges [first, end) that a lease should cover; PENDING keys count as there."""
        facts = instance.namespace.facts
        present: Sequence[object | None] = found
        if pending:
            present = [
                chunk if chunk is not None else (key if key in pending else None)
                for chunk, key in zip(found, keys, strict=True)
            ]
        if len(ranges) == 1 and not facts.groups[0].sliding_window_tokens:
            end = first_gap(present)
            if max_tokens:
                first = first_chunks[0] if first_chunks else 0
                end = min(end, max(max_tokens // facts.chunk_tokens(0) - first, 0))
            return [(0, end)]
        groups = [
            GroupPresence(
                present[start:end],
                facts.chunk_tokens(group),
                first_chunks[group] if first_chunks else 0,
                facts.groups[group].sliding_window_tokens,
            )
            for group, (start, end) in enumerate(ranges)
        ]
        prefix = usable_prefix(groups, max_tokens or None)
        return [
            (start + first - group.first_chunk, start + end - group.first_chunk)
            for (start, _), group, (first, end) in zip(ranges, groups, prefix.ranges, strict=True)
        ]

    def _lease_runs(
        self,
        instance: Instance,
        request: Request,
        keys: Sequence[bytes],
        found: Sequence[Chunk | None],
        statuses: list[int],
        unwanted: list[int],
        wanted: Sequence[tuple[int, int]],
        pending: set[bytes],
        below: dict[bytes, LowerTier],
        lease_id: int,
        now_ns: int,
        pending_wait_ns: int,
    ) -> LookupAnswer:
        known = self._books.leases.get(instance, lease_id)
        if known is not None:
            if known.kind is not LeaseKind.LOOKUP:
                raise LeaseUnknown(f"lease {lease_id:#x} is a {known.kind} lease")
            self._books.end_lease(known)  # a repeated call: the answer is made anew
        coming = pending | below.keys() if below else pending
        fitting = self._fitting(
            instance, keys, found, coming, wanted, self._room(instance, request, found, wanted)
        )
        if (
            self._books.leases.is_buried(instance, lease_id)
            or instance.num_leases >= self._books.limits.max_leases
        ):
            fitting = [(first, first) for first, _ in wanted]
        counts = self._books.counts
        for (_, end), (_, allowed) in zip(wanted, fitting, strict=True):
            for index in range(allowed, end):
                key = keys[index]
                if found[index] is not None or (key in below and below[key].holds(instance.space, key)):
                    statuses[index] = _HIT_UNLEASED
                    counts["lookup:hit_unleased"] += 1
                    counts["lookup:miss" if found[index] is None else "lookup:hit"] -= 1
        unwanted = [index for index in unwanted if statuses[index] == _MISS]
        runs, chunks = self._runs(found, fitting)
        waiting = pending and {k for first, end in fitting for k in keys[first:end] if k in pending}
        lease = Lease(lease_id, LeaseKind.LOOKUP, instance, now_ns, instance.lookup_lease_ns)
        lease.request_id = request.id
        self._books.pin(lease, chunks)  # before room is made for what comes up
        if below:
            waiting |= self._promote(
                instance, request, keys, fitting, below, statuses, now_ns, pending_wait_ns
            )
            unwanted = [index for index in unwanted if statuses[index] == _MISS]
        if not chunks and not waiting:
            return LookupAnswer(statuses, unwanted)
        instance.requests.add_lease(request, lease_id)
        self._books.leases.add(lease)
        if waiting:
            until_ns = now_ns + min(pending_wait_ns, self._books.limits.max_pending_wait_ns)
            self._books.wait_for(lease, waiting, until_ns)
        return LookupAnswer(
            statuses,
            unwanted,
            runs,
            [chunk.slot_id for chunk in chunks],
            [chunk.generation for chunk in chunks],
        )

    def _promote(
        self,
        instance: Instance,
        request: Request,
        keys: Sequence[bytes],
        fitting: Sequence[tuple[int, int]],
        below: dict[bytes, LowerTier],
        statuses: list[int],
        now_ns: int,
        pending_wait_ns: int,
    ) -> set[bytes]:
        """Begin to bring up what the lease would cover; its statuses become PENDING. Returns the keys."""
        index_of: dict[bytes, int] = {}
        wanted = []
        for size_class, (first, end) in zip(instance.namespace.classes, fitting, strict=True):
            for index in range(first, end):
                key = keys[index]
                if key in below and key not in index_of:
                    index_of[key] = index
                    wanted.append((key, size_class, below[key]))
        begun = self._below.promotions.begin(instance.space, request, wanted, now_ns, pending_wait_ns)
        chunk_tokens = instance.namespace.facts.chunk_tokens(0)
        for key in begun:
            index = index_of[key]
            statuses[index] = _PENDING
            if index < fitting[0][1]:  # by the first group: the others cover the same tokens
                below[key].counts["hit_tokens"] += chunk_tokens
        counts = self._books.counts
        counts["lookup:pending"] += len(begun)
        counts["lookup:miss"] -= len(begun)
        return set(begun)

    def _fitting(
        self,
        instance: Instance,
        keys: Sequence[bytes],
        found: Sequence[Chunk | None],
        pending: set[bytes],
        wanted: Sequence[tuple[int, int]],
        room: int,
    ) -> list[tuple[int, int]]:
        """Shorten the ranges to what the instance may still pin. Several groups fit wholly or not at all."""
        if self._need(instance, keys, found, pending, wanted) <= room:
            return list(wanted)
        if len(wanted) > 1:
            return [(first, first) for first, _ in wanted]
        first, end = wanted[0]
        return [(first, min(end, first + max(room, 0) // instance.namespace.classes[0].slot_bytes))]

    def _room(
        self,
        instance: Instance,
        request: Request,
        found: Sequence[Chunk | None],
        ranges: Sequence[tuple[int, int]],
    ) -> int:
        """Bytes that the instance may still pin for a request, with what it has pinned for it already.

        A request that asks anew holds its former lease until it has the answer: pinning the same chunks once
        more takes no room.
        """
        room = self._books.max_pinned_bytes(instance) - instance.pinned_bytes
        own: set[Chunk] = set()
        for lease_id in request.lookup_leases:
            if (lease := self._books.leases.get(instance, lease_id)) is not None:
                room += sum(chunk.size_class.slot_bytes for chunk in lease.chunks)
                own.update(lease.chunks)
        if own:
            for first, end in ranges:
                own.difference_update(found[first:end])
            room -= sum(chunk.size_class.slot_bytes for chunk in own)
        return room

    @staticmethod
    def _need(
        instance: Instance,
        keys: Sequence[bytes],
        found: Sequence[Chunk | None],
        pending: set[bytes],
        ranges: Sequence[tuple[int, int]],
    ) -> int:
        """Bytes that pinning what is resident in these ranges takes, and what may become so."""
        need = 0
        for group, (first, end) in enumerate(ranges):
            count = end - first - found[first:end].count(None)
            if pending:
                count += sum(key in pending for key in keys[first:end])
            need += count * instance.namespace.classes[group].slot_bytes
        return need

    @staticmethod
    def _runs(
        found: Sequence[Chunk | None], ranges: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], list[Chunk]]:
        """Runs (first, count) of resident chunks within the ranges, and the chunks."""
        runs: list[tuple[int, int]] = []
        chunks: list[Chunk] = []
        for start, end in ranges:
            position = start
            while position < end:
                try:
                    gap = found.index(None, position, end)
                except ValueError:
                    gap = end
                if gap > position:
                    runs.append((position, gap - position))
                    chunks.extend(found[position:gap])  # type: ignore[arg-type]
                position = gap + 1
        return runs, chunks

    def touch(self, session: Session, request: Request, keys: Sequence[bytes]) -> None:
        """Count a use of resident keys by this request."""
        instance = session.for_scheduling()
        check_keys(keys, self._books.limits.max_keys)
        found = list(map(instance.space.chunks.get, keys))
        self._books.note_use(instance, request, keys, found, instance.namespace.split(keys))
        self._below.used(instance.space, request, keys)
