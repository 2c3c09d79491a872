"""The scheduler half of an engine's offloading: what can be loaded, what to store, and into which slots.

For engines that hand over token counts and block tables. Owns the jobs; the requests, the credits and what is
told to the daemon are the base's. Copies nothing: the jobs travel to the workers by the engine's own means.

    add_request     one leased Lookup is sent
    lookup          its answer is read, as often as the scheduler asks
    prepare_load    uses the pins of that lease: no RPC, so it cannot fail
    prepare_store   takes slots from credits: no RPC either
    end_step        one Complete for everything of the step, and none for a step without news
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence

from kvtier_client.client import OffloadClient
from kvtier_client.credits import Credit
from kvtier_client.jobs import NO_SLOT, JobId, LoadJob, StoreJob, flatten
from kvtier_client.requests import ChunkRef, RequestState, SkipReason, SlotRef
from kvtier_client.scheduler_base import SchedulerBase


class SchedulerShim(SchedulerBase):
    """One engine's requests, seen from its scheduler.

    `null_block_id` stands in block tables for a block that is not in device memory; None = there is no such
    id. Times are seconds of `clock`. `offers_ahead` as in the base: an engine that calls `prepare_store`
    after the forward says False, and its operator sees what computing really costs.
    """

    def __init__(
        self,
        client: OffloadClient,
        *,
        null_block_id: int | None = 0,
        clock: Callable[[], float] = time.monotonic,
        offers_ahead: bool = True,
    ) -> None:
        super().__init__(client, clock=clock, offers_ahead=offers_ahead)
        self._null_block_id = null_block_id
        self._loads: dict[JobId, tuple[str, LoadJob]] = {}
        self._stores: dict[JobId, StoreJob] = {}
        self._job_ids = itertools.count(1)

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
        self._costs.asks(req_id, self._clock())
        tokens = self._pins.tokens(state, num_computed_tokens) if state.may_load else 0
        if tokens is not None:
            self._costs.answered(req_id, num_computed_tokens, self._clock())
        return tokens

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
        self._costs.loading(req_id, num_tokens)
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
        self._costs.loaded(req_id, self._clock(), ok=ok)
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
        self._costs.computed(req_id, num_computed_tokens)
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
        taken = self._spend(state, wanted)
        return self._make_store(state, taken, block_ids) if taken else None

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
