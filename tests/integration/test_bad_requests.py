"""What a client must not send: the daemon says which field, and goes on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from tests.conftest import MakeEngine
from tests.daemon_process import WAIT_S, DaemonProcess
from tests.raw_engine import Failure, RawEngine, failure, failure_of, refusal, to_key, to_keys

from kvtier.v1 import admin_pb2
from kvtier.v1 import offload_pb2 as pb
from kvtier_server.message_bytes import message_bytes

SERVICE = "/kvtier.v1.OffloadService"
UNARY = ("Describe", "Lookup", "PrepareLoad", "PrepareStore", "Complete", "RenewLeases", "Touch",
         "FinishRequest", "Reset")  # fmt: skip
NO_MESSAGE = b"\x0a\xff"
"""Field 1 is longer than the bytes that follow: no message of any kind."""


def context(request_id: str = "request") -> pb.RequestContext:
    return pb.RequestContext(request_id=request_id)


def assert_bad_request(failed: Failure, field: str) -> None:
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT, failed
    assert failed.reason == "BAD_REQUEST"
    assert failed.metadata["field"] == field
    assert failed.message.startswith(f"{field}: "), failed.message


@pytest.mark.parametrize("method", UNARY)
def test_bytes_that_are_no_message_are_a_bad_request(engine: RawEngine, method: str) -> None:
    assert_bad_request(refusal(lambda: engine.send_bytes(f"{SERVICE}/{method}", NO_MESSAGE)), "request")


def test_bytes_that_are_no_message_are_a_bad_request_to_admin_too(engine: RawEngine) -> None:
    path = "/kvtier.v1.AdminService/GetStatus"
    assert_bad_request(refusal(lambda: engine.send_bytes(path, NO_MESSAGE)), "request")


def test_bytes_that_are_no_message_open_no_session(daemon: DaemonProcess, engine: RawEngine) -> None:
    sessions = len(daemon.status().sessions)
    assert_bad_request(refusal(lambda: engine.stream_bytes(f"{SERVICE}/Attach", NO_MESSAGE)), "request")
    for call in ("Watch", "Snapshot"):
        path = f"/kvtier.v1.EventsService/{call}"
        assert_bad_request(refusal(lambda path=path: engine.stream_bytes(path, NO_MESSAGE)), "request")  # type: ignore[misc]
    assert len(daemon.status().sessions) == sessions


# Methods with keys, each made with the keys in question.
KEYED: dict[str, Callable[[RawEngine, list[bytes]], object]] = {
    "Lookup": lambda engine, keys: engine.lookup(keys),
    "PrepareLoad": lambda engine, keys: engine.prepare_load(keys),
    "PrepareStore": lambda engine, keys: engine.prepare_store(keys),
    "Touch": lambda engine, keys: engine.stub.Touch(
        pb.TouchRequest(session_id=engine.session_id, context=context(), keys=keys), timeout=WAIT_S
    ),
}


@pytest.mark.parametrize("num_bytes", [0, 4, 129])
@pytest.mark.parametrize("method", KEYED)
def test_a_key_of_a_wrong_length_is_named_by_its_index(
    engine: RawEngine, method: str, num_bytes: int
) -> None:
    keys = [to_key(0), to_key(1), b"k" * num_bytes]
    assert_bad_request(refusal(lambda: KEYED[method](engine, keys)), "keys[2]")


@pytest.mark.parametrize("num_bytes", [5, 128])
def test_the_shortest_and_the_longest_key_are_stored_and_hit(engine: RawEngine, num_bytes: int) -> None:
    key = b"k" * num_bytes
    engine.store([key])
    assert list(engine.lookup([key]).statuses) == [pb.LOOKUP_STATUS_HIT]


@pytest.mark.parametrize("method", KEYED)
def test_one_key_more_than_8192_is_refused(engine: RawEngine, method: str) -> None:
    assert_bad_request(refusal(lambda: KEYED[method](engine, to_keys(range(8193)))), "keys")


def test_8192_keys_are_answered(engine: RawEngine) -> None:
    assert len(engine.lookup(to_keys(range(8192))).statuses) == 8192


@pytest.mark.parametrize("method", ["Lookup", "PrepareLoad", "Touch"])
def test_no_keys_at_all_are_refused(engine: RawEngine, method: str) -> None:
    assert_bad_request(refusal(lambda: KEYED[method](engine, [])), "keys")


@pytest.mark.parametrize("request_id", ["", "r" * 257])
def test_a_request_id_must_have_1_to_256_characters(engine: RawEngine, request_id: str) -> None:
    assert_bad_request(
        refusal(lambda: engine.lookup([to_key(1)], request_id=request_id)), "context.request_id"
    )


def test_parameters_of_64_kib_are_taken_and_a_byte_more_is_refused(engine: RawEngine) -> None:
    def look(num_bytes: int) -> object:
        asked = pb.LookupRequest(session_id=engine.session_id, context=context(), keys=[to_key(1)])
        asked.context.params_json = b" " * num_bytes
        return engine.stub.Lookup(asked, timeout=WAIT_S)

    look(65_536)
    assert_bad_request(refusal(lambda: look(65_537)), "context.params_json")


def test_a_lease_without_an_id_is_refused(engine: RawEngine) -> None:
    assert_bad_request(refusal(lambda: engine.prepare_store([to_key(1)], lease_id=0)), "lease_id")
    assert_bad_request(refusal(lambda: engine.prepare_load([to_key(1)], lease_id=0)), "lease_id")


@pytest.mark.parametrize(
    ("wishes", "store_lease_id", "field"),
    [
        ([pb.SlotsForMisses(group=0, at_most=1)], 0, "store_lease_id"),
        ([pb.SlotsForMisses(group=1, at_most=1)], 5, "slots_for_misses.group"),
        ([pb.SlotsForMisses(group=0, at_most=1)] * 2, 5, "slots_for_misses.group"),
    ],
)
def test_a_wish_for_slots_that_cannot_be_met_is_refused_and_leases_nothing(
    engine: RawEngine,
    daemon: DaemonProcess,
    wishes: list[pb.SlotsForMisses],
    store_lease_id: int,
    field: str,
) -> None:
    engine.store([to_key(1)])
    asked = pb.LookupRequest(
        session_id=engine.session_id,
        context=context(),
        keys=[to_key(1)],
        lease_id=4,
        slots_for_misses=wishes,
        store_lease_id=store_lease_id,
    )
    assert_bad_request(refusal(lambda: engine.stub.Lookup(asked, timeout=WAIT_S)), field)
    assert daemon.status().tiers[0].pinned_chunks == 0


COLUMNS: dict[str, dict[str, object]] = {
    "announcements[0].generations": {
        "announcements": [pb.Announcement(slot_ids=[1], generations=[], keys=[to_key(1)])]
    },
    "announcements[0].keys": {"announcements": [pb.Announcement(slot_ids=[1], generations=[1], keys=[])]},
    "credit_returns[0].generations": {"credit_returns": [pb.CreditReturn(slot_ids=[1, 2], generations=[1])]},
    "store_reports[0].generations": {
        "store_reports": [pb.StoreReport(slot_ids=[1], generations=[1, 2], keys=[to_key(1)], checksums=[0])]
    },
    "store_reports[0].keys": {
        "store_reports": [pb.StoreReport(slot_ids=[1], generations=[1], checksums=[0])]
    },
    "store_reports[0].checksums": {
        "store_reports": [pb.StoreReport(slot_ids=[1], generations=[1], keys=[to_key(1)])]
    },
    "store_reports[0].failed": {
        "store_reports": [
            pb.StoreReport(slot_ids=[1], generations=[1], keys=[to_key(1)], checksums=[0], failed=[1])
        ]
    },
}


@pytest.mark.parametrize("field", COLUMNS)
def test_columns_of_unequal_length_are_refused(engine: RawEngine, field: str) -> None:
    assert_bad_request(refusal(lambda: engine.complete(engine.workers[0], **COLUMNS[field])), field)


def test_a_refused_complete_has_done_nothing(engine: RawEngine) -> None:
    granted = engine.prepare_store([to_key(1)])
    good = pb.StoreReport(
        slot_ids=granted.slot_ids, generations=granted.generations, keys=[to_key(1)], checksums=[0]
    )
    bad = pb.StoreReport(slot_ids=[1], generations=[], keys=[to_key(2)], checksums=[0])
    refusal(lambda: engine.complete(engine.workers[0], store_reports=[good, bad]))
    assert list(engine.lookup([to_key(1)]).statuses) == [pb.LOOKUP_STATUS_PENDING]


def test_a_complete_names_at_most_twice_as_many_items_as_a_call_may_have_keys(engine: RawEngine) -> None:
    returned = [pb.CreditReturn(slot_ids=range(16_384), generations=[1] * 16_384)]
    assert_bad_request(refusal(lambda: engine.complete(credit_returns=returned)), "items")


def test_a_message_over_8_mib_is_refused_by_grpc_itself(daemon: DaemonProcess, engine: RawEngine) -> None:
    path = f"{SERVICE}/Describe"
    assert_bad_request(refusal(lambda: engine.send_bytes(path, padding_of((8 << 20) - 16))), "request")
    failed = failure(lambda: engine.send_bytes(path, padding_of(8 << 20)))
    assert failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failed.reason == ""
    assert daemon.health() == "SERVING"


MAX_BYTES = message_bytes(max_keys=8192, max_params_bytes=65_536)
TO_STREAMS = {"OffloadService/Attach", "EventsService/Watch", "EventsService/Snapshot"}


@pytest.mark.parametrize("method", sorted(MAX_BYTES.keys() - {"AdminService/SetQuota"}))
def test_a_message_that_is_longer_than_its_fields_can_be_is_refused_before_it_is_read(
    engine: RawEngine, method: str
) -> None:
    raw = padding_of(MAX_BYTES[method] - len(padding_of(0))) + NO_MESSAGE
    assert len(raw) > MAX_BYTES[method]
    path = f"/kvtier.v1.{method}"

    def send() -> object:
        if method == "TransferService/Transfer":
            return list(engine.channel.stream_stream(path, bytes, bytes)(iter([raw]), timeout=WAIT_S))
        return (engine.stream_bytes if method in TO_STREAMS else engine.send_bytes)(path, raw)

    failed = refusal(send)
    assert_bad_request(failed, "request")
    assert f"at most {MAX_BYTES[method]} are allowed" in failed.message


def padding_of(num_bytes: int) -> bytes:
    """A message of a field that no call has, of about this length."""
    return b"\xfa\x01" + _varint(num_bytes) + bytes(num_bytes)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize("method", ["OffloadService/NoSuchCall", "NoSuchService/Lookup"])
def test_an_unknown_method_is_unimplemented(engine: RawEngine, method: str) -> None:
    failed = failure(lambda: engine.send_bytes(f"/kvtier.v1.{method}", b""))
    assert failed.code is grpc.StatusCode.UNIMPLEMENTED


UNIMPLEMENTED = ["AdminService/SetQuota"]


@pytest.mark.parametrize("method", UNIMPLEMENTED)
def test_a_call_that_is_not_built_yet_says_so(engine: RawEngine, method: str) -> None:
    failed = refusal(lambda: engine.send_bytes(f"/kvtier.v1.{method}", b""))
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED")
    assert "is not part of this version of kvtier" in failed.message


# -- Millions of items: counted, not walked --

MANY = 100_000

MANY_ITEMS: list[tuple[str, str, Callable[[str], Message]]] = [
    ("Lookup", "keys", lambda sid: pb.LookupRequest(session_id=sid, context=context(), keys=[b""] * MANY)),
    ("Lookup", "first_chunks", lambda sid: _lookup(sid, first_chunks=[0] * MANY)),
    ("Lookup", "slots_for_misses", lambda sid: _lookup(sid, slots_for_misses=[pb.SlotsForMisses()] * MANY)),
    ("PrepareLoad", "keys", lambda sid: pb.PrepareLoadRequest(session_id=sid, keys=[b""] * MANY)),
    ("PrepareStore", "keys", lambda sid: pb.PrepareStoreRequest(session_id=sid, keys=[b""] * MANY)),
    (
        "PrepareStore",
        "credits",
        lambda sid: pb.PrepareStoreRequest(session_id=sid, credits=[pb.CreditRequest()] * MANY),
    ),
    ("Touch", "keys", lambda sid: pb.TouchRequest(session_id=sid, keys=[b""] * MANY)),
    ("RenewLeases", "lease_ids", lambda sid: pb.RenewLeasesRequest(session_id=sid, lease_ids=[1] * 9000)),
    (
        "FinishRequest",
        "request_ids",
        lambda sid: pb.FinishRequestRequest(session_id=sid, request_ids=[""] * MANY),
    ),
    # Of these the first one alone is refused with its index: a sign of a walk.
    ("Complete", "items", lambda sid: _complete(sid, announcements=[pb.Announcement(slot_ids=[1])] * MANY)),
    ("Complete", "items", lambda sid: _complete(sid, load_starts=[pb.LoadStart()] * MANY)),
    ("Complete", "items", lambda sid: _complete(sid, store_reports=[pb.StoreReport(slot_ids=[1])] * MANY)),
    ("Complete", "items", lambda sid: _complete(sid, load_reports=[pb.LoadReport()] * MANY)),
    (
        "Complete",
        "items",
        lambda sid: _complete(sid, load_reports=[pb.LoadReport(mismatches=[pb.Mismatch()] * MANY)]),
    ),
    ("Complete", "items", lambda sid: _complete(sid, credit_returns=[pb.CreditReturn(slot_ids=[1])] * MANY)),
    ("Complete", "items", lambda sid: _complete(sid, released_lease_ids=[1] * MANY)),
    ("Complete", "items", lambda sid: _complete(sid, finished_request_ids=[""] * MANY)),
    (
        "Complete",
        "store_reports[0].failed",
        lambda sid: _complete(sid, store_reports=[_one_slot([0] * MANY)]),
    ),
]


def _lookup(session_id: str, **fields: object) -> pb.LookupRequest:
    return pb.LookupRequest(session_id=session_id, context=context(), keys=[to_key(1)], **fields)  # type: ignore[arg-type]


def _complete(session_id: str, **fields: object) -> pb.CompleteRequest:
    return pb.CompleteRequest(session_id=session_id, **fields)  # type: ignore[arg-type]


def _one_slot(failed: list[int]) -> pb.StoreReport:
    return pb.StoreReport(slot_ids=[1], generations=[1], keys=[to_key(1)], checksums=[1], failed=failed)


@pytest.mark.parametrize(("method", "field", "make"), MANY_ITEMS)
def test_more_items_than_there_can_be_are_refused_by_their_number(
    engine: RawEngine, method: str, field: str, make: Callable[[str], Message]
) -> None:
    session_id = engine.workers[0].id if "[" in field else engine.session_id
    raw = make(session_id).SerializeToString()
    assert_bad_request(refusal(lambda: engine.send_bytes(f"{SERVICE}/{method}", raw)), field)


MANY_FACTS: list[tuple[str, Callable[[pb.AttachRequest], object]]] = [
    ("namespace.groups", lambda asked: asked.namespace.groups.extend([pb.GroupFacts()] * MANY)),
    ("namespace.groups.layer_names", lambda asked: asked.namespace.groups[0].layer_names.extend([""] * MANY)),
    ("namespace.extra", lambda asked: asked.namespace.extra.update({str(n): "" for n in range(MANY // 4)})),
    ("geometry", lambda asked: asked.geometry.extend([pb.GroupGeometry()] * MANY)),
    ("geometry.tensors", lambda asked: asked.geometry[0].tensors.extend([pb.TensorGeometry()] * MANY)),
]


@pytest.mark.parametrize(("field", "add"), MANY_FACTS)
def test_more_facts_than_there_can_be_are_refused_by_their_number(
    engine: RawEngine, field: str, add: Callable[[pb.AttachRequest], object]
) -> None:
    request = engine.attach_request(pb.SESSION_ROLE_WORKER)
    request.role = pb.SESSION_ROLE_UNSPECIFIED  # refused as such by who looks at more than the numbers
    add(request)
    path, raw = f"{SERVICE}/Attach", request.SerializeToString()
    assert_bad_request(refusal(lambda: engine.stream_bytes(path, raw)), field)


def test_more_keys_than_are_explained_are_refused_by_their_number(engine: RawEngine) -> None:
    raw = admin_pb2.ExplainRequest(keys=[b""] * 90_000).SerializeToString()
    assert_bad_request(refusal(lambda: engine.send_bytes("/kvtier.v1.AdminService/Explain", raw)), "keys")


# -- Every number in every message, as large as it goes --

_EXTREMES: dict[int, tuple[float, ...]] = {
    FieldDescriptor.TYPE_UINT32: (0, 1 << 31, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: (0, 1 << 31, 1 << 63, (1 << 64) - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 1 << 63, (1 << 64) - 1),
    FieldDescriptor.TYPE_ENUM: (0, 99, (1 << 31) - 1, -1),
    FieldDescriptor.TYPE_DOUBLE: (-1.0, 1e308, float("inf"), float("nan")),
}
EXPECTED_CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def with_extremes(message: Message) -> Iterator[tuple[str, Message]]:
    """Copies of `message`, one for each number in it at each of its extremes, and what was set."""
    original = message.SerializeToString()
    for path, kind in _number_fields(message):
        for number in _EXTREMES[kind]:
            copy = type(message).FromString(original)
            parent: Message = copy
            for name, index in path[:-1]:
                parent = getattr(parent, name) if index is None else getattr(parent, name)[index]
            name, index = path[-1]
            if index is None:
                setattr(parent, name, number)
            else:
                getattr(parent, name)[index] = number
            yield f"{'.'.join(step for step, _ in path)} = {number}", copy


Path = tuple[tuple[str, int | None], ...]


def _number_fields(message: Message, at: Path = ()) -> Iterator[tuple[Path, int]]:
    """Where the numbers are in a message, and of which type."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        places: list[tuple[int | None, object]] = [(None, value)]
        if field.is_repeated:
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                continue
            places = list(enumerate(value))
        for index, element in places:
            here = (*at, (field.name, index))
            if field.type in _EXTREMES:
                yield here, field.type
            elif isinstance(element, Message):
                yield from _number_fields(element, here)


def ordinary_requests(engine: RawEngine) -> list[tuple[str, Message]]:
    """One request per unary call, with something in every field."""
    scheduler, worker = engine.session_id, engine.workers[0].id
    keys, named = to_keys([1, 2]), context()
    return [
        (
            "Lookup",
            pb.LookupRequest(
                session_id=scheduler, context=context(), keys=keys, lease_id=77, first_chunks=[0]
            ),
        ),
        ("PrepareLoad", pb.PrepareLoadRequest(session_id=scheduler, context=named, keys=keys, lease_id=78)),
        ("PrepareStore", pb.PrepareStoreRequest(session_id=scheduler, context=named, keys=keys, lease_id=79)),
        (
            "PrepareStore",
            pb.PrepareStoreRequest(session_id=scheduler, lease_id=80, credits=[pb.CreditRequest(count=1)]),
        ),
        (
            "Complete",
            pb.CompleteRequest(
                session_id=scheduler,
                announcements=[pb.Announcement(slot_ids=[1], generations=[1], keys=[to_key(1)])],
                load_starts=[pb.LoadStart(lookup_lease_id=77, load_lease_id=81, slot_ids=[1])],
                credit_returns=[pb.CreditReturn(slot_ids=[1], generations=[1])],
                released_lease_ids=[82],
            ),
        ),
        (
            "Complete",
            pb.CompleteRequest(
                session_id=worker,
                store_reports=[
                    pb.StoreReport(
                        slot_ids=[1], generations=[1], keys=[to_key(1)], checksums=[1], failed=[0]
                    )
                ],
                load_reports=[
                    pb.LoadReport(
                        lease_id=81,
                        torn_slot_ids=[1],
                        mismatches=[pb.Mismatch(slot_id=1, generation=1, checksum=1)],
                    )
                ],
            ),
        ),
        ("RenewLeases", pb.RenewLeasesRequest(session_id=scheduler, lease_ids=[77])),
        ("Touch", pb.TouchRequest(session_id=scheduler, context=context(), keys=keys)),
    ]  # fmt: skip


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return failure_of(error).code
    return grpc.StatusCode.OK


def test_no_number_in_any_call_is_too_large_for_an_answer(daemon: DaemonProcess, engine: RawEngine) -> None:
    unexpected = []
    for method, ordinary in ordinary_requests(engine):
        for what, request in with_extremes(ordinary):
            send = functools.partial(engine.send_bytes, f"{SERVICE}/{method}", request.SerializeToString())
            code = code_of(send)
            if code not in EXPECTED_CODES:
                unexpected.append(f"{method}: {what}: {code.name}")
    assert unexpected == []
    assert "call_failed" not in daemon.log_text()
    engine.store(to_keys(range(100, 104)))


def test_no_number_in_attach_is_too_large_for_an_answer(daemon: DaemonProcess, engine: RawEngine) -> None:
    unexpected = []
    for role in (pb.SESSION_ROLE_SCHEDULER, pb.SESSION_ROLE_WORKER):
        ordinary = engine.attach_request(role)
        for serial, (what, request) in enumerate(with_extremes(ordinary)):
            assert isinstance(request, pb.AttachRequest)
            request.engine_id = f"{engine.engine_id}-{role}-{serial}"
            stream = engine.stub.Attach(request, timeout=WAIT_S)
            code = code_of(functools.partial(next, stream))
            stream.cancel()
            if code not in EXPECTED_CODES:
                unexpected.append(f"{what}: {code.name}")
    assert unexpected == []
    assert "call_failed" not in daemon.log_text()
    engine.store(to_keys(range(100, 104)))


def test_a_tensor_without_bytes_is_a_bad_request(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon)
    request = engine.attach_request(pb.SESSION_ROLE_WORKER)
    request.geometry[0].tensors[1].page_bytes = 0
    assert_bad_request(refusal(lambda: engine.open_session(request)), "geometry[0].tensors[1].page_bytes")


IMPOSSIBLE = [
    {"store_reports": [pb.StoreReport(bytes=(1 << 64) - 1, seconds=seconds)]}
    for seconds in (float("inf"), float("nan"), -1.0)
]


@pytest.mark.parametrize("report", IMPOSSIBLE)
def test_a_report_with_impossible_figures_leaves_the_metrics_finite(
    daemon: DaemonProcess, engine: RawEngine, report: dict[str, object]
) -> None:
    engine.complete(engine.workers[0], **report)
    page = daemon.page("/metrics")[1]
    sums = [line for line in page.splitlines() if line.startswith("kvtier_transfer_duration_seconds_sum")]
    assert sums
    assert all(math.isfinite(float(line.split()[-1])) for line in sums), sums
