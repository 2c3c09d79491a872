"""What can be loaded: asking the daemon about a request's chunks, and reading the answer as often as needed.

Owns when a Lookup is sent, how long its answer is waited for, and the lookup leases that pin what was found.
What an answer means for the request is `requests.py`. One thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from kvtier_client.answers import LookupAnswer, SlotsForMisses
from kvtier_client.client import OffloadClient
from kvtier_client.options import ClientOptions
from kvtier_client.patience import Patience
from kvtier_client.requests import Asked, ChunkRef, ChunkStatus, RequestState, SlotRef, read_status

REFRESH_FIRST_S = 0.05
"""A request that waits longer than this asks again for what it missed: another engine may have stored it."""

UNLEASED_FIRST_S = 0.005
"""The same for a request whose chunks are there but could not all be pinned."""

REFRESH_MAX_S = 2.0
"""Each refresh doubles the delay up to this, or a full waiting queue would ask all the time."""

DEFAULT_MAX_KEYS = 8192
"""Keys in one Lookup until a session has told its limit."""

MAX_EARLY_EVENTS = 4096
"""Events about lookups whose answer has not been read. Beyond it the oldest are dropped: their chunks stay
PENDING until promotion_wait_ms, then miss."""


class Attempt(Enum):
    """How much one attempt to begin a request may rely on."""

    KNOWN = "known"
    """The answer is there, or nothing can be asked: what is not pinned misses."""
    WAITING = "waiting"
    """The answer is on its way."""
    OVERDUE = "overdue"
    """It should have been there by now: everything misses."""


Resolution = tuple[bytes, ChunkStatus, SlotRef | None]
AnswerHandler = Callable[[RequestState, LookupAnswer, Sequence[ChunkRef], float], None]
SlotsWisher = Callable[[RequestState, Sequence[int]], Sequence[SlotsForMisses]]


class Pins:
    """The lookups and lookup leases of one engine's requests.

    `slots_wanted(state, first_chunks)` says what slots are to come with an answer; `on_answer(state, answer,
    missing, asked_at)` is called with it and what it says is not there.
    """

    def __init__(
        self,
        client: OffloadClient,
        options: ClientOptions,
        clock: Callable[[], float],
        slots_wanted: SlotsWisher,
        on_answer: AnswerHandler,
        lease_hits: bool = False,
    ) -> None:
        self._client = client
        self._wait_s = options.lookup_wait_ms / 1000
        self._deadline_s = options.lookup_deadline_ms / 1000
        self._promotion_wait_ms = options.promotion_wait_ms
        self._clock = clock
        self._slots_wanted = slots_wanted
        self._on_answer = on_answer
        self._lease_hits = lease_hits
        self._patience = Patience()
        self._owners: dict[int, RequestState] = {}
        self._early: OrderedDict[int, list[Resolution]] = OrderedDict()
        self._num_early = 0

    def attempt(self, state: RequestState, num_computed_tokens: int, wait_s: float | None = None) -> Attempt:
        """Bring what is known of a request up to date, for one attempt of the scheduler to begin it.

        Sends nothing while the present answer stands. Waits for one on its way, at most `wait_s`
        (`lookup_wait_ms` by default), and not at all where answers usually take longer.
        """
        now = self._clock()
        if state.lease_id and not self._client.lease_valid(state.lease_id):
            self.release(state)
        self._ask_if_due(state, num_computed_tokens, now)
        asked = state.asked
        if (
            asked is not None
            and self.settle(state, self._useful_wait(asked, self._wait_s if wait_s is None else wait_s))
            and _reaches_further(state, num_computed_tokens)
        ):
            # A request's first lookup is sent before anybody knows what the device cache holds of it.
            self.ask(state, num_computed_tokens, now)
        asked = state.asked
        if asked is None or asked.background:
            awaits_room = self._awaits_room(state, num_computed_tokens, now)
            return Attempt.WAITING if awaits_room else Attempt.KNOWN
        # The client ends the lookup at the same deadline; whoever is first, this attempt computes.
        return Attempt.OVERDUE if now - asked.asked_at >= self._deadline_s else Attempt.WAITING

    def tokens(self, state: RequestState, num_computed_tokens: int) -> int | None:
        """Return how many tokens after the computed ones are pinned; None = not known yet."""
        attempt = self.attempt(state, num_computed_tokens)
        if attempt is not Attempt.KNOWN:
            return 0 if attempt is Attempt.OVERDUE else None
        tokens = state.pinned_tokens(num_computed_tokens)
        if self._clock() < state.pending_until and state.has(ChunkStatus.PENDING):
            hoped = state.hoped_tokens(num_computed_tokens, ChunkStatus.HIT, ChunkStatus.PENDING)
            if hoped > max(tokens, num_computed_tokens):
                return None
        return max(0, tokens - num_computed_tokens)

    def ask(
        self, state: RequestState, num_computed_tokens: int, now: float, background: bool = False
    ) -> None:
        """Send one Lookup for everything after the computed tokens."""
        session = self._client.session
        max_keys = session.limits.max_keys if session is not None else DEFAULT_MAX_KEYS
        ranges = state.ask_range(num_computed_tokens, max_keys)
        keys = [
            key
            for chunks, (first, end) in zip(state.groups, ranges, strict=True)
            for key in chunks.keys[first:end]
        ]
        if not keys:
            self._learn_nothing(state, num_computed_tokens, now)
            return
        firsts = tuple(first for first, _ in ranges)
        pending = self._client.lookup_async(
            state.ctx,
            keys,
            lease=state.may_load,
            first_chunks=firsts,
            max_tokens=state.max_lookup_tokens,
            pending_wait_ms=self._promotion_wait_ms if state.may_load else 0,
            lease_hits=self._lease_hits,
            slots_for_misses=self._slots_wanted(state, firsts),
        )
        counts = tuple(end - first for first, end in ranges)
        state.asked = Asked(pending, firsts, counts, num_computed_tokens, now, background)

    def settle(self, state: RequestState, wait_s: float) -> bool:
        """Take over the answer of the lookup under way, if it comes within `wait_s`."""
        asked = state.asked
        if asked is None or not asked.pending.wait(wait_s):
            return False
        state.asked = None
        answer = asked.pending.answer()
        if asked.waited and asked.pending.took_s is not None:
            self._patience.note(asked.pending.took_s)
        if answer.reason:
            if asked.background:
                self._plan_refresh(state, self._clock())
            else:
                self._learn_nothing(state, asked.computed_tokens, self._clock())
            return True
        self.release(state)
        missing = state.take_answer(asked, answer)
        if not state.pending_until and state.has(ChunkStatus.PENDING):
            # Once: what is still PENDING when it is asked for again has been waited for already.
            state.pending_until = asked.asked_at + self._promotion_wait_ms / 1000
        self._plan_refresh(state, self._clock())
        if state.has(ChunkStatus.HIT_UNLEASED):
            # The share of pins was used up in that instant: it is worth asking anew soon.
            state.refresh_delay = min(state.refresh_delay, max(2 * state.unleased_delay, UNLEASED_FIRST_S))
            state.unleased_delay = state.refresh_delay
            state.refresh_after = self._clock() + state.refresh_delay
        if state.lease_id:
            self._owners[state.lease_id] = state
            self._client.keep_lease(state.lease_id)
            self._apply_early(state)
        self._on_answer(state, answer, missing, asked.asked_at)
        if state.lease_id and not self._client.lease_valid(state.lease_id):
            # The answer came in a session that has ended since, or long ago.
            self.release(state)
        return True

    def resolve(self, lease_id: int, key: bytes, raw_status: int, slot: SlotRef) -> None:
        """Take the daemon's later word on a PENDING chunk, also before the answer has been read."""
        status = read_status(raw_status)
        if state := self._owners.get(lease_id):
            state.resolve(key, status, slot)
            return
        self._early.setdefault(lease_id, []).append((key, status, slot))
        self._num_early += 1
        while self._num_early > MAX_EARLY_EVENTS:
            _, dropped = self._early.popitem(last=False)
            self._num_early -= len(dropped)

    def release(self, state: RequestState) -> None:
        """Give the lookup lease back, if there is one; the next `tokens` asks anew."""
        lease_id = state.drop_pins()
        if lease_id:
            self._owners.pop(lease_id, None)
            self._client.release(lease_id)

    @staticmethod
    def abandon(state: RequestState) -> None:
        """Want no answer any more. The client gives back the lease that it may still bring."""
        if state.asked is not None:
            state.asked.pending.cancel()
            state.asked = None

    def void(self, states: Iterable[RequestState]) -> None:
        """Forget every lease: the session is over, there is nobody to give them back to."""
        for state in states:
            state.drop_pins()
        self._owners.clear()
        self._early.clear()
        self._num_early = 0

    def _awaits_room(self, state: RequestState, num_computed_tokens: int, now: float) -> bool:
        """Ask anew for what is there and could not be pinned; False = it is not worth waiting for.

        Such a request was looked up when it came, with many others. Now it is its turn, and those before it
        are unpinning what they have loaded. It waits for `lookup_deadline_ms`, once.
        """
        if state.unleased_until is not None and now >= state.unleased_until:
            return False
        if not self._client.ready or not _is_short_of_room(state, num_computed_tokens):
            return False
        if state.unleased_until is None:
            state.unleased_until = now + self._deadline_s
            state.unleased_delay, state.refresh_after = 0.0, now
        if state.asked is None and now >= state.refresh_after:
            self.ask(state, num_computed_tokens, now, background=True)
        return True

    def _useful_wait(self, asked: Asked, wait_s: float) -> float:
        """Return how long to wait for an answer, in seconds."""
        if asked.background or asked.pending.done():
            return 0.0  # there is an answer to go on with
        if not self._patience.is_worth(asked.pending.age_s, wait_s):
            return 0.0
        asked.waited = True
        return wait_s

    def _ask_if_due(self, state: RequestState, num_computed_tokens: int, now: float) -> None:
        if state.asked is not None:
            return
        if not state.answered or _reaches_further(state, num_computed_tokens):
            self.ask(state, num_computed_tokens, now)
        elif now >= state.refresh_after and any(None in chunks.pinned for chunks in state.groups):
            self.ask(state, num_computed_tokens, now, background=True)

    def _learn_nothing(self, state: RequestState, num_computed_tokens: int, now: float) -> None:
        """Go on with what is known, which is misses if nothing is, until the next refresh."""
        state.answered, state.answered_from = True, num_computed_tokens
        self._plan_refresh(state, now)

    @staticmethod
    def _plan_refresh(state: RequestState, now: float) -> None:
        state.refresh_delay = min(max(2 * state.refresh_delay, REFRESH_FIRST_S), REFRESH_MAX_S)
        state.refresh_after = now + state.refresh_delay

    def _apply_early(self, state: RequestState) -> None:
        early = self._early.pop(state.lease_id, [])
        self._num_early -= len(early)
        for resolution in early:
            state.resolve(*resolution)


def _is_short_of_room(state: RequestState, num_computed_tokens: int) -> bool:
    """Tell whether more would be pinned if there were room for it."""
    if not state.has(ChunkStatus.HIT_UNLEASED):
        return False
    hoped = state.hoped_tokens(num_computed_tokens, ChunkStatus.HIT, ChunkStatus.HIT_UNLEASED)
    return hoped > max(state.pinned_tokens(num_computed_tokens), num_computed_tokens)


def _reaches_further(state: RequestState, num_computed_tokens: int) -> bool:
    """Tell whether a lookup from here would pin more than the present lease holds.

    The lease begins at the tokens that were computed when it was asked for. When the device cache has gained
    some since, chunks behind a gap are of use; when it has lost some, the gap has not been asked for.
    """
    if num_computed_tokens < state.answered_from:
        return True
    if num_computed_tokens == state.answered_from or not state.has(ChunkStatus.HIT):
        return False
    hoped = state.hoped_tokens(num_computed_tokens, ChunkStatus.HIT)
    return hoped > max(state.pinned_tokens(num_computed_tokens), num_computed_tokens)
