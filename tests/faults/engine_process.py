"""The other end of `block_engine.py`: an engine process that a test starts, asks, stops and kills.

Also what tests ask about the daemon and its pool afterwards: that nothing is held, that every chunk is right.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tests.daemon_process import REPOSITORY, WAIT_S, DaemonProcess, child_environment, wait_until
from tests.faults.block_device import PART_BYTES, content_of

from kvtier_ops.checksum import part_checksum
from kvtier_ops.header import HEADER_BYTES, read_header
from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.pool import MappedPool, SlotState

Answer = dict[str, Any]


class EngineEnded(AssertionError):
    """The process is gone. `code` is its exit code, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the engine ended with {code}")
        self.code = code


class EngineProcess:
    """One block engine. It starts at once, and attaches when told to; on leaving it is killed."""

    def __init__(self, engine_id: str = "") -> None:
        self.engine_id = engine_id or f"engine-{secrets.token_hex(4)}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.block_engine"],
            env=child_environment(),
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="engine-answers", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def attach(self, daemon: DaemonProcess | str, **options: object) -> Self:
        """Attach to a daemon, or to an address, and wait until it is ready. `options`: see Engine.start."""
        address = daemon if isinstance(daemon, str) else daemon.address
        self.ask("start", address=address, engine_id=self.engine_id, **options)
        self.ask("wait_ready")
        return self

    def ask(self, op: str, **arguments: object) -> Any:
        """Give a command and return its answer; fails with the engine's traceback if it raised."""
        self.tell(op, **arguments)
        return self.answer()

    def tell(self, op: str, **arguments: object) -> None:
        """Give a command, and wait for nothing."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineEnded(self._process.wait(WAIT_S)) from None

    def answer(self) -> Any:
        """Return the answer to the oldest command that has not been answered."""
        try:
            line = self._lines.get(timeout=2 * WAIT_S)
        except queue.Empty:
            raise AssertionError("the engine does not answer") from None
        if not line:
            raise EngineEnded(self._process.wait(WAIT_S))
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(f"the engine raised:\n{answer['error']}")
        return answer["answer"]

    def wait_stopped(self) -> None:
        """Wait until the whole process is stopped (SIGSTOP)."""
        wait_until(lambda: self._state() == "T", "the engine is stopped")

    def stop(self) -> None:
        """Stop the whole process."""
        self._process.send_signal(signal.SIGSTOP)
        self.wait_stopped()

    def resume(self) -> None:
        """Let a stopped process go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a chance to do anything."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(WAIT_S)
        self._end()

    def close(self) -> int:
        """Let it end well, and return its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(WAIT_S)
        self._end()
        return code

    def _end(self) -> None:
        self._reader.join(WAIT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:  # a command that nobody reads any more
                    continue

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _state(self) -> str:
        # The name in brackets may hold anything, the state comes after the last of them.
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]


def held(daemon: DaemonProcess) -> dict[str, int]:
    """What sessions hold of the daemon. All 0 but `sessions` and `owner_locks` when nothing is under way."""
    status = daemon.status()
    pool = status.tiers[0]
    owners = daemon.pool_directory / "owners"
    return {
        "reserved": pool.reserved_slots,
        "quarantined": pool.quarantined_slots,
        "pinned": pool.pinned_chunks,
        "leases": sum(lease.count for lease in status.leases),
        # Both sessions of an engine show what the engine holds.
        "credits": sum(session.credits for session in status.sessions if session.role == "scheduler"),
        "sessions": len(status.sessions),
        "owner_locks": len(list(owners.iterdir())) if owners.exists() else 0,
    }


def wait_nothing_held(daemon: DaemonProcess, *, engines: int = 0) -> None:
    """Wait until the daemon holds nothing for anybody; `engines` are attached, with two sessions each."""
    idle = dict.fromkeys(("reserved", "quarantined", "pinned", "leases", "credits"), 0)
    wanted = {**idle, "sessions": 2 * engines, "owner_locks": 2 * engines}
    try:
        wait_until(lambda: held(daemon) == wanted, "nothing is held", timeout_s=10.0)
    except AssertionError as error:
        raise AssertionError(f"{error}; held: {held(daemon)}, not {wanted}") from None


def lease_count(daemon: DaemonProcess, kind: str) -> int:
    """How many leases of a kind there are."""
    return sum(lease.count for lease in daemon.status().leases if lease.kind == kind)


def open_pool(pool_file: Path) -> MappedPool:
    """Map a pool, whichever it is, to look at it."""
    with pool_file.open("rb") as file:
        header = read_header(file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size)
    return MappedPool.open(pool_file, header.pool_id)


def check_published_chunks(pool_file: Path, weights: str = "") -> int:
    """Check checksum and bytes of every published slot of a pool. Returns how many there are."""
    pool = open_pool(pool_file)
    count = 0
    try:
        for slot_id in range(pool.data_bytes // SLOT_UNIT_BYTES):
            record = pool.slots.read(slot_id)
            if record is None or record.state is not SlotState.PUBLISHED:
                continue
            view = pool.slot_view(slot_id, PART_BYTES)
            assert part_checksum(view) == record.checksums[0], f"slot {slot_id}: another checksum"
            assert np.array_equal(view, content_of(record.key, weights)), f"slot {slot_id}: another's bytes"
            count += 1
    finally:
        pool.close()
    return count
