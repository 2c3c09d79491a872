"""One lookup: what is sent, and how its reply becomes an answer.

Owns the reply's checks: a reply that contradicts itself is a miss, and its lease is given back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Event

import grpc

from kvtier.v1 import offload_pb2
from kvtier_client.answers import CreditGrant, LookupAnswer, SlotsForMisses
from kvtier_client.context import ReqContext
from kvtier_client.gate import Gate, lease_time
from kvtier_client.link import Link
from kvtier_client.stats import ClientStats

# The generated constants are plain ints: comparing with an enum's member costs thirteen times as much.
_HIT = offload_pb2.LOOKUP_STATUS_HIT
_PENDING = offload_pb2.LOOKUP_STATUS_PENDING


class LookupCall:
    """A lookup on its way. `give_back` ends a lease that the engine will not hear of, or credits."""

    __slots__ = (
        "_ctx",
        "_epoch",
        "_first_chunks",
        "_gate",
        "_give_back",
        "_keys",
        "_lease_hits",
        "_lease_id",
        "_link",
        "_max_tokens",
        "_metadata",
        "_num_keys",
        "_pending_wait_ms",
        "_sent_at",
        "_slots_for_misses",
        "_stats",
        "_store_lease_id",
    )

    def __init__(
        self,
        gate: Gate,
        link: Link,
        stats: ClientStats,
        give_back: Callable[[int], None],
        ctx: ReqContext,
        keys: Sequence[bytes],
        *,
        lease_id: int,
        first_chunks: Sequence[int],
        max_tokens: int | None,
        pending_wait_ms: int,
        lease_hits: bool,
        slots_for_misses: Sequence[SlotsForMisses],
        store_lease_id: int,
    ) -> None:
        self._gate = gate
        self._link = link
        self._stats = stats
        self._give_back = give_back
        self._ctx = ctx
        self._keys = keys
        self._num_keys = len(keys)
        self._lease_id = lease_id
        self._first_chunks = first_chunks
        self._max_tokens = max_tokens
        self._pending_wait_ms = pending_wait_ms
        self._lease_hits = lease_hits
        self._slots_for_misses = slots_for_misses
        self._store_lease_id = store_lease_id
        self._metadata = link.trace_metadata(ctx)
        self._epoch = link.info.epoch
        self._sent_at = 0.0

    def send(self, timeout_s: float) -> offload_pb2.LookupResponse:
        """Send it and wait for the reply. Raises grpc.RpcError; ValueError if the channel was closed."""
        return self._link.stub.Lookup(self._message(), timeout=timeout_s, metadata=self._metadata)

    def send_async(self, timeout_s: float) -> grpc.Future[offload_pb2.LookupResponse]:
        """Send it. Raises ValueError if the channel was closed."""
        return self._link.stub.Lookup.future(self._message(), timeout=timeout_s, metadata=self._metadata)

    def _message(self) -> offload_pb2.LookupRequest:
        """Build it where it is sent: the engine's scheduler has better things to do."""
        message = offload_pb2.LookupRequest(
            session_id=self._link.session_id,
            context=self._link.context_message(self._ctx),
            keys=self._keys,
            lease_id=self._lease_id,
            first_chunks=self._first_chunks,
            max_tokens=self._max_tokens or 0,
            pending_wait_ms=self._pending_wait_ms,
            lease_hits=self._lease_hits,
            slots_for_misses=[
                offload_pb2.SlotsForMisses(group=wish.group, at_most=wish.at_most, spare=wish.spare)
                for wish in self._slots_for_misses
            ],
            store_lease_id=self._store_lease_id,
        )
        # Before it is sent: the daemon's count can only begin later.
        self._sent_at = lease_time()
        return message

    def failed(self, error: Exception, *, counts: bool) -> LookupAnswer:
        """Read a failure."""
        failure = self._gate.failed(self._link, error, "Lookup", counts=counts)
        if not failure.boot_id:
            # The daemon may have granted the lease and the reply was lost.
            self.abandon()
        return LookupAnswer.missed(self._num_keys, failure.reason, failure.boot_id)

    def answered(self, reply: offload_pb2.LookupResponse) -> LookupAnswer:
        """Read a reply."""
        gate, link = self._gate, self._link
        if not gate.answered(link, reply.boot_id, "Lookup"):
            return LookupAnswer.missed(self._num_keys, "session_changed", reply.boot_id)
        statuses = reply.statuses
        runs = tuple([(run.first, run.count) for run in reply.leased])
        granted = [
            CreditGrant(grant.group, grant.slot_ids[:], grant.generations[:]) for grant in reply.credits
        ]
        if (
            len(statuses) != self._num_keys
            or not _fits(runs, reply, self._num_keys)
            or any(len(grant.slot_ids) != len(grant.generations) for grant in granted)
        ):
            self._stats.add("bad_replies")
            self.abandon()
            return LookupAnswer.missed(self._num_keys, "bad_reply", reply.boot_id)
        lease_id = self._lease_id
        if lease_id and not runs and not (self._pending_wait_ms and _PENDING in statuses):
            lease_id = 0  # nothing is pinned and nothing will be: there is no lease
        with gate.lock:
            # The epoch too: what was leased before a reset holds bytes of the old weights.
            void = gate.link is not link or gate.resetting or link.info.epoch != self._epoch
            if not void:
                link.mark_seen(self._ctx)
                if lease_id:
                    link.leases.granted(lease_id, self._ctx.wire_id, self._sent_at)
        if void:
            return self.missed("session_changed")
        self._stats.add_lookup(self._num_keys, statuses.count(_HIT), len(reply.slot_ids))
        return LookupAnswer(
            statuses,
            lease_id=lease_id,
            leased_runs=runs,
            slot_ids=reply.slot_ids[:],  # a slice of a repeated field costs a quarter less than list()
            generations=reply.generations[:],
            unwanted_indexes=reply.unwanted,
            boot_id=reply.boot_id,
            pool_id=link.info.pool_id,
            credits=granted,
            store_lease_id=self._store_lease_id if granted else 0,
        )

    def missed_deadline(self, *, counts: bool) -> None:
        """Note that the engine gave up at the deadline."""
        self._gate.missed_deadline("Lookup", counts=counts)

    def missed(self, reason: str) -> LookupAnswer:
        """Give up: answer MISS, and give back the lease that may have been granted."""
        self.abandon()
        return LookupAnswer.missed(self._num_keys, reason)

    def abandon(self) -> None:
        """Give back the leases."""
        for lease_id in (self._lease_id, self._store_lease_id):
            if lease_id:
                self._give_back(lease_id)


def _fits(runs: tuple[tuple[int, int], ...], reply: offload_pb2.LookupResponse, num_keys: int) -> bool:
    end = total = 0
    for first, count in runs:
        if first < end or not count:
            return False
        end = first + count
        total += count
    return end <= num_keys and total == len(reply.slot_ids) == len(reply.generations)


class PendingLookup:
    """A lookup whose answer is on its way. Thread-safe; every wait is bounded by the lookup's deadline."""

    def __init__(self, gate: Gate, num_keys: int) -> None:
        self._gate = gate
        self._num_keys = num_keys
        self._answer: LookupAnswer | None = None
        self._arrived = Event()
        self._call: LookupCall | None = None
        self._future: grpc.Future[offload_pb2.LookupResponse] | None = None
        self._began_at = 0.0
        self._arrived_at = 0.0
        self._give_up_at = 0.0
        self._timeout_s = 0.0
        self._counts = True

    @classmethod
    def settled(cls, gate: Gate, answer: LookupAnswer) -> PendingLookup:
        """Return one that was answered without asking."""
        pending = cls(gate, len(answer.statuses))
        pending._answer = answer
        return pending

    def done(self) -> bool:
        """Tell whether the answer is there."""
        return self._answer is not None

    def wait(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for the answer; True if it is there."""
        if timeout_s > 0 and self._answer is None and not self._gate.forked:
            self._arrived.wait(timeout_s)
        return self._answer is not None

    @property
    def age_s(self) -> float:
        """Seconds since it was begun."""
        return time.monotonic() - self._began_at

    @property
    def took_s(self) -> float | None:
        """Seconds until the daemon's answer; None = it was not asked, or has not answered."""
        return self._arrived_at - self._began_at if self._arrived_at else None

    def answer(self) -> LookupAnswer:
        """Return the answer, waiting for it until the deadline; past it every key is a miss."""
        self.wait(max(0.0, self._give_up_at - time.monotonic()))
        return self._settle("deadline")

    def cancel(self) -> None:
        """Give up what the answer grants: its lease ends. Repeating it does nothing."""
        answer = self._settle("cancelled")
        if (answer.lease_id or answer.store_lease_id) and self._call is not None:
            self._call.abandon()
            self._answer = LookupAnswer.missed(self._num_keys, "cancelled", answer.boot_id)

    def begin(self, call: LookupCall, timeout_s: float, *, counts: bool) -> None:
        """Note what will be sent. The deadline counts from here. Called once, by the client that made it."""
        self._call = call
        self._counts = counts
        self._timeout_s = timeout_s
        # The deadline is grpc's to keep; the margin is for the threads that send and bring its verdict.
        self._began_at = time.monotonic()
        self._give_up_at = self._began_at + timeout_s + 0.05

    def send(self) -> None:
        """Send it, unless it was given up before. Called once, on the thread that starts calls."""
        assert self._call is not None, "nothing to send"
        if self._answer is not None:
            return
        try:
            future = self._call.send_async(self._timeout_s)
        except ValueError:  # the channel was closed meanwhile
            self._settle("session_changed")
            return
        self._future = future
        if self.done():
            future.cancel()  # given up in between, when there was nothing to cancel yet
        future.add_done_callback(self._replied)

    def _settle(self, reason: str) -> LookupAnswer:
        """Return the answer; if there is none yet, it is MISS from now on."""
        missed = LookupAnswer.missed(self._num_keys, reason)
        if self._gate.forked:
            return self._answer or missed
        with self._gate.lock:
            answer = self._answer
            if answer is None:
                self._answer = missed
        if answer is not None:
            return answer
        self._arrived.set()
        if self._call is not None:
            if self._timeout_s <= self.age_s:
                # As grpc would have said an instant later, had it not been cancelled here.
                self._call.missed_deadline(counts=self._counts)
            self._call.abandon()
        if self._future is not None:
            self._future.cancel()
        return missed

    def _replied(self, future: grpc.Future[offload_pb2.LookupResponse]) -> None:
        """Take the reply, on a thread of grpc."""
        assert self._call is not None, "a reply to a lookup that was not sent"
        if self._answer is not None:
            return  # given up, and its lease given back
        try:
            answer = self._call.answered(future.result())
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            answer = self._call.failed(error, counts=self._counts)
        self._arrived_at = time.monotonic()
        with self._gate.lock:
            late = self._answer is not None
            if not late:
                self._answer = answer
        if late:
            self._call.abandon()
        self._arrived.set()
