"""The helper process of one device, from the daemon's side: begun, asked, and begun again when it has died.

Owns the process, its end of the socket, and who waits for which answer. Everything here runs on the loop's
thread. What the helper does is `helper.py`'s.

A job that fails because the helper died does so after the process is gone: until then it might still write.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import structlog

from kvtier_server.transfer.wire import (
    LAYOUT,
    LENGTH_BYTES,
    Done,
    Failure,
    Job,
    Ready,
    Register,
    Registered,
    Unregister,
    pack,
    unpack,
)

log = structlog.get_logger("kvtier.transfer")

START_S = 30.0
"""What a helper's start may take: 0.4 s, and seconds where a device has to wake up."""

HANG_S = 30.0
"""A helper that has jobs and ends none for so long hangs: it is ended, and its jobs fail."""

_MODULE = "kvtier_server.transfer.helper"


class HelperLost(Exception):
    """The helper has ended, or could not be begun. Nothing of the call was done, or nobody can know."""


class DeviceProcess:
    """The helper of one device, whichever process it is at the time."""

    def __init__(self, device: str, pool_path: str, pool_id: int, pool_lock_fd: int) -> None:
        """Begin nothing yet. `device`: its UUID in hex, or "host"."""
        self.device = device
        self._pool_path = pool_path
        self._pool_id = pool_id
        self._pool_lock_fd = pool_lock_fd
        self._life: _Life | None = None
        self._starting = asyncio.Lock()
        self._registers: dict[int, Register] = {}
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """Process id; None while there is none."""
        return None if self._life is None else self._life.pid

    async def register(self, register: Register) -> str:
        """Open memory; returns the name of the helper's lock file.

        Raises HelperLost, and ImportFailed with what the helper says.
        """
        life = await self._alive()
        await life.register(register)
        self._registers[register.memory_id] = register
        return life.lock_file

    def unregister(self, memory_id: int) -> None:
        """Close memory. Its jobs have ended."""
        if self._registers.pop(memory_id, None) is not None and self._life is not None:
            self._life.tell(Unregister(memory_id))

    async def run(self, job: Job) -> Done:
        """Run a job to its end, whatever becomes of the helper."""
        try:
            life = await self._alive()
            return await life.run(job)
        except (HelperLost, ImportFailed) as error:
            return failed(job, f"the copy process of {self.device}: {error}")

    async def _alive(self) -> _Life:
        """Return the helper, a new one with all that was registered if it has died."""
        async with self._starting:
            if self._life is not None and not self._life.has_ended:
                return self._life
            if self._life is not None:
                self.num_restarts += 1
            life = await _Life.begin(self.device, self._pool_path, self._pool_id, self._pool_lock_fd)
            for register in list(self._registers.values()):
                try:
                    await life.register(register)
                except ImportFailed as error:
                    # Its engine may be gone: that is noticed elsewhere, and others must not suffer.
                    log.warning("memory_lost", device=self.device, memory=register.memory_id, why=str(error))
                    self._registers.pop(register.memory_id, None)
            self._life = life
            return life

    async def close(self, timeout_s: float) -> bool:
        """End the helper; False if it is in a copy that nothing ends."""
        return self._life is None or await self._life.close(timeout_s)


class ImportFailed(Exception):
    """The helper could not open memory; the message says why and what to do."""


def failed(job: Job, message: str) -> Done:
    """Return the end of a job of which nothing was copied."""
    every = tuple(range(len(job.slot_ids)))
    return Done(job.job_id, every, (int(Failure.ERROR),) * len(every), (0,) * len(every), message, 0, 0.0)


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
        self._heard = False
        """Whether anything came since somebody last looked."""
        self.has_ended = False
        self.lock_file = self.problem = ""
        self._reading = asyncio.create_task(self._read_to_the_end())
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def begin(cls, device: str, pool_path: str, pool_id: int, pool_lock_fd: int) -> _Life:
        """Start a process and wait until it works. Raises HelperLost."""
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
                # Who maps the pool also holds the lock on it, so that it is not taken over before that ends.
                pass_fds=[fd for fd in (theirs.fileno(), pool_lock_fd) if fd >= 0],
            )
        except OSError as error:
            ours.close()
            raise HelperLost(f"it cannot be begun: {error.strerror}") from error
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        life = cls(device, process, reader, writer)
        try:
            await asyncio.wait_for(asyncio.shield(life._ready), START_S)
        except (TimeoutError, HelperLost) as error:
            await life.close(0.0)
            raise HelperLost(
                life.problem or "it did not start; its last words are in the daemon's log"
            ) from error
        log.info("copy_process", device=device, pid=process.pid, lock=life.lock_file)
        return life

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, message: Unregister) -> None:
        self._writer.write(pack(message))

    async def register(self, register: Register) -> None:
        future = self._registering[register.memory_id] = asyncio.get_running_loop().create_future()
        self._send(pack(register))
        await future

    async def run(self, job: Job) -> Done:
        """Run a job under a number of its own: ids of several streams may be equal. Raises HelperLost."""
        own_id, self._next_job_id = self._next_job_id, self._next_job_id + 1
        future = self._jobs[own_id] = asyncio.get_running_loop().create_future()
        self._send(pack(job._replace(job_id=own_id)))
        while not future.done():
            self._heard = False
            await asyncio.wait([future], timeout=HANG_S)
            if not future.done() and not self._heard:
                log.warning("copy_process_hangs", device=self._device, pid=self.pid, seconds=HANG_S)
                self._process.kill()
        done: Done = future.result()
        return done._replace(job_id=job.job_id)

    def _send(self, data: bytes) -> None:
        if self.has_ended:
            raise HelperLost("it has ended")
        self._writer.write(data)

    async def _read_to_the_end(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
                self._take(unpack(await self._reader.readexactly(length)))
        self._process.kill()
        await asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        self.has_ended = True
        self._writer.close()
        lost = HelperLost(f"it has ended with status {self._process.returncode}")
        waiting: list[asyncio.Future[Any]] = [*self._registering.values(), *self._jobs.values(), self._ready]
        self._registering.clear()
        self._jobs.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(lost)
            future.exception()  # somebody may have stopped waiting
        log.warning("copy_process_ended", device=self._device, pid=self.pid, status=self._process.returncode)

    def _take(self, message: object) -> None:
        self._heard = True
        if isinstance(message, Done):
            _settle(self._jobs.pop(message.job_id), lambda future: future.set_result(message))
        elif isinstance(message, Registered):
            future = self._registering.pop(message.memory_id)
            if message.error:
                _settle(future, lambda future: future.set_exception(ImportFailed(message.error)))
            else:
                _settle(future, lambda future: future.set_result(None))
        elif isinstance(message, Ready):
            self.lock_file, self.problem = message.lock_file, message.error
            if not message.error:
                self._ready.set_result(None)

    async def close(self, timeout_s: float) -> bool:
        with contextlib.suppress(OSError):
            self._writer.close()
        wait = asyncio.get_running_loop().run_in_executor
        for seconds in (timeout_s / 2, timeout_s / 2 + 1.0):
            try:
                await wait(None, self._process.wait, seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
            else:
                return True
        return False


def _settle(future: asyncio.Future[Done] | asyncio.Future[None], how: Callable[..., None]) -> None:
    if not future.done():
        how(future)
