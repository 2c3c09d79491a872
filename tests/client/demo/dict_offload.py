"""An in-process offload for tests: chunks of real block bytes in a dict, with every trouble an adapter may
have.

It copies as late as it may and spoils what nobody may read yet, so an engine that breaks the contract of
`OffloadAdapter` (reuses a block under a store, reads one under a load) ends with other tokens or an
assertion.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from kvtier_client.demo.cache import NULL_BLOCK, BlockTable, DeviceCache, OffloadKey
from kvtier_client.demo.offload import OffloadAdapter, RequestId, StoreJob

Chunk = npt.NDArray[np.uint8]
"""Shape (layers in group, blocks_per_chunk, page_bytes)."""


@dataclass(slots=True)
class Load:
    request_id: RequestId
    block_ids: list[BlockTable]
    first_blocks: list[int]
    ok: bool
    polls_left: int


@dataclass(slots=True)
class Store:
    chunks: list[tuple[OffloadKey, int, BlockTable, Chunk]]
    polls_left: int


class Troubles(TypedDict, total=False):
    """The keyword arguments of `DictOffload`."""

    blocks_per_chunk: int
    delay: int
    unknown: int
    failing_loads: Collection[int]


class DictOffload(OffloadAdapter):
    """Keeps every offered chunk.

    `delay` polls pass before a copy ends, the first `unknown` lookups of a request answer None, and the loads
    with the numbers `failing_loads` (from 0, in order) fail.
    """

    def __init__(
        self,
        cache: DeviceCache,
        chunks: dict[OffloadKey, Chunk] | None = None,
        *,
        blocks_per_chunk: int = 1,
        delay: int = 0,
        unknown: int = 0,
        failing_loads: Collection[int] = (),
    ) -> None:
        self.chunks = {} if chunks is None else chunks
        self.loads_begun = 0
        self.stores_waited_for = 0
        self.lookups: list[tuple[RequestId, int, int]] = []
        self.finished: list[RequestId] = []
        self.steps = 0
        self._cache = cache
        self._blocks_per_chunk = blocks_per_chunk
        self._delay = delay
        self.unknown = unknown
        self._failing_loads = failing_loads
        self._keys: dict[RequestId, Sequence[Sequence[OffloadKey]]] = {}
        self.unknown_left: dict[RequestId, int] = {}
        self._found: dict[RequestId, int] = {}
        self._loads: list[Load] = []
        self._stores: dict[StoreJob, Store] = {}
        self._num_jobs = 0

    def on_new_request(
        self,
        request_id: RequestId,
        keys: Sequence[Sequence[OffloadKey]],
        loadable_tokens: int,
        params: Mapping[str, object],
    ) -> None:
        assert request_id not in self._keys
        self._keys[request_id] = keys
        self.unknown_left[request_id] = self.unknown

    def lookup(self, request_id: RequestId, num_computed_tokens: int, max_load_tokens: int) -> int | None:
        self.lookups.append((request_id, num_computed_tokens, max_load_tokens))
        if self.unknown_left[request_id]:
            self.unknown_left[request_id] -= 1
            return None
        size = self._cache.tokens_per_block
        computed = num_computed_tokens // size
        end = computed + max_load_tokens // size
        while end > computed and not self._loadable(request_id, computed, end):
            end -= 1
        self._found[request_id] = (end - computed) * size
        return self._found[request_id]

    def begin_load(
        self,
        request_id: RequestId,
        block_ids: Sequence[BlockTable],
        first_blocks: Sequence[int],
        num_tokens: int,
    ) -> None:
        assert num_tokens == self._found.pop(request_id)
        ok = self.loads_begun not in self._failing_loads
        self.loads_begun += 1
        for group, table in enumerate(block_ids):
            assert NULL_BLOCK not in table
            for pages in self._cache.pages(group):
                pages[table] = 0xFF  # NaN: reading it before the load ends would show
        self._loads.append(Load(request_id, list(block_ids), list(first_blocks), ok, self._delay))

    def finished_loads(self) -> Sequence[tuple[RequestId, bool]]:
        ended = [load for load in self._loads if load.polls_left == 0]
        self._loads = [load for load in self._loads if load.polls_left]
        for load in self._loads:
            load.polls_left -= 1
        for load in ended:
            if load.ok:
                self._copy_in(load)
        return [(load.request_id, load.ok) for load in ended]

    def store(
        self, request_id: RequestId, num_full_blocks: int, block_ids: Sequence[BlockTable]
    ) -> StoreJob | None:
        chunks = []
        n = self._blocks_per_chunk
        for group, table in enumerate(block_ids):
            assert len(table) == num_full_blocks
            for end in range(n, num_full_blocks + 1, n):
                key, part = self._keys[request_id][group][end - 1], table[end - n : end]
                if key not in self.chunks and NULL_BLOCK not in part:
                    chunks.append((key, group, part, self._copy_out(group, part)))
        if not chunks:
            return None
        self._num_jobs += 1
        job = StoreJob(self._num_jobs)
        self._stores[job] = Store(chunks, self._delay)
        return job

    def finished_stores(self) -> Sequence[StoreJob]:
        ended = [job for job, store in self._stores.items() if store.polls_left == 0]
        for store in self._stores.values():
            store.polls_left -= 1
        for job in ended:
            self._end_store(job)
        return ended

    def wait_for_stores(self, jobs: Collection[StoreJob]) -> None:
        self.stores_waited_for += len(jobs)
        for job in jobs:
            self._end_store(job)

    def preempt(self, request_id: RequestId) -> None:
        assert request_id in self._keys

    def finish(self, request_id: RequestId) -> None:
        assert all(load.request_id != request_id for load in self._loads)
        del self._keys[request_id]
        self.finished.append(request_id)

    def end_step(self) -> None:
        self.steps += 1

    def _loadable(self, request_id: RequestId, computed: int, end: int) -> bool:
        size = self._cache.tokens_per_block
        return all(
            self._chunk(request_id, number, block) is not None
            for number, group in enumerate(self._cache.groups)
            for block in range(max(computed, group.first_block(end * size, size)), end)
        )

    def _chunk(self, request_id: RequestId, group: int, block: int) -> Chunk | None:
        keys, last = self._keys[request_id][group], block - block % self._blocks_per_chunk
        last += self._blocks_per_chunk - 1
        return self.chunks.get(keys[last]) if last < len(keys) else None

    def _copy_in(self, load: Load) -> None:
        for group, (table, first) in enumerate(zip(load.block_ids, load.first_blocks, strict=True)):
            for block, block_id in enumerate(table, start=first):
                chunk = self._chunk(load.request_id, group, block)
                assert chunk is not None
                for pages, source in zip(self._cache.pages(group), chunk, strict=True):
                    pages[block_id] = source[block % self._blocks_per_chunk]

    def _copy_out(self, group: int, table: BlockTable) -> Chunk:
        return np.stack([pages[table] for pages in self._cache.pages(group)])

    def _end_store(self, job: StoreJob) -> None:
        for key, group, table, offered in self._stores.pop(job).chunks:
            copied = self._copy_out(group, table)
            assert np.array_equal(copied, offered), f"blocks {table} changed under store job {job}"
            self.chunks[key] = copied
