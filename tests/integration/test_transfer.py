"""Copies that the daemon makes: a real daemon, its helper, and engines whose memory is shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, child_environment, state_of, wait_until
from tests.faults.engine_process import open_pool
from tests.integration.transfer_engine import (
    LOAD,
    NUM_BLOCKS,
    PAGE_BYTES,
    STORE,
    TransferEngine,
    message_of,
)
from tests.raw_engine import PART_BYTES, refusal, to_keys

from kvtier.v1 import offload_pb2 as pb
from kvtier.v1 import transfer_pb2 as tpb
from kvtier_ops.checksum import part_checksum
from kvtier_ops.locks import CopyGate, owner_lock_is_free

POOL_BYTES = 256 * PART_BYTES

MakeTransfer = Callable[..., TransferEngine]


@pytest.fixture
def make_transfer(make_engine: MakeEngine) -> Iterator[MakeTransfer]:
    """Make engines that are attached, registered and have a stream."""
    with ExitStack() as stack:

        def make(daemon: DaemonProcess, **settings: Any) -> TransferEngine:
            own = TransferEngine(make_engine(daemon, **settings).attach())
            stack.callback(own.close)
            own.register()
            own.open_stream()
            return own

        yield make


def helper_pid(daemon: DaemonProcess) -> int:
    """Process id of the copy process."""
    for task in Path(f"/proc/{daemon.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"kvtier_server.transfer.helper" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise AssertionError("there is no copy process")


def reserved(daemon: DaemonProcess) -> int:
    """Slots that are reserved or quarantined."""
    primary = daemon.status().tiers[0]
    return primary.reserved_slots + primary.quarantined_slots


def test_what_is_stored_by_the_daemon_is_loaded_by_it_into_other_blocks(
    daemon: DaemonProcess, make_transfer: MakeTransfer
) -> None:
    own = make_transfer(daemon)
    blocks = [5, 6, 7, 40]
    rows = own.fill(blocks, 1)
    keys = to_keys(range(4))
    stored = own.store(keys, blocks)
    assert list(stored.checksums) == [
        part_checksum(np.ascontiguousarray(rows[:, index]).reshape(-1)) for index in range(4)
    ]
    others = [60, 1, 30, 31]
    loaded = own.load(keys, others)
    assert loaded.ok
    assert loaded.bytes == 4 * PART_BYTES
    assert np.array_equal(own.tensors[:, others], rows)


def test_another_engine_loads_what_the_first_one_had_stored(
    daemon: DaemonProcess, make_transfer: MakeTransfer
) -> None:
    one = make_transfer(daemon)
    other = make_transfer(daemon, facts=one.engine.facts)
    keys = to_keys(range(10, 14))
    rows = one.fill(range(4), 2)
    one.store(keys, range(4))
    assert other.load(keys, range(20, 24)).ok
    assert np.array_equal(other.tensors[:, 20:24], rows)


WRONG_HANDLES: dict[str, dict[str, object]] = {
    "kind": {"kind": 0},
    "kind of a later version": {"kind": 9},
    "name": {"handle": b"../../etc/passwd"},
    "name of nothing": {"handle": b"kvtier-mem-" + b"0" * 32},
    "size": {"allocation_bytes": 4 * NUM_BLOCKS * PAGE_BYTES},
    "end": {"offset_bytes": 2 * NUM_BLOCKS * PAGE_BYTES - PAGE_BYTES},
    "stride": {"block_stride_bytes": PAGE_BYTES - 1},
    "blocks": {"num_blocks": NUM_BLOCKS + 1},
    "overflow": {"offset_bytes": 2**64 - 1},
    "device": {"device_uuid": bytes(16)},
    "overlap": {"offset_bytes": NUM_BLOCKS * PAGE_BYTES},
}


@pytest.mark.parametrize("wrong", WRONG_HANDLES)
def test_memory_that_is_not_what_it_says_is_refused_by_name_and_nothing_is_opened(
    wrong: str, daemon: DaemonProcess, make_transfer: MakeTransfer
) -> None:
    own = make_transfer(daemon)
    first, second = own.handles()
    request = own.register_request(message_of(first, **WRONG_HANDLES[wrong]), message_of(second))
    refused = refusal(lambda: own.stub.RegisterMemory(request))
    assert refused.reason in ("BAD_REQUEST", "CUDA_IPC_IMPORT"), refused
    own.fill([3], 3)
    own.store(to_keys([20]), [3])  # what was registered before works as before


def test_memory_of_a_process_that_is_gone_cannot_be_registered(
    daemon: DaemonProcess, make_transfer: MakeTransfer
) -> None:
    own = make_transfer(daemon)
    size = NUM_BLOCKS * PAGE_BYTES
    script = (
        "from kvtier_ops.ipc import SharedAllocation\n"
        f"import os, sys\nprint(SharedAllocation({2 * size}).name, flush=True)\nsys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        child.kill()
    handles = [message_of(handle, handle=name) for handle in own.handles()]
    refused = refusal(lambda: own.stub.RegisterMemory(own.register_request(*handles)))
    assert refused.reason == "CUDA_IPC_IMPORT"
    assert "is gone" in refused.message


WRONG_JOBS: dict[str, tuple[dict[str, object], int]] = {
    "block past the end": ({"block_ids": [NUM_BLOCKS]}, tpb.TRANSFER_FAILURE_ERROR),
    "slots of a group without end": ({"group_slots": [2**32 - 1]}, tpb.TRANSFER_FAILURE_ERROR),
    "too few blocks": ({"block_ids": [], "group_sizes": [0]}, tpb.TRANSFER_FAILURE_ERROR),
    "too many groups": (
        {"block_ids": [1], "group_sizes": [0, 1], "block_indices": [0, 0]},
        tpb.TRANSFER_FAILURE_ERROR,
    ),
    "another generation": ({"generations": [12345]}, tpb.TRANSFER_FAILURE_NOT_HELD),
    "a slot past the end": ({"slot_ids": [2**40]}, tpb.TRANSFER_FAILURE_NOT_HELD),
}


@pytest.mark.parametrize("wrong", WRONG_JOBS)
@pytest.mark.parametrize("direction", [STORE, LOAD])
def test_a_job_that_reaches_out_of_its_memory_or_slots_fails_and_moves_nothing(
    wrong: str,
    direction: tpb.TransferDirection.ValueType,
    daemon: DaemonProcess,
    make_transfer: MakeTransfer,
) -> None:
    changes, why = WRONG_JOBS[wrong]
    own = make_transfer(daemon)
    own.fill([3], 4)
    own.store(to_keys([30]), [3])
    if direction == STORE:
        granted = own.engine.prepare_store(to_keys([31]))
        slots, generations = granted.slot_ids, granted.generations
    else:
        found = own.engine.lookup(to_keys([30]), lease_id=own.engine.new_lease_id())
        slots, generations = found.slot_ids, found.generations
    before = own.tensors.copy()
    asked = {"slot_ids": slots, "generations": generations, "block_ids": [7], **changes}
    answer = own.copy(direction, **asked)
    assert not answer.ok
    assert list(answer.failures) == [why]
    assert np.array_equal(own.tensors, before)
    assert own.load(to_keys([30]), [9]).ok, "the next one works"


def test_slots_of_another_engine_can_be_neither_read_nor_written(
    daemon: DaemonProcess, make_transfer: MakeTransfer
) -> None:
    victim, own = make_transfer(daemon), make_transfer(daemon)
    victim.fill([0], 5)
    victim.store(to_keys([40]), [0])
    found = victim.engine.lookup(to_keys([40]), lease_id=victim.engine.new_lease_id())
    granted = victim.engine.prepare_store(to_keys([41]))
    before = own.tensors.copy()
    for direction, slots in ((LOAD, found), (STORE, granted), (STORE, found)):
        answer = own.copy(direction, slots.slot_ids, slots.generations, [1])
        assert list(answer.failures) == [tpb.TRANSFER_FAILURE_NOT_HELD]
    assert np.array_equal(own.tensors, before)
    foreign = tpb.TransferRequest(session_id=own.session_id, job_id=1, memory_id=victim.memory_id)
    assert refusal(lambda: list(own.stub.Transfer(iter([foreign])))).reason == "BAD_REQUEST"


def test_a_slot_whose_bytes_are_not_what_was_stored_is_a_failed_load(
    daemon: DaemonProcess, make_transfer: MakeTransfer
) -> None:
    own = make_transfer(daemon)
    own.fill([0], 6)
    own.store(to_keys([50]), [0])
    found = own.engine.lookup(to_keys([50]), lease_id=own.engine.new_lease_id())
    pool = open_pool(daemon.pool_file)
    pool.slot_view(found.slot_ids[0], PART_BYTES)[100] ^= 1
    pool.close()
    answer = own.copy(LOAD, found.slot_ids, found.generations, [1])
    assert list(answer.failures) == [tpb.TRANSFER_FAILURE_MISMATCH]
    assert answer.checksums[0]


def test_an_engine_that_dies_in_the_middle_of_a_copy_has_its_slots_held_until_it_is_over(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    own, other = make_transfer(daemon), make_transfer(daemon)
    granted = own.engine.prepare_store(to_keys(range(8)))
    helper = helper_pid(daemon)
    os.kill(helper, signal.SIGSTOP)
    own.send(STORE, granted.slot_ids, granted.generations, range(8))
    own.wait_begun()
    for session in own.engine.sessions:
        session.close()  # also the lock: the process is gone
    wait_until(lambda: daemon.status().tiers[0].quarantined_slots == 8, "its slots wait for the copy")
    assert refusal(lambda: other.engine.lookup([b""])).reason == "BAD_REQUEST", "others are served"
    os.kill(helper, signal.SIGCONT)
    wait_until(lambda: reserved(daemon) == 0, "the copy is over, and the slots are free")
    other.fill([0], 7)
    other.store(to_keys([100]), [0])
    assert other.load(to_keys([100]), [1]).ok


def test_the_successor_of_a_session_waits_for_its_copies(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    own = make_transfer(daemon)
    granted = own.engine.prepare_store(to_keys(range(4)))
    helper = helper_pid(daemon)
    os.kill(helper, signal.SIGSTOP)
    own.send(STORE, granted.slot_ids, granted.generations, range(4))
    own.wait_begun()
    worker = own.engine.workers[0]
    request = own.engine.attach_request(pb.SESSION_ROLE_WORKER)
    request.previous_session = worker.id
    worker.close(release_lock=False)
    request.lock_file = worker.lock.name
    refused = refusal(lambda: next(iter(own.engine.stub.Attach(request))))
    assert refused.reason == "INFLIGHT"
    os.kill(helper, signal.SIGCONT)
    attached = own.engine.open_session(request, lock=worker.lock)
    assert attached.id != worker.id
    wait_until(lambda: reserved(daemon) == 0, "its word and the end of the copies free the slots")


def test_a_helper_that_dies_fails_its_jobs_and_the_next_one_knows_all_memory(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    one, other = make_transfer(daemon), make_transfer(daemon)
    for own in (one, other):
        own.fill([0], 8)
        own.store(to_keys([60]), [0])
    found = one.engine.lookup(to_keys([60]), lease_id=one.engine.new_lease_id())
    helper = helper_pid(daemon)
    os.kill(helper, signal.SIGSTOP)
    one.send(LOAD, found.slot_ids, found.generations, [1])
    one.wait_begun()
    os.kill(helper, signal.SIGKILL)
    answer = one.answer()
    assert list(answer.failures) == [tpb.TRANSFER_FAILURE_ERROR]
    assert "copy process" in answer.message
    for own in (one, other):
        assert own.load(to_keys([60]), [2]).ok
        assert np.array_equal(own.tensors[:, 2], own.tensors[:, 0])
    assert helper_pid(daemon) != helper


def test_where_no_helper_can_be_begun_any_more_engines_are_told_that_they_have_to_copy_themselves(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    own = make_transfer(daemon)
    own.fill([0], 9)
    own.store(to_keys([61]), [0])
    found = own.engine.lookup(to_keys([61]), lease_id=own.engine.new_lease_id())
    helper = helper_pid(daemon)
    hidden = daemon.pool_file.rename(daemon.pool_file.with_name("hidden"))  # a helper cannot map it
    os.kill(helper, signal.SIGKILL)

    def load() -> None:
        for _ in range(1000):  # until the end of the helper, and of the one that cannot be begun, is seen
            assert list(own.copy(LOAD, found.slot_ids, found.generations, [1]).failures) == [
                tpb.TRANSFER_FAILURE_ERROR
            ]

    refused = refusal(load)
    assert refused.reason == "BAD_REQUEST"
    assert "has not registered it" in refused.message
    refused = refusal(own.register)
    assert refused.reason == "CUDA_IPC_IMPORT"
    assert "copies through shared memory" in refused.message
    hidden.rename(daemon.pool_file)
    wait_until(lambda: registers(own), "a later helper can be begun")


def registers(own: TransferEngine) -> bool:
    """Try to register memory; tell whether the daemon has opened it."""
    try:
        own.register()
    except grpc.RpcError:
        return False
    return True


def test_a_device_that_this_machine_lacks_is_refused_with_the_reason(
    daemon: DaemonProcess, make_transfer: MakeTransfer
) -> None:
    own = make_transfer(daemon)
    gpu = {"kind": tpb.MEMORY_KIND_CUDA_IPC, "device_uuid": bytes(range(16)), "handle": bytes(64)}
    handles = [message_of(handle, **gpu) for handle in own.handles()]
    refused = refusal(lambda: own.stub.RegisterMemory(own.register_request(*handles)))
    assert refused.reason == "CUDA_IPC_IMPORT"
    assert refused.metadata["device"] == bytes(range(16)).hex()
    assert "cupy" in refused.message or "device" in refused.message
    mixed = [message_of(own.handles()[0]), handles[1]]
    assert refusal(lambda: own.stub.RegisterMemory(own.register_request(*mixed))).reason == "BAD_REQUEST"


def test_a_registration_that_nobody_waits_for_any_more_leaves_nothing(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    own = make_transfer(daemon)
    helper = helper_pid(daemon)
    os.kill(helper, signal.SIGSTOP)
    call = own.stub.RegisterMemory.future(own.register_request())
    granted = own.engine.prepare_store(to_keys(range(4)))
    own.send(STORE, granted.slot_ids, granted.generations, range(4))
    own.wait_begun()
    call.cancel()
    os.kill(helper, signal.SIGKILL)
    assert list(own.answer().failures) == [tpb.TRANSFER_FAILURE_ERROR] * 4
    own.fill([0], 9)
    own.store(to_keys([70]), [0])
    successor = helper_pid(daemon)
    own.close_stream()
    for session in own.engine.sessions:
        session.close()
    wait_until(lambda: state_of(successor) == "", "nobody uses the device: its process ends")


def test_memory_is_closed_when_its_session_ends(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    own, other = make_transfer(daemon), make_transfer(daemon)
    maps = Path(f"/proc/{helper_pid(daemon)}/maps")
    assert own.memory.name in maps.read_text()
    own.close_stream()
    for session in own.engine.sessions:
        session.close()
    wait_until(lambda: own.memory.name not in maps.read_text(), "the mapping is closed")
    assert other.memory.name in maps.read_text()


def test_a_stopped_daemon_takes_its_helper_along(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    own = make_transfer(daemon)
    helper = helper_pid(daemon)
    assert not owner_lock_is_free(daemon.pool_directory, own.lock_file)
    assert daemon.stop() == 0
    wait_until(lambda: not Path(f"/proc/{helper}").exists(), "the helper is gone")
    assert owner_lock_is_free(daemon.pool_directory, own.lock_file), "nothing of it can arrive any more"


def test_a_scheduler_has_no_memory_to_register(daemon: DaemonProcess, make_transfer: MakeTransfer) -> None:
    own = make_transfer(daemon)
    request = own.register_request()
    request.session_id = own.engine.session_id
    assert refusal(lambda: own.stub.RegisterMemory(request)).reason == "BAD_REQUEST"
    request.session_id = "nobody"
    refused = refusal(lambda: own.stub.RegisterMemory(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN")


def test_a_store_that_is_reported_before_its_copy_is_over_is_neither_published_nor_free(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    own = make_transfer(daemon)
    rows = own.fill([3, 4], 10)
    granted = own.engine.take_credits(2)
    keys = to_keys(range(80, 82))
    slots = {"slot_ids": list(granted.slot_ids), "generations": list(granted.generations)}

    def report(checksums: Sequence[int], failed: Sequence[int] = ()) -> list[int]:
        reported = pb.StoreReport(**slots, keys=keys, checksums=checksums, failed=failed)  # type: ignore[arg-type]
        answered = own.engine.complete(own.engine.workers[0], store_reports=[reported])
        return list(answered.store_reports[0].statuses)

    helper = helper_pid(daemon)
    os.kill(helper, signal.SIGSTOP)
    own.send(STORE, granted.slot_ids, granted.generations, [3, 4])
    own.wait_begun()
    unknown = [pb.COMPLETE_STATUS_UNKNOWN] * 2
    assert report([0, 0]) == report([0, 0], failed=[1]) == unknown
    returned = own.engine.complete(credit_returns=[pb.CreditReturn(**slots)])
    assert list(returned.credit_returns[0].statuses) == unknown
    # The lease's end is the scheduler's word too that the slots were never handed out.
    own.engine.complete(released_lease_ids=[own.engine.new_lease_id() - 1])
    assert daemon.status().tiers[0].reserved_slots == 2
    assert set(own.engine.lookup(keys).statuses) == {pb.LOOKUP_STATUS_MISS}
    os.kill(helper, signal.SIGCONT)
    answer = own.answer()
    assert answer.ok
    assert report(answer.checksums) == [], "it is published"
    assert own.load(keys, [9, 10]).ok
    assert np.array_equal(own.tensors[:, [9, 10]], rows)
    assert reserved(daemon) == 0


def test_copies_of_the_daemon_are_counted_by_who_made_them_and_shown(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES)
    own = make_transfer(daemon)
    own.fill([0, 1], 11)
    own.store(to_keys([90, 91]), [0, 1])
    own.load(to_keys([90]), [2])
    metrics = daemon.page("/metrics")[1]
    for direction, num_bytes in (("store", 2 * PART_BYTES), ("load", PART_BYTES)):
        sample = f'kvtier_transfer_bytes_total{{direction="{direction}",path="remote_host"}}'
        assert f"{sample} {float(num_bytes)}" in metrics
        assert f'kvtier_transfer_bytes_total{{direction="{direction}",path="shm"}} 0.0' in metrics
    status = daemon.status()
    assert [session.path for session in status.sessions] == ["", "remote_host"]
    (device,) = status.copy_devices
    assert (device.device, device.state, device.memories, device.jobs) == ("host", "serving", 1, 0)
    helper = helper_pid(daemon)
    os.kill(helper, signal.SIGKILL)
    wait_until(lambda: state_of(helper) == "", "it is gone")
    assert own.load(to_keys([90]), [2]).ok
    assert daemon.status().copy_devices[0].restarts == 1
    wait_until(
        lambda: 'kvtier_copy_helper_restarts_total{device="host"} 1.0' in daemon.page("/metrics")[1],
        "the metrics of the next second say so",
    )
    assert 'kvtier_pinned_bytes{device="host"} 0.0' in daemon.page("/metrics")[1]


LIMITS = """
[limits]
transfer_memories = 1
transfer_tensors = 2
transfer_devices = 1
transfer_jobs = 2
"""


def test_each_limit_of_transfers_is_a_setting_that_its_error_names(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=LIMITS)
    own = make_transfer(daemon)
    again = refusal(lambda: own.stub.RegisterMemory(own.register_request()))
    assert again.reason == "LIMIT_TRANSFER_MEMORIES"
    assert "limits.transfer_memories" in again.message
    metrics = daemon.page("/metrics")[1]
    for name, value in (("memories", 1), ("tensors", 2), ("devices", 1), ("jobs", 2), ("answers", 512)):
        assert f'kvtier_limit{{name="limits.transfer_{name}"}} {float(value)}' in metrics


def test_one_device_more_than_the_limit_is_refused_by_name(
    start_daemon: StartDaemon, make_transfer: MakeTransfer, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config="[limits]\ntransfer_devices = 1\n")
    make_transfer(daemon)
    other = TransferEngine(make_engine(daemon).attach())
    gpu = {"kind": tpb.MEMORY_KIND_CUDA_IPC, "device_uuid": bytes(range(16)), "handle": bytes(64)}
    handles = [message_of(handle, **gpu) for handle in other.handles()]
    refused = refusal(lambda: other.stub.RegisterMemory(other.register_request(*handles)))
    assert refused.reason == "LIMIT_TRANSFER_DEVICES"
    assert "limits.transfer_devices" in refused.message
    other.close()


def test_a_registration_of_more_tensors_than_the_limit_is_refused_by_name(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config="[limits]\ntransfer_tensors = 1\n")
    own = TransferEngine(make_engine(daemon).attach())
    refused = refusal(own.register)
    assert refused.reason == "BAD_REQUEST"
    assert "limits.transfer_tensors" in refused.message
    own.close()


def test_who_asks_whether_the_daemon_is_there_is_answered_while_as_many_jobs_run_as_may(
    start_daemon: StartDaemon, make_transfer: MakeTransfer
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=LIMITS)
    own = make_transfer(daemon)
    granted = own.engine.prepare_store(to_keys(range(2)))
    helper = helper_pid(daemon)
    os.kill(helper, signal.SIGSTOP)
    for index in range(2):
        own.send(STORE, granted.slot_ids[index : index + 1], granted.generations[index : index + 1], [index])
    own.wait_begun()
    os.kill(helper, signal.SIGCONT)
    assert {own.answer().ok, own.answer().ok} == {True}


def test_nothing_is_copied_for_a_registration_that_its_engine_has_given_up(
    daemon: DaemonProcess, make_transfer: MakeTransfer
) -> None:
    own = make_transfer(daemon)
    own.fill([0], 12)
    own.store(to_keys([95]), [0])
    gate = CopyGate.open(daemon.pool_directory, own.gate_file)
    assert gate.take(), "nothing is copied now"
    before = own.tensors.copy()
    answer = own.load(to_keys([95]), [1])
    assert list(answer.failures) == [tpb.TRANSFER_FAILURE_ERROR]
    assert "given this registration up" in answer.message
    assert np.array_equal(own.tensors, before)
    gate.close()
    assert own.load(to_keys([95]), [1]).ok
