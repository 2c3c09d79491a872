"""What a refused call leaves behind: nothing. No collection of garbage comes while a daemon is idle."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess
from tests.raw_engine import RawEngine, failure, refusal

CALLS = 300
MESSAGE_BYTES = 1 << 20
BOUND_BYTES = 100 << 20
"""What a daemon may grow by in CALLS calls of about MESSAGE_BYTES, a third of what it was sent."""

NO_MESSAGE = b"\x0a\xff"
"""Field 1 is longer than the bytes that follow: no message of any kind."""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon whose socket of engines tells callers apart, so that every layer is passed.

    One for each test: what an earlier one has left, and was collected since, would hide what the next leaves.
    """
    with tempfile.TemporaryDirectory(prefix="kvtier-run-") as short:
        config = f'[server]\nadmin_address = "unix://{short}/a/admin.sock"\n'
        with DaemonProcess(tmp_path, config=config) as daemon:
            yield daemon.start()


def resident_bytes(daemon: DaemonProcess) -> int:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, status
    return int(found[1]) << 10


def assert_stays(daemon: DaemonProcess, call: Callable[[], object]) -> None:
    call()
    before = resident_bytes(daemon)
    for _ in range(CALLS):
        call()
    grown = resident_bytes(daemon) - before
    assert grown < BOUND_BYTES, f"{CALLS} refused calls left {grown >> 20} MiB"


def test_refused_lookups_of_many_keys_leave_no_memory_behind(
    guarded: DaemonProcess, make_engine: MakeEngine
) -> None:
    engine = make_engine(guarded)
    engine.attach_scheduler()
    keys = [number.to_bytes(128, "big") for number in range(8192)]

    def look_up() -> None:
        failed = refusal(lambda: engine.lookup(keys, lease_id=engine.new_lease_id()))
        assert failed.reason == "WORKERS_MISSING"

    assert_stays(guarded, look_up)


def unary(engine: RawEngine, path: str, raw: bytes) -> object:
    return engine.send_bytes(path, raw)


def to_stream(engine: RawEngine, path: str, raw: bytes) -> object:
    return engine.stream_bytes(path, raw)


def both_ways(engine: RawEngine, path: str, raw: bytes) -> object:
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = engine.channel.stream_stream(path, bytes, bytes)
    return list(call(iter([raw]), timeout=WAIT_S))


METHODS: dict[str, Callable[[RawEngine, str, bytes], object]] = {
    "OffloadService/Lookup": unary,
    "OffloadService/Complete": unary,
    "OffloadService/Describe": unary,
    "OffloadService/Attach": to_stream,
    "TransferService/RegisterMemory": unary,
    "TransferService/Transfer": both_ways,
    "EventsService/Watch": to_stream,
    "EventsService/Snapshot": to_stream,
    "AdminService/Explain": unary,
    "AdminService/Clear": unary,  # the role is missing here
}


@pytest.mark.parametrize("method", METHODS)
def test_malformed_calls_leave_no_memory_behind(
    guarded: DaemonProcess, make_engine: MakeEngine, method: str
) -> None:
    engine = make_engine(guarded)
    length = MESSAGE_BYTES
    padding = b"\x7a" + bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + bytes(length)
    raw = padding + NO_MESSAGE  # field 15, unknown to most, and then what is none
    assert_stays(guarded, lambda: refusal(lambda: METHODS[method](engine, f"/kvtier.v1.{method}", raw)))


def test_calls_that_are_not_built_yet_leave_no_memory_behind(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine, raw = make_engine(daemon), bytes(MESSAGE_BYTES)
    path = "/kvtier.v1.AdminService/SetQuota"
    assert_stays(daemon, lambda: failure(lambda: engine.send_bytes(path, raw)))
