"""The seam between the reference engine and an offload: what is called, when, and who holds what.

`OffloadAdapter` itself offloads nothing; the engine uses it when it has no offload. An adapter overrides
every method.

All calls come from the engine's thread. No call may raise, and none may wait for longer than its own
deadline: an adapter in trouble finds nothing, stores nothing and reports the loads in flight as failed.

    on_new_request -> lookup .. lookup -> begin_load ... finished_loads -> store .. store -> finish
                        ^  (once per step while the request waits)                |
                        +------------------- preempt -----------------------------+
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NewType

from kvtier_client.demo.cache import BlockTable, OffloadKey

RequestId = NewType("RequestId", str)
StoreJob = NewType("StoreJob", int)


class OffloadAdapter:
    """What an engine asks of an offload. The defaults find nothing and store nothing."""

    def on_new_request(
        self,
        request_id: RequestId,
        keys: Sequence[Sequence[OffloadKey]],
        loadable_tokens: int,
        params: Mapping[str, object],
    ) -> None:
        """Learn a request, once, before any other call names it.

        `keys[group][i]` names the full prompt block i. A chunk of n blocks is named by the key of its last
        block, which covers the others because hashes are chained. At most the first `loadable_tokens` will
        ever be loaded (the last prompt token is always computed). `params` are the request's
        `kv_transfer_params`, unchecked.
        """

    def lookup(self, request_id: RequestId, num_computed_tokens: int, max_load_tokens: int) -> int | None:
        """Return how many tokens after `num_computed_tokens` can be loaded; None = not known yet, ask again.

        `num_computed_tokens` are in the device cache already, a multiple of the block size. The answer is one
        too, and at most `max_load_tokens` (the rest of the loadable tokens). Sliding-window groups
        need only the blocks that the first token after the load can see, full-attention groups all of them.
        Called in every step in which the request waits: the second call must be cheap, and None must end. A
        positive answer holds until `begin_load`, the next `lookup` or `finish` of this request; it does not
        promise a load.
        """
        return 0

    def begin_load(
        self,
        request_id: RequestId,
        block_ids: Sequence[BlockTable],
        first_blocks: Sequence[int],
        num_tokens: int,
    ) -> None:
        """Start to load what the last `lookup` found, in the same step and before its forwards.

        `block_ids[group][i]` receives logical block `first_blocks[group] + i`; all end at the same token.
        From here until `finished_loads` reports the request, the adapter alone writes these blocks: the
        engine neither reads, shares, frees nor preempts them. A load that cannot start is reported there as
        failed.
        """

    def finished_loads(self) -> Sequence[tuple[RequestId, bool]]:
        """Return the loads that ended since the last call, each exactly once.

        Called at the start of every step. True: all bytes are in place. False: nothing is known about the
        blocks' bytes; the engine throws them away and computes. Either way nothing may write to these blocks
        any more.
        """
        return ()

    def store(
        self, request_id: RequestId, num_full_blocks: int, block_ids: Sequence[BlockTable]
    ) -> StoreJob | None:
        """Offer the first `num_full_blocks` prompt blocks; called after each step that completed some.

        `block_ids[group]` has one id per block, those of earlier calls, of device hits and of loads included;
        NULL_BLOCK (0) where a block has left the window. The adapter picks what it has not stored. With a job
        returned the engine keeps every one of these blocks unchanged until the job ends; None = nothing will
        be read.
        """
        return None

    def finished_stores(self) -> Sequence[StoreJob]:
        """Return the store jobs that ended since the last call, well or not. Every job must end.

        Nothing reads their blocks any more. A job that `wait_for_stores` has waited for may be reported or
        left out.
        """
        return ()

    def wait_for_stores(self, jobs: Collection[StoreJob]) -> None:
        """Return when nothing reads the blocks of these jobs any more: the engine is about to reuse them."""

    def preempt(self, request_id: RequestId) -> None:
        """Forget how far the request got: it lost its blocks, waits again, and `lookup` comes again.

        It has no load in flight. Its store jobs go on and keep their blocks.
        """

    def finish(self, request_id: RequestId) -> None:
        """Forget the request. Its store jobs go on and keep their blocks."""

    def end_step(self) -> None:
        """Send what the calls of this step have collected. Called once per step, empty ones too."""
