"""What a client tells the shim above it.

Owns the names of the calls. They come on the client's own threads, one at a time per client, and must be
quick: an event waits behind them. They may call the client's methods that
queue or send asynchronously, not those that wait for an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvtier_client.answers import SessionInfo


class ClientListener:
    """Does nothing. A shim overrides what it needs to know."""

    def on_attached(self, session: SessionInfo) -> None:
        """A session is open. In workers `session.pool` is mapped; let go of views into an earlier pool."""

    def on_detached(self, reason: str) -> None:
        """The session is over: all its leases and credits are void, and what it had in flight has failed."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until no copy of this process runs any more; False = not within `timeout_s`, ask again.

        Called after `on_detached`, before the client attaches again, because naming the previous session
        promises the daemon that none of its slots is still written; and by `OffloadClient.close`, because
        its lock file let go promises the same.
        """
        return True

    def on_resolved(self, lease_id: int, key: bytes, status: int, slot_id: int, generation: int) -> None:
        """A key that a lookup called PENDING is decided (LookupStatus); slot and generation with HIT.

        It may come before the answer of its lookup has been read.
        """

    def on_credits(
        self, group: int, slot_ids: Sequence[int], generations: Sequence[int], lease_id: int
    ) -> None:
        """The answer to one `request_credits`; no slots (and lease 0) when nothing was granted.

        Slots asked for before a reset can never be published: give them back. `lease_id` tells, because
        later requests have larger ones.
        """

    def on_credits_wanted(self, count: int) -> None:
        """The daemon wants up to `count` unused credits back; see `return_credits`."""

    def on_draining(self, deadline_ms: int) -> None:
        """The daemon is about to stop and grants nothing more."""

    def on_workers_changed(self, missing_ranks: tuple[int, ...]) -> None:
        """The set of attached workers of this instance changed; empty = leases are granted."""
