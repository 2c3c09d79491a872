"""The scheduler half of an engine's offloading: what can be loaded, what to store, and into which slots.

Owns the requests, the credits and the order of what is told to the daemon. Copies nothing: the jobs it makes
travel to the workers by the engine's own means. Calls no grpc: the client turns every trouble into a miss.

A step of the engine waits for no RPC, except that `lookup` waits up to `lookup_wait_ms` for an answer that is
already on its way:

    add_request     one leased Lookup is sent
    lookup          its answer is read, as often as the scheduler asks
    prepare_load    uses the pins of that lease: no RPC, so it cannot fail
    prepare_store   takes slots from credits: no RPC either
    end_step        one Complete for everything of the step, and none for a step without news

One thread calls the shim. The listener's methods come from the client's threads: credits go into a book with
a lock of its own, everything else into a queue that the next call reads.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvtier_client.answers import SessionInfo
from kvtier_client.client import OffloadClient
from kvtier_client.context import ReqContext
from kvtier_client.credits import Credit, CreditBook
from kvtier_client.jobs import NO_SLOT, JobId, LoadJob, StoreJob, flatten
from kvtier_client.listener import ClientListener
from kvtier_client.pins import Pins
from kvtier_client.recent import RecentStores
from kvtier_client.requests import ChunkRef, ChunkStatus, RequestState, SkipReason, SlotRef


@dataclass(slots=True)
class SchedulerStats:
    """What the shim has done since it was made. Plain counts."""

    loads: int = 0
    loaded_tokens: int = 0
    failed_loads: int = 0
    stores: int = 0
    stored_chunks: int = 0
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    """Chunks that were computed and not stored, by reason."""


class SchedulerShim(ClientListener):
    """One engine's requests, seen from its scheduler.

    `null_block_id` stands in block tables for a block that is not in device memory; None = there is no such
    id. Times are seconds of `clock`.
    """

    def __init__(
        self,
        client: OffloadClient,
        *,
        null_block_id: int | None = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = SchedulerStats()
        self._client = client
        self._facts = client.facts
        self._null_block_id = null_block_id
        self._clock = clock
        self._requests: dict[str, RequestState] = {}
        self._pins = Pins(client, client.options, clock, self._note_missing)
        self._loads: dict[JobId, tuple[str, LoadJob]] = {}
        self._stores: dict[JobId, StoreJob] = {}
        self._job_ids = itertools.count(1)
        self._credits = CreditBook()
        self._recent = RecentStores()
        self._events: deque[Callable[[], None]] = deque()
        self._pid = os.getpid()
        client.listener = self
        if client.session is not None:
            self.on_attached(client.session)

    # Requests

    def add_request(
        self,
        req_id: str,
        keys: Sequence[Sequence[bytes]],
        params: Mapping[str, Any] | None = None,
        max_lookup_tokens: int | None = None,
    ) -> None:
        """Begin a request and ask for its chunks.

        `keys[g]` names every full chunk of group g that is known now. At most `max_lookup_tokens` leading
        tokens will be loaded; 0 = none.
        """
        self._notice_fork()
        assert req_id not in self._requests, f"request {req_id} was added before and has not finished"
        state = RequestState.build(ReqContext(req_id, params), self._facts, keys, max_lookup_tokens)
        self._requests[req_id] = state
        now = self._clock()
        for group, chunks in enumerate(state.groups):
            if not self._credits.held(group):
                # After a rest there is nothing to store into: ask before the answer says how much is needed.
                self._credits.foresee(group, len(chunks.keys), now)
        self._pins.ask(state, 0, now)
        self._ask_for_credits(now)

    def extend_keys(self, req_id: str, group: int, keys: Sequence[bytes]) -> None:
        """Append the keys of chunks that became known later. They are stored when full, never looked up
        before the request is looked up anew.
        """
        self._requests[req_id].extend(group, keys)

    def finish(self, req_id: str) -> None:
        """End a request, however it ended. Its jobs go on; report their ends all the same."""
        state = self._requests.pop(req_id, None)
        if state is None:
            return
        self._pins.abandon(state)
        self._pins.release(state)
        self._client.finish(req_id)

    # Lookup

    def lookup(self, req_id: str, num_computed_tokens: int) -> int | None:
        """Return how many tokens after the computed ones can be loaded; None = ask again in the next step.

        They are pinned until `prepare_load`, `finish` or the first `prepare_store` of the request. Waits at
        most `lookup_wait_ms`; says None for at most `lookup_deadline_ms`, or `promotion_wait_ms` for chunks
        on their way from a lower tier.
        """
        self._notice_fork()
        self._read_events()
        state = self._requests[req_id]
        if not state.may_load:
            return 0
        return self._pins.tokens(state, num_computed_tokens)

    def _note_missing(self, state: RequestState, missing: Sequence[ChunkRef], asked_at: float) -> None:
        """Expect to store what the daemon does not have; the slots come while the engine computes."""
        wanted: Counter[int] = Counter()
        for ref in missing:
            chunks = state.groups[ref.group]
            self._recent.missed(chunks.keys[ref.chunk], asked_at)
            if chunks.status[ref.chunk] is ChunkStatus.MISS and ref.chunk < state.stores_at_most(ref.group):
                wanted[ref.group] += 1
        now = self._clock()
        for group, count in wanted.items():
            self._credits.foresee(group, count, now)
        self._ask_for_credits(now)

    # Loads

    def prepare_load(
        self,
        req_id: str,
        num_computed_tokens: int,
        num_tokens: int,
        block_ids: Sequence[Sequence[int]],
        block_indices: Sequence[int] | None = None,
    ) -> LoadJob:
        """Make the job that loads `num_tokens` after the computed ones into these device blocks.

        `block_ids[g]` are the blocks of group g that are loaded, in order; `block_indices[g]` is the place in
        the request of the first of them, by default such that the last one holds the last token. Cannot fail:
        a chunk that is not pinned becomes a load that fails.
        """
        self._notice_fork()
        # A session that has ended took its pins along.
        self._read_events()
        state = self._requests[req_id]
        end = num_computed_tokens + num_tokens
        if block_indices is None:
            block_indices = [
                -(-end // group.tokens_per_block) - len(blocks)
                for group, blocks in zip(self._facts.groups, block_ids, strict=True)
            ]
        refs = self._refs(block_ids, block_indices)
        pins = [state.groups[ref.group].pinned[ref.chunk] or SlotRef(NO_SLOT, 0) for ref in refs]
        slots = [pin.slot_id for pin in pins if pin.slot_id != NO_SLOT]
        flat, sizes = flatten(block_ids)
        job = LoadJob(
            job_id=JobId(next(self._job_ids)),
            pool_id=state.pool_id if slots else 0,
            slot_ids=tuple(pin.slot_id for pin in pins),
            generations=tuple(pin.generation for pin in pins),
            keys=tuple(state.groups[ref.group].keys[ref.chunk] for ref in refs),
            block_ids=flat,
            group_sizes=sizes,
            block_indices=tuple(block_indices),
            load_lease_id=self._client.new_lease_id(),
        )
        if slots:
            # Before the release: the pins move to the load lease first, then the rest of them ends.
            self._client.start_load(state.lease_id, job.load_lease_id, slots)
        self._pins.abandon(state)
        self._pins.release(state)
        self._loads[job.job_id] = (req_id, job)
        self.stats.loads += 1
        self.stats.loaded_tokens += num_tokens
        return job

    def _refs(self, block_ids: Sequence[Sequence[int]], block_indices: Sequence[int]) -> list[ChunkRef]:
        """Return the chunks that hold these blocks, in the order of a job's slots."""
        size = self._facts.blocks_per_chunk
        return [
            ChunkRef(group, chunk)
            for group, (blocks, first) in enumerate(zip(block_ids, block_indices, strict=True))
            if blocks
            for chunk in range(first // size, (first + len(blocks) - 1) // size + 1)
        ]

    def load_finished(self, job_id: JobId, ok: bool, failed_keys: Collection[bytes] = ()) -> None:
        """Note that every rank has ended this load. What failed misses for this request from now on."""
        req_id, job = self._loads.pop(job_id)
        if ok:
            return
        self.stats.failed_loads += 1
        state = self._requests.get(req_id)
        if state is not None:
            state.mark_failed(failed_keys or job.keys)

    # Stores

    def prepare_store(
        self, req_id: str, num_computed_tokens: int, block_ids: Sequence[Sequence[int]]
    ) -> StoreJob | None:
        """Make the job that stores the chunks which this step completes; None = nothing to store.

        `num_computed_tokens` counts the tokens whose KV will be there when the step ends; `block_ids[g]` is
        the whole block table of group g. Each chunk is offered once: what finds no credit now is given up.
        """
        self._notice_fork()
        state = self._requests[req_id]
        if state.asked is not None and not self._pins.settle(state, 0):
            self._pins.abandon(state)
        # The request computes: whatever it did not load by now it will not load.
        self._pins.release(state)
        wanted: list[list[ChunkRef]] = [[] for _ in state.groups]
        for ref, reason in state.offer(num_computed_tokens, block_ids, self._null_block_id):
            if reason is not None:
                self.stats.skipped[reason] += 1
            elif state.groups[ref.group].keys[ref.chunk] in self._recent:
                self.stats.skipped[SkipReason.RECENT] += 1
            else:
                wanted[ref.group].append(ref)
        taken = self._spend(wanted)
        return self._make_store(state, taken, block_ids) if taken else None

    def _spend(self, wanted: Sequence[Sequence[ChunkRef]]) -> list[tuple[ChunkRef, Credit]]:
        """Give each chunk a slot, the leading ones where there are not enough."""
        now = self._clock()
        taken: list[tuple[ChunkRef, Credit]] = []
        short = SkipReason.NO_CREDITS if self._client.attached else SkipReason.AWAY
        for group, refs in enumerate(wanted):
            slots = self._credits.take(group, len(refs), now)
            taken += zip(refs, slots, strict=False)
            if len(slots) < len(refs):
                self.stats.skipped[short] += len(refs) - len(slots)
        return taken

    def _make_store(
        self,
        state: RequestState,
        taken: Sequence[tuple[ChunkRef, Credit]],
        block_ids: Sequence[Sequence[int]],
    ) -> StoreJob:
        blocks: list[list[int]] = [[] for _ in state.groups]
        indices = [0] * len(state.groups)
        for ref, _ in taken:
            if not blocks[ref.group]:
                indices[ref.group] = ref.chunk * self._facts.blocks_per_chunk
            # Chunks between that are not stored leave no gap: only whole chunks follow each other here.
            blocks[ref.group] += state.blocks_of(ref, block_ids[ref.group])
        flat, sizes = flatten(blocks)
        job = StoreJob(
            job_id=JobId(next(self._job_ids)),
            # The last one's: if a session ended since the first was taken, the slots of its pool fail in the
            # worker by their generations.
            pool_id=taken[-1][1].pool_id,
            slot_ids=tuple(slot.slot_id for _, slot in taken),
            generations=tuple(slot.generation for _, slot in taken),
            keys=tuple(state.groups[ref.group].keys[ref.chunk] for ref, _ in taken),
            block_ids=flat,
            group_sizes=sizes,
            block_indices=tuple(indices),
        )
        self._client.announce(state.ctx.req_id, job.slot_ids, job.generations, job.keys)
        self._recent.begin(job.keys)
        self._stores[job.job_id] = job
        self.stats.stores += 1
        self.stats.stored_chunks += len(job.keys)
        return job

    def store_finished(self, job_id: JobId) -> None:
        """Note that every rank has ended this store. The ranks have told the daemon how."""
        self._recent.end(self._stores.pop(job_id).keys, self._clock())

    # Steps

    def end_step(self) -> None:
        """Send what the step has to say; sends nothing where it has nothing to say."""
        self._notice_fork()
        self._read_events()
        now = self._clock()
        self._credits.end_step()
        self._return(self._credits.surplus(now))
        self._ask_for_credits(now)
        self._client.flush()

    def reset(self, weights_id: str = "") -> bool:
        """Move to another epoch after a weight update: nothing stored before is hit again.

        Waits for the daemon. Call it when no request computes and every store has finished. False = the
        daemon has not confirmed yet; until it does the client answers every lookup with misses.
        """
        self._notice_fork()
        self._read_events()
        for state in self._requests.values():
            self._pins.abandon(state)
            self._pins.release(state)
            state.forget()
        self._recent.clear()
        self._return(self._credits.reset(self._client.new_lease_id()))
        return self._client.reset(weights_id)

    def _ask_for_credits(self, now: float) -> None:
        if self._client.ready:
            for group, count in self._credits.shortfall(now):
                if not self._client.request_credits(group, count):
                    self._credits.grant(group, (), (), 0, now)

    def _return(self, slots: Sequence[Credit]) -> None:
        if slots:
            self._client.return_credits([slot.slot_id for slot in slots], [slot.generation for slot in slots])

    # The client's listener, on the client's threads

    def on_attached(self, session: SessionInfo) -> None:
        """Begin with no credits; what is needed is asked for in the next step."""
        max_bytes = session.limits.max_credit_bytes
        self._credits.open(session.slot_bytes, max_bytes, session.pool_id, self._clock())

    def on_detached(self, reason: str) -> None:
        """Let every pin and credit go. Jobs under way are the workers' to end."""
        self._credits.void()
        self._events.append(self._forget_session)

    def on_resolved(self, lease_id: int, key: bytes, status: int, slot_id: int, generation: int) -> None:
        """Keep it for the next call of the scheduler."""
        slot = SlotRef(slot_id, generation)
        self._events.append(partial(self._pins.resolve, lease_id, key, status, slot))

    def on_credits(
        self, group: int, slot_ids: Sequence[int], generations: Sequence[int], lease_id: int
    ) -> None:
        """Take the slots; give those back at once that were asked for before a reset."""
        outdated = self._credits.grant(group, slot_ids, generations, lease_id, self._clock())
        if outdated:
            self._return(outdated)
            self._client.flush()

    def on_credits_wanted(self, count: int) -> None:
        """Give back what is unused, at once: an idle engine takes no step that could do it."""
        self._return(self._credits.give_back(count, self._clock()))
        self._client.flush()

    def on_draining(self, deadline_ms: int) -> None:
        """Give every unused credit back: the daemon waits for what is out."""
        self.on_credits_wanted(sys.maxsize)

    def _notice_fork(self) -> None:
        """In the child of a fork begin anew: its parent's pins and credits are not its own.

        The book's lock may be held for good by a thread that does not exist here, so the book is a new one.
        """
        if self._pid != os.getpid() and self._client.forked:
            self._pid = os.getpid()
            self._credits = CreditBook()
            self._events.clear()
            self._forget_session()

    def _forget_session(self) -> None:
        self._pins.void(self._requests.values())
        self._recent.clear()

    def _read_events(self) -> None:
        while self._events:
            self._events.popleft()()
