"""Sends what waits for Complete: one call in flight, repeated until it is answered.

Owns when a batch goes out and what its reply does. What is in a batch is `flush.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import grpc

from kvtier.v1 import offload_pb2
from kvtier_client.flush import Batch
from kvtier_client.gate import Gate
from kvtier_client.link import Link
from kvtier_client.options import ClientOptions
from kvtier_client.outbox import Outbox
from kvtier_client.stats import ClientStats

FLUSH_SOON_S = 0.1
"""Above a step: an engine at work has flushed by then, and only an idle one costs a call of its own."""

_RETRIED = frozenset({"deadline", "unavailable", "draining", "cancelled", "limit_unary_calls"})
"""The daemon did not look at the batch, or nobody knows whether it did."""

_FINE = frozenset({offload_pb2.COMPLETE_STATUS_OK, offload_pb2.COMPLETE_STATUS_ALREADY})


class CompletionSender:
    """Queues items for the open session and sends them when a flush asks for it. Thread-safe, never waits.

    What the daemon holds for this process until it is told otherwise (slots to be written, pins of loads,
    credits) is told for certain or the session ends, which frees it as the death of the process would.
    """

    def __init__(self, gate: Gate, options: ClientOptions, stats: ClientStats, outbox: Outbox) -> None:
        self._gate = gate
        self._outbox = outbox
        self._options = options
        self._stats = stats

    def add(self, put: Callable[[Link], None]) -> None:
        """Queue an item in the open session. Without one it is void, like the lease it is about.

        Raises what `put` raises for an item that no message can carry; the session is over then.
        """
        gate = self._gate
        if gate.forked:
            return
        link: Link | None = None
        try:
            with gate.lock:
                link = gate.link
                if link is not None:
                    put(link)
        except Exception:
            if link is not None:
                # Half of it may be queued, and what it was about would stay taken as long as the session.
                gate.lose(link, "a report or release could not be queued, which is a bug of whoever made it")
            raise
        if link is None:
            self._stats.add("queued_dropped")
        elif link.buffer.entries > self._options.max_queued_entries:
            gate.lose(link, f"the daemon has not taken {link.buffer.entries} queued reports and releases")

    def flush(self) -> None:
        """Send what is queued now; if a call is in flight, when its reply is there."""
        gate = self._gate
        if gate.forked:
            return
        link = gate.link
        if link is None or not link.buffer.waits:
            return  # looked at without the lock: most steps of an engine have nothing to say
        with gate.lock:
            link.flush_at = None
            link.flush_wanted = True
        self._outbox.hand_over(partial(self.send, link))

    def flush_step(self) -> None:
        """Send what is queued now if it is urgent, else soon: the ends of requests and leases can wait."""
        gate = self._gate
        if gate.forked:
            return
        link = gate.link
        if link is None or not link.buffer.waits:
            return
        if link.buffer.urgent:
            self.flush()
        else:
            self.flush_soon()

    def flush_soon(self) -> None:
        """Have the background thread flush, unless somebody else does within FLUSH_SOON_S."""
        gate = self._gate
        if gate.forked:
            return
        with gate.lock:
            if gate.link is not None and gate.link.flush_at is None:
                gate.link.flush_at = time.monotonic() + FLUSH_SOON_S
                gate.changed.notify_all()

    def wait_flushed(self, timeout_s: float) -> bool:
        """Flush, then wait until everything was answered; False when it was not, or there is no session."""
        gate = self._gate
        if gate.forked:
            return False
        link = gate.link
        if link is None:
            return False
        self.flush()
        with gate.lock:
            gate.flushed.wait_for(lambda: gate.link is not link or link.buffer.empty, timeout_s)
            return gate.link is link and link.buffer.empty

    def send(self, link: Link) -> None:
        """Send the oldest batch if a flush wants it, nothing is in flight and the breaker is closed."""
        gate = self._gate
        with gate.lock:
            if gate.link is not link or gate.breaker.is_open or not link.flush_wanted:
                return
            if link.retry_at is not None and time.monotonic() < link.retry_at:
                return
            batch = link.buffer.next_batch()
            if batch is None:
                link.flush_wanted = not link.buffer.empty
                return
            link.retry_at = None
        self._stats.add("flushes")
        self._stats.add("rpc_complete")
        try:
            call = link.stub.Complete.future(batch.request, timeout=self._options.prepare_deadline_ms / 1000)
        except ValueError:  # the channel was closed meanwhile, and the session with it
            return
        call.add_done_callback(partial(self._replied, link, batch))

    def _replied(self, link: Link, batch: Batch, call: grpc.Future[offload_pb2.CompleteResponse]) -> None:
        """Take the reply, on a thread of grpc."""
        gate = self._gate
        try:
            reply = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            failure = gate.failed(link, error, "Complete")
            if failure.reason in _RETRIED:
                self._repeat_later(link, batch)
                return
            self._stats.add("flush_dropped")
            if batch.ends_holds:
                gate.lose(link, f"the daemon did not take reports of copies: {failure.reason}")
        else:
            gate.answered(link, reply.boot_id, "Complete")
            if not_ok := sum(status not in _FINE for status in _statuses(reply)):
                self._stats.add("items_not_ok", not_ok)
        with gate.lock:
            link.buffer.acknowledge(batch)
            gate.flushed.notify_all()
        self.send(link)

    def _repeat_later(self, link: Link, batch: Batch) -> None:
        gate = self._gate
        self._stats.add("flush_retries")
        with gate.lock:
            link.buffer.put_back(batch)
            link.flush_wanted = True
            link.retry_at = time.monotonic() + self._options.reconnect_min_ms / 1000
            gate.changed.notify_all()


def _statuses(reply: offload_pb2.CompleteResponse) -> Iterable[int]:
    for results in (reply.announcements, reply.store_reports, reply.credit_returns):
        for result in results:
            yield from result.statuses
    yield from reply.load_starts
    # UNKNOWN: a rank was done before the scheduler had told of the load; the daemon remembers it.
    yield from (status for status in reply.load_reports if status != offload_pb2.COMPLETE_STATUS_UNKNOWN)
    yield from reply.released_leases
