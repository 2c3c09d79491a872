"""The daemon's side of a copy process that says nothing any more."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.daemon_process import WAIT_S, child_environment, state_of
from tests.stall import Stall

from kvtier_ops.ipc import SharedAllocation, export_shared
from kvtier_ops.locks import CopyGate
from kvtier_ops.pool import Pool
from kvtier_server.transfer import device_process
from kvtier_server.transfer.device_process import DeviceProcess
from kvtier_server.transfer.helper import HUNG_STATUS
from kvtier_server.transfer.wire import ALIVE_S, HOST_DEVICE, Done, Job, Register

PAGE_BYTES = 4096
JOB = Job(1, 1, True, False, (0,), (1,), (0,), (1,), (0,), None, 0, ())


@pytest.fixture
def pool() -> Iterator[Pool]:
    directory = Path(tempfile.mkdtemp(prefix="kvtier-test-", dir="/dev/shm"))
    made = Pool.create(directory, 1 << 20)
    made.back(0, made.data_bytes)
    made.back_records(range(made.data_bytes // PAGE_BYTES))
    yield made
    made.close()
    shutil.rmtree(directory, ignore_errors=True)


def test_a_helper_that_is_silent_is_ended_its_jobs_fail_and_the_next_one_has_the_memory(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_process, "HANG_S", ALIVE_S + 1)
    memory = SharedAllocation(PAGE_BYTES)
    handle = export_shared(memory, 0, PAGE_BYTES, PAGE_BYTES, 1)
    register = Register(1, 1, 0, 1, ((handle,),), ((PAGE_BYTES,),), b"", CopyGate.create(pool.directory))

    def children() -> list[int]:
        tasks = Path("/proc/self/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]

    async def run() -> tuple[Done, Done, int]:
        process = DeviceProcess(HOST_DEVICE, str(pool.path), pool.pool_id, (), lambda _: None)
        before = set(children())
        await process.register(register)
        (helper,) = set(children()) - before
        os.kill(helper, signal.SIGSTOP)
        silent = await asyncio.wait_for(process.run(JOB), WAIT_S)
        answered = await asyncio.wait_for(process.run(JOB), WAIT_S)
        assert await process.close(2.0)
        return silent, answered, helper

    try:
        silent, answered, helper = asyncio.run(run())
    finally:
        memory.close()
    assert silent.failed == (0,)
    assert "it has ended with status -9" in silent.message
    assert state_of(helper) == ""
    # No slot is reserved in this pool, which only a helper that knows the memory looks at.
    assert (answered.failed, answered.message) == ((0,), "")


def test_a_helper_whose_copy_hangs_ends_itself_and_the_next_one_copies(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, "copy_engine.before_chunk")
    for name, value in child_environment(**stall.env).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device_process, "_MODULE", "tests.server.impatient_helper")
    memory = SharedAllocation(PAGE_BYTES)
    handle = export_shared(memory, 0, PAGE_BYTES, PAGE_BYTES, 1)
    gate = CopyGate.create(pool.directory)
    register = Register(1, 1, 0, 1, ((handle,),), ((PAGE_BYTES,),), b"", gate)
    (generation,) = pool.slots.reserve([0], 1, PAGE_BYTES)
    job = JOB._replace(generations=(generation,))

    async def run() -> tuple[Done, int, Done, int]:
        process = DeviceProcess(HOST_DEVICE, str(pool.path), pool.pool_id, (), lambda _: None)
        await process.register(register)
        stall.arm()
        hung = await asyncio.wait_for(process.run(job), WAIT_S)
        restarts = process.num_restarts
        (tmp_path / "stall-copy_engine.before_chunk").unlink()  # nobody hangs there any more
        copied = await asyncio.wait_for(process.run(job), WAIT_S)
        assert await process.close(2.0)
        return hung, restarts, copied, process.num_restarts

    try:
        hung, before, copied, after = asyncio.run(run())
    finally:
        memory.close()
    assert hung.failed == (0,)
    assert f"it has ended with status {HUNG_STATUS}" in hung.message
    assert copied.failed == ()
    assert (before, after) == (0, 1)
