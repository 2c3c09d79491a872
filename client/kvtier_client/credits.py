"""Credits: slots reserved ahead, so that preparing a store needs no RPC.

Owns which slots this engine holds unused, and how many it should hold: what the requests that are there are
expected to store, or twice what the largest of the last 100 storing steps took beyond that, if that is more.
Most come with the answers to lookups, which say what will be stored. Sends nothing: the scheduler shim asks
`shortfall` and `surplus` and does the talking.

Credits are used oldest first. They do not age: the daemon never takes one, it asks for them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WINDOW_STEPS = 100
"""Storing steps whose largest decides: a few seconds of an engine under load."""

IDLE_RETURN_S = 5.0
"""Without stores for so long, every credit goes back: others may want the memory."""

RETRY_S = 0.1
"""After a grant that was short, the pool mostly had no more: asking every step would only cost RPCs."""

LOOK_AGAIN_S = RETRY_S
"""How long the books may go unread while nothing changes in them: what time alone brings is no sooner."""

REPLY_LOST_S = 1.0
"""A request for credits unanswered for so long is counted as lost; a late grant is still taken."""


class Credit(NamedTuple):
    """One reserved slot without a key."""

    slot_id: int
    generation: int
    pool_id: int


@dataclass(slots=True)
class _Group:
    slot_bytes: int
    held: deque[Credit]
    asked: int = 0
    asked_at: float = 0.0
    ask_after: float = 0.0
    largest: int = 0


class CreditBook:
    """The unused credits of one engine instance, by group. Thread-safe; times are passed in, in seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: list[_Group] = []
        self._max_bytes = 0
        self._pool_id = 0
        self._first_lease_id = 0
        self._steps: deque[tuple[int, ...]] = deque(maxlen=WINDOW_STEPS)
        self._step: list[int] = []
        self._expected: list[int] = []
        self._last_use = 0.0
        self._changed = True
        self._look_at = 0.0

    def open(
        self, slot_bytes: Sequence[int], max_bytes: int, pool_id: int, now: float, first_lease_id: int = 0
    ) -> None:
        """Begin a session with no credits. What is known of the demand stays if the groups are as before.

        Credits under lease ids below `first_lease_id` are of an earlier session.
        """
        with self._lock:
            self._first_lease_id = max(self._first_lease_id, first_lease_id)
            self._groups = [_Group(size, deque()) for size in slot_bytes]
            self._max_bytes = max_bytes
            self._pool_id = pool_id
            self._last_use = now
            self._changed = True
            if len(self._step) != len(self._groups):
                self._steps.clear()
                self._step = [0] * len(self._groups)
            self._expected += [0] * (len(self._groups) - len(self._expected))
            self._measure()

    def void(self) -> None:
        """Forget every credit: the session is over, and the slots are the daemon's again."""
        with self._lock:
            self._groups = []
            self._max_bytes = 0

    def held(self, group: int) -> int:
        """Count the unused credits of `group`."""
        with self._lock:
            return len(self._groups[group].held) if group < len(self._groups) else 0

    def grant(
        self, group: int, slot_ids: Sequence[int], generations: Sequence[int], lease_id: int, now: float
    ) -> list[Credit]:
        """Add the answer to one request; fewer than asked means that the daemon has no more for now.

        Returns what must go back at once: what was asked for, under `lease_id`, before a reset, and what
        comes while the book is closed, because the session's answers may be faster than `open`.
        """
        with self._lock:
            granted = self._credits(slot_ids, generations)
            if group >= len(self._groups) or (granted and lease_id < self._first_lease_id):
                return granted
            entry = self._groups[group]
            if len(granted) < entry.asked:
                entry.ask_after = now + RETRY_S
            entry.asked = 0
            entry.held.extend(granted)
            self._changed = True
            return []

    def add(
        self,
        group: int,
        slot_ids: Sequence[int],
        generations: Sequence[int],
        lease_id: int,
        *,
        needed: int,
        now: float,
    ) -> list[Credit]:
        """Add the slots that came with a lookup, of which `needed` were needed.

        Fewer means that the daemon has no more for now. Returns what must go back at once, as `grant` does.
        """
        with self._lock:
            added = self._credits(slot_ids, generations)
            if group >= len(self._groups) or (added and lease_id < self._first_lease_id):
                return added
            entry = self._groups[group]
            if len(added) < needed:
                entry.ask_after = now + RETRY_S
            entry.held.extend(added)
            self._changed = True
            return []

    def spare(self, group: int, own: int) -> int:
        """Count the credits, held or on their way, that nobody needs but one request that expects `own`.

        What is held for stores that no lookup foresees is not spare: each use of it would have to be asked
        for again, in a call of its own.
        """
        with self._lock:
            if group >= len(self._groups) or group >= len(self._expected):
                return 0
            entry = self._groups[group]
            others = self._expected[group] - own
            return max(0, len(entry.held) + entry.asked - others - 2 * entry.largest)

    def take(self, group: int, count: int, now: float, expected: int = 0) -> list[Credit]:
        """Use up to `count` credits, and note that more than the `expected` ones were wanted in this step."""
        with self._lock:
            if count <= 0 or group >= len(self._groups):
                return []
            self._last_use = now
            self._changed = True
            self._step[group] += max(0, count - expected)
            held = self._groups[group].held
            return [held.popleft() for _ in range(min(count, len(held)))]

    def expect(self, group: int, change: int, now: float) -> None:
        """Count on `change` more chunks (fewer, if negative) that requests will store."""
        with self._lock:
            # Also without a session: the requests are there when one comes.
            self._expected += [0] * (group + 1 - len(self._expected))
            self._expected[group] += change
            self._changed = True
            if change > 0:
                self._last_use = now

    def awaits(self, now: float, patience_s: float) -> bool:
        """Tell whether slots that are needed are on their way, asked for at most `patience_s` ago."""
        with self._lock:
            return any(
                entry.asked and now - entry.asked_at < patience_s and expected > len(entry.held)
                for entry, expected in zip(self._groups, self._expected, strict=False)
            )

    def end_step(self, now: float) -> bool:
        """Close the step; True = look at `surplus` and `shortfall`, something may have to be sent.

        A step that wanted nothing is not remembered, or waiting would forget the demand.
        """
        if not self._changed and now < self._look_at:
            return False
        self._look_at = now + LOOK_AGAIN_S
        with self._lock:
            self._changed = False
            if any(self._step):
                self._steps.append(tuple(self._step))
                self._step = [0] * len(self._step)
                self._measure()
        return True

    def shortfall(self, now: float) -> list[tuple[int, int]]:
        """Return (group, count) to ask the daemon for, and note them as asked."""
        with self._lock:
            asks: list[tuple[int, int]] = []
            if now - self._last_use >= IDLE_RETURN_S:
                return asks
            for group, (entry, target) in enumerate(zip(self._groups, self._targets(), strict=True)):
                if entry.asked and now - entry.asked_at < REPLY_LOST_S:
                    continue
                missing = target - len(entry.held)
                # A quarter of slack: topping up after every step would cost an RPC a step.
                if missing * 4 >= target > 0 and missing > 0 and now >= entry.ask_after:
                    entry.asked, entry.asked_at = missing, now
                    asks.append((group, missing))
            return asks

    def surplus(self, now: float) -> list[Credit]:
        """Take out what should go back: all when idle, else what exceeds twice the target."""
        with self._lock:
            if now - self._last_use >= IDLE_RETURN_S:
                return self._take_newest(sum(len(entry.held) for entry in self._groups))
            back: list[Credit] = []
            for entry, target in zip(self._groups, self._targets(), strict=True):
                while len(entry.held) > 2 * target:
                    back.append(entry.held.popleft())
            return back

    def give_back(self, count: int, now: float) -> list[Credit]:
        """Take out up to `count` credits because the daemon wants them, and ask for no more for a while."""
        with self._lock:
            for entry in self._groups:
                entry.ask_after = now + IDLE_RETURN_S
            return self._take_newest(count)

    def reset(self, first_lease_id: int) -> list[Credit]:
        """Take out every credit: no slot of the old epoch can be published.

        Those on their way go back when they come, in whatever order: their lease ids are below
        `first_lease_id`, those of later requests are not.
        """
        with self._lock:
            self._first_lease_id = first_lease_id
            for entry in self._groups:
                entry.asked = 0
            return self._take_newest(sum(len(entry.held) for entry in self._groups))

    def _credits(self, slot_ids: Sequence[int], generations: Sequence[int]) -> list[Credit]:
        return [
            Credit(slot_id, generation, self._pool_id)
            for slot_id, generation in zip(slot_ids, generations, strict=True)
        ]

    def _measure(self) -> None:
        for group, entry in enumerate(self._groups):
            entry.largest = max((step[group] for step in self._steps), default=0)

    def _targets(self) -> list[int]:
        """Credits each group should hold, scaled down together to what the daemon allows."""
        targets = [
            max(2 * entry.largest, expected)
            for entry, expected in zip(self._groups, self._expected, strict=False)
        ]
        wanted = sum(t * entry.slot_bytes for t, entry in zip(targets, self._groups, strict=True))
        if wanted > self._max_bytes:
            return [target * self._max_bytes // wanted for target in targets]
        return targets

    def _take_newest(self, count: int) -> list[Credit]:
        """Take from the group that holds most, newest first: the oldest are the next to be used."""
        back: list[Credit] = []
        while len(back) < count:
            richest = max(self._groups, key=lambda entry: len(entry.held), default=None)
            if richest is None or not richest.held:
                break
            back.append(richest.held.pop())
        return back
