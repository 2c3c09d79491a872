"""The stub made safe: the calls an engine makes, none of which raises or hangs because of the daemon.

Owns the public calls. What cannot be answered in time is a miss, a refusal or nothing, with a reason. Any
engine thread may call; a fork's child may too, and only misses. The background thread that opens and keeps
the session is `keeper.py`'s; whether a call may go out, `gate.py`'s.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import partial
from itertools import count

import grpc

from kvtier.v1 import offload_pb2
from kvtier_client.answers import LoadGrant, LookupAnswer, SessionInfo, SlotsForMisses, StoreGrant
from kvtier_client.attach import attach_request, check_geometry
from kvtier_client.channel import parse_address
from kvtier_client.context import ReqContext, wire_request_id
from kvtier_client.costs import TokenCosts
from kvtier_client.gate import Gate, lease_time
from kvtier_client.grants import GrantCalls
from kvtier_client.keeper import SessionKeeper
from kvtier_client.link import Link
from kvtier_client.listener import ClientListener
from kvtier_client.lookups import LookupCall, PendingLookup
from kvtier_client.options import ClientOptions, EngineIdentity, Role
from kvtier_client.outbox import Outbox
from kvtier_client.reports import LoadReportItem, StoreReportItem
from kvtier_client.reset import Weights
from kvtier_client.sender import CompletionSender
from kvtier_client.stats import ClientStats
from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import NamespaceFacts

CLOSE_S = 2.0
"""What `OffloadClient.close` may take, however the daemon and running copies behave."""


class OffloadClient:
    """One engine process's access to the daemon of its node.

    Construction checks what it was given and raises ValueError; it opens nothing. `start` begins to attach in
    the background; until then, and whenever the daemon is away, every call misses at once.
    """

    def __init__(
        self,
        address: str,
        identity: EngineIdentity,
        facts: NamespaceFacts,
        *,
        geometry: Sequence[Sequence[TensorLayout]] | None = None,
        options: ClientOptions | None = None,
        listener: ClientListener | None = None,
    ) -> None:
        facts.validate()
        check_geometry(identity, facts, geometry)
        self.identity = identity
        self.facts = facts
        self._options = options or ClientOptions()
        self._target = parse_address(address, self._options.tls)
        self.stats = ClientStats()
        self._request = attach_request(identity, facts, geometry or ())
        self._gate = Gate(self._options, self.stats, listener or ClientListener())
        self._outbox = Outbox()
        self._sender = CompletionSender(self._gate, self._options, self.stats, self._outbox)
        self._weights = Weights(self._gate, self.stats)
        self._grants = GrantCalls(self._gate, self._options, self.stats, self._give_back, self._outbox)
        self._lookup_deadline_s = self._options.lookup_deadline_ms / 1000
        self._prepare_deadline_s = self._options.prepare_deadline_ms / 1000
        # Half a lease id, so that two clients of one instance do not choose the same.
        self._lease_prefix = (secrets.randbits(32) or 1) << 32
        self._lease_numbers = count(1)
        self._keeper: SessionKeeper | None = None

    def start(self) -> None:
        """Begin to attach, in the background. Repeating it does nothing."""
        if self._keeper is not None or self._gate.closing:
            return
        self._gate.adopt_process()
        self._gate.away_reason = "attaching"
        self._keeper = SessionKeeper(
            self._gate,
            self._target,
            self._request,
            maps_pool=self.identity.role is Role.WORKER,
            options=self._options,
            sender=self._sender,
            stats=self.stats,
            weights=self._weights,
        )
        self._keeper.start()

    def wait_attached(self, timeout_s: float) -> bool:
        """Wait until a session is open and the listener knows; for tools, tests and demos."""
        gate = self._gate
        if gate.forked:
            return False
        with gate.lock:
            return gate.changed.wait_for(lambda: gate.link is not None and gate.link.announced, timeout_s)

    def close(self, drained: bool = True) -> None:
        """Tell what is queued, end the session, unmap the pool and let the lock file go. For good.

        Takes CLOSE_S at most. Pool and lock file stay until the process ends if copies still run by then
        (`ClientListener.drain` is asked), or with `drained=False`. Not to be called by the listener.
        Repeating it does nothing.
        """
        gate = self._gate
        if gate.forked or gate.closing:
            return
        give_up_at = time.monotonic() + CLOSE_S
        self._sender.wait_flushed(min(self._prepare_deadline_s, CLOSE_S / 2))
        with gate.lock:
            gate.closing = True
            gate.away_reason = "closed"
            gate.changed.notify_all()
        if self._keeper is not None:
            self._keeper.stop(drained=drained, timeout_s=max(0.0, give_up_at - time.monotonic()))
        self._outbox.stop()

    @property
    def options(self) -> ClientOptions:
        """What the client may cost."""
        return self._options

    @property
    def listener(self) -> ClientListener:
        """Who is told. Set it before `start`: what was told before is not repeated."""
        return self._gate.listener

    @listener.setter
    def listener(self, listener: ClientListener) -> None:
        self._gate.listener = listener

    @property
    def attached(self) -> bool:
        """Whether a session is open."""
        return self._gate.link is not None and not self._gate.forked

    @property
    def forked(self) -> bool:
        """Whether this is the copy of a fork's child, in which every call misses; see `start`."""
        return self._gate.forked

    @property
    def ready(self) -> bool:
        """Whether a lookup would be asked and could be leased: attached, all workers too, breaker closed."""
        link = self._gate.link
        return (
            link is not None
            and not link.info.missing_ranks
            and not self._gate.breaker.is_open
            and not self._gate.resetting
            and not self._gate.forked
        )

    @property
    def session(self) -> SessionInfo | None:
        """The open session; None when away."""
        link = self._gate.link
        return link.info if link is not None and not self._gate.forked else None

    @property
    def away_reason(self) -> str:
        """Why there is no session, for people; "" when there is one."""
        return self._gate.away_reason

    def new_lease_id(self) -> int:
        """Return an id for a lease to ask for; never 0, unique in this engine instance, later ones larger."""
        return self._lease_prefix | (next(self._lease_numbers) & 0xFFFF_FFFF)

    def lookup(
        self,
        ctx: ReqContext,
        keys: Sequence[bytes],
        *,
        lease: bool = True,
        first_chunks: Sequence[int] = (),
        max_tokens: int | None = None,
        pending_wait_ms: int = 0,
        lease_hits: bool = False,
        timeout_s: float | None = None,
    ) -> LookupAnswer:
        """Ask for keys and wait for the answer, at most until the deadline.

        `keys`: group-major, within a group in prefix order; `first_chunks`: per group the request's chunk
        that its first key belongs to. `lease_hits`: pin every hit, not only the prefix that all groups can
        use. `timeout_s` takes the place of `lookup_deadline_ms`; a shorter one
        is no missed deadline for the breaker.
        """
        call = self._lookup_call(ctx, keys, lease, first_chunks, max_tokens, pending_wait_ms, lease_hits)
        if isinstance(call, str):
            return LookupAnswer.missed(len(keys), call)
        deadline_s = self._lookup_deadline_s if timeout_s is None else timeout_s
        try:
            reply = call.send(deadline_s)
        except (grpc.RpcError, ValueError) as error:
            return call.failed(error, counts=deadline_s >= self._lookup_deadline_s)
        return call.answered(reply)

    def lookup_async(
        self,
        ctx: ReqContext,
        keys: Sequence[bytes],
        *,
        lease: bool = True,
        first_chunks: Sequence[int] = (),
        max_tokens: int | None = None,
        pending_wait_ms: int = 0,
        lease_hits: bool = False,
        slots_for_misses: Sequence[SlotsForMisses] = (),
        timeout_s: float | None = None,
    ) -> PendingLookup:
        """Ask as `lookup` does, and return at once. `slots_for_misses`: have slots come with the answer."""
        call = self._lookup_call(
            ctx, keys, lease, first_chunks, max_tokens, pending_wait_ms, lease_hits, slots_for_misses
        )
        if isinstance(call, str):
            return PendingLookup.settled(self._gate, LookupAnswer.missed(len(keys), call))
        deadline_s = self._lookup_deadline_s if timeout_s is None else timeout_s
        pending = PendingLookup(self._gate, len(keys))
        pending.begin(call, deadline_s, counts=deadline_s >= self._lookup_deadline_s)
        self._outbox.hand_over(pending.send)
        return pending

    def prepare_load(self, ctx: ReqContext, keys: Sequence[bytes]) -> LoadGrant | None:
        """Pin all keys under a new load lease, or none: then None."""
        link = self._enter(ctx, len(keys))
        if isinstance(link, str):
            return None
        return self._grants.prepare_load(link, ctx, keys, self.new_lease_id())

    def prepare_store(self, ctx: ReqContext, keys: Sequence[bytes]) -> StoreGrant:
        """Reserve a slot for each key, as far as the daemon grants it. `keys` as in `lookup`."""
        link = self._enter(ctx, len(keys))
        if isinstance(link, str):
            return StoreGrant.refused(len(keys), link)
        return self._grants.prepare_store(link, ctx, keys, self.new_lease_id())

    def request_credits(self, group: int, count: int) -> bool:
        """Ask for slots without keys; returns at once.

        True: `ClientListener.on_credits` follows once, unless the session ends first. False: nothing sent.
        """
        link = self._gate.enter()
        if isinstance(link, str):
            return False
        self._grants.request_credits(link, group, count, self.new_lease_id())
        return True

    def touch(self, ctx: ReqContext, keys: Sequence[bytes]) -> None:
        """Tell that the request uses chunks that the engine still had itself. Sends and forgets."""
        link = self._enter(ctx, min(len(keys), 1))
        if isinstance(link, str):
            return
        for start in range(0, len(keys), link.max_keys):
            request = offload_pb2.TouchRequest(
                session_id=link.session_id,
                context=link.context_message(ctx),
                keys=keys[start : start + link.max_keys],
            )
            self.stats.add("rpc_touch")
            try:
                call = link.stub.Touch.future(request, timeout=self._prepare_deadline_s)
            except ValueError:
                return
            call.add_done_callback(partial(self._touched, link))

    def reset(self, weights_id: str = "", timeout_s: float = 5.0) -> bool:
        """Move to another epoch after a weight update; every call misses until the daemon has confirmed it.

        False: not confirmed yet; the background thread goes on trying. Leases from before are void either
        way. Call it in the scheduler, while no load runs.
        """
        if self._gate.forked:
            return False
        self._sender.wait_flushed(min(timeout_s, self._prepare_deadline_s))
        link = self._weights.begin(weights_id)
        if link is None:
            return False
        if self._weights.restore(link, timeout_s):
            return True
        self._gate.lose(link, "the epoch of the engine's new weights could not be set")
        return False

    def announce(
        self, req_id: str, slot_ids: Sequence[int], generations: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        """Queue which key goes into which credit slot. `req_id` may be empty: unknown."""
        wire_id = wire_request_id(req_id) if req_id else ""
        self._sender.add(lambda link: link.buffer.announce(wire_id, slot_ids, generations, keys))

    def start_load(self, lookup_lease_id: int, load_lease_id: int, slot_ids: Sequence[int]) -> None:
        """Queue that a load begins under a lookup lease: its pins move to the load lease."""
        self._sender.add(lambda link: link.buffer.start_load(lookup_lease_id, load_lease_id, slot_ids))

    def report_store(self, item: StoreReportItem) -> None:
        """Queue stores of this rank that have ended."""
        self._sender.add(lambda link: link.buffer.report_store(item))

    def report_load(self, item: LoadReportItem) -> None:
        """Queue the end of a load of this rank."""
        self._sender.add(lambda link: link.buffer.report_load(item))

    def return_credits(self, slot_ids: Sequence[int], generations: Sequence[int]) -> None:
        """Queue credits that were never handed to a worker."""
        self._sender.add(lambda link: link.buffer.return_credits(slot_ids, generations))

    def release(self, lease_id: int) -> None:
        """Queue the end of a lease, granted or not; 0 is none."""
        if lease_id:
            self._sender.add(lambda link: link.release(lease_id))

    def report_costs(self, costs: TokenCosts) -> None:
        """Queue what tokens have cost, for the operator's metrics."""
        self._sender.add(lambda link: link.buffer.report_costs(costs))

    def finish(self, req_id: str) -> None:
        """Queue the end of a request: its lookup leases end, running copies go on."""
        wire_id = wire_request_id(req_id)
        self._sender.add(lambda link: link.finish(wire_id))

    def reattach(self, session_id: str, reason: str) -> None:
        """Give a session up, if it is the open one, and open the next, in the background."""
        link = self._gate.link
        if link is not None and link.session_id == session_id and not self._gate.forked:
            self._gate.lose(link, reason)

    def flush(self) -> None:
        """Send what is queued in one call, now or when the one in flight is answered. Never waits."""
        self._sender.flush()

    def flush_step(self) -> None:
        """Send what is queued as `flush` does if others wait for it, else in at most a tenth of a second.

        Ends of requests and of leases are waited for by nobody, and go with what is said next.
        """
        self._sender.flush_step()

    def flush_and_wait(self, timeout_s: float) -> bool:
        """Flush, and wait until the daemon has answered everything; False when it has not, or is away."""
        return self._sender.wait_flushed(timeout_s)

    def keep_lease(self, lease_id: int) -> None:
        """Have a lookup's lease renewed in the background until it is released or its request finished."""
        if self._gate.forked:
            return
        with self._gate.lock:
            if self._gate.link is not None:
                self._gate.link.leases.keep(lease_id)

    def lease_valid(self, lease_id: int) -> bool:
        """Tell whether a load may start under a lookup's lease.

        Not in the last third of its time, and not after the session changed.
        """
        if self._gate.forked:
            return False
        with self._gate.lock:
            link = self._gate.link
            return link is not None and link.leases.valid(lease_id, lease_time())

    def _enter(self, ctx: ReqContext, num_keys: int) -> Link | str:
        link = self._gate.enter()
        if isinstance(link, str):
            return link
        if not num_keys:
            return "no_keys"
        if num_keys > link.max_keys:
            return "too_many_keys"
        # The end of the earlier request would end this one's leases when it arrives later.
        if link.buffer.is_finishing(ctx.wire_id):
            return "finishing"
        return link

    def _lookup_call(
        self,
        ctx: ReqContext,
        keys: Sequence[bytes],
        lease: bool,
        first_chunks: Sequence[int],
        max_tokens: int | None,
        pending_wait_ms: int,
        lease_hits: bool,
        slots_for_misses: Sequence[SlotsForMisses] = (),
    ) -> LookupCall | str:
        """Return a lookup to send, or the reason why its keys miss at once."""
        link = self._enter(ctx, len(keys))
        if isinstance(link, str):
            return link
        if (lease or slots_for_misses) and link.info.missing_ranks:
            return "workers_missing"
        self.stats.add("rpc_lookup")
        return LookupCall(
            self._gate,
            link,
            self.stats,
            self._give_back,
            ctx,
            keys,
            # No tokens wanted is no lease; on the wire 0 would be no cap.
            lease_id=self.new_lease_id() if lease and max_tokens != 0 else 0,
            first_chunks=first_chunks,
            max_tokens=max_tokens,
            pending_wait_ms=pending_wait_ms,
            lease_hits=lease_hits,
            slots_for_misses=slots_for_misses,
            store_lease_id=self.new_lease_id() if slots_for_misses else 0,
        )

    def _give_back(self, lease_id: int) -> None:
        """End a lease that the engine will not hear of, also if it takes no step any more that flushes."""
        self.release(lease_id)
        self._sender.flush_soon()

    def _touched(self, link: Link, call: grpc.Future[offload_pb2.TouchResponse]) -> None:
        try:
            self._gate.answered(link, call.result().boot_id, "Touch")
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            self._gate.failed(link, error, "Touch")
