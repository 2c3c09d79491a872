"""The scheduler half for engines that ask chunk by chunk and keep tokens and blocks to themselves (vLLM).

Such an engine decides by its own rule how long a prefix it can use: it asks for one key at a time, from the
beginning again in every step in which the request waits. Owns the answers by key and how long a step waits.
The requests, the credits and what is told to the daemon are the base's.

    add_request     one leased Lookup is sent, for all keys
    lookup          reads its answer; a step waits `lookup_wait_ms` at most, and so does a request in all
    prepare_load    uses the pins of that lease: no RPC, so it cannot fail
    prepare_store   takes slots from credits; what finds none is given up
    end_step        one Complete for everything of the step, and none for a step without news
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvtier_client.client import OffloadClient
from kvtier_client.jobs import NO_SLOT
from kvtier_client.pins import Attempt
from kvtier_client.requests import SKIP_OF_STATUS, ChunkStatus, RequestState, SkipReason, SlotRef
from kvtier_client.scheduler_base import SchedulerBase

GROUP_TAIL_BYTES = 4
"""The last bytes of a key name its group, where there are several."""

MAX_WAITS = 65_536
"""Lookup waits remembered until `take_waits`. Beyond it, later ones are not."""


class KeyStatus(Enum):
    """What one key is worth to the request that asks."""

    HIT = "hit"
    """Pinned: `prepare_load` will find it."""
    PENDING = "pending"
    """On its way to the pool; ask again in the next step."""
    RETRY = "retry"
    """Not known yet; ask again in the next step."""
    MISS = "miss"


@dataclass(frozen=True, slots=True)
class LoadSlots:
    """Where a load reads: columns in the order of the keys; NO_SLOT where nothing is pinned."""

    lease_id: int
    pool_id: int
    slot_ids: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreSlots:
    """Where a store writes: the keys to store, in the order they were given, and their slots."""

    pool_id: int
    keys: tuple[bytes, ...]
    slot_ids: tuple[int, ...]
    generations: tuple[int, ...]


NOTHING_TO_STORE = StoreSlots(0, (), (), ())


@dataclass(slots=True)
class _View:
    """A request's answers by key, as of one step."""

    state: RequestState
    step: int = -1
    attempt: Attempt = Attempt.OVERDUE
    version: int = -1
    """The state's, of which the two dictionaries were made."""
    pinned: dict[bytes, SlotRef] = field(default_factory=dict)
    status: dict[bytes, ChunkStatus] = field(default_factory=dict)
    wait_left_s: float = 0.0
    waited_s: float = 0.0
    """What the answer that is on its way has cost in all steps so far."""
    awaits_slots_until: float | None = None
    loaded: set[bytes] = field(default_factory=set)

    def refresh(self) -> None:
        """Make the dictionaries anew if a chunk has changed."""
        state = self.state
        if self.version == state.version:
            return
        self.version = state.version
        self.pinned, self.status = {}, {}
        for chunks in state.groups:
            self.pinned.update(
                (key, pin) for key, pin in zip(chunks.keys, chunks.pinned, strict=True) if pin is not None
            )
            self.status.update(zip(chunks.keys, chunks.status, strict=True))


class KeyedSchedulerShim(SchedulerBase):
    """One engine's requests, seen from a scheduler that knows chunks by their keys only.

    With `hears_of_failures` the engine tells `load_finished` which keys failed. Without, a request that asks
    again after a load has lost what it loaded, for whatever reason, and does not get the same chunks again:
    one that fails to load them every time would never end.
    """

    def __init__(
        self,
        client: OffloadClient,
        *,
        hears_of_failures: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(client, clock=clock, lease_hits=len(client.facts.groups) > 1)
        self._hears_of_failures = hears_of_failures
        self.num_events = 0
        """Attempts to begin a request, and stores asked for: only these change what is counted."""
        self._views: dict[str, _View] = {}
        self._step = 0
        self._step_wait_s = client.options.lookup_wait_ms / 1000
        self._wait_left_s = self._step_wait_s
        self._patience_s = client.options.lookup_deadline_ms / 1000
        self._waits: list[float] = []

    # Requests

    def add_request(
        self,
        req_id: str,
        keys: Sequence[Sequence[bytes]],
        params: Mapping[str, Any] | None = None,
        max_lookup_tokens: int | None = None,
    ) -> None:
        super().add_request(req_id, keys, params, max_lookup_tokens)
        self._views[req_id] = _View(self._requests[req_id], wait_left_s=self._step_wait_s)

    def has_request(self, req_id: str) -> bool:
        """Tell whether the request was added and has not finished."""
        return req_id in self._views

    def num_keys(self, req_id: str, group: int) -> int:
        """Count the keys of a group that are known of a request."""
        return len(self._requests[req_id].groups[group].keys)

    def finish(self, req_id: str) -> None:
        super().finish(req_id)
        self._views.pop(req_id, None)

    # Lookup

    def begin_attempt(self, req_id: str, num_computed_tokens: int) -> bool:
        """Look whether a request can begin in this step; False = ask again in the next one.

        Called by the first `lookup` of a step itself; an engine that knows before it asks key by key that
        it will have to wait saves the asking.
        """
        view = self._views[req_id]
        if all(
            num_computed_tokens >= len(chunks.keys) * self._facts.chunk_tokens(group)
            for group, chunks in enumerate(view.state.groups)
        ):
            return True  # the device has every chunk of it: whatever the answer is, it is of no use
        if view.step != self._step:
            self._attempt(view, num_computed_tokens)
        return view.attempt is not Attempt.WAITING

    def lookup(self, req_id: str, key: bytes) -> KeyStatus:
        """Say what one key is worth to the request now. The answers of one step go together.

        RETRY comes for at most `lookup_deadline_ms`, PENDING for at most `promotion_wait_ms`.
        """
        view = self._views[req_id]
        if view.step != self._step:
            self._attempt(view, self._computed_before(view, key))
        if view.attempt is not Attempt.KNOWN:
            return KeyStatus.RETRY if view.attempt is Attempt.WAITING else KeyStatus.MISS
        if key in view.pinned:
            return KeyStatus.HIT
        if view.status.get(key) is ChunkStatus.PENDING and self._clock() < view.state.pending_until:
            if key in view.state.failed:
                return KeyStatus.MISS
            self._costs.waits(req_id)
            return KeyStatus.PENDING
        return KeyStatus.MISS

    def _attempt(self, view: _View, num_computed_tokens: int) -> None:
        """Begin the request's attempt of this step."""
        self._notice_fork()
        self._read_events()
        state = view.state
        view.step = self._step
        self.num_events += 1
        if view.loaded:
            state.mark_failed(view.loaded)
            view.loaded = set()
        began = self._clock()
        version = state.version
        wait_s = min(self._wait_left_s, view.wait_left_s)
        self._costs.asks(state.ctx.req_id, began)
        attempt = self._pins.attempt(state, num_computed_tokens, wait_s)
        now = self._clock()
        self._wait_left_s = max(0.0, self._wait_left_s - (now - began))
        view.wait_left_s = max(0.0, view.wait_left_s - (now - began))
        view.waited_s += now - began
        if attempt is not Attempt.WAITING and state.version != version and len(self._waits) < MAX_WAITS:
            self._waits.append(view.waited_s)
            view.waited_s = 0.0
        if attempt is Attempt.KNOWN and self._awaits_slots(view, now):
            attempt = Attempt.WAITING
        view.attempt = attempt
        if attempt is not Attempt.WAITING:
            self._costs.answered(state.ctx.req_id, num_computed_tokens, now)
        if attempt is Attempt.KNOWN:
            view.refresh()

    def _awaits_slots(self, view: _View, now: float) -> bool:
        """Tell whether slots for what the request will store are about to come.

        The engine asks for a place to store into in the step that begins the request, and never again. After
        a rest there are no credits: a step or two of patience, once per request, saves its chunks.
        """
        if not any(view.state.expected) or not self._credits.awaits(now, self._patience_s):
            return False
        if view.awaits_slots_until is None:
            view.awaits_slots_until = now + self._patience_s
        return now < view.awaits_slots_until

    def _computed_before(self, view: _View, key: bytes) -> int:
        """Return how many tokens are computed when the first key that is asked for is this one.

        Exact for full attention, which asks from there forwards; a window is asked for from its end.
        """
        group = self._group_of(key)
        facts = self._facts.groups[group]
        if facts.sliding_window_tokens or len(self._facts.groups) > 1:
            return 0
        try:
            return view.state.groups[group].keys.index(key) * self._facts.chunk_tokens(group)
        except ValueError:
            return 0

    def _group_of(self, key: bytes) -> int:
        num_groups = len(self._facts.groups)
        group = int.from_bytes(key[-GROUP_TAIL_BYTES:], "big") if num_groups > 1 else 0
        assert group < num_groups, f"key of group {group}, there are {num_groups}"
        return group

    def take_waits(self) -> list[float]:
        """Return what lookups have cost the scheduler since the last call, in seconds each."""
        if not self._waits:
            return []
        waits, self._waits = self._waits, []
        return waits

    # Loads

    def prepare_load(self, req_id: str, keys: Sequence[bytes]) -> LoadSlots:
        """Name the slots to load from. Cannot fail: a chunk that is not pinned becomes a load that fails."""
        self._notice_fork()
        # A session that has ended took its pins along.
        self._read_events()
        view = self._views[req_id]
        view.refresh()
        state = view.state
        none = SlotRef(NO_SLOT, 0)
        pins = [view.pinned.get(key, none) for key in keys]
        slots = [pin.slot_id for pin in pins if pin is not none]
        load = LoadSlots(
            lease_id=self._client.new_lease_id(),
            pool_id=state.pool_id if slots else 0,
            slot_ids=tuple([pin.slot_id for pin in pins]),
            generations=tuple([pin.generation for pin in pins]),
        )
        if slots:
            # Before the release: the pins move to the load lease first, then the rest of them ends.
            self._client.start_load(state.lease_id, load.lease_id, slots)
        self._pins.abandon(state)
        self._pins.release(state)
        num_chunks = sum(self._group_of(key) == 0 for key in keys)
        self._costs.loading(req_id, num_chunks * self._facts.chunk_tokens(0))
        self.stats.loads += 1
        return load

    def load_finished(self, req_id: str, keys: Collection[bytes], failed_keys: Collection[bytes]) -> None:
        """Note that every rank has ended a load. What failed misses for this request from now on."""
        self._costs.loaded(req_id, self._clock(), ok=not failed_keys)
        if failed_keys:
            self.stats.failed_loads += 1
        view = self._views.get(req_id)
        if view is None:
            return
        if failed_keys:
            view.state.mark_failed(failed_keys)
        if not self._hears_of_failures:
            view.loaded.update(keys)

    # Stores

    def prepare_store(self, req_id: str, keys: Sequence[bytes]) -> StoreSlots:
        """Take a slot for each of these chunks that is worth one. What finds no credit now is given up.

        A key that is named twice is stored once.
        """
        self._notice_fork()
        self.num_events += 1
        view = self._views[req_id]
        state = view.state
        if state.asked is not None and not self._pins.settle(state, 0):
            self._pins.abandon(state)
        # The request computes: whatever it did not load by now it will not load.
        self._pins.release(state)
        view.refresh()
        self._costs.computed(req_id, self._tokens_until(state, keys))
        wanted: list[list[bytes]] = [[] for _ in state.groups]
        for key in keys:
            reason = SKIP_OF_STATUS[view.status.get(key, ChunkStatus.UNKNOWN)]
            if reason is None and key in self._recent:
                reason = SkipReason.RECENT
            if reason is None:
                wanted[self._group_of(key)].append(key)
            else:
                self.stats.skipped[reason] += 1
        spent = self._spend(state, wanted)
        taken = dict(spent)
        if not taken:
            return NOTHING_TO_STORE
        if len(taken) < len(spent):  # a key was named twice; looked for here, where others pay nothing for it
            self._return([slot for key, slot in spent if slot != taken[key]])
            keys = list(dict.fromkeys(keys))
        ordered = tuple([key for key in keys if key in taken])
        slots = [taken[key] for key in ordered]
        store = StoreSlots(
            # The last one's: if a session ended since the first was taken, the slots of its pool fail in
            # the worker by their generations.
            pool_id=slots[-1].pool_id,
            keys=ordered,
            slot_ids=tuple([slot.slot_id for slot in slots]),
            generations=tuple([slot.generation for slot in slots]),
        )
        self._client.announce(state.ctx.req_id, store.slot_ids, store.generations, store.keys)
        self._recent.begin(store.keys)
        self.stats.stores += 1
        self.stats.stored_chunks += len(store.keys)
        return store

    def _tokens_until(self, state: RequestState, keys: Sequence[bytes]) -> int:
        """Return how many tokens are there with the last of these keys of the first group."""
        last = next((key for key in reversed(keys) if self._group_of(key) == 0), None)
        if last is None:
            return 0
        known = state.groups[0].keys
        for index in range(len(known) - 1, -1, -1):  # what is offered lies near the end
            if known[index] == last:
                return (index + 1) * self._facts.chunk_tokens(0)
        return 0

    def give_up(self, num_chunks: int) -> None:
        """Count chunks that are not stored because their blocks are gone."""
        self.num_events += 1
        self.stats.skipped[SkipReason.INCOMPLETE] += num_chunks

    def store_finished(self, keys: Collection[bytes]) -> None:
        """Note that every rank has ended a store. The ranks have told the daemon how."""
        self._recent.end(keys, self._clock())

    # Steps

    def end_step(self) -> None:
        self._step += 1
        self._wait_left_s = self._step_wait_s
        super().end_step()
