"""The calls that ask for slots: prepared loads, prepared stores, credits.

Owns the reading of their replies. A grant that cannot be used (no reply, a reply that contradicts itself, a
session or epoch that is over) is given back by releasing its lease id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import grpc

from kvtier.v1 import offload_pb2
from kvtier_client.answers import LoadGrant, StoreGrant
from kvtier_client.context import ReqContext
from kvtier_client.gate import Gate
from kvtier_client.link import Link
from kvtier_client.options import ClientOptions
from kvtier_client.outbox import Outbox
from kvtier_client.stats import ClientStats


class GrantCalls:
    """Asks through an open session, which the caller has entered. `give_back` ends a lease."""

    def __init__(
        self,
        gate: Gate,
        options: ClientOptions,
        stats: ClientStats,
        give_back: Callable[[int], None],
        outbox: Outbox,
    ) -> None:
        self._gate = gate
        self._outbox = outbox
        self._deadline_s = options.prepare_deadline_ms / 1000
        self._stats = stats
        self._give_back = give_back

    def prepare_load(
        self, link: Link, ctx: ReqContext, keys: Sequence[bytes], lease_id: int
    ) -> LoadGrant | None:
        """Pin all keys or none."""
        request = offload_pb2.PrepareLoadRequest(
            session_id=link.session_id, context=link.context_message(ctx), keys=keys, lease_id=lease_id
        )
        self._stats.add("rpc_prepare_load")
        epoch = link.info.epoch
        try:
            reply = link.stub.PrepareLoad(
                request, timeout=self._deadline_s, metadata=link.trace_metadata(ctx)
            )
        except (grpc.RpcError, ValueError) as error:
            self._failed(link, error, lease_id)
            return None
        if not self._usable(link, epoch, ctx, reply.boot_id, lease_id):
            return None
        if not len(reply.slot_ids) == len(reply.generations) == len(keys):
            self._contradicts(lease_id)
            return None
        return LoadGrant(lease_id, list(reply.slot_ids), list(reply.generations), link.info.pool_id)

    def prepare_store(self, link: Link, ctx: ReqContext, keys: Sequence[bytes], lease_id: int) -> StoreGrant:
        """Reserve what can be reserved."""
        request = offload_pb2.PrepareStoreRequest(
            session_id=link.session_id, context=link.context_message(ctx), keys=keys, lease_id=lease_id
        )
        self._stats.add("rpc_prepare_store")
        epoch = link.info.epoch
        try:
            reply = link.stub.PrepareStore(
                request, timeout=self._deadline_s, metadata=link.trace_metadata(ctx)
            )
        except (grpc.RpcError, ValueError) as error:
            return StoreGrant.refused(len(keys), self._failed(link, error, lease_id))
        if not self._usable(link, epoch, ctx, reply.boot_id, lease_id):
            return StoreGrant.refused(len(keys), "session_changed")
        verdicts: list[int] = list(reply.verdicts)
        granted = verdicts.count(offload_pb2.STORE_VERDICT_GRANTED)
        if len(verdicts) != len(keys) or not len(reply.slot_ids) == len(reply.generations) == granted:
            self._contradicts(lease_id)
            return StoreGrant.refused(len(keys), "bad_reply")
        return StoreGrant(
            verdicts,
            lease_id if granted else 0,
            list(reply.slot_ids),
            list(reply.generations),
            list(reply.evicted_keys),
            pool_id=link.info.pool_id,
        )

    def request_credits(self, link: Link, group: int, count: int, lease_id: int) -> None:
        """Ask for slots without keys."""
        request = offload_pb2.PrepareStoreRequest(
            session_id=link.session_id,
            lease_id=lease_id,
            credits=[offload_pb2.CreditRequest(group=group, count=count)],
        )
        self._outbox.hand_over(partial(self._send_credit_request, link, request, group, lease_id))

    def _send_credit_request(
        self, link: Link, request: offload_pb2.PrepareStoreRequest, group: int, lease_id: int
    ) -> None:
        self._stats.add("rpc_prepare_store")
        try:
            call = link.stub.PrepareStore.future(request, timeout=self._deadline_s)
        except ValueError:  # the channel was closed meanwhile, and the session with it
            return
        call.add_done_callback(partial(self._credits_replied, link, group, lease_id))

    def _credits_replied(
        self,
        link: Link,
        group: int,
        lease_id: int,
        call: grpc.Future[offload_pb2.PrepareStoreResponse],
    ) -> None:
        """Hand credits on, on a thread of grpc."""
        slot_ids: list[int] = []
        generations: list[int] = []
        try:
            reply = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            self._failed(link, error, lease_id)
        else:
            if not self._gate.answered(link, reply.boot_id, "Prepare"):
                return
            slot_ids = [slot_id for grant in reply.credits for slot_id in grant.slot_ids]
            generations = [generation for grant in reply.credits for generation in grant.generations]
            if len(slot_ids) != len(generations):
                self._contradicts(lease_id)
                slot_ids, generations = [], []
        self._gate.deliver(
            link, self._gate.listener.on_credits, group, slot_ids, generations, lease_id if slot_ids else 0
        )

    def _usable(self, link: Link, epoch: int, ctx: ReqContext, boot_id: str, lease_id: int) -> bool:
        """Note an answer; False if it grants nothing because the session or the epoch is over.

        `epoch`: the session's before the call was sent. What was granted in another holds old bytes, or can
        never be published.
        """
        gate = self._gate
        if not gate.answered(link, boot_id, "Prepare"):
            return False
        with gate.lock:
            void = gate.link is not link or gate.resetting or link.info.epoch != epoch
            if not void:
                link.mark_seen(ctx)
        if void:
            self._give_back(lease_id)
        return not void

    def _failed(self, link: Link, error: Exception, lease_id: int) -> str:
        failure = self._gate.failed(link, error, "Prepare")
        if not failure.boot_id:
            self._give_back(lease_id)  # it may have been granted, and the reply lost
        return failure.reason

    def _contradicts(self, lease_id: int) -> None:
        self._stats.add("bad_replies")
        self._give_back(lease_id)
