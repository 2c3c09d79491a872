"""Who may attach, and what is said to who may not."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, wait_until
from tests.raw_engine import PART_BYTES, namespace, refusal
from tests.raw_engine_process import RawEngineProcess

from kvtier.v1 import admin_pb2
from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.locks import OwnerLock
from kvtier_ops.pool import MappedPool

WORKER = pb.SESSION_ROLE_WORKER
SCHEDULER = pb.SESSION_ROLE_SCHEDULER


def test_describe_tells_where_the_pool_is_before_there_is_a_session(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    described = make_engine(daemon).describe()
    assert Path(described.pool.directory) == daemon.pool_directory
    assert Path(described.pool.path) == daemon.pool_file
    MappedPool.open(daemon.pool_file, described.pool.pool_id).close()


def test_the_first_message_tells_what_the_client_needs(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    engine = make_engine(daemon, world_size=2)
    attached = engine.attach_scheduler().attached
    assert attached.session_id.startswith(attached.boot_id)
    assert attached.boot_id == daemon.status().boot_id
    assert list(attached.slot_bytes) == [2 * PART_BYTES]
    assert list(attached.missing_ranks) == [0, 1]
    assert attached.limits.max_keys == 8192
    assert attached.limits.max_message_bytes == 8 << 20
    assert attached.limits.max_params_bytes == 65_536


def test_the_scheduler_is_told_as_workers_come(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon, world_size=2)
    scheduler = engine.attach_scheduler()
    assert list(scheduler.wait_for("workers_changed").workers_changed.missing_ranks) == [0, 1]
    engine.attach_worker(1)
    assert list(scheduler.wait_for("workers_changed").workers_changed.missing_ranks) == [0]
    engine.attach_worker(0)
    assert list(scheduler.wait_for("workers_changed").workers_changed.missing_ranks) == []


# -- C1: the wrong geometry, each field alone --


def _shorter(request: pb.AttachRequest) -> None:
    del request.geometry[0].tensors[1]
    request.geometry[0].tensors[0].page_bytes = PART_BYTES


def _renamed(request: pb.AttachRequest) -> None:
    request.geometry[0].tensors[1].name = "layer.9"


def _other_pages(request: pb.AttachRequest) -> None:
    request.geometry[0].tensors[0].page_bytes += 256
    request.geometry[0].tensors[1].page_bytes -= 256


def _other_part(request: pb.AttachRequest) -> None:
    request.geometry[0].tensors[0].page_bytes += 256


def _group_missing(request: pb.AttachRequest) -> None:
    del request.geometry[1]


HALF = str(PART_BYTES // 2)
WRONG_GEOMETRY: list[tuple[Callable[[pb.AttachRequest], None], str, str, str]] = [
    (_shorter, "geometry[0]: number of tensors", "2", "1"),
    (_renamed, "geometry[0].tensors[1].name", "layer.1", "layer.9"),
    (_other_pages, "geometry[0].tensors[0].page_bytes", HALF, str(PART_BYTES // 2 + 256)),
    (_other_part, "geometry[0]: bytes of a part", str(PART_BYTES), str(PART_BYTES + 256)),
    (_group_missing, "geometry: number of groups", "2", "1"),
]


@pytest.mark.parametrize(("change", "field", "registered", "given"), WRONG_GEOMETRY)
def test_a_geometry_that_differs_is_refused_with_the_field_and_both_values(
    daemon: DaemonProcess,
    make_engine: MakeEngine,
    change: Callable[[pb.AttachRequest], None],
    field: str,
    registered: str,
    given: str,
) -> None:
    facts = namespace(num_groups=2, weights_id=f"geometry of {field}")
    make_engine(daemon, facts=facts).attach()
    other = make_engine(daemon, facts=facts)
    request = other.attach_request(WORKER)
    change(request)
    failed = refusal(lambda: other.open_session(request))
    assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GEOMETRY_MISMATCH")
    assert failed.metadata == {"field": field, "registered": registered, "given": given}
    for said in (field, registered, given):
        assert said in failed.message
    other.attach_worker()  # with the right geometry it may


def test_ranks_may_differ_from_each_other(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon, world_size=2)
    engine.attach_worker(0)
    request = engine.attach_request(WORKER, rank=1)
    request.geometry[0].tensors[0].name = "another.layer"
    engine.open_session(request)


def test_ranks_that_hold_equal_bytes_may_not(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    facts = namespace(tensor_parallel_size=2, weights_id="equal bytes")
    engine = make_engine(daemon, world_size=2, facts=facts)
    engine.attach_worker(0)
    request = engine.attach_request(WORKER, rank=1)
    request.geometry[0].tensors[0].name = "another.layer"
    failed = refusal(lambda: engine.open_session(request))
    assert (failed.reason, failed.metadata["given"]) == ("GEOMETRY_MISMATCH", "another.layer")


# -- Fields of Attach --

BAD_FIELDS: list[tuple[str, dict[str, object]]] = [
    ("role", {"role": 0}),
    ("role", {"role": 3}),
    ("engine_id", {"engine_id": ""}),
    ("engine_id", {"engine_id": "e" * 129}),
    ("engine_id", {"engine_id": "new\nline"}),
    ("tenant", {"tenant": "t" * 65}),
    ("tenant", {"tenant": "\x00"}),
    ("instance_nonce", {"instance_nonce": 0}),
    ("world_size", {"world_size": 0}),
    ("world_size", {"world_size": 33}),
    ("rank", {"rank": 1}),
    ("namespace_digest", {"namespace_digest": "0" * 32}),
    ("namespace", {"namespace": namespace(model="")}),
    ("namespace", {"namespace": namespace(groups=[])}),
    ("namespace", {"namespace": namespace(model="m" * 1025)}),
    ("namespace", {"namespace": namespace(blocks_per_chunk=0)}),
    ("namespace.num_parts", {"namespace": namespace(num_parts=3)}),
]


@pytest.mark.parametrize(("field", "changes"), BAD_FIELDS)
def test_a_bad_field_of_attach_is_named(
    daemon: DaemonProcess, make_engine: MakeEngine, field: str, changes: dict[str, object]
) -> None:
    engine = make_engine(daemon)
    request = engine.attach_request(SCHEDULER)
    for name, value in changes.items():
        if isinstance(value, pb.NamespaceFacts):
            request.namespace.CopyFrom(value)
        else:
            setattr(request, name, value)
    failed = refusal(lambda: engine.open_session(request))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")
    assert failed.metadata["field"] == field


def test_names_of_tensors_have_64_kib_together(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon)
    request = engine.attach_request(WORKER)
    first, second = request.geometry[0].tensors
    first.name, second.name = "a" * 32_768, "b" * 32_768
    engine.open_session(request).close()
    second.name += "b"
    failed = refusal(lambda: engine.open_session(request))
    assert (failed.reason, failed.metadata["field"]) == ("BAD_REQUEST", "geometry.tensors")


def test_a_name_that_differs_is_told_in_part_where_it_is_long(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    facts = namespace(tensor_parallel_size=2, weights_id="long names")
    engine = make_engine(daemon, world_size=2, facts=facts)
    engine.attach_worker(0)
    request = engine.attach_request(WORKER, rank=1)
    request.geometry[0].tensors[0].name = "x" * 60_000
    failed = refusal(lambda: engine.open_session(request))
    assert (failed.reason, failed.metadata["given"]) == ("GEOMETRY_MISMATCH", "x" * 128)


def test_operators_are_answered_when_all_engines_have_the_longest_facts(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    for number in range(64):
        facts = namespace(model=f"{number:04}" * 256, extra={"fact": "x" * 65_000})
        facts.groups[0].layer_names.extend(["l" * 32] * 2048)
        engine = make_engine(daemon, facts=facts)
        engine.attach_scheduler()
    assert {len(session.model) for session in daemon.status().sessions} == {1024}
    listed = engine.admin.ListNamespaces(admin_pb2.ListNamespacesRequest(), timeout=WAIT_S).namespaces
    assert (len(listed), listed[0].facts.model) == (64, "0000" * 256)
    wait_until(
        lambda: daemon.page("/metrics")[1].count("kvtier_engine_info{") == 64, "all engines in the metrics"
    )
    opened = [line for line in daemon.log_text().splitlines() if "session_opened" in line]
    assert opened
    assert max(map(len, opened)) < 1024, "a model's name is cut in the log"


@pytest.mark.parametrize("name", ["", "../../../etc/passwd", "ABCDEF0123", "0" * 65])
def test_a_lock_file_must_have_the_name_of_one(
    daemon: DaemonProcess, make_engine: MakeEngine, name: str
) -> None:
    engine = make_engine(daemon)
    request = engine.attach_request(SCHEDULER)
    request.lock_file = name
    failed = refusal(lambda: next(engine.stub.Attach(request)))
    assert (failed.reason, failed.metadata["field"]) == ("BAD_REQUEST", "lock_file")


@pytest.mark.parametrize("role", [SCHEDULER, WORKER])
def test_a_lock_file_that_nobody_holds_is_refused(
    daemon: DaemonProcess, make_engine: MakeEngine, role: pb.SessionRole.ValueType
) -> None:
    engine = make_engine(daemon)
    request = engine.attach_request(role)
    lock = OwnerLock.acquire(daemon.pool_directory)
    lock.release()
    for request.lock_file in (lock.name, "ab" * 16):
        failed = refusal(lambda: next(engine.stub.Attach(request)))
        assert (failed.reason, failed.metadata["field"]) == ("BAD_REQUEST", "lock_file")
        assert "nobody holds" in failed.message


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_what_is_no_file_passes_for_no_lock(
    daemon: DaemonProcess, make_engine: MakeEngine, kind: str
) -> None:
    engine = make_engine(daemon)
    request = engine.attach_request(SCHEDULER)
    request.lock_file = secrets.token_hex(16)
    path, held = (
        daemon.pool_directory / "owners" / request.lock_file,
        OwnerLock.acquire(daemon.pool_directory),
    )
    if kind == "link":
        path.symlink_to(held.name)
    else:
        path.mkdir()
    failed = refusal(lambda: next(engine.stub.Attach(request)))
    assert (failed.reason, failed.metadata["field"]) == ("BAD_REQUEST", "lock_file")
    held.release()


def test_the_minor_version_before_is_served_and_others_are_refused(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    engine = make_engine(daemon)
    newest = engine.describe().protocol_minor
    request = engine.attach_request(SCHEDULER)
    request.protocol_minor = newest - 1
    assert engine.open_session(request).attached.protocol_minor == newest - 1
    request.protocol_minor = newest + 1
    failed = refusal(lambda: engine.open_session(request))
    assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROTOCOL_VERSION")


@pytest.mark.parametrize("contradiction", ["namespace", "world_size", "tenant"])
def test_a_process_that_contradicts_its_instance_is_refused(
    daemon: DaemonProcess, make_engine: MakeEngine, contradiction: str
) -> None:
    engine = make_engine(daemon)
    engine.attach_scheduler()
    request = engine.attach_request(WORKER)
    if contradiction == "namespace":
        request.namespace.weights_id = "other"
    elif contradiction == "world_size":
        request.world_size = 2
    else:
        request.tenant = "other"
    failed = refusal(lambda: engine.open_session(request))
    assert (failed.reason, failed.metadata["field"]) == ("BAD_REQUEST", contradiction)


def test_a_chunk_larger_than_the_pool_is_refused_with_the_figures(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    facts = namespace(groups=[pb.GroupFacts(tokens_per_block=16, part_bytes=1 << 30)])
    failed = refusal(make_engine(daemon, facts=facts).attach_scheduler)
    assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "POOL_FULL")
    assert str(1 << 30) in failed.message
    assert str(4 << 20) in failed.message


# -- RANK_TAKEN --


def test_a_rank_is_taken_while_its_process_lives_and_free_once_it_is_killed(
    daemon: DaemonProcess, make_engine: MakeEngine
) -> None:
    first = make_engine(daemon)
    second = make_engine(daemon, first.engine_id, facts=first.facts)
    with RawEngineProcess(first) as process:
        process.stop_running()
        failed = refusal(second.attach_worker)
        assert (failed.code, failed.reason) == (grpc.StatusCode.ALREADY_EXISTS, "RANK_TAKEN")
        assert failed.metadata["lock"] == process.hello.lock_file
        assert failed.metadata["age_seconds"].isdigit()
        process.kill()
        second.attach_worker()


def test_the_same_process_may_take_its_own_seat_again(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon).attach()
    before = engine.workers[0]
    request = engine.attach_request(WORKER)
    request.previous_session = before.id
    after = engine.open_session(request, lock=before.lock)
    assert before.wait_for("ended").ended.reason == "REPLACED"
    assert before.wait_for_end() is grpc.StatusCode.OK
    assert engine.scheduler is not None
    assert engine.scheduler.wait_for("ended").ended.reason == "INSTANCE_LOST"
    assert after.id != before.id


def test_a_killed_engine_process_leaves_no_session(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon)
    with RawEngineProcess(engine, num_stores=2):
        assert engine.engine_id in {session.engine_id for session in daemon.status().sessions}
    wait_until(
        lambda: engine.engine_id not in {session.engine_id for session in daemon.status().sessions},
        "the sessions of a killed process end",
    )


# -- Limits --


def test_engines_beyond_the_limit_are_refused_until_one_leaves(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(config="[limits]\nengines = 1\nsessions = 8\n")
    first = make_engine(daemon).attach()
    second = make_engine(daemon)
    failed = refusal(second.attach_scheduler)
    assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_ENGINES")
    assert "limits.engines" in failed.message
    first.close()
    wait_until(lambda: not daemon.status().sessions, "the first engine's sessions end")
    second.attach()


def test_sessions_beyond_the_limit_are_refused(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon(config="[limits]\nengines = 2\nsessions = 2\n")
    make_engine(daemon).attach()
    failed = refusal(make_engine(daemon).attach_scheduler)
    assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_SESSIONS")
    assert "limits.sessions" in failed.message
