"""What every scheduler half shares: the requests, the credits, and what is told to the daemon and when.

Owns the books of one engine's scheduler and the client's events. How an engine's calls map to them is in the
two shims above: `scheduler.py` for engines that hand over tokens and block tables, `keyed_scheduler.py` for
engines that ask chunk by chunk and keep their blocks to themselves. Calls no grpc: the client turns every
trouble into a miss.

A step of the engine waits for no RPC, except that a lookup waits up to `lookup_wait_ms` for an answer that is
already on its way. One thread calls the shim. The listener's methods come from the client's threads: credits
go into a book with a lock of its own, everything else into a queue that the next call reads.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from kvtier_client.answers import CreditGrant, LookupAnswer, SessionInfo, SlotsForMisses
from kvtier_client.client import OffloadClient
from kvtier_client.context import ReqContext
from kvtier_client.costs import Costs
from kvtier_client.credits import Credit, CreditBook
from kvtier_client.listener import ClientListener
from kvtier_client.pins import Pins
from kvtier_client.recent import RecentStores
from kvtier_client.requests import ChunkRef, ChunkStatus, RequestState, SkipReason, SlotRef

T = TypeVar("T")
"""Whatever the shim above knows a chunk by."""


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


class SchedulerBase(ClientListener):
    """One engine's requests, seen from its scheduler. Times are seconds of `clock`."""

    def __init__(
        self,
        client: OffloadClient,
        *,
        clock: Callable[[], float] = time.monotonic,
        lease_hits: bool = False,
        offers_ahead: bool = True,
    ) -> None:
        """`offers_ahead`: `prepare_store` is called before the step computes, not after it."""
        self.stats = SchedulerStats()
        self._client = client
        self._facts = client.facts
        self._clock = clock
        self._requests: dict[str, RequestState] = {}
        self._pins = Pins(client, client.options, clock, self._slots_wanted, self._note_answer, lease_hits)
        self._credits = CreditBook()
        self._recent = RecentStores()
        self._costs = Costs(offers_ahead)
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
        self._costs.begin(req_id, len(keys[0]) * self._facts.chunk_tokens(0))
        self._pins.ask(state, 0, self._clock())

    def extend_keys(self, req_id: str, group: int, keys: Sequence[bytes]) -> None:
        """Append the keys of chunks that became known later. They are stored when full, never looked up
        before the request is looked up anew.
        """
        self._requests[req_id].extend(group, keys)

    def finish(self, req_id: str) -> None:
        """End a request, however it ended. Its jobs go on; report their ends all the same."""
        self._notice_fork()
        state = self._requests.pop(req_id, None)
        if state is None:
            return
        self._costs.end(req_id, self._clock())
        self._pins.abandon(state)
        self._pins.release(state)
        for group in range(len(state.groups)):
            self._expect(state, group, 0, 0.0)
        self._client.finish(req_id)

    def _slots_wanted(self, state: RequestState, first_chunks: Sequence[int]) -> list[SlotsForMisses]:
        """Wish for slots, with a lookup, for everything that it may find missing."""
        wishes: list[SlotsForMisses] = []
        if state.outdated:
            return wishes
        for group, first in enumerate(first_chunks):
            at_most = state.stores_at_most(group) - first
            if at_most > 0:
                wishes.append(
                    SlotsForMisses(group, at_most, self._credits.spare(group, state.expected[group]))
                )
        return wishes

    def _note_answer(
        self, state: RequestState, answer: LookupAnswer, missing: Sequence[ChunkRef], asked_at: float
    ) -> None:
        """Expect to store what the daemon does not have, into the slots that came along."""
        wanted: Counter[int] = Counter()
        for ref in missing:
            chunks = state.groups[ref.group]
            self._recent.missed(chunks.keys[ref.chunk], asked_at)
            if chunks.status[ref.chunk] is ChunkStatus.MISS and ref.chunk < state.stores_at_most(ref.group):
                wanted[ref.group] += 1
        now = self._clock()
        slots = {grant.group: grant for grant in answer.credits}
        for group in range(len(state.groups)):
            needed = wanted[group] - self._credits.spare(group, state.expected[group])
            self._expect(state, group, wanted[group], now)
            _, slot_ids, generations = slots.get(group, CreditGrant(group, (), ()))
            self._return(
                self._credits.add(group, slot_ids, generations, answer.store_lease_id, needed=needed, now=now)
            )

    def _expect(self, state: RequestState, group: int, count: int, now: float) -> None:
        """Count on a request to store `count` chunks of `group` from now on."""
        change = count - state.expected[group]
        if change:
            state.expected[group] = count
            self._credits.expect(group, change, now)

    def _spend(self, state: RequestState, wanted: Sequence[Sequence[T]]) -> list[tuple[T, Credit]]:
        """Give each chunk a slot, the leading ones where there are not enough."""
        now = self._clock()
        taken: list[tuple[T, Credit]] = []
        if state.outdated:
            self.stats.skipped[SkipReason.RESET] += sum(map(len, wanted))
            return taken
        short = SkipReason.NO_CREDITS if self._client.attached else SkipReason.AWAY
        for group, refs in enumerate(wanted):
            expected = state.expected[group]
            self._expect(state, group, max(0, expected - len(refs)), now)
            slots = self._credits.take(group, len(refs), now, expected)
            taken += zip(refs, slots, strict=False)
            if len(slots) < len(refs):
                self.stats.skipped[short] += len(refs) - len(slots)
        return taken

    # Steps

    def end_step(self) -> None:
        """Send what the step has to say; sends nothing where it has nothing to say."""
        self._notice_fork()
        self._read_events()
        now = self._clock()
        if self._credits.end_step(now):
            self._return(self._credits.surplus(now))
            self._ask_for_credits(now)
        self._costs.end_step(now)
        if (costs := self._costs.take(now)) is not None and self._client.attached:
            self._client.report_costs(costs)
        self._client.flush_step()

    def flush(self) -> None:
        """Send what is queued, without ending the step."""
        self._client.flush()

    def reset(self, weights_id: str = "", timeout_s: float = 5.0) -> bool:
        """Move to another epoch after a weight update: nothing stored before is hit again.

        Waits for the daemon, at most `timeout_s`. Call it when no request computes and every store has
        finished. False = the daemon has not confirmed yet; until it does every lookup misses.
        """
        self._notice_fork()
        self._read_events()
        for state in self._requests.values():
            self._pins.abandon(state)
            self._pins.release(state)
            state.forget()
            state.outdated = True
        self._recent.clear()
        self._return(self._credits.reset(self._client.new_lease_id()))
        return self._client.reset(weights_id, timeout_s)

    def _ask_for_credits(self, now: float) -> None:
        if self._client.ready and (asks := self._credits.shortfall(now)):
            # First what became of the ones before: until the daemon knows, they count as held.
            self._client.flush()
            for group, count in asks:
                if not self._client.request_credits(group, count):
                    self._credits.grant(group, (), (), 0, now)

    def _return(self, slots: Sequence[Credit]) -> None:
        if slots:
            self._client.return_credits([slot.slot_id for slot in slots], [slot.generation for slot in slots])

    # The client's listener, on the client's threads

    def on_attached(self, session: SessionInfo) -> None:
        """Begin with no credits; what is needed is asked for in the next step."""
        max_bytes = session.limits.max_credit_bytes
        first_lease_id = self._client.new_lease_id()
        self._credits.open(session.slot_bytes, max_bytes, session.pool_id, self._clock(), first_lease_id)

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
        now = self._clock()
        outdated = self._credits.grant(group, slot_ids, generations, lease_id, now)
        if outdated:
            self._return(outdated)
            self._client.flush()
        elif slot_ids:
            # Requests that came since the asking need more, and may be waiting for it.
            self._ask_for_credits(now)

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
