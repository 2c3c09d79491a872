"""The helper process of one device, from the daemon's side: begun, asked, and begun again when it has died.

Owns the process, its end of the socket, and who waits for which answer. Everything here runs on the loop's
thread; what takes long runs in tasks of its own, which the end of a call does not cancel. What the helper
does is `helper.py`'s.

A job that fails because the helper died does so after the process is gone: until then it might still write.
What comes between the helper's kill and its end fails at once, and a new helper is begun only after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from kvtier_ops.helper_lines import relay_lines
from kvtier_server.transfer.wire import (
    ALIVE_S,
    HANG_S,
    LAYOUT,
    LENGTH_BYTES,
    Alive,
    Done,
    Failure,
    Job,
    Message,
    Ready,
    Register,
    Registered,
    Unregister,
    pack,
    unpack,
)

T = TypeVar("T")
log = structlog.get_logger("kvtier.transfer")

START_S = 30.0
"""What a helper's start, or the opening of memory, may take: 0.4 s, and seconds where a device wakes up."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Bounds of the pause after a start that failed; it doubles with each that fails again."""

GRACE_S = ALIVE_S
"""What a helper may take once more after it was too late by this process's clock: where this process stood
still itself, the answer lies in the socket already."""

POLL_S = 0.02
"""Between two looks whether a process that was ended is gone."""

_MODULE = "kvtier_server.transfer.helper"


class HelperLost(Exception):
    """The helper has ended, or could not be begun. Nothing of the call was done, or nobody can know."""


class ImportFailed(Exception):
    """The helper could not open memory; the message says why and what to do."""


class DeviceProcess:
    """The helper of one device, whichever process it is at the time."""

    def __init__(
        self,
        device: str,
        pool_path: str,
        pool_id: int,
        lock_fds: tuple[int, ...],
        on_lost: Callable[[int], None],
    ) -> None:
        """Begin nothing yet. `device`: its UUID in hex, or HOST_DEVICE.

        `lock_fds`: what the helper holds until it ends. `on_lost` is told of memory that a new helper could
        not open again, and of all memory where none could be begun.
        """
        self.device = device
        self._pool_path = pool_path
        self._pool_id = pool_id
        self._lock_fds = lock_fds
        self._on_lost = on_lost
        self._life: _Life | None = None
        self._start: asyncio.Task[_Life] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._registers: dict[int, Register] = {}
        """The memory that is open, for the next helper."""
        self._registering: set[int] = set()
        """The memory that is being opened, and is still wanted."""
        self._pause_s = FIRST_PAUSE_S
        self._begin_after = 0.0
        self._last_failure = ""
        self._closed = False
        self.num_restarts = 0
        """How often the helper was begun anew after one that had ended."""

    @property
    def state(self) -> str:
        """What it does: "serving", "starting", or why there is no helper."""
        if self._start is not None:
            return "starting"
        if self._life is None or self._life.has_ended:
            return self._last_failure or "ended"
        return "was killed, and is not gone yet" if self._life.is_killed else "serving"

    @property
    def pinned_bytes(self) -> int:
        """How much of the pool the helper has pinned; as it said last."""
        return 0 if self._life is None or self._life.has_ended else self._life.said.pinned_bytes

    @property
    def problem(self) -> str:
        """What makes copies slower than they could be; "" where nothing does."""
        return "" if self._life is None or self._life.has_ended else self._life.said.pin_problem

    async def register(self, register: Register) -> None:
        """Open memory, also if the caller stops waiting. Raises HelperLost, ImportFailed."""
        self._registering.add(register.memory_id)
        await asyncio.shield(self._task(self._register(register)))

    async def _register(self, register: Register) -> None:
        memory_id = register.memory_id
        try:
            life = await self._alive()
            await life.register(register)
            if memory_id in self._registering:
                self._registers[memory_id] = register
            else:
                life.tell(Unregister(memory_id))  # given up meanwhile
        finally:
            self._registering.discard(memory_id)

    def unregister(self, memory_id: int) -> None:
        """Close memory, also what is being opened. Its jobs have ended."""
        self._registering.discard(memory_id)
        if self._registers.pop(memory_id, None) is not None and self._life is not None:
            self._life.tell(Unregister(memory_id))

    async def run(self, job: Job) -> Done:
        """Run a job to its end, whatever becomes of the helper."""
        try:
            life = await self._alive()
            return await life.run(job)
        except HelperLost as error:
            return failed(job, f"the copy process of {self.device}: {error}")

    async def _alive(self) -> _Life:
        """Return the helper, a new one with all that was registered if it has died. Raises HelperLost."""
        if self._closed:
            raise HelperLost("the daemon is stopping, or nobody used the device any more")
        if self._start is None:
            if self._life is not None and not self._life.has_ended:
                self._life.raise_if_killed()
                return self._life
            if time.monotonic() < self._begin_after:
                raise HelperLost(self._last_failure)
            self._start = self._task(self._begin())
        return await asyncio.shield(self._start)

    async def _begin(self) -> _Life:
        self.num_restarts += self._life is not None
        try:
            # Known before it works: what is closed meanwhile is closed in it too; none is begun beside it.
            life = self._life = await _Life.begin(self.device, self._pool_path, self._pool_id, self._lock_fds)
            await life.wait_ready()
            for memory_id in list(self._registers):
                await self._open_again(life, memory_id)
        except HelperLost as error:
            self._last_failure = str(error)
            self._begin_after = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._lose_all()
            raise
        finally:
            self._start = None
        self._pause_s = FIRST_PAUSE_S
        return life

    def _lose_all(self) -> None:
        """Give up what was open: nobody has it open now, and engines that are told copy by themselves."""
        lost, self._registers = list(self._registers), {}
        if lost:
            log.warning("memory_lost", device=self.device, memory=lost, why=self._last_failure)
        for memory_id in lost:
            self._on_lost(memory_id)

    async def _open_again(self, life: _Life, memory_id: int) -> None:
        register = self._registers.get(memory_id)
        if register is None:
            return  # closed meanwhile
        try:
            await life.register(register)
        except ImportFailed as error:
            log.warning("memory_lost", device=self.device, memory=memory_id, why=str(error))
            self._registers.pop(memory_id, None)
            self._on_lost(memory_id)
        if memory_id not in self._registers:
            life.tell(Unregister(memory_id))

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_take_exception)
        return task

    async def close(self, timeout_s: float) -> bool:
        """End the helper, and begin no other; False if it is in a copy that nothing ends."""
        self._closed = True
        if self._start is not None:
            await asyncio.wait([self._start], timeout=timeout_s)
            if self._start is not None:
                return False  # its process ends with this one
        return self._life is None or await self._life.close(timeout_s)


def failed(job: Job, message: str) -> Done:
    """Return the end of a job of which nothing was copied."""
    every = tuple(range(len(job.slot_ids)))
    return Done(job.job_id, every, (int(Failure.ERROR),) * len(every), (0,) * len(every), message, 0, 0.0)


def _take_exception(future: asyncio.Future[Any]) -> None:
    """Look at an exception that whoever waited may have stopped waiting for."""
    if not future.cancelled():
        future.exception()


class _Life:
    """One process, from its start to its end."""

    def __init__(self, device: str, process: subprocess.Popen[bytes], reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter) -> None:  # fmt: skip
        self._device = device
        self._process = process
        self._reader = reader
        self._writer = writer
        self._registering: dict[int, asyncio.Future[None]] = {}
        self._jobs: dict[int, asyncio.Future[Done]] = {}
        self._next_job_id = 1
        self._closing = False
        self.is_killed = False
        """Whether it is to end, or has: it takes nothing any more."""
        self.has_ended = False
        """Whether the process is gone."""
        self.said = Alive(0, "")
        """What it said last of itself."""
        self._problem = ""
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read_to_the_end())

    @classmethod
    async def begin(cls, device: str, pool_path: str, pool_id: int, lock_fds: tuple[int, ...]) -> _Life:
        """Start a process; see `wait_ready`. Raises HelperLost."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        settings = {
            "device": device,
            "channel": theirs.fileno(),
            "pool": pool_path,
            "pool_id": pool_id,
            "layout": LAYOUT,
        }
        try:
            # Blocks for the two milliseconds of a fork.
            process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-P", "-m", _MODULE, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno(), *lock_fds],
            )
        except OSError as error:
            ours.close()
            raise HelperLost(f"it cannot be begun: {error.strerror}") from error
        finally:
            theirs.close()
        relay_lines(process.stderr, lambda said: log.warning("copy_process_said", device=device, text=said))
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(device, process, reader, writer)

    async def wait_ready(self) -> None:
        """Wait until it works. Raises HelperLost."""
        await self._in_time(self._ready)
        log.info("copy_process", device=self._device, pid=self._process.pid)

    async def _in_time(self, future: asyncio.Future[None]) -> None:
        """Wait for an answer; a helper that does not give it in START_S is killed. Raises HelperLost."""
        await asyncio.wait([future], timeout=START_S)
        await asyncio.wait([future], timeout=GRACE_S)
        if not future.done():
            self._kill()
            raise HelperLost(f"it gave no answer for {START_S:.0f} s")
        await future

    def _kill(self) -> None:
        """End the process, which may take as long as the driver holds it; `has_ended` tells."""
        self.is_killed = True
        self._process.kill()

    def raise_if_killed(self) -> None:
        """Raise HelperLost if it takes nothing any more."""
        if self.has_ended:
            raise HelperLost("it has ended")
        if self.is_killed:
            raise HelperLost("it was killed, and is not gone yet")

    def tell(self, message: Unregister) -> None:
        if not self.is_killed:
            self._writer.write(pack(message))

    async def register(self, register: Register) -> None:
        """Open memory. Raises HelperLost, ImportFailed."""
        self.raise_if_killed()
        future = self._registering[register.memory_id] = asyncio.get_running_loop().create_future()
        self._send(register)
        await self._in_time(future)

    async def run(self, job: Job) -> Done:
        """Run a job under a number of its own: ids of several streams may be equal. Raises HelperLost."""
        self.raise_if_killed()
        own_id, self._next_job_id = self._next_job_id, self._next_job_id + 1
        future = self._jobs[own_id] = asyncio.get_running_loop().create_future()
        self._send(job._replace(job_id=own_id))
        done: Done = await future
        return done._replace(job_id=job.job_id)

    def _send(self, message: Message) -> None:
        self._writer.write(pack(message))

    async def _read_to_the_end(self) -> None:
        try:
            while True:
                length = int.from_bytes(await self._read(LENGTH_BYTES), "little")
                self._take(unpack(await self._read(length)))
        except TimeoutError:
            log.warning("copy_process_hangs", device=self._device, pid=self._process.pid, seconds=HANG_S)
        except (asyncio.IncompleteReadError, OSError):
            pass
        except Exception:
            log.exception("copy_process_misunderstood", device=self._device)
        self._kill()
        while self._process.poll() is None:  # noqa: ASYNC110 - there is nothing to wait on
            await asyncio.sleep(POLL_S)
        self._ended()

    async def _read(self, count: int) -> bytes:
        """Read so many bytes. Raises TimeoutError where it says nothing: it says that it is there every few
        seconds, if nothing else.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANG_S):
                return await self._reader.readexactly(count)
        async with asyncio.timeout(GRACE_S):
            return await self._reader.readexactly(count)

    def _ended(self) -> None:
        """Fail whoever waits: the process is gone."""
        self.has_ended = True
        self._writer.close()
        status = self._process.returncode
        if not self._closing:
            log.warning("copy_process_ended", device=self._device, pid=self._process.pid, status=status)
        waiting: list[asyncio.Future[Any]] = [*self._registering.values(), *self._jobs.values(), self._ready]
        self._registering.clear()
        self._jobs.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(HelperLost(self._problem or f"it has ended with status {status}"))
            _take_exception(future)

    def _take(self, message: Message) -> None:
        if isinstance(message, Done):
            self._jobs.pop(message.job_id).set_result(message)
        elif isinstance(message, Registered):
            future = self._registering.pop(message.memory_id)
            if message.error:
                future.set_exception(ImportFailed(message.error))
            else:
                future.set_result(None)
        elif isinstance(message, Ready):
            self._problem = message.error
            if not message.error:
                self._ready.set_result(None)
        elif isinstance(message, Alive):
            self.said = message

    async def close(self, timeout_s: float) -> bool:
        """End it; False if that cannot be."""
        self._closing = True
        self._writer.close()
        for kills in (False, True):
            if kills:
                self._kill()
            give_up_at = time.monotonic() + timeout_s / 2
            while self._process.poll() is None and time.monotonic() < give_up_at:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        return self._process.poll() is not None
