"""How the daemon comes to stop, and what it still holds meanwhile.

Owns who has asked for it - a signal, or an operator's Drain - and until when copies are waited for. Stopping
itself is `daemon.py`'s. On the loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvtier_server.core.leases import LeaseKind
from kvtier_server.core.tiering import Core


@dataclass(frozen=True, slots=True)
class Held:
    """What engines and tiers hold at one instant."""

    leases: int
    sessions: int
    loads: int
    """Load leases: copies from the pool."""
    stores: int
    """Reserved slots with a key: chunks that are being copied into the pool."""
    queued_bytes: int
    """Of chunks that wait to go down to tiers, or do."""

    @property
    def copies(self) -> int:
        """What a daemon that stops waits for first."""
        return self.loads + self.stores


def held(core: Core) -> Held:
    """Count. O(tiers)."""
    leases = core.books.leases
    return Held(
        leases=len(leases),
        sessions=len(core.books.instances.sessions),
        loads=leases.count(LeaseKind.LOAD),
        stores=core.books.reservations.num_named,
        queued_bytes=sum(below.waiting_bytes + below.running_bytes for below in core.below.tiers),
    )


class Stopping:
    """Whether the daemon is to stop. `copies_ns` returns the configured longest wait for copies."""

    def __init__(self, copies_ns: Callable[[], int]) -> None:
        self._copies_ns = copies_ns
        self._asked = asyncio.Event()
        self._has_signal = False
        self._copies_end = 0.0
        self.copies_ms = 0
        """How long copies are waited for in all."""

    def ask(self, copies_ms: int | None = None) -> None:
        """Let the daemon stop. `copies_ms`: how long it waits for copies from now on; a repeat may change it.

        None: as configured, and in a repeat as it was.
        """
        if copies_ms is None and not self._asked.is_set():
            copies_ms = self._copies_ns() // 1_000_000
        if copies_ms is not None:
            self.copies_ms = copies_ms
            self._copies_end = time.monotonic() + copies_ms / 1000
        self._asked.set()

    def by_signal(self) -> bool:
        """Note a signal and let the daemon stop. True for a second one: it is to end at once.

        An operator's Drain is no signal: a supervisor sends SIGTERM after it, and means no harm.
        """
        was_signalled, self._has_signal = self._has_signal, True
        self.ask()
        return was_signalled

    async def wait(self) -> None:
        """Return when the daemon is to stop."""
        await self._asked.wait()

    @property
    def left_ms(self) -> int:
        """How long copies are waited for yet."""
        return max(int((self._copies_end - time.monotonic()) * 1000), 0)
