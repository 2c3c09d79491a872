"""gRPC in, core calls, gRPC out. No logic: what may be done is the core's to say.

Owns the translation of messages. Everything here runs on the loop's thread, which is the one that is in the
core; nothing waits, and long calls let others in between their slices. What a message repeats is
counted before it is walked: a count costs nothing, a walk of all that fits into a message stops all engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import grpc

from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.namespace import MAX_GROUPS
from kvtier_server.callers import current_caller
from kvtier_server.core.completions import MismatchReport
from kvtier_server.core.grants import StoreVerdict
from kvtier_server.core.instances import Session
from kvtier_server.core.namespaces import check_keys, check_number_of_keys
from kvtier_server.core.refused import BadRequest
from kvtier_server.core.requests import Request
from kvtier_server.core.stores import ItemStatus
from kvtier_server.core.tiering import Core
from kvtier_server.facts import PROTOCOL_MINOR
from kvtier_server.message_bytes import ITEMS_PER_KEY
from kvtier_server.metrics import SHM, Metrics
from kvtier_server.primary.tier import SLICE_ITEMS
from kvtier_server.rpc import CallScope

SERVICE = "kvtier.v1.OffloadService"

COMPLETE_SLICE_SLOTS = 512
"""Slots that a Complete names, taken in one go: publishing one costs about 4 us, so 2 ms."""

MAX_COST_S, MAX_COST_TOKENS = 1e6, 1 << 32
"""What one report of costs may say to be believed: far more than an engine's requests wait in a second."""

MAX_COPY_S = 3600.0
"""Longest time of one report's copies that is believed: far above what filling the largest pool takes."""


def boottime_ns() -> int:
    """Return the core's clock: never set back, and goes on during suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class OffloadService:
    """The unary calls of OffloadService; Attach is `sessions.py`'s."""

    def __init__(
        self,
        core: Core,
        scope: CallScope,
        metrics: Metrics,
        describe: Callable[[], pb.PoolInfo],
        version: str,
        clock: Callable[[], int],
        on_spaces_changed: Callable[[], None],
    ) -> None:
        self._core = core
        self._scope = scope
        self._metrics = metrics
        self._describe_pool = describe
        self._version = version
        self._clock = clock
        self._on_spaces_changed = on_spaces_changed
        self._boot_id = scope.boot_id

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
        """Method handlers by RPC name."""
        unary = self._scope.unary
        return {
            "Describe": unary("OffloadService/Describe", pb.DescribeRequest, self.describe),
            "Lookup": unary("OffloadService/Lookup", pb.LookupRequest, self.lookup),
            "PrepareLoad": unary("OffloadService/PrepareLoad", pb.PrepareLoadRequest, self.prepare_load),
            "PrepareStore": unary("OffloadService/PrepareStore", pb.PrepareStoreRequest, self.prepare_store),
            "Complete": unary("OffloadService/Complete", pb.CompleteRequest, self.complete),
            "RenewLeases": unary("OffloadService/RenewLeases", pb.RenewLeasesRequest, self.renew_leases),
            "Touch": unary("OffloadService/Touch", pb.TouchRequest, self.touch),
            "FinishRequest": unary(
                "OffloadService/FinishRequest", pb.FinishRequestRequest, self.finish_request
            ),
            "Reset": unary("OffloadService/Reset", pb.ResetRequest, self.reset),
        }

    def _session(self, session_id: str) -> Session:
        return current_caller().check_own(self._core.books.instances.session(session_id))

    def _request(self, session: Session, context: pb.RequestContext) -> Request:
        params = context.params_json if context.HasField("params_json") else None
        return self._core.books.request(session.instance, context.request_id, params)

    def _check_number(self, field: str, number: int) -> None:
        _check_at_most(field, number, self._core.books.limits.max_keys)

    def _check_keys(self, keys: Sequence[bytes]) -> None:
        check_number_of_keys(keys, self._core.books.limits.max_keys)

    def describe(self, _: pb.DescribeRequest) -> pb.DescribeResponse:
        """Tell where the pool is."""
        return pb.DescribeResponse(
            boot_id=self._boot_id,
            version=self._version,
            protocol_minor=PROTOCOL_MINOR,
            pool=self._describe_pool(),
        )

    def lookup(self, message: pb.LookupRequest) -> pb.LookupResponse:
        """Answer a status per key, and what is leased."""
        session = self._session(message.session_id)
        self._check_keys(message.keys)
        _check_at_most("first_chunks", len(message.first_chunks), MAX_GROUPS)
        _check_at_most("slots_for_misses", len(message.slots_for_misses), MAX_GROUPS)
        keys = message.keys[:]  # a slice costs a quarter less than list()
        wishes = [(wish.group, wish.at_most, wish.spare) for wish in message.slots_for_misses]
        if wishes:
            self._core.grants.check_wishes(session, wishes, message.store_lease_id)
        answer = self._core.lookups.lookup(
            session,
            self._request(session, message.context),
            keys,
            self._clock(),
            message.lease_id,
            message.first_chunks[:],
            message.max_tokens,
            message.pending_wait_ms * 1_000_000,
            message.lease_hits,
        )
        reply = pb.LookupResponse(
            boot_id=self._boot_id,
            statuses=bytes(answer.statuses),
            unwanted=answer.unwanted,
            leased=[pb.IndexRun(first=first, count=count) for first, count in answer.leased],
            slot_ids=answer.slot_ids,
            generations=answer.generations,
        )
        if wishes:
            for group, slot_ids, generations in self._core.grants.for_misses(
                session, keys, answer, wishes, message.store_lease_id, self._clock()
            ):
                reply.credits.add(group=group, slot_ids=slot_ids, generations=generations)
        return reply

    def prepare_load(self, message: pb.PrepareLoadRequest) -> pb.PrepareLoadResponse:
        """Pin all keys or refuse."""
        session = self._session(message.session_id)
        self._check_keys(message.keys)
        request = self._request(session, message.context)
        chunks = self._core.grants.prepare_load(
            session, request, list(message.keys), message.lease_id, self._clock()
        )
        return pb.PrepareLoadResponse(
            boot_id=self._boot_id,
            slot_ids=[chunk.slot_id for chunk in chunks],
            generations=[chunk.generation for chunk in chunks],
        )

    async def prepare_store(self, message: pb.PrepareStoreRequest) -> pb.PrepareStoreResponse:
        """Reserve slots for keys, or credits; many keys in slices, between which other calls get in."""
        limit = self._core.books.limits.max_keys
        check_number_of_keys(message.keys, limit, at_least=0)
        _check_at_most("credits", len(message.credits), MAX_GROUPS)
        keys = message.keys[:]
        check_keys(keys, limit, at_least=0)
        asked_credits = [(asked.group, asked.count) for asked in message.credits]
        reply = pb.PrepareStoreResponse(boot_id=self._boot_id)
        full = False
        for start in range(0, max(len(keys), 1), SLICE_ITEMS):
            if full:
                # A leading part is granted: what became free since must not leave a hole.
                reply.verdicts.extend([pb.STORE_VERDICT_FULL] * len(keys[start:]))
                break
            if start:
                await asyncio.sleep(0)
            session = self._session(message.session_id)
            answer = self._core.grants.prepare_store(
                session,
                self._request(session, message.context) if keys else None,
                keys[start : start + SLICE_ITEMS],
                asked_credits,
                message.lease_id,
                self._clock(),
                extend=start > 0,
            )
            full = StoreVerdict.FULL in answer.verdicts or StoreVerdict.INFLIGHT in answer.verdicts
            reply.verdicts.extend(answer.verdicts)  # type: ignore[arg-type]
            reply.slot_ids.extend(answer.slot_ids)
            reply.generations.extend(answer.generations)
            reply.evicted_keys.extend(answer.evicted)
            for group, slot_ids, generations in answer.credits:
                reply.credits.add(group=group, slot_ids=slot_ids, generations=generations)
        return reply

    async def complete(self, message: pb.CompleteRequest) -> pb.CompleteResponse:
        """Take the items in the order of the fields; malformed columns are refused before that.

        Many slots are taken in slices, between which other calls get in.
        """
        session = self._session(message.session_id)
        completions = self._core.completions
        _check_columns(message, self._core.books.limits.max_keys)
        for stored in message.store_reports:
            completions.check_store_report(session, stored.part)
        if message.load_reports:
            completions.check_load_report(session)
        reply = pb.CompleteResponse(boot_id=self._boot_id)
        slices = _Slices(partial(self._session, message.session_id))
        for announced in message.announcements:
            reply.announcements.append(
                await slices.take(len(announced.slot_ids), partial(self._announce, session, announced))
            )
        for start in message.load_starts:
            slot_ids = list(start.slot_ids)
            leases = (start.lookup_lease_id, start.load_lease_id)
            reply.load_starts.append(_wire(completions.start_load(session, *leases, slot_ids, self._clock())))
        for stored in message.store_reports:
            reply.store_reports.append(
                await slices.take(len(stored.slot_ids), partial(self._take_store_report, session, stored))
            )
            self._observe_copies("store", stored.bytes, stored.seconds)
        for loaded in message.load_reports:
            reply.load_reports.append(_wire(self._take_load_report(session, loaded)))
        for returned in message.credit_returns:
            reply.credit_returns.append(
                await slices.take(len(returned.slot_ids), partial(self._return_credits, session, returned))
            )
        for lease_id in message.released_lease_ids:
            await slices.let_others_in(self._core.books.should_settle)
            known = self._core.release(session.instance, lease_id, self._clock())
            reply.released_leases.append(_wire(ItemStatus.OK if known else ItemStatus.UNKNOWN))
        for request_id in message.finished_request_ids:
            self._core.finish(session.instance, request_id)
        self._observe_costs(message.costs)
        return reply

    def _announce(
        self, session: Session, announced: pb.Announcement, first: int, end: int
    ) -> list[ItemStatus]:
        return self._core.completions.announce(
            session,
            announced.request_id,
            announced.slot_ids[first:end],
            announced.generations[first:end],
            announced.keys[first:end],
        )

    def _return_credits(
        self, session: Session, returned: pb.CreditReturn, first: int, end: int
    ) -> list[ItemStatus]:
        return self._core.completions.return_credits(
            session, returned.slot_ids[first:end], returned.generations[first:end]
        )

    def _take_store_report(
        self, session: Session, report: pb.StoreReport, first: int, end: int
    ) -> list[ItemStatus]:
        return self._core.completions.report_store(
            session,
            report.part,
            report.slot_ids[first:end],
            report.generations[first:end],
            report.keys[first:end],
            report.checksums[first:end],
            {index - first for index in report.failed},
        )

    def _take_load_report(self, session: Session, report: pb.LoadReport) -> ItemStatus:
        mismatches = [MismatchReport(found.slot_id, found.generation) for found in report.mismatches]
        torn = len(report.torn_slot_ids)
        completions = self._core.completions
        status = completions.report_load(session, report.lease_id, torn, mismatches, self._clock())
        self._observe_copies("load", report.bytes, report.seconds)
        return status

    def _observe_copies(self, direction: str, num_bytes: int, seconds: float) -> None:
        # Copies that a process of ours made are counted there; their reports have no figures.
        # Figures from outside: one infinity would stay in the metrics' sums for good.
        if 0 < seconds <= MAX_COPY_S and num_bytes <= self._core.books.primary.slabs.pool_bytes:
            self._metrics.observe_transfer(direction, SHM, num_bytes, seconds)

    def _observe_costs(self, costs: pb.Costs) -> None:
        # Figures from outside, as above.
        are_tokens = max(costs.loaded_tokens, costs.computed_tokens) <= MAX_COST_TOKENS
        if are_tokens and all(0 <= s <= MAX_COST_S for s in (costs.load_seconds, costs.compute_seconds)):
            self._metrics.observe_costs(
                costs.loaded_tokens, costs.load_seconds, costs.computed_tokens, costs.compute_seconds
            )

    def renew_leases(self, message: pb.RenewLeasesRequest) -> pb.RenewLeasesResponse:
        """Extend lookup leases."""
        session = self._session(message.session_id)
        self._check_number("lease_ids", len(message.lease_ids))
        known = self._core.renew(session, list(message.lease_ids), self._clock())
        statuses = [_wire(ItemStatus.OK if renewed else ItemStatus.UNKNOWN) for renewed in known]
        return pb.RenewLeasesResponse(boot_id=self._boot_id, statuses=statuses)

    def touch(self, message: pb.TouchRequest) -> pb.TouchResponse:
        """Count a use."""
        session = self._session(message.session_id)
        self._check_keys(message.keys)
        self._core.lookups.touch(session, self._request(session, message.context), list(message.keys))
        return pb.TouchResponse(boot_id=self._boot_id)

    def finish_request(self, message: pb.FinishRequestRequest) -> pb.FinishRequestResponse:
        """Forget requests."""
        session = self._session(message.session_id)
        self._check_number("request_ids", len(message.request_ids))
        for request_id in message.request_ids:
            self._core.finish(session.instance, request_id)
        return pb.FinishRequestResponse(boot_id=self._boot_id)

    def reset(self, message: pb.ResetRequest) -> pb.ResetResponse:
        """Move the instance to another epoch."""
        epoch = self._core.reset(self._session(message.session_id), message.weights_id)
        self._on_spaces_changed()
        return pb.ResetResponse(boot_id=self._boot_id, epoch=epoch)


class _Slices:
    """Takes the slots that one Complete names in slices; many short columns make up one together.

    `check_session` raises if the session has ended while others got in.
    """

    def __init__(self, check_session: Callable[[], object]) -> None:
        self._check_session = check_session
        self._taken = 0

    async def take(
        self, num_slots: int, take_piece: Callable[[int, int], list[ItemStatus]]
    ) -> pb.CompleteResult:
        """Take a column of slots piece by piece, [first, end)."""
        statuses: list[ItemStatus] = []
        for first in range(0, num_slots, COMPLETE_SLICE_SLOTS):
            await self.let_others_in(self._taken >= COMPLETE_SLICE_SLOTS)
            end = min(first + COMPLETE_SLICE_SLOTS, num_slots)
            statuses += take_piece(first, end)
            self._taken += end - first
        return _result(statuses)

    async def let_others_in(self, is_time: bool) -> None:
        """Begin a new slice, if it is time."""
        if is_time:
            self._taken = 0
            await asyncio.sleep(0)
            self._check_session()


def _wire(status: ItemStatus) -> pb.CompleteStatus.ValueType:
    return pb.CompleteStatus.ValueType(int(status))


def _result(statuses: Sequence[ItemStatus]) -> pb.CompleteResult:
    if all(status is ItemStatus.OK for status in statuses):
        return pb.CompleteResult()  # a step's report says nothing where everything went well
    return pb.CompleteResult(statuses=[_wire(status) for status in statuses])


def _check_columns(message: pb.CompleteRequest, max_keys: int) -> None:
    """Refuse columns of unequal length, and more items than one call may have: before anything is done."""
    _check_items(message, ITEMS_PER_KEY * max_keys)
    for index, announced in enumerate(message.announcements):
        where = f"announcements[{index}]"
        _check_column(f"{where}.generations", len(announced.generations), len(announced.slot_ids))
        _check_column(f"{where}.keys", len(announced.keys), len(announced.slot_ids))
        check_keys(announced.keys, max_keys, at_least=0)
    for index, started in enumerate(message.load_starts):
        if not started.load_lease_id:
            raise BadRequest(f"load_starts[{index}].load_lease_id", "0; the client chooses one")
    for index, stored in enumerate(message.store_reports):
        where = f"store_reports[{index}]"
        _check_column(f"{where}.generations", len(stored.generations), len(stored.slot_ids))
        _check_column(f"{where}.keys", len(stored.keys), len(stored.slot_ids))
        _check_column(f"{where}.checksums", len(stored.checksums), len(stored.slot_ids))
        check_keys(stored.keys, max_keys, at_least=0)
        if len(stored.failed) > len(stored.slot_ids):
            raise BadRequest(f"{where}.failed", "more indexes than slots")
        if any(failed >= len(stored.slot_ids) for failed in stored.failed):
            raise BadRequest(f"{where}.failed", "an index beyond its slots")
    for index, returned in enumerate(message.credit_returns):
        where = f"credit_returns[{index}].generations"
        _check_column(where, len(returned.generations), len(returned.slot_ids))


def _check_items(message: pb.CompleteRequest, limit: int) -> None:
    """Refuse more items and slots than one call may have, the items before any of them is looked at."""
    items = len(message.announcements) + len(message.load_starts) + len(message.store_reports)
    items += len(message.load_reports) + len(message.credit_returns)
    items += len(message.released_lease_ids) + len(message.finished_request_ids)
    if items <= limit:
        items += sum([len(announced.slot_ids) for announced in message.announcements])
        items += sum([len(started.slot_ids) for started in message.load_starts])
        items += sum([len(stored.slot_ids) for stored in message.store_reports])
        items += sum([len(loaded.torn_slot_ids) + len(loaded.mismatches) for loaded in message.load_reports])
        items += sum([len(returned.slot_ids) for returned in message.credit_returns])
    if items > limit:
        raise BadRequest("items", f"{items} items and slots; at most {limit} are allowed")


def _check_column(name: str, entries: int, slots: int) -> None:
    if entries != slots:
        raise BadRequest(name, f"{entries} entries for {slots} slots")


def _check_at_most(field: str, number: int, limit: int) -> None:
    if number > limit:
        raise BadRequest(field, f"{number} entries; at most {limit} are allowed in a call")
