"""The engine loop: requests wait, are admitted, prefill in tiles, decode greedily and finish.

Owns requests and their order, and decides every allocation, preemption and recomputation. Owns no bytes
(`cache.py`), no arithmetic (`model.py`) and no copies (`offload.py`, which is called from `step` and its
parts only).

Every forward is for one request, and prefill runs in tiles of one block, the last one maybe shorter. So a
prefix that was loaded and one that was computed are continued with the same shapes, and the logits are
bitwise equal. The tokens of a request therefore do not depend on the cache size, the load, the other requests
or the offload.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvtier_client.demo.cache import BlockHash, BlockTable, DeviceCache, block_hashes, offload_key
from kvtier_client.demo.model import Model
from kvtier_client.demo.offload import OffloadAdapter, RequestId, StoreJob

IDLE_SLEEP_S = 0.0002
"""Pause after a step in which all requests waited for the offload, to leave the core to copy threads."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Say how many requests run at once, and how many prefill tiles each of them gets per step."""

    max_running: int = 4
    tiles_per_step: int = 4


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What a request produced and cost. Hits are those of its first start, costs sums over all starts."""

    request_id: RequestId
    output: tuple[int, ...]
    prompt_tokens: int
    loadable_tokens: int
    """Prompt tokens in full blocks, without the block of the last token: that one is always computed."""
    device_tokens: int
    """Prompt tokens found in the device cache."""
    loaded_tokens: int
    """Prompt tokens loaded by the offload."""
    computed_tokens: int
    """Prompt tokens prefilled, again after a preemption included."""
    preemptions: int
    failed_loads: int
    first_token_s: float
    """From `add_request` to the first output token, waiting included."""
    total_s: float

    def missing_tokens(self, tokens_per_chunk: int) -> int:
        """Return the tokens an ideal offload could have loaded: in full chunks, not in the device cache.

        The sum over requests is the denominator of the offload's hit rate; `loaded_tokens` is never more.
        """
        full = self.prompt_tokens // tokens_per_chunk * tokens_per_chunk
        return max(0, min(full, self.loadable_tokens) - self.device_tokens)


@dataclass(slots=True, eq=False)
class Request:
    """A request in progress. `tables` is empty while it waits; `num_computed` tokens have their KV."""

    request_id: RequestId
    prompt: tuple[int, ...]
    max_new_tokens: int
    hashes: list[BlockHash]
    tables: list[BlockTable] = field(default_factory=list)
    num_computed: int = 0
    output: list[int] = field(default_factory=list)
    loading_tokens: int = 0
    device_tokens: int = 0
    loaded_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    failed_loads: int = 0
    added_at: float = field(default_factory=time.perf_counter)
    first_token_at: float = 0.0


class Engine:
    """Runs requests over one model and one device cache. Not thread-safe: one thread makes all calls."""

    def __init__(
        self,
        model: Model,
        cache: DeviceCache,
        config: EngineConfig | None = None,
        offload: OffloadAdapter | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._config = config or EngineConfig()
        self._offload = offload or OffloadAdapter()
        self._ids: set[RequestId] = set()
        self._waiting: list[Request] = []
        self._loading: dict[RequestId, Request] = {}
        self._running: list[Request] = []
        self._stores: dict[StoreJob, list[BlockTable]] = {}
        self._results: list[RequestResult] = []

    @property
    def cache(self) -> DeviceCache:
        return self._cache

    def add_request(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_new_tokens: int,
        params: Mapping[str, object] | None = None,
    ) -> None:
        """Queue a request. ValueError, and nothing changed, if it can never run here."""
        size = self._cache.tokens_per_block
        kv_tokens = len(prompt) + max_new_tokens - 1  # the last output token's KV is never needed
        capacity = min((self._cache.num_blocks - 1) * size, self._model.config.max_tokens)
        if not prompt or max_new_tokens < 1:
            raise ValueError(f"request {request_id}: needs at least one prompt token and one output token")
        if kv_tokens > capacity:
            raise ValueError(
                f"request {request_id}: {kv_tokens} tokens of KV do not fit {capacity}; use more blocks"
            )
        if request_id in self._ids:
            raise ValueError(f"request {request_id}: this id is in use; choose another one")
        hashes = block_hashes(prompt, size)
        request = Request(RequestId(request_id), tuple(prompt), max_new_tokens, hashes)
        self._ids.add(request.request_id)
        self._waiting.append(request)
        keys = [[offload_key(key, group) for key in hashes] for group in range(len(self._cache.groups))]
        loadable_tokens = len(self._loadable(request)) * size
        self._offload.on_new_request(request.request_id, keys, loadable_tokens, params or {})

    def has_unfinished(self) -> bool:
        return bool(self._ids)

    def step(self) -> list[RequestResult]:
        """Advance every request once and return those that finished."""
        self._end_loads()
        self._end_stores(self._offload.finished_stores())
        self._admit()
        for request in list(self._running):
            # Empty tables: preempted by an earlier request of this very loop.
            if request.tables:
                self._advance(request)
        self._offload.end_step()
        results, self._results = self._results, []
        return results

    def run(self) -> list[RequestResult]:
        """Step until all requests have finished and all stores ended; return results as they finished."""
        return list(self.results())

    def results(self) -> Iterator[RequestResult]:
        """Do as `run`, and yield each result in the step in which it is there."""
        while self.has_unfinished():
            yield from self.step()
            if not self._running:
                time.sleep(IDLE_SLEEP_S)
        self._wait_for_stores()

    def check_integrity(self) -> None:
        """Assert that the blocks' references are exactly those of the requests and the store jobs."""
        holders = [request.tables for request in (*self._running, *self._loading.values())]
        holders += self._stores.values()
        for group, pool in enumerate(self._cache.pools):
            pool.check_integrity()
            held = [block_id for tables in holders for block_id in tables[group] if block_id]
            counts = {block_id: held.count(block_id) for block_id in set(held)}
            assert counts == pool.references(), f"group {group}: held {counts}, counted {pool.references()}"
        assert not any(request.tables for request in self._waiting), "a waiting request holds blocks"

    # Admission: device hits, then loads, then blocks for the whole prompt or nothing.

    def _admit(self) -> None:
        size = self._cache.tokens_per_block
        for request in list(self._waiting):
            if len(self._running) + len(self._loading) >= self._config.max_running:
                return
            loadable = self._loadable(request)
            hit_blocks = self._cache.match_prefix(loadable)
            load_tokens = self._lookup(request, hit_blocks * size, len(loadable) * size)
            if load_tokens is None:
                continue
            ready_blocks = hit_blocks + load_tokens // size
            num_blocks = -(-len(request.prompt) // size)
            tables = self._cache.start_tables(request.hashes, hit_blocks, ready_blocks, num_blocks)
            if tables is None:
                return  # first come, first served: a smaller request behind it must not starve this one
            self._waiting.remove(request)
            request.tables = tables
            request.num_computed = hit_blocks * size
            if request.preemptions == 0:
                request.device_tokens = hit_blocks * size
            if load_tokens:
                self._begin_load(request, hit_blocks, load_tokens)
            else:
                self._running.append(request)

    def _loadable(self, request: Request) -> list[BlockHash]:
        # The last prompt token is always computed: its logits are the first output token.
        return request.hashes[: (len(request.prompt) - 1) // self._cache.tokens_per_block]

    def _lookup(self, request: Request, num_computed: int, end: int) -> int | None:
        if request.failed_loads:
            return 0
        answer = self._offload.lookup(request.request_id, num_computed, end - num_computed)
        if answer is not None:
            assert answer in range(0, end - num_computed + 1, self._cache.tokens_per_block), (
                f"lookup of {request.request_id} answered {answer} tokens after {num_computed} of {end}"
            )
        return answer

    def _begin_load(self, request: Request, hit_blocks: int, load_tokens: int) -> None:
        size = self._cache.tokens_per_block
        ready = hit_blocks + load_tokens // size
        first_blocks = [
            max(hit_blocks, group.first_block(ready * size, size)) for group in self._cache.groups
        ]
        targets = [table[first:ready] for table, first in zip(request.tables, first_blocks, strict=True)]
        request.loading_tokens = load_tokens
        self._loading[request.request_id] = request
        self._offload.begin_load(request.request_id, targets, first_blocks, load_tokens)

    def _end_loads(self) -> None:
        size = self._cache.tokens_per_block
        for request_id, ok in self._offload.finished_loads():
            request = self._loading.pop(request_id)
            start, end = request.num_computed, request.num_computed + request.loading_tokens
            request.loading_tokens = 0
            if ok:
                request.num_computed = end
                if request.preemptions == 0:
                    request.loaded_tokens = end - start
                self._cache.publish(request.tables, request.hashes, start // size, end // size)
                self._running.append(request)
            else:
                # Starting over from the device hits also gets back the window blocks that the load skipped.
                request.failed_loads += 1
                self._unwind(request)

    # Progress of one running request: some prefill tiles, or one token.

    def _advance(self, request: Request) -> None:
        if request.num_computed < len(request.prompt):
            self._prefill(request)
        elif self._grow(request):
            self._emit(request, self._forward(request, request.output[-1:]))

    def _prefill(self, request: Request) -> None:
        size = self._cache.tokens_per_block
        full_before = request.num_computed // size
        for _ in range(self._config.tiles_per_step):
            tile = request.prompt[request.num_computed : request.num_computed + size]
            logits = self._forward(request, tile)
            request.computed_tokens += len(tile)
            if request.num_computed == len(request.prompt):
                break
        full = request.num_computed // size
        if full > full_before:
            self._cache.publish(request.tables, request.hashes, full_before, full)
            self._store(request, full)
        if request.num_computed == len(request.prompt):
            request.first_token_at = request.first_token_at or time.perf_counter()
            self._emit(request, logits)
        else:
            self._cache.release_out_of_window(request.tables, request.num_computed)

    def _forward(self, request: Request, tokens: Sequence[int]) -> torch.Tensor:
        logits = self._model.forward(tokens, request.num_computed, self._cache, request.tables)
        request.num_computed += len(tokens)
        return logits

    def _emit(self, request: Request, logits: torch.Tensor) -> None:
        """Append the next token; there is no stop token, since random weights would stop at random."""
        request.output.append(int(logits.argmax()))
        if len(request.output) == request.max_new_tokens:
            self._finish(request)
        else:
            self._cache.release_out_of_window(request.tables, request.num_computed)

    def _finish(self, request: Request) -> None:
        self._running.remove(request)
        self._cache.release(request.tables)
        self._ids.remove(request.request_id)
        self._offload.finish(request.request_id)
        self._results.append(
            RequestResult(
                request_id=request.request_id,
                output=tuple(request.output),
                prompt_tokens=len(request.prompt),
                loadable_tokens=len(self._loadable(request)) * self._cache.tokens_per_block,
                device_tokens=request.device_tokens,
                loaded_tokens=request.loaded_tokens,
                computed_tokens=request.computed_tokens,
                preemptions=request.preemptions,
                failed_loads=request.failed_loads,
                first_token_s=request.first_token_at - request.added_at,
                total_s=time.perf_counter() - request.added_at,
            )
        )

    # Blocks under pressure: wait for stores first, then take the blocks of the youngest request.

    def _grow(self, request: Request) -> bool:
        """Make room for the KV of the next token; False when the request was preempted instead."""
        if request.num_computed < len(request.tables[0]) * self._cache.tokens_per_block:
            return True
        while not self._cache.grow(request.tables):
            if self._stores:
                self._wait_for_stores()
                continue
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks away. It starts over; greedy decoding repeats its tokens."""
        self._running.remove(request)
        request.preemptions += 1
        request.output.clear()
        self._unwind(request)
        self._offload.preempt(request.request_id)

    def _unwind(self, request: Request) -> None:
        """Give all blocks back and put the request first in the queue."""
        self._cache.release(request.tables)
        request.tables = []
        request.num_computed = 0
        self._waiting.insert(0, request)

    # Stores in flight hold a reference of their own to every block, so a finished request's blocks survive.

    def _store(self, request: Request, num_full_blocks: int) -> None:
        tables = [table[:num_full_blocks] for table in request.tables]
        job = self._offload.store(request.request_id, num_full_blocks, tables)
        if job is not None:
            self._cache.acquire(tables)
            self._stores[job] = tables

    def _end_stores(self, jobs: Iterable[StoreJob]) -> None:
        for job in jobs:
            # Absent: the engine has waited for this job, and dropped its references, before it was reported.
            tables = self._stores.pop(job, None)
            if tables is not None:
                self._cache.release(tables)

    def _wait_for_stores(self) -> None:
        self._offload.wait_for_stores(list(self._stores))
        self._end_stores(list(self._stores))
