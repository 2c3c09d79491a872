"""A session's life, against a peer that loses replies, comes back as another boot, and ends streams."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from kvtier.v1 import offload_pb2 as pb
from kvtier_client import ClientOptions, LookupStatus, OffloadClient, ReqContext, Role, StoreVerdict
from kvtier_client.answers import StoreGrant
from kvtier_client.gate import Gate
from kvtier_client.link import Link
from kvtier_client.reports import LoadReportItem, StoreReportItem
from kvtier_ops.locks import owner_lock_is_free

from .builders import KEYS, Notes, make_client, wait_until
from .scripted_peer import Context, Peer

CTX = ReqContext("r1", {"max_offload_tokens": 5})
LONG_S = 20


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    tmp_path.chmod(0o700)
    with Peer(tmp_path / "s", tmp_path / "pool") as peer:
        yield peer


@pytest.fixture
def attach(peer: Peer) -> Iterator[Callable[..., OffloadClient]]:
    clients = []

    def attach(
        notes: Notes | None = None, *, role: Role = Role.SCHEDULER, options: ClientOptions | None = None
    ) -> OffloadClient:
        # Generous deadlines: on a busy machine an answer must not miss them by itself.
        options = options or ClientOptions(lookup_deadline_ms=5000, prepare_deadline_ms=5000)
        client = make_client(peer.address, role=role, options=options, listener=notes)
        clients.append(client)
        client.start()
        assert client.wait_attached(LONG_S), client.away_reason
        return client

    yield attach
    for client in clients:
        client.close()


Attach = Callable[..., OffloadClient]


def hits(peer: Peer, leased: int) -> Callable[[pb.LookupRequest, Context], pb.LookupResponse]:
    """Answer HIT for all keys and pin the first ones."""

    def answer(request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        return pb.LookupResponse(
            boot_id=peer.boot_id,
            statuses=bytes([pb.LOOKUP_STATUS_HIT]) * len(request.keys),
            leased=[pb.IndexRun(first=0, count=leased)] if request.lease_id else [],
            slot_ids=range(10, 10 + leased) if request.lease_id else [],
            generations=range(20, 20 + leased) if request.lease_id else [],
        )

    return answer


def never(request: object, context: Context) -> None:
    """Keep the caller waiting until it gives up: its reply is lost."""
    done = threading.Event()
    context.add_callback(done.set)
    done.wait(LONG_S)


def released(peer: Peer) -> set[int]:
    return {lease for request in peer.asked("Complete") for lease in request.released_lease_ids}


def test_the_first_attach_tells_who_and_what_and_holds_the_lock_it_names(peer: Peer, attach: Attach) -> None:
    client = attach(role=Role.WORKER)
    request = peer.asked("Attach")[0]
    assert (request.engine_id, request.instance_nonce, request.rank) == ("engine-1", 7, 0)
    assert request.role == pb.SESSION_ROLE_WORKER
    assert request.namespace_digest == client.facts.digest()
    assert [tensor.page_bytes for tensor in request.geometry[0].tensors] == [4096]
    assert request.previous_session == ""
    directory = Path(peer.pool.directory)
    assert not owner_lock_is_free(directory, request.lock_file)
    assert client.session is not None
    assert client.session.pool is not None
    assert client.session.pool.pool_id == client.session.pool_id == peer.pool.pool_id
    client.close()
    assert owner_lock_is_free(directory, request.lock_file)


def test_a_scheduler_does_not_map_the_pool(attach: Attach) -> None:
    session = attach().session
    assert session is not None
    assert session.pool is None


def test_closing_with_copies_running_keeps_the_lock(peer: Peer, attach: Attach) -> None:
    client = attach(role=Role.WORKER)
    client.close(drained=False)
    name = peer.asked("Attach")[0].lock_file
    assert not owner_lock_is_free(Path(peer.pool.directory), name)
    assert client._keeper is not None
    client._keeper._place.leave()


def test_closing_keeps_the_lock_while_the_listener_knows_of_a_copy(peer: Peer, attach: Attach) -> None:
    notes = Notes()
    notes.drained = False
    client = attach(notes, role=Role.WORKER)
    name = peer.asked("Attach")[0].lock_file
    client.close()
    assert not owner_lock_is_free(Path(peer.pool.directory), name)


def test_close_comes_back_though_the_listener_does_not(peer: Peer, attach: Attach) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Hanging(Notes):
        def on_workers_changed(self, missing_ranks: tuple[int, ...]) -> None:
            entered.set()
            go_on.wait(5 * LONG_S)

    client = attach(Hanging(), role=Role.WORKER)
    peer.send(pb.AttachResponse(workers_changed=pb.WorkersChanged()))
    assert entered.wait(LONG_S)
    closing = threading.Thread(target=client.close)
    closing.start()
    closing.join(LONG_S)
    came_back = not closing.is_alive()
    name = peer.asked("Attach")[0].lock_file
    assert not owner_lock_is_free(Path(peer.pool.directory), name)
    go_on.set()
    closing.join(LONG_S)
    assert came_back


def test_parameters_travel_until_a_call_that_had_them_was_answered(peer: Peer, attach: Attach) -> None:
    client = attach(options=ClientOptions(lookup_deadline_ms=200))
    peer.scripts["Lookup"] = never
    assert client.lookup(CTX, KEYS).reason == "deadline"
    del peer.scripts["Lookup"]
    client.lookup(CTX, KEYS, timeout_s=LONG_S)
    client.lookup(CTX, KEYS, timeout_s=LONG_S)
    client.finish("r1")
    assert client.flush_and_wait(LONG_S)
    client.lookup(CTX, KEYS, timeout_s=LONG_S)
    sent = [request.context.params_json for request in peer.asked("Lookup")]
    params = b'{"max_offload_tokens":5}'
    assert sent == [params, params, b"", params]


def test_parameters_that_are_too_large_are_left_out_and_counted(peer: Peer, attach: Attach) -> None:
    client = attach()
    client.lookup(ReqContext("r1", {"a": "x" * 65_536, "b": 1}), KEYS)
    assert not peer.asked("Lookup")[0].context.HasField("params_json")
    assert client.stats.snapshot()["params_dropped"] == 1


def test_few_requests_are_remembered_when_few_may_be(peer: Peer, attach: Attach) -> None:
    client = attach(options=ClientOptions(lookup_deadline_ms=5000, max_seen_requests=2))
    for req_id in ("r1", "r2", "r3", "r3", "r1"):
        client.lookup(ReqContext(req_id, {"a": 1}), KEYS)
    sent = [request.context.HasField("params_json") for request in peer.asked("Lookup")]
    assert sent == [True, True, True, False, True]


def test_a_leased_answer_names_slots_by_index(peer: Peer, attach: Attach) -> None:
    client = attach()
    peer.scripts["Lookup"] = hits(peer, leased=2)
    for answer in (client.lookup(CTX, KEYS), client.lookup_async(CTX, KEYS).answer()):
        assert list(answer.statuses) == [LookupStatus.HIT] * 4
        assert answer.leased == {0: (10, 20), 1: (11, 21)}
        assert client.lease_valid(answer.lease_id)
    assert client.lookup(CTX, KEYS, lease=False).lease_id == 0
    assert client.lookup(CTX, KEYS, max_tokens=0).lease_id == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"statuses": bytes([1, 1, 1])},
        {"slot_ids": [1]},
        {"generations": [1, 2, 3]},
        {"leased": [pb.IndexRun(first=3, count=2)]},
        {"leased": [pb.IndexRun(first=1, count=1), pb.IndexRun(first=1, count=1)]},
        {"leased": [pb.IndexRun(first=1, count=2), pb.IndexRun(first=3, count=0)]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_reply_that_contradicts_itself_is_a_miss_and_its_lease_is_given_back(
    peer: Peer, attach: Attach, wrong: dict[str, object]
) -> None:
    client = attach()
    fields: dict[str, object] = {
        "boot_id": peer.boot_id,
        "statuses": bytes([pb.LOOKUP_STATUS_HIT]) * 4,
        "leased": [pb.IndexRun(first=0, count=2)],
        "slot_ids": [1, 2],
        "generations": [1, 2],
    }
    peer.scripts["Lookup"] = lambda request, context: pb.LookupResponse(**{**fields, **wrong})  # type: ignore[arg-type]
    answer = client.lookup(CTX, KEYS)
    assert answer.reason == "bad_reply"
    assert list(answer.statuses) == [LookupStatus.MISS] * 4
    assert client.flush_and_wait(LONG_S)
    assert released(peer) == {peer.asked("Lookup")[0].lease_id}


def test_a_lease_whose_reply_was_lost_is_given_back(peer: Peer, attach: Attach) -> None:
    client = attach(options=ClientOptions(lookup_deadline_ms=100, breaker_threshold=100))
    peer.scripts |= {"Lookup": never, "PrepareLoad": never, "PrepareStore": never}
    client.lookup(CTX, KEYS)
    client.lookup_async(CTX, KEYS).answer()
    cancelled = client.lookup_async(CTX, KEYS, timeout_s=LONG_S)
    peer.wait_asked("Lookup", 3)
    cancelled.cancel()
    assert cancelled.answer().reason == "cancelled"
    assert client.prepare_load(CTX, KEYS) is None
    assert client.prepare_store(CTX, KEYS).reason == "deadline"
    assert client.flush_and_wait(LONG_S)
    calls = peer.asked("Lookup") + peer.asked("PrepareLoad") + peer.asked("PrepareStore")
    assert released(peer) == {request.lease_id for request in calls}


def test_cancelling_an_answered_lookup_gives_its_lease_back(peer: Peer, attach: Attach) -> None:
    client = attach()
    peer.scripts["Lookup"] = hits(peer, leased=2)
    pending = client.lookup_async(CTX, KEYS)
    lease_id = pending.answer().lease_id
    pending.cancel()
    pending.cancel()
    assert not client.lease_valid(lease_id)
    assert pending.answer().lease_id == 0
    assert client.flush_and_wait(LONG_S)
    assert [list(request.released_lease_ids) for request in peer.asked("Complete")] == [[lease_id]]


def test_a_refusal_has_the_daemons_reason(peer: Peer, attach: Attach) -> None:
    client = attach()

    def refuse(request: object, context: Context) -> None:
        peer.refuse(context, grpc.StatusCode.UNAVAILABLE, "DRAINING")

    peer.scripts |= {"Lookup": refuse, "PrepareStore": refuse}
    assert client.lookup(CTX, KEYS).reason == "draining"
    assert client.prepare_store(CTX, KEYS).reason == "draining"
    assert client.flush_and_wait(LONG_S)
    assert not released(peer), "a call that was refused granted nothing"


def test_leases_are_not_asked_while_workers_are_missing(peer: Peer, attach: Attach) -> None:
    peer.missing_ranks = (0,)
    notes = Notes()
    client = attach(notes)
    assert not client.ready
    assert client.lookup(CTX, KEYS).reason == "workers_missing"
    assert client.lookup(CTX, KEYS, lease=False).reason == ""
    peer.send(pb.AttachResponse(workers_changed=pb.WorkersChanged()))
    wait_until(lambda: client.ready, "the worker is noticed")
    assert client.lookup(CTX, KEYS).reason == ""
    wait_until(lambda: ("workers", ()) in notes.told, "the listener knows")


def test_events_of_the_stream_reach_the_listener_in_order(peer: Peer, attach: Attach) -> None:
    notes = Notes()
    attach(notes)
    hit = pb.Resolved(lease_id=9, key=KEYS[0], status=pb.LOOKUP_STATUS_HIT, slot_id=4, generation=2)
    peer.send(pb.AttachResponse(resolved=hit))
    peer.send(pb.AttachResponse(credits_wanted=pb.CreditsWanted(count=3)))
    peer.send(pb.AttachResponse())  # of a newer daemon, unknown here
    peer.send(pb.AttachResponse(draining=pb.Draining(deadline_ms=500)))
    wait_until(lambda: len(notes.told) == 4, "all events arrived")
    assert notes.told[1:] == [
        ("resolved", 9, KEYS[0], LookupStatus.HIT, 4, 2),
        ("credits_wanted", 3),
        ("draining", 500),
    ]


def test_credits_reach_the_listener_and_none_is_an_answer_too(peer: Peer, attach: Attach) -> None:
    notes = Notes()
    client = attach(notes)
    peer.scripts["PrepareStore"] = lambda request, context: pb.PrepareStoreResponse(
        boot_id=peer.boot_id, credits=[pb.CreditGrant(group=2, slot_ids=[5, 6], generations=[1, 1])]
    )
    assert client.request_credits(2, 8)
    wait_until(lambda: len(notes.told) == 2, "credits arrived")
    assert notes.told[1] == ("credits", 2, [5, 6], [1, 1], peer.asked("PrepareStore")[0].lease_id)
    peer.scripts["PrepareStore"] = lambda request, context: peer.refuse(
        context, grpc.StatusCode.RESOURCE_EXHAUSTED, "POOL_FULL"
    )
    client.request_credits(2, 8)
    wait_until(lambda: len(notes.told) == 3, "the refusal arrived")
    assert notes.told[2] == ("credits", 2, [], [], 0)


def test_a_listener_that_fails_does_not_stop_the_others(peer: Peer, attach: Attach) -> None:
    class Failing(Notes):
        def on_credits_wanted(self, count: int) -> None:
            raise RuntimeError("a bug of the shim")

    notes = Failing()
    client = attach(notes)
    peer.send(pb.AttachResponse(credits_wanted=pb.CreditsWanted(count=3)))
    peer.send(pb.AttachResponse(draining=pb.Draining(deadline_ms=500)))
    wait_until(lambda: ("draining", 500) in notes.told, "the next event arrives")
    assert client.stats.snapshot()["listener_errors"] == 1
    assert client.attached


def test_a_prepared_store_keeps_the_order_of_the_keys(peer: Peer, attach: Attach) -> None:
    client = attach()
    verdicts = [StoreVerdict.GRANTED, StoreVerdict.RESIDENT, StoreVerdict.GRANTED, StoreVerdict.QUOTA]
    peer.scripts["PrepareStore"] = lambda request, context: pb.PrepareStoreResponse(
        boot_id=peer.boot_id,
        verdicts=[int(verdict) for verdict in verdicts],  # type: ignore[misc]
        slot_ids=[7, 8],
        generations=[1, 2],
        evicted_keys=[b"evicted"],
    )
    grant = client.prepare_store(CTX, KEYS)
    assert grant.verdicts == verdicts
    assert (grant.slot_ids, grant.generations, grant.evicted_keys) == ([7, 8], [1, 2], [b"evicted"])
    assert grant.lease_id == peer.asked("PrepareStore")[0].lease_id


def test_what_is_queued_goes_out_in_one_call_and_nothing_in_none(peer: Peer, attach: Attach) -> None:
    client = attach()
    client.flush()
    assert client.flush_and_wait(LONG_S)
    assert not peer.asked("Complete")
    client.announce("r1", [1], [2], [KEYS[0]])
    client.start_load(5, 6, [3])
    client.release(7)
    client.release(0)
    client.finish("r2")
    client.flush()
    (request,) = peer.wait_asked("Complete")
    assert [a.request_id for a in request.announcements] == ["r1"]
    assert [start.load_lease_id for start in request.load_starts] == [6]
    assert list(request.released_lease_ids) == [7]
    assert list(request.finished_request_ids) == ["r2"]


def test_one_call_is_in_flight_and_what_is_flushed_meanwhile_follows_in_one_more(
    peer: Peer, attach: Attach
) -> None:
    client = attach()
    go_on = threading.Event()

    def slow(request: pb.CompleteRequest, context: Context) -> pb.CompleteResponse:
        go_on.wait(LONG_S)
        return pb.CompleteResponse(boot_id=peer.boot_id)

    peer.scripts["Complete"] = slow
    client.release(1)
    client.flush()
    peer.wait_asked("Complete")
    for lease_id in (2, 3):
        client.release(lease_id)
        client.flush()
    go_on.set()
    assert client.flush_and_wait(LONG_S)
    assert [list(r.released_lease_ids) for r in peer.asked("Complete")] == [[1], [2, 3]]


def test_a_report_whose_reply_was_lost_is_repeated_unchanged_and_first(peer: Peer, attach: Attach) -> None:
    client = attach(options=ClientOptions(prepare_deadline_ms=150, breaker_threshold=100))
    peer.scripts["Complete"] = never
    client.release(1)
    client.flush()
    peer.wait_asked("Complete")
    del peer.scripts["Complete"]
    client.release(2)
    assert client.flush_and_wait(LONG_S)
    told = [list(request.released_lease_ids) for request in peer.asked("Complete")]
    assert told == [[1]] * (len(told) - 1) + [[2]]
    assert len(told) >= 3


def test_a_refused_report_is_not_repeated(peer: Peer, attach: Attach) -> None:
    client = attach()
    peer.scripts["Complete"] = lambda request, context: peer.refuse(
        context, grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", "released_lease_ids"
    )
    client.release(1)
    assert client.flush_and_wait(LONG_S)
    assert len(peer.asked("Complete")) == 1
    assert client.stats.snapshot()["flush_dropped"] == 1


@pytest.mark.parametrize("what", ["store report", "load report", "credits"])
def test_what_the_daemon_holds_until_it_is_told_ends_with_the_session_when_it_is_refused(
    peer: Peer, attach: Attach, what: str
) -> None:
    client = attach()
    peer.scripts["Complete"] = lambda request, context: peer.refuse(
        context, grpc.StatusCode.INTERNAL, "INTERNAL", "a bug of the daemon"
    )
    if what == "store report":
        client.report_store(StoreReportItem(0, [1], [2], KEYS[:1]))
    elif what == "load report":
        client.report_load(LoadReportItem(7))
    else:
        client.return_credits([1], [2])
    client.flush()
    peer.wait_asked("Attach", 2)
    assert client.wait_attached(LONG_S)
    assert len(peer.asked("Complete")) == 1


def test_a_report_that_no_message_can_carry_ends_the_session(peer: Peer, attach: Attach) -> None:
    client = attach()
    with pytest.raises(TypeError):
        client.report_store(StoreReportItem(0, [1], [2], ["no bytes"]))  # type: ignore[list-item]
    peer.wait_asked("Attach", 2)
    assert client.wait_attached(LONG_S)
    assert client.flush_and_wait(LONG_S)
    assert not peer.asked("Complete")


def test_a_load_report_that_came_before_its_announcement_is_no_trouble(peer: Peer, attach: Attach) -> None:
    client = attach()
    unknown = pb.COMPLETE_STATUS_UNKNOWN
    peer.scripts["Complete"] = lambda request, context: pb.CompleteResponse(
        boot_id=peer.boot_id, load_reports=[unknown], released_leases=[unknown]
    )
    client.report_load(LoadReportItem(7))
    client.release(8)
    assert client.flush_and_wait(LONG_S)
    assert client.stats.snapshot()["items_not_ok"] == 1


def test_a_daemon_that_takes_no_reports_loses_the_session(peer: Peer, attach: Attach) -> None:
    notes = Notes()
    client = attach(notes, options=ClientOptions(max_queued_entries=10))
    for lease_id in range(1, 12):
        client.release(lease_id)
    wait_until(lambda: "detached" in notes.names(), "the session is given up")
    assert client.wait_attached(LONG_S)
    assert client.flush_and_wait(LONG_S)
    assert not released(peer)


def test_a_request_id_is_not_used_again_before_its_end_is_confirmed(peer: Peer, attach: Attach) -> None:
    client = attach()
    client.finish("r1")
    assert client.lookup(CTX, KEYS).reason == "finishing"
    assert client.lookup(ReqContext("r2"), KEYS).reason == ""
    assert client.flush_and_wait(LONG_S)
    assert client.lookup(CTX, KEYS).reason == ""


def test_more_keys_than_the_daemon_takes_are_not_sent(peer: Peer, attach: Attach) -> None:
    peer.max_keys = 3
    client = attach()
    assert client.lookup(CTX, KEYS).reason == "too_many_keys"
    assert client.lookup(CTX, KEYS[:3]).reason == ""
    client.touch(CTX, KEYS)
    assert sorted(len(request.keys) for request in peer.wait_asked("Touch", 2)) == [1, 3]
    assert not client.lookup(CTX, []).statuses


def test_kept_leases_are_renewed_in_one_call_and_the_others_run_out(peer: Peer, attach: Attach) -> None:
    peer.lookup_lease_ms = 600
    peer.scripts["Lookup"] = hits(peer, leased=1)
    client = attach()
    kept = [client.lookup(ReqContext(req_id), KEYS).lease_id for req_id in ("r1", "r2")]
    left = client.lookup(ReqContext("r3"), KEYS).lease_id
    for lease_id in kept:
        client.keep_lease(lease_id)
    client.keep_lease(12345)
    requests = peer.wait_asked("RenewLeases", 4)
    assert all(sorted(request.lease_ids) == sorted(kept) for request in requests)
    wait_until(lambda: not client.lease_valid(left), "the lease runs out")
    client.finish("r1")
    client.release(kept[1])
    assert not any(client.lease_valid(lease_id) for lease_id in kept)


def test_a_lease_that_the_daemon_does_not_know_is_not_believed_in(peer: Peer, attach: Attach) -> None:
    peer.lookup_lease_ms = 3000
    peer.scripts["Lookup"] = hits(peer, leased=1)
    peer.scripts["RenewLeases"] = lambda request, context: pb.RenewLeasesResponse(
        boot_id=peer.boot_id, statuses=[pb.COMPLETE_STATUS_UNKNOWN] * len(request.lease_ids)
    )
    client = attach()
    lease_id = client.lookup(CTX, KEYS).lease_id
    client.keep_lease(lease_id)
    peer.wait_asked("RenewLeases")
    wait_until(lambda: client.stats.snapshot()["leases_lost"] == 1, "the loss is noticed")
    assert not client.lease_valid(lease_id)


@pytest.mark.parametrize(
    "how", ["end_stream", "session_ended", "session_unknown", "boot_in_error", "boot_in_reply"]
)
def test_however_a_session_ends_its_leases_are_void_and_the_next_names_it(
    peer: Peer, attach: Attach, how: str
) -> None:
    notes = Notes()
    client = attach(notes)
    peer.scripts["Lookup"] = hits(peer, leased=1)
    lease_id = client.lookup(CTX, KEYS).lease_id
    assert client.lease_valid(lease_id)
    session = client.session
    assert session is not None
    if how == "end_stream":
        peer.end_stream()
    elif how == "session_ended":
        peer.send(pb.AttachResponse(ended=pb.SessionEnded(reason="INSTANCE_LOST")))
    elif how == "session_unknown":
        peer.scripts["Lookup"] = lambda request, context: peer.refuse(
            context, grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN"
        )
        assert client.lookup(CTX, KEYS).reason == "session_unknown"
        del peer.scripts["Lookup"]
    else:
        peer.boot_id = "00000000000000b2"
        if how == "boot_in_error":
            peer.scripts["Lookup"] = lambda request, context: peer.refuse(
                context, grpc.StatusCode.UNAVAILABLE, "DRAINING"
            )
        answer = client.lookup(CTX, KEYS)
        assert answer.boot_id == peer.boot_id
        assert not answer.lease_id
    (first, second) = peer.wait_asked("Attach", 2)
    assert second.previous_session == session.session_id
    assert second.lock_file == first.lock_file
    assert client.wait_attached(LONG_S)
    assert not client.lease_valid(lease_id)
    assert notes.names() == ["attached", "detached", "drain", "attached"]


def test_it_does_not_attach_again_while_a_copy_still_runs(peer: Peer, attach: Attach) -> None:
    notes = Notes()
    notes.drained = False
    client = attach(notes, role=Role.WORKER)
    peer.end_stream()
    wait_until(lambda: client.stats.snapshot()["drain_waits"] >= 2, "the client asks the copies again")
    assert len(peer.asked("Attach")) == 1
    assert "copies" in client.away_reason
    notes.drained = True
    assert client.wait_attached(LONG_S)
    assert peer.asked("Attach")[1].mapped_pool_id == peer.pool.pool_id


def test_a_refused_attach_is_told_once_and_tried_again(
    peer: Peer, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    peer.scripts["Attach"] = lambda request, context: peer.refuse(
        context, grpc.StatusCode.ALREADY_EXISTS, "RANK_TAKEN", "held for 3 s"
    )
    client = make_client(peer.address)
    client.start()
    peer.wait_asked("Attach", 3)
    assert client.away_reason == "rank_taken: held for 3 s"
    assert len([r for r in caplog.records if "rank_taken" in r.getMessage()]) == 1
    del peer.scripts["Attach"]
    assert client.wait_attached(LONG_S)
    client.close()


def test_after_a_reset_only_the_new_epoch_is_used_also_by_later_sessions(peer: Peer, attach: Attach) -> None:
    client = attach()
    peer.scripts["Lookup"] = hits(peer, leased=1)
    lease_id = client.lookup(CTX, KEYS).lease_id
    assert client.reset("weights-2", LONG_S)
    assert client.session is not None
    assert client.session.epoch == 2
    assert not client.lease_valid(lease_id)
    assert client.flush_and_wait(LONG_S)
    assert released(peer) == {lease_id}
    peer.epoch = 1  # as a daemon that was restarted and knows nothing of the reset
    peer.end_stream()
    requests = peer.wait_asked("Reset", 2)
    assert [request.weights_id for request in requests] == ["weights-2"] * 2
    assert client.wait_attached(LONG_S)
    assert client.session.epoch == 2


@pytest.mark.parametrize("call", ["PrepareLoad", "PrepareStore"])
def test_a_grant_that_was_asked_for_before_a_reset_is_given_back(
    peer: Peer, attach: Attach, call: str
) -> None:
    client = attach()
    go_on = threading.Event()

    def slow(request: pb.PrepareLoadRequest, context: Context) -> object:
        assert go_on.wait(LONG_S)
        if call == "PrepareLoad":
            return pb.PrepareLoadResponse(boot_id=peer.boot_id, slot_ids=[1], generations=[2])
        verdicts = [pb.STORE_VERDICT_GRANTED]
        return pb.PrepareStoreResponse(boot_id=peer.boot_id, verdicts=verdicts, slot_ids=[1], generations=[2])

    peer.scripts[call] = slow
    prepare = client.prepare_load if call == "PrepareLoad" else client.prepare_store
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(prepare(CTX, KEYS[:1])))
    asking.start()
    (request,) = peer.wait_asked(call)
    assert client.reset("weights-2", LONG_S)
    go_on.set()
    asking.join(LONG_S)
    assert answers == [None if call == "PrepareLoad" else StoreGrant.refused(1, "session_changed")]
    assert client.flush_and_wait(LONG_S)
    assert request.lease_id in released(peer)


@pytest.mark.parametrize(
    ("reason", "warns"), [("INSTANCE_LOST", 0), ("REPLACED", 0), ("DRAINING", 0), ("SLOW_READER", 1)]
)
def test_only_an_end_that_nobody_meant_is_a_warning(
    peer: Peer, attach: Attach, caplog: pytest.LogCaptureFixture, reason: str, warns: int
) -> None:
    client = attach()
    with caplog.at_level(logging.INFO):
        peer.send(pb.AttachResponse(ended=pb.SessionEnded(reason=reason)))
        peer.wait_asked("Attach", 2)
        assert client.wait_attached(LONG_S)
    told = [record for record in caplog.records if reason in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING if warns else logging.INFO]


def test_a_reset_just_before_a_session_is_let_through_is_done_in_that_session(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = Gate.install
    resets: list[bool] = []

    def reset_first(gate: Gate, link: Link) -> bool:
        if not resets:  # the engine's thread is faster here
            resets.append(client.reset())
        return install(gate, link)

    monkeypatch.setattr(Gate, "install", reset_first)
    options = ClientOptions(lookup_deadline_ms=5000, prepare_deadline_ms=5000)
    client = make_client(peer.address, options=options)
    try:
        client.start()
        assert client.wait_attached(LONG_S)
        assert resets == [False]
        assert client.ready
        assert client.lookup(CTX, KEYS).reason == ""
        assert len(peer.asked("Reset")) == len(peer.asked("Attach")) == 1
        assert client.session is not None
        assert client.session.epoch == peer.epoch
    finally:
        client.close()


def test_until_a_reset_is_confirmed_everything_misses(peer: Peer, attach: Attach) -> None:
    client = attach()
    peer.scripts |= {
        "Lookup": hits(peer, leased=1),
        "Reset": lambda request, context: peer.refuse(context, grpc.StatusCode.INTERNAL, "INTERNAL"),
    }
    assert not client.reset("", LONG_S)
    assert list(client.lookup(CTX, KEYS).statuses) == [LookupStatus.MISS] * 4
    peer.wait_asked("Reset", 3)
    assert list(client.lookup(CTX, KEYS).statuses) == [LookupStatus.MISS] * 4
    assert not peer.asked("Lookup")
    del peer.scripts["Reset"]
    assert client.wait_attached(LONG_S)
    assert list(client.lookup(CTX, KEYS).statuses) == [LookupStatus.HIT] * 4


def test_closing_tells_what_was_queued(peer: Peer, attach: Attach) -> None:
    notes = Notes()
    client = attach(notes)
    client.release(3)
    client.close()
    assert released(peer) == {3}
    assert notes.told[-2:] == [("detached", "closed"), ("drain",)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvtier-")]


def test_many_threads_call_while_sessions_come_and_go(peer: Peer, attach: Attach) -> None:
    client = attach(Notes(), options=ClientOptions(reconnect_min_ms=5, reconnect_max_ms=20))
    peer.scripts["Lookup"] = hits(peer, leased=2)
    failures: list[BaseException] = []
    stop = threading.Event()

    def engine(name: str) -> None:
        try:
            number = 0
            while not stop.is_set():
                number += 1
                ctx = ReqContext(f"{name}-{number}", {"n": number})
                pending = client.lookup_async(ctx, KEYS)
                client.keep_lease(client.lookup(ctx, KEYS).lease_id)
                client.announce(ctx.req_id, [1, 2], [1, 1], KEYS[:2])
                client.request_credits(0, 4)
                client.touch(ctx, KEYS)
                if number % 2:
                    pending.cancel()
                client.release(pending.answer().lease_id)
                client.finish(ctx.req_id)
                client.flush()
        except BaseException as failure:  # noqa: BLE001 - it must fail the test, not end the thread
            failures.append(failure)

    threads = [threading.Thread(target=engine, args=(f"thread-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for sessions in range(2, 7):
            peer.end_stream()
            peer.wait_asked("Attach", sessions)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert client.wait_attached(LONG_S)
    wait_until(lambda: client.flush_and_wait(LONG_S), "what was queued is told")
    assert client.stats.snapshot()["keeper_errors"] == client.stats.snapshot()["listener_errors"] == 0
