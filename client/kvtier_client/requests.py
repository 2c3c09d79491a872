"""What the scheduler shim knows about one request: its chunks, what the daemon said of them, what is stored.

Owns the state and the pure decisions on it: how many tokens can be loaded, which chunks to store. Sends
nothing and takes the time from outside. One thread.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from kvtier_client.answers import LookupAnswer
from kvtier_client.context import ReqContext
from kvtier_client.lookups import PendingLookup
from kvtier_ops.namespace import NamespaceFacts
from kvtier_ops.prefix import GroupPresence, usable_prefix

logger = logging.getLogger(__name__)

MAX_OFFLOAD_TOKENS = "max_offload_tokens"


class ChunkStatus(IntEnum):
    """What is known of a chunk. The first five are the numbers of LookupStatus."""

    UNKNOWN = 0
    HIT = 1
    HIT_UNLEASED = 2
    PENDING = 3
    MISS = 4
    UNWANTED = 5
    """A miss whose store would be refused."""


class SkipReason(IntEnum):
    """Why a computed chunk is not stored. Skipped chunks are never offered again."""

    CAPPED = 0
    """Beyond the request's max_offload_tokens."""
    RESIDENT = 1
    """The daemon has it, or somebody is storing it."""
    UNWANTED = 2
    """The daemon would refuse it: reuse filter or quota."""
    RECENT = 3
    """This engine stored it lately."""
    INCOMPLETE = 4
    """Some of its blocks are not in device memory: the window has moved past them."""
    NO_CREDITS = 5
    """No slot was at hand."""
    AWAY = 6
    """There is no daemon."""
    RESET = 7
    """The weights have changed since the request began."""


class SlotRef(NamedTuple):
    """A pinned slot."""

    slot_id: int
    generation: int


class ChunkRef(NamedTuple):
    """A chunk of a request by its place."""

    group: int
    chunk: int


def max_offload_tokens(params: Mapping[str, object] | None, req_id: str) -> int | None:
    """Return the request's cap on stored tokens; None = no cap.

    Only a plain int of at least 0 is taken: True is no number, and "512" is a mistake better said than
    guessed at. Anything else is warned about and ignored.
    """
    if params is None or MAX_OFFLOAD_TOKENS not in params:
        return None
    raw = params[MAX_OFFLOAD_TOKENS]
    if type(raw) is int and raw >= 0:
        return raw
    logger.warning(
        "request %s: %s is %r and is ignored; it must be an int of at least 0",
        req_id,
        MAX_OFFLOAD_TOKENS,
        raw,
    )
    return None


@dataclass(slots=True)
class GroupChunks:
    """The chunks of one group of a request; the lists are parallel to `keys`."""

    keys: list[bytes]
    status: list[ChunkStatus]
    pinned: list[SlotRef | None]
    """What the lookup lease holds for this request. None: not there, not leased, or the lease is gone."""
    next_store: int = 0
    """Chunks before this one have been decided on."""


@dataclass(slots=True)
class Asked:
    """One lookup: which chunks it asked for, and when."""

    pending: PendingLookup
    first_chunks: tuple[int, ...]
    counts: tuple[int, ...]
    computed_tokens: int
    asked_at: float
    background: bool
    """The present answer is used until this one is there."""
    waited: bool = False
    """Whether the scheduler has waited for it."""


@dataclass(slots=True)
class RequestState:
    """A request between `add_request` and `finish`. Built once; `ctx` goes with every call."""

    ctx: ReqContext
    facts: NamespaceFacts
    groups: list[GroupChunks]
    max_lookup_tokens: int | None
    max_offload_tokens: int | None
    asked: Asked | None = None
    """The lookup under way."""
    answered: bool = False
    """False = the next lookup asks the daemon: nothing was asked, or the lease is used or gone."""
    answered_from: int = 0
    """Computed tokens that the present answer was asked with."""
    lease_id: int = 0
    pool_id: int = 0
    """The pool that the pins are in."""
    pending_until: float = 0.0
    """PENDING chunks are worth waiting for until then. 0 = none was seen yet."""
    refresh_after: float = 0.0
    refresh_delay: float = 0.0
    unleased_delay: float = 0.0
    unleased_until: float | None = None
    """Room to pin what is there is worth waiting for until then. None = it was not its turn yet, or not short
    of it then."""
    outdated: bool = False
    """It was there when the weights changed: what it has computed is not to be stored."""
    failed: set[bytes] = field(default_factory=set)
    expected: list[int] = field(default_factory=list)
    """Per group, how many chunks it is expected to store yet."""
    version: int = 0
    """Raised whenever what is known of a chunk changes."""
    _places: list[dict[bytes, int]] | None = None
    """Per group, where each key is; made when it is first needed, until keys are appended."""
    _present: frozenset[ChunkStatus] | None = None
    _tokens: dict[tuple[int, tuple[ChunkStatus, ...]], int] = field(default_factory=dict)
    """What follows from the chunks, until one changes: a waiting request is asked about in every step."""

    @classmethod
    def build(
        cls,
        ctx: ReqContext,
        facts: NamespaceFacts,
        keys: Sequence[Sequence[bytes]],
        max_lookup_tokens: int | None,
    ) -> RequestState:
        """Start with nothing known of any chunk."""
        assert len(keys) == len(facts.groups), f"{len(keys)} lists of keys for {len(facts.groups)} groups"
        groups = [GroupChunks([], [], []) for _ in keys]
        cap = max_offload_tokens(ctx.kv_transfer_params, ctx.req_id)
        state = cls(ctx, facts, groups, max_lookup_tokens, cap, expected=[0] * len(groups))
        for group, group_keys in enumerate(keys):
            state.extend(group, group_keys)
        return state

    def extend(self, group: int, keys: Sequence[bytes]) -> None:
        """Append keys learned later."""
        chunks = self.groups[group]
        chunks.keys.extend(keys)
        chunks.status.extend([ChunkStatus.UNKNOWN] * len(keys))
        chunks.pinned.extend([None] * len(keys))
        self._places = None
        self._chunks_changed()

    @property
    def may_load(self) -> bool:
        """Tell whether this request may load anything at all."""
        return self.max_lookup_tokens is None or self.max_lookup_tokens > 0

    # What to ask for

    def ask_range(self, num_computed_tokens: int, max_keys: int) -> list[tuple[int, int]]:
        """Return per group the chunks [first, end) to ask for: those after the computed ones.

        When there are more than `max_keys`, the leading tokens of all groups are asked for.
        """
        firsts = [
            min(num_computed_tokens // self.facts.chunk_tokens(group), len(chunks.keys))
            for group, chunks in enumerate(self.groups)
        ]
        ends = [len(chunks.keys) for chunks in self.groups]
        if sum(ends) - sum(firsts) > max_keys:
            begin = min(
                num_computed_tokens // tokens * tokens
                for tokens in (self.facts.chunk_tokens(group) for group in range(len(self.groups)))
            )
            # Chunks a token, summed over the groups, say how many tokens max_keys reach.
            density = sum(1 / self.facts.chunk_tokens(group) for group in range(len(self.groups)))
            reach = begin + int(max_keys / density)
            ends = [
                max(first, min(end, reach // self.facts.chunk_tokens(group)))
                for group, (first, end) in enumerate(zip(firsts, ends, strict=True))
            ]
        return list(zip(firsts, ends, strict=True))

    # What the daemon said

    def take_answer(self, asked: Asked, answer: LookupAnswer) -> list[ChunkRef]:
        """Replace what was known of the asked chunks, and every pin. Return the chunks that are missing.

        An answer that never came (`answer.reason`) must not be given.
        """
        self.drop_pins()
        self.answered, self.answered_from, self.lease_id = True, asked.computed_tokens, answer.lease_id
        self.pool_id = answer.pool_id
        missing: list[ChunkRef] = []
        index = 0
        for group, (first, count) in enumerate(zip(asked.first_chunks, asked.counts, strict=True)):
            chunks = self.groups[group]
            for chunk in range(first, first + count):
                status = read_status(answer.statuses[index])
                if chunks.keys[chunk] in self.failed and status is not ChunkStatus.MISS:
                    # Not for this request any more; and worth storing again if it turns out to be gone.
                    status = ChunkStatus.UNKNOWN
                elif status is ChunkStatus.HIT and (slot := answer.leased.get(index)) is not None:
                    chunks.pinned[chunk] = SlotRef(*slot)
                elif status is ChunkStatus.MISS:
                    if index in answer.unwanted:
                        status = ChunkStatus.UNWANTED
                    missing.append(ChunkRef(group, chunk))
                chunks.status[chunk] = status
                index += 1
        self._chunks_changed()
        return missing

    def resolve(self, key: bytes, status: ChunkStatus, slot: SlotRef | None) -> None:
        """Take the daemon's later word on a PENDING chunk."""
        for ref in self.find(key):
            chunks = self.groups[ref.group]
            if chunks.status[ref.chunk] is ChunkStatus.PENDING:
                chunks.status[ref.chunk] = status
                if status is ChunkStatus.HIT and key not in self.failed:
                    chunks.pinned[ref.chunk] = slot
        self._chunks_changed()

    def drop_pins(self) -> int:
        """Forget what the lease held, because it is used or gone; return its id, 0 if there was none.

        What is known for stores stays: a chunk that was there is most likely still there.
        """
        lease_id, self.lease_id, self.answered = self.lease_id, 0, False
        pinned = [chunks for chunks in self.groups if chunks.pinned.count(None) < len(chunks.pinned)]
        for chunks in pinned:
            chunks.pinned = [None] * len(chunks.keys)
        if pinned:
            self._chunks_changed()
        return lease_id

    def forget(self) -> None:
        """Know nothing of any chunk any more: they may all be others now."""
        for chunks in self.groups:
            chunks.status = [ChunkStatus.UNKNOWN] * len(chunks.keys)
        self._chunks_changed()

    def mark_failed(self, keys: Collection[bytes]) -> None:
        """Let these keys miss from now on, and be stored again once they are computed."""
        self.failed.update(keys)
        failed = frozenset(keys)
        for chunks in self.groups:
            for chunk, key in enumerate(chunks.keys):
                if key in failed:
                    chunks.status[chunk] = ChunkStatus.UNKNOWN
                    chunks.pinned[chunk] = None
                    chunks.next_store = min(chunks.next_store, chunk)
        self._chunks_changed()

    def _chunks_changed(self) -> None:
        self.version += 1
        self._present = None
        self._tokens.clear()

    def find(self, key: bytes) -> list[ChunkRef]:
        """Return the places of a key, one per group that has it."""
        if self._places is None:
            # Events come by the thousand, for every promoted chunk of a long prompt: no scan for each.
            self._places = [{key: chunk for chunk, key in enumerate(chunks.keys)} for chunks in self.groups]
        return [ChunkRef(group, places[key]) for group, places in enumerate(self._places) if key in places]

    # What can be loaded

    def has(self, status: ChunkStatus) -> bool:
        """Tell whether any chunk has this status."""
        if self._present is None:
            self._present = frozenset(status for chunks in self.groups for status in chunks.status)
        return status in self._present

    def pinned_tokens(self, num_computed_tokens: int) -> int:
        """Return the prefix, in tokens, that all groups can use with what is pinned."""
        tokens = self._tokens.get((num_computed_tokens, ()))
        if tokens is None:
            tokens = self._prefix([chunks.pinned for chunks in self.groups], num_computed_tokens)
            self._tokens[num_computed_tokens, ()] = tokens
        return tokens

    def hoped_tokens(self, num_computed_tokens: int, *also: ChunkStatus) -> int:
        """Return the prefix that all groups could use if chunks of these statuses were pinned too."""
        tokens = self._tokens.get((num_computed_tokens, also))
        if tokens is None:
            present: list[list[object | None]] = [
                [
                    pin or (status in also and key not in self.failed) or None
                    for pin, status, key in zip(chunks.pinned, chunks.status, chunks.keys, strict=True)
                ]
                for chunks in self.groups
            ]
            tokens = self._tokens[num_computed_tokens, also] = self._prefix(present, num_computed_tokens)
        return tokens

    def _prefix(self, present: Sequence[Sequence[object | None]], num_computed_tokens: int) -> int:
        groups: list[GroupPresence] = []
        for group, there in enumerate(present):
            chunk_tokens = self.facts.chunk_tokens(group)
            # Whole chunks before the computed tokens are in device memory; one they end in is needed.
            first = min(num_computed_tokens // chunk_tokens, len(there))
            window = self.facts.groups[group].sliding_window_tokens
            groups.append(GroupPresence(there[first:], chunk_tokens, first, window))
        return usable_prefix(groups, self.max_lookup_tokens).tokens

    # What to store

    def stores_at_most(self, group: int) -> int:
        """Return how many leading chunks of `group` the request's cap allows to store."""
        known = len(self.groups[group].keys)
        if self.max_offload_tokens is None:
            return known
        return min(known, self.max_offload_tokens // self.facts.chunk_tokens(group))

    def offer(
        self, num_computed_tokens: int, block_ids: Sequence[Sequence[int]], null_block_id: int | None
    ) -> Iterator[tuple[ChunkRef, SkipReason | None]]:
        """Yield each chunk that became full since the last offer, and why not to store it, if so.

        Group after group, in prefix order. Every chunk is yielded once in the life of the request.
        """
        for group, chunks in enumerate(self.groups):
            chunk_tokens = self.facts.chunk_tokens(group)
            end = min(num_computed_tokens // chunk_tokens, len(chunks.keys))
            cap = self.stores_at_most(group)
            first, chunks.next_store = chunks.next_store, max(chunks.next_store, end)
            for chunk in range(first, end):
                ref = ChunkRef(group, chunk)
                if chunk >= cap:
                    yield ref, SkipReason.CAPPED
                elif not self._is_complete(ref, block_ids[group], null_block_id):
                    yield ref, SkipReason.INCOMPLETE
                else:
                    yield ref, SKIP_OF_STATUS[chunks.status[chunk]]

    def _is_complete(self, ref: ChunkRef, table: Sequence[int], null_block_id: int | None) -> bool:
        blocks = self.blocks_of(ref, table)
        return len(blocks) == self.facts.blocks_per_chunk and null_block_id not in blocks

    def blocks_of(self, ref: ChunkRef, table: Sequence[int]) -> Sequence[int]:
        """Return the blocks of a chunk, from the group's block table."""
        size = self.facts.blocks_per_chunk
        return table[ref.chunk * size : (ref.chunk + 1) * size]


def read_status(raw: int) -> ChunkStatus:
    """Read a LookupStatus; one that this version does not know is a miss."""
    return _STATUS_OF.get(raw, ChunkStatus.MISS)


_STATUS_OF = {
    int(status): status
    for status in (ChunkStatus.HIT, ChunkStatus.HIT_UNLEASED, ChunkStatus.PENDING, ChunkStatus.MISS)
}


SKIP_OF_STATUS: dict[ChunkStatus, SkipReason | None] = {
    # Why not to store a chunk of which this is known; None = store it.
    # Never asked (decoded later, or no answer came): stored on suspicion; the daemon drops duplicates.
    ChunkStatus.UNKNOWN: None,
    ChunkStatus.MISS: None,
    ChunkStatus.HIT: SkipReason.RESIDENT,
    ChunkStatus.HIT_UNLEASED: SkipReason.RESIDENT,
    ChunkStatus.PENDING: SkipReason.RESIDENT,
    ChunkStatus.UNWANTED: SkipReason.UNWANTED,
}
