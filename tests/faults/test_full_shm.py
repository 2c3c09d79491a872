"""D6: the file system of the pool is too small, or fills up later: exit 2 with figures, or less capacity."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.daemon_process import DaemonProcess, wait_until
from tests.raw_engine import RawEngine, to_keys

from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.pool import MappedPool

MIB = 1 << 20
FILE_SYSTEM_BYTES = 32 * MIB
POOL_BYTES = 16 * MIB
PIECE_BYTES = 4 * MIB


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of its own, with room for FILE_SYSTEM_BYTES."""
    folder = tmp_path / "shm"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM_BYTES}", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def pool_config(folder: Path) -> str:
    return f'[pool]\ndirectory = "{folder}/pool"\nbacking_piece = {PIECE_BYTES}\n'


def wait_until_stopped(daemon: DaemonProcess) -> None:
    os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)


def fill(folder: Path, leave_bytes: int) -> None:
    """Take all of a file system but `leave_bytes`, which the records of some slots still need."""
    free = os.statvfs(folder)
    with (folder / "greedy").open("wb") as greedy:
        os.posix_fallocate(greedy.fileno(), 0, free.f_bavail * free.f_frsize - leave_bytes)


def test_a_pool_larger_than_its_file_system_is_refused_with_the_figures(
    small_tmpfs: Path, tmp_path: Path
) -> None:
    daemon = DaemonProcess(tmp_path, 2 * FILE_SYSTEM_BYTES, config=pool_config(small_tmpfs))
    with daemon:
        daemon.launch()
        assert daemon.wait() == 2
        assert str(small_tmpfs) in daemon.log_text()
        assert "MiB" in daemon.log_text() or "GiB" in daemon.log_text()


def test_a_file_system_that_fills_up_while_the_pool_is_backed_costs_capacity_only(
    small_tmpfs: Path, tmp_path: Path
) -> None:
    daemon = DaemonProcess(
        tmp_path,
        POOL_BYTES,
        config=pool_config(small_tmpfs),
        env={"KVTIER_FAULTS": "backing.before_piece=stop"},
    )
    with daemon:
        daemon.launch()
        wait_until_stopped(daemon)  # before the first piece
        daemon.signal(signal.SIGCONT)
        wait_until_stopped(daemon)  # before the second one: now somebody else takes the rest
        fill(small_tmpfs, leave_bytes=MIB)
        daemon.signal(signal.SIGCONT)
        wait_until(lambda: daemon.status().state == "degraded", "the daemon serves with what it has")
        status = daemon.status()
        assert status.pool.backed_bytes == PIECE_BYTES
        assert str(POOL_BYTES) in status.tiers[0].health
        with RawEngine(daemon.address) as engine:
            engine.attach()
            slots = PIECE_BYTES // SLOT_UNIT_BYTES
            granted = engine.prepare_store(to_keys(range(slots + 100)))
            verdicts = list(granted.verdicts)
            assert 0 < verdicts.count(pb.STORE_VERDICT_GRANTED) <= slots
            assert verdicts[-1] == pb.STORE_VERDICT_FULL
            info = engine.describe().pool
            mapped = MappedPool.open(Path(info.path), info.pool_id)
            for slot_id in granted.slot_ids:
                mapped.slot_view(slot_id, SLOT_UNIT_BYTES)[:] = 7  # no SIGBUS: the slot has its memory
            mapped.close()
        assert daemon.stop() == 0
