"""What a request's tokens cost it: the time it waited for those that were loaded, and for those it computed.

Owns the stopwatches of one engine's requests and their sums: what tells an operator whether loading pays;
nothing is decided by it. Times are the requests' own, waiting for others in a batch included: a token that is
loaded saves its request that much. One thread; times are passed in, seconds of any clock.

    asks ---- answered ---------------- computed .. computed        nothing to load
    asks ---- answered -- loading -- loaded -- computed ..          something
    |<----------- load_s ------------->|<----- compute_s ---->|
"""

from __future__ import annotations

from dataclasses import dataclass, field

REPORT_EVERY_S = 1.0
"""Between two reports to the daemon: metrics are read far less often."""


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """Tokens of all requests, and the sums of what these waited for them."""

    loaded_tokens: int = 0
    load_s: float = 0.0
    computed_tokens: int = 0
    compute_s: float = 0.0


@dataclass(slots=True)
class _Request:
    prompt_tokens: int
    asked_at: float | None = None
    is_answered: bool = False
    computes_since: float | None = None
    have_tokens: int = 0
    """Of the prompt, whose KV is there."""
    loading_tokens: int = 0
    ended_tokens: int = 0
    """Offered and not closed: their step may still be computing them."""


@dataclass(slots=True)
class Costs:
    """`offers_ahead`: stores are offered before the step that computes what is stored, not after it."""

    offers_ahead: bool = True
    _requests: dict[str, _Request] = field(default_factory=dict)
    _offered: list[_Request] = field(default_factory=list)
    """By the step that is going on."""
    _computing: list[_Request] = field(default_factory=list)
    """By the one before it."""
    _sums: list[float] = field(default_factory=lambda: [0, 0.0, 0, 0.0])
    _report_at: float = 0.0

    def begin(self, req_id: str, prompt_tokens: int) -> None:
        """Know a request; only tokens of its prompt count."""
        self._requests[req_id] = _Request(prompt_tokens)

    def asks(self, req_id: str, now: float) -> None:
        """The engine would begin, and asks what can be loaded; the first time counts.

        An answer that it has not used, for want of room for the request, is asked for anew.
        """
        request = self._requests[req_id]
        if request.asked_at is None or request.is_answered:
            request.asked_at = now
            request.is_answered = False

    def waits(self, req_id: str) -> None:
        """It has to wait for chunks that are on their way: the answer was none yet."""
        self._requests[req_id].is_answered = False

    def answered(self, req_id: str, num_computed_tokens: int, now: float) -> None:
        """It knows, and computes from here on unless it loads."""
        request = self._requests[req_id]
        request.is_answered = True
        request.have_tokens = num_computed_tokens
        request.computes_since = now

    def loading(self, req_id: str, num_tokens: int) -> None:
        """It loads so many tokens after those that it has."""
        self._requests[req_id].loading_tokens = num_tokens

    def loaded(self, req_id: str, now: float, *, ok: bool) -> None:
        """The load has ended; from here on it computes. A failed one brought nothing, and is not counted."""
        request = self._requests.get(req_id)
        if request is None:
            return
        if ok and request.asked_at is not None:
            request.have_tokens += request.loading_tokens
            self._sums[0] += request.loading_tokens
            self._sums[1] += now - request.asked_at
        request.loading_tokens = 0
        request.asked_at = None
        request.computes_since = now

    def computed(self, req_id: str, num_tokens: int) -> None:
        """The first `num_tokens` are there when the step ends."""
        request = self._requests[req_id]
        request.asked_at = None
        num_tokens = min(num_tokens, request.prompt_tokens)
        if request.computes_since is not None and num_tokens > max(request.have_tokens, request.ended_tokens):
            request.ended_tokens = num_tokens
            self._offered.append(request)

    def end(self, req_id: str, now: float) -> None:
        """Forget a request; what it offered is computed."""
        request = self._requests.pop(req_id, None)
        if request is not None:
            self._close(request, now)

    def end_step(self, now: float) -> None:
        """Close what has been computed."""
        if self.offers_ahead:
            closing, self._computing, self._offered = self._computing, self._offered, []
        else:
            closing, self._offered = self._offered, []
        for request in closing:
            self._close(request, now)

    def _close(self, request: _Request, now: float) -> None:
        if request.computes_since is not None and request.ended_tokens > request.have_tokens:
            self._sums[2] += request.ended_tokens - request.have_tokens
            self._sums[3] += now - request.computes_since
            request.have_tokens = request.ended_tokens
            request.computes_since = now
        request.ended_tokens = 0

    def take(self, now: float) -> TokenCosts | None:
        """Return the sums since the last time, if it is time to report them and there are any."""
        if now < self._report_at or not any(self._sums):
            return None
        loaded, load_s, computed, compute_s = self._sums
        self._sums = [0, 0.0, 0, 0.0]
        self._report_at = now + REPORT_EVERY_S
        return TokenCosts(int(loaded), load_s, int(computed), compute_s)
