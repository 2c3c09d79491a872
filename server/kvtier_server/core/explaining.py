"""Why a key would hit or miss: what is known of it in the pool, on its way, below, and in the log of events.

Owns the verdicts and their order. Counts no use and no offer, and changes nothing. The answer is made in
steps, each a fraction of a slice, so it may show several instants of a busy daemon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.below import Below
from kvtier_server.core.books import Books
from kvtier_server.core.events import POOL, OffloadingEvent
from kvtier_server.core.lower_tiers import LowerTier
from kvtier_server.core.namespaces import check_keys
from kvtier_server.core.naming import Names
from kvtier_server.core.refused import BadRequest
from kvtier_server.primary.index import KeySpace
from kvtier_server.secondary.base import Presence

STEP_ITEMS = 2_048
"""Keys of events, or reservations, that are looked at in one step."""

MAX_EXPLAINED_KEYS = 1_024
"""Keys of one question: the prompt of a request in chunks of 16 tokens, up to 16,384."""

STEP_KEYS = 32
"""Asked keys that are looked up in one step."""


class Verdict(StrEnum):
    """What became of a key, the first that fits."""

    RESIDENT = "resident"
    """In the pool, or in a tier below it."""
    PENDING = "pending"
    """An engine is storing it, or a tier is bringing it up."""
    STALE = "stale"
    """In the pool, but of an epoch that no attached engine is in: a reset made it unreachable."""
    QUARANTINED = "quarantined"
    """What there was of it lies in a slot that is set aside: its engine died while it wrote, or it rotted."""
    FILTERED = "filtered"
    """Offered, but not often enough to be stored."""
    EVICTED = "evicted"
    """It was there, and went for the room."""
    DROPPED = "dropped"
    """It was there, and went for another reason."""
    WANTED = "wanted"
    """Offered often enough; the next store of it is granted."""
    NEVER_SEEN = "never seen"
    """Nothing is known of it, as far back as the log of events goes."""


EVICTIONS = frozenset({"evict", "admin"})
"""Reasons of removals for the sake of room."""


@dataclass(slots=True)
class KeyExplanation:
    """What is known of one key. `details`: facts for a person, in the order in which a lookup meets them."""

    key: bytes
    verdict: Verdict = Verdict.NEVER_SEEN
    details: list[str] = field(default_factory=list)

    @property
    def is_hit(self) -> bool:
        """Whether a lookup that may wait finds it."""
        return self.verdict is Verdict.RESIDENT


@dataclass(slots=True)
class Explanation:
    """The answer under way, made by `Explainer.begin`: complete when `steps` has been stepped to its end."""

    keys: list[KeyExplanation]
    steps: Iterator[None] = field(default_factory=lambda: iter(()))

    @property
    def num_leading_hits(self) -> int:
        """How many of the first keys a request would find."""
        missing = (index for index, key in enumerate(self.keys) if not key.is_hit)
        return next(missing, len(self.keys))

    @property
    def verdict(self) -> Verdict:
        """That of the first key that is no hit; RESIDENT if all are."""
        return next((key.verdict for key in self.keys if not key.is_hit), Verdict.RESIDENT)


@dataclass(slots=True)
class _Search:
    """What is being found out of the asked keys."""

    now_ns: int
    spaces: list[KeySpace]
    names: list[SpaceName]
    found: dict[bytes, KeyExplanation]
    is_known: bool
    """Whether the pool or an engine has this namespace."""
    current: set[SpaceName]
    """Those of `names` in which engines look now; all of them where no engine is attached."""
    pending: dict[bytes, list[str]] = field(default_factory=dict)
    unfinished: dict[bytes, list[str]] = field(default_factory=dict)
    last: dict[tuple[bytes, str], OffloadingEvent] = field(default_factory=dict)
    """The last event of a key in a tier."""
    horizon: str = ""


class Explainer:
    """Explains keys."""

    def __init__(self, books: Books, below: Below, names: Names) -> None:
        self._books = books
        self._below = below
        self._names = names

    def begin(self, namespace: str, tenant: str, keys: Sequence[bytes], now_ns: int) -> Explanation:
        """Begin to explain keys of one namespace and tenant, over all its epochs. Raises BadRequest."""
        check_keys(keys, MAX_EXPLAINED_KEYS)
        if not namespace:
            raise BadRequest("namespace", f"none is given; {self._names.which_namespaces()}")
        digest = self._names.digest(namespace, may_be_unknown=bool(self._below.tiers))
        is_known = digest in self._names.namespaces()
        spaces = [
            space
            for space in self._books.primary.spaces
            if (space.name.namespace, space.name.tenant) == (digest, tenant)
        ]
        if is_known:
            self._names.check_tenant(tenant)
        # What only a tier holds was stored by engines that are gone, most likely in the first epoch.
        names = [space.name for space in spaces] or [SpaceName(digest, tenant, 0)]
        explanations = [KeyExplanation(key) for key in keys]
        engines = (instance.space.name for instance in self._books.instances)
        current = set(names).intersection(engines) or set(names)
        found = {each.key: each for each in explanations}
        search = _Search(now_ns, spaces, names, found, is_known, current)
        return Explanation([search.found[key] for key in keys], self._explain(search))

    def _explain(self, search: _Search) -> Iterator[None]:
        yield from self._find_writers(search)
        yield from self._find_unfinished(search)
        yield from self._find_events(search)
        for number, explanation in enumerate(search.found.values(), 1):
            self._conclude(search, explanation)
            if not number % STEP_KEYS:
                yield

    # Who has to do with the keys

    def _find_writers(self, search: _Search) -> Iterator[None]:
        """Find who stores the keys, if anybody does."""
        if not any(key in space.writers for space in search.spaces for key in search.found):
            return
        yield
        spaces = set(search.spaces)
        for number, reservation in enumerate(list(self._books.reservations), 1):
            key = reservation.key
            if key is not None and key in search.found and reservation.space in spaces:
                age_s = (search.now_ns - reservation.lease.created_ns) / 1e9
                who = f"engine {reservation.instance.engine_id!r} has been storing it for {age_s:.1f} s"
                if reservation.expired:
                    who += ", longer than its lease: it will not be published"
                search.pending.setdefault(key, []).append(who)
            if not number % STEP_ITEMS:
                yield
        for space in search.spaces:
            for key in search.found:
                if key in space.writers and (coming := self._below.promotions.coming_from(space, key)):
                    text = f"tier {coming[0]} is to bring it up: {coming[1]}"
                    search.pending.setdefault(key, []).append(text)
            yield

    def _find_unfinished(self, search: _Search) -> Iterator[None]:
        """Find slots that are set aside because their engine died in the middle of one of the keys."""
        names = set(search.names)
        looked_at = 0
        for batch in self._books.quarantine.unfinished():
            for what in batch:
                if what.key in search.found and what.space in names:
                    text = (
                        f"engine {what.engine_id!r} ended while it wrote it; the slot waits for its processes"
                    )
                    search.unfinished.setdefault(what.key, []).append(text)
            looked_at += len(batch)
            if looked_at > STEP_ITEMS:
                looked_at = 0
                yield

    def _find_events(self, search: _Search) -> Iterator[None]:
        """Find the last event of each key in each tier, in what the log has kept."""
        events = self._books.events.kept()
        if self._books.events.oldest == 1:
            search.horizon = "the log of events has everything since the daemon's start"
        elif events:
            search.horizon = f"the log of events goes back {_ago(search.now_ns, events[0].at_ns)}"
        else:
            search.horizon = "the log of events was cut, and nothing has happened since"
        names, wanted = set(search.names), search.found.keys()
        looked_at = 0
        for event in reversed(events):
            looked_at += 1
            if event.space in names:
                looked_at += len(event.keys)
                for key in wanted & set(event.keys):
                    search.last.setdefault((key, event.tier), event)
            if looked_at > STEP_ITEMS:
                looked_at = 0
                yield

    # What it comes to

    def _conclude(self, search: _Search, explanation: KeyExplanation) -> None:
        key, details = explanation.key, explanation.details
        if not search.is_known:
            details.append("namespace: the pool has nothing of it, and no engine of it is attached")
        resident, stale = self._in_pool(search, key, details)
        for below in self._below.tiers:
            resident = self._in_tier(search, below, key, details) or resident
        pending = search.pending.get(key, [])
        unfinished = search.unfinished.get(key, [])
        details += [f"pending: {text}" for text in pending]
        details += [f"quarantined: {text}" for text in unfinished]
        last = [event for tier in self._tier_names() if (event := search.last.get((key, tier))) is not None]
        for event in last:
            what = f"{event.kind} ({event.reason})"
            details.append(f"{event.tier}: {what} {_ago(search.now_ns, event.at_ns)} ago")
        offers, threshold = self._offers(search, key), self._books.filter.threshold
        if self._books.filter.is_active:
            details.append(f"admission: offered {offers} times, stored from {threshold} on")
        if not last:
            details.append(f"no event of it: {search.horizon}")
        removed = next((event for event in last if event.kind == "removed"), None)
        if resident:
            explanation.verdict = Verdict.RESIDENT
        elif pending:
            explanation.verdict = Verdict.PENDING
        elif stale:
            explanation.verdict = Verdict.STALE
        elif unfinished or (removed is not None and removed.reason == "corrupt"):
            explanation.verdict = Verdict.QUARANTINED
        elif removed is not None:
            explanation.verdict = Verdict.EVICTED if removed.reason in EVICTIONS else Verdict.DROPPED
        elif self._books.filter.is_active and offers:
            explanation.verdict = Verdict.FILTERED if offers < threshold else Verdict.WANTED

    def _in_pool(self, search: _Search, key: bytes, details: list[str]) -> tuple[bool, bool]:
        """Say whether the pool has it where engines look, and whether it has it where none does any more."""
        resident = stale = False
        for space in search.spaces:
            chunk = space.chunks.get(key)
            if chunk is None:
                continue
            is_current = space.name in search.current
            resident, stale = resident or is_current, stale or not is_current
            pins = f"pinned {chunk.pins} times" if chunk.pins else "not pinned"
            epoch = "" if is_current else f"; of epoch {space.name.epoch:x}, in which no engine is any more"
            details.append(
                f"{POOL}: resident in slot {chunk.slot_id}, published, generation {chunk.generation}, "
                f"{pins}{epoch}"
            )
        if not resident and not stale:
            details.append(f"{POOL}: not resident")
        return resident, stale

    def _in_tier(self, search: _Search, below: LowerTier, key: bytes, details: list[str]) -> bool:
        known = {below.tier.lookup(name, (key,))[0] for name in search.current}
        if Presence.YES in known:
            details.append(f"{below.rules.name}: has it")
        elif Presence.UNKNOWN in known:
            details.append(f"{below.rules.name}: may have it, others store there too; a lookup asks")
        else:
            details.append(f"{below.rules.name}: does not have it")
        return Presence.YES in known

    def _offers(self, search: _Search, key: bytes) -> int:
        ids = [space.chunk_id(key) for space in search.spaces]
        return max(map(self._books.filter.num_offers, ids), default=0)

    def _tier_names(self) -> list[str]:
        return [POOL, *(below.rules.name for below in self._below.tiers)]


def _ago(now_ns: int, at_ns: int) -> str:
    return f"{max(now_ns - at_ns, 0) / 1e9:.1f} s"
