"""The daemon's side of a copy process that says nothing any more, dies, or cannot be begun."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.daemon_process import WAIT_S, child_environment, state_of, wait_until
from tests.stall import Stall

from kvtier_ops.ipc import SharedAllocation, export_shared
from kvtier_ops.locks import CopyGate
from kvtier_ops.pool import Pool
from kvtier_server.transfer import device_process
from kvtier_server.transfer.device_process import DeviceProcess, HelperLost
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


@pytest.fixture
def memory() -> Iterator[SharedAllocation]:
    made = SharedAllocation(PAGE_BYTES)
    yield made
    made.close()


def register_of(memory: SharedAllocation, memory_id: int, pool: Pool) -> Register:
    handle = export_shared(memory, 0, PAGE_BYTES, PAGE_BYTES, 1)
    gate = CopyGate.create(pool.directory)
    return Register(memory_id, 1, 0, 1, ((handle,),), ((PAGE_BYTES,),), b"", gate)


def process_of(pool: Pool, on_lost: Callable[[int], None] = lambda _: None) -> DeviceProcess:
    return DeviceProcess(HOST_DEVICE, str(pool.path), pool.pool_id, (), on_lost)


def use_helper(monkeypatch: pytest.MonkeyPatch, module: str, **env: str) -> None:
    """Begin another module as the helper from now on."""
    for name, value in child_environment(**env).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device_process, "_MODULE", module)


def children() -> set[int]:
    """Process ids of this process's children."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


async def begin(process: DeviceProcess, *registers: Register) -> int:
    """Register memory, and return the process id of the helper that this began."""
    before = children()
    for register in registers:
        await process.register(register)
    (helper,) = children() - before
    return helper


def test_a_helper_that_is_silent_is_ended_its_jobs_fail_and_the_next_one_has_the_memory(
    pool: Pool, memory: SharedAllocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_process, "HANG_S", ALIVE_S + 1)

    async def run() -> tuple[Done, Done, int]:
        process = process_of(pool)
        helper = await begin(process, register_of(memory, 1, pool))
        os.kill(helper, signal.SIGSTOP)
        silent = await asyncio.wait_for(process.run(JOB), WAIT_S)
        answered = await asyncio.wait_for(process.run(JOB), WAIT_S)
        assert await process.close(2.0)
        return silent, answered, helper

    silent, answered, helper = asyncio.run(run())
    assert silent.failed == (0,)
    assert "it has ended with status -9" in silent.message
    assert state_of(helper) == ""
    # No slot is reserved in this pool, which only a helper that knows the memory looks at.
    assert (answered.failed, answered.message) == ((0,), "")


def test_a_helper_whose_copy_hangs_ends_itself_and_the_next_one_copies(
    pool: Pool, memory: SharedAllocation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, "copy_engine.before_chunk")
    use_helper(monkeypatch, "tests.server.impatient_helper", **stall.env)
    (generation,) = pool.slots.reserve([0], 1, PAGE_BYTES)
    job = JOB._replace(generations=(generation,))

    async def run() -> tuple[Done, int, Done, int]:
        process = process_of(pool)
        await process.register(register_of(memory, 1, pool))
        stall.arm()
        hung = await asyncio.wait_for(process.run(job), WAIT_S)
        restarts = process.num_restarts
        (tmp_path / "stall-copy_engine.before_chunk").unlink()  # nobody hangs there any more
        copied = await asyncio.wait_for(process.run(job), WAIT_S)
        assert await process.close(2.0)
        return hung, restarts, copied, process.num_restarts

    hung, before, copied, after = asyncio.run(run())
    assert hung.failed == (0,)
    assert f"it has ended with status {HUNG_STATUS}" in hung.message
    assert copied.failed == ()
    assert (before, after) == (0, 1)


def test_where_no_helper_can_be_begun_its_memory_is_lost_and_the_next_registration_refused(
    pool: Pool, memory: SharedAllocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        lost: list[int] = []
        process = process_of(pool, lost.append)
        helper = await begin(process, *(register_of(memory, number, pool) for number in (1, 2)))
        os.kill(helper, signal.SIGSTOP)
        sent = asyncio.create_task(process.run(JOB))
        monkeypatch.setattr(device_process, "_MODULE", "tests.server.no_such_module")
        os.kill(helper, signal.SIGKILL)
        assert "it has ended with status -9" in (await asyncio.wait_for(sent, WAIT_S)).message
        assert lost == []
        failed = await asyncio.wait_for(process.run(JOB), WAIT_S)
        assert "it has ended with status 1" in failed.message
        assert lost == [1, 2]
        with pytest.raises(HelperLost):
            await asyncio.wait_for(process.register(register_of(memory, 3, pool)), WAIT_S)
        assert lost == [1, 2], "each is told once"
        assert await process.close(2.0)

    asyncio.run(run())


def test_memory_that_is_given_up_while_it_is_being_opened_is_closed_again(
    pool: Pool, memory: SharedAllocation
) -> None:
    given_up = SharedAllocation(PAGE_BYTES)

    async def run() -> None:
        process = process_of(pool)
        helper = await begin(process, register_of(memory, 1, pool))

        def is_open() -> bool:
            return given_up.name in Path(f"/proc/{helper}/maps").read_text()

        opening = asyncio.create_task(process.register(register_of(given_up, 2, pool)))
        for _ in range(5):
            await asyncio.sleep(0)  # as far as the helper's answer
        wait_until(is_open, "the helper opens it; this thread does not read that it has")
        process.unregister(2)
        await opening
        await asyncio.to_thread(wait_until, lambda: not is_open(), "the helper closes it")
        assert await process.close(2.0)

    try:
        asyncio.run(run())
    finally:
        given_up.close()


def test_a_daemon_that_stood_still_keeps_its_healthy_helper(
    pool: Pool, memory: SharedAllocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_helper(monkeypatch, "tests.server.impatient_helper")
    monkeypatch.setattr(device_process, "HANG_S", 1.0)

    async def run() -> None:
        process = process_of(pool)
        helper = await begin(process, register_of(memory, 1, pool))
        thaws_at = time.monotonic() + 1.5
        wait_until(lambda: time.monotonic() > thaws_at, "the loop has stood still for longer than HANG_S")
        answered = await asyncio.wait_for(process.run(JOB), WAIT_S)
        assert (answered.failed, answered.message) == ((0,), "")
        assert (process.state, process.num_restarts) == ("serving", 0)
        assert state_of(helper) not in {"", "Z"}
        assert await process.close(2.0)

    asyncio.run(run())


def test_a_helper_that_stood_still_does_not_end_itself_over_one_look(
    pool: Pool, memory: SharedAllocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_helper(monkeypatch, "tests.server.twice_looking_helper")

    async def run() -> None:
        process = process_of(pool)
        await begin(process, register_of(memory, 1, pool))
        await asyncio.to_thread(
            wait_until, lambda: process.pinned_bytes >= 6 or process.state != "serving", "it looks six times"
        )
        assert (process.state, process.num_restarts) == ("serving", 0)
        assert await process.close(2.0)

    asyncio.run(run())


def test_what_comes_between_a_helpers_kill_and_its_end_fails_at_once_and_what_was_sent_waits(
    pool: Pool, memory: SharedAllocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        process = process_of(pool)
        helper = await begin(process, register_of(memory, 1, pool))
        os.kill(helper, signal.SIGSTOP)
        sent = asyncio.create_task(process.run(JOB))
        await asyncio.sleep(0)
        with monkeypatch.context() as held:
            held.setattr(subprocess.Popen, "poll", lambda _: None)  # the kernel does not let it go yet
            os.kill(helper, signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: process.state != "serving", "its end is seen")
            async with asyncio.timeout(WAIT_S):
                later = await process.run(JOB)
                with pytest.raises(HelperLost, match="not gone yet"):
                    await process.register(register_of(memory, 2, pool))
            assert "it was killed, and is not gone yet" in later.message
            assert not sent.done()
            assert children() >= {helper}
        assert "it has ended with status -9" in (await asyncio.wait_for(sent, WAIT_S)).message
        again = await asyncio.wait_for(process.run(JOB), WAIT_S)
        assert (again.failed, again.message, process.num_restarts) == ((0,), "", 1)
        assert await process.close(2.0)

    asyncio.run(run())
