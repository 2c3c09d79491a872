from __future__ import annotations

import os
import resource
import signal
import socket
import stat
import time
from pathlib import Path

import pytest

from kvtier_ops.lock_watch import OwnerLocks
from kvtier_ops.locks import (
    CopyGate,
    DaemonLock,
    OwnerLock,
    PoolBusy,
    owner_lock_is_free,
)
from kvtier_ops.pool import PoolDirectoryError

from .conftest import StartChild

HOLD = """
import sys
from pathlib import Path
from kvtier_ops.locks import OwnerLock
lock = OwnerLock.acquire(Path(sys.argv[1]))
print(lock.name, flush=True)
sys.stdin.read()
"""

FORK_AND_HOLD = """
import os, signal, sys
from pathlib import Path
from kvtier_ops.locks import OwnerLock
lock = OwnerLock.acquire(Path(sys.argv[1]))
if os.fork() == 0:
    print(lock.name, os.getpid(), flush=True)
    signal.alarm(60)  # it may outlive a failed test, but not for long
    signal.pause()
else:
    sys.stdin.readline()
    lock.release()
    print("released", flush=True)
    sys.stdin.read()
"""


def wait_until_free(directory: Path, name: str) -> None:
    deadline = time.monotonic() + 30
    while not owner_lock_is_free(directory, name):
        assert time.monotonic() < deadline, f"owner lock {name} was never freed"
        os.sched_yield()


def read_line(child: object) -> str:
    return str(child.stdout.readline()).strip()  # type: ignore[attr-defined]


def test_an_owner_lock_is_taken_while_its_process_lives_and_free_after_sigkill(
    pool_directory: Path, start_child: StartChild
) -> None:
    child = start_child(HOLD, pool_directory)
    name = read_line(child)
    assert not owner_lock_is_free(pool_directory, name)
    child.kill()
    child.wait()
    wait_until_free(pool_directory, name)
    assert not (pool_directory / "owners" / name).exists()


def test_a_forked_child_keeps_its_dead_parents_lock(pool_directory: Path, start_child: StartChild) -> None:
    parent = start_child(FORK_AND_HOLD, pool_directory)
    name, child_pid = read_line(parent).split()
    parent.kill()
    parent.wait()
    assert not owner_lock_is_free(pool_directory, name)
    os.kill(int(child_pid), signal.SIGKILL)
    wait_until_free(pool_directory, name)


def test_a_release_does_not_free_the_lock_under_a_forked_child(
    pool_directory: Path, start_child: StartChild
) -> None:
    parent = start_child(FORK_AND_HOLD, pool_directory)
    name, child_pid = read_line(parent).split()
    assert parent.stdin is not None
    parent.stdin.write("release\n")
    parent.stdin.flush()
    assert read_line(parent) == "released"
    assert not owner_lock_is_free(pool_directory, name)
    os.kill(int(child_pid), signal.SIGKILL)
    wait_until_free(pool_directory, name)


def test_a_released_lock_is_free_and_its_file_gone(pool_directory: Path) -> None:
    lock = OwnerLock.acquire(pool_directory)
    path = pool_directory / "owners" / lock.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not owner_lock_is_free(pool_directory, lock.name)
    lock.release()
    lock.release()
    assert not path.exists()
    assert owner_lock_is_free(pool_directory, lock.name)


@pytest.mark.parametrize("name", ["", "../daemon.lock", "abc/def", "ABC", "a" * 65, "0x1", "a\n"])
def test_a_lock_name_that_is_not_hex_is_refused(pool_directory: Path, name: str) -> None:
    with pytest.raises(PoolDirectoryError, match="hex"):
        owner_lock_is_free(pool_directory, name)


@pytest.mark.parametrize("kind", ["directory", "link", "dangling link", "socket", "unreachable"])
def test_a_lock_that_cannot_be_tried_is_not_free(pool_directory: Path, kind: str) -> None:
    held = OwnerLock.acquire(pool_directory)
    path = pool_directory / "owners" / "abc"
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(pool_directory)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        (pool_directory / "owners").rename(pool_directory / "aside")
        (pool_directory / "owners").touch()
    assert not owner_lock_is_free(pool_directory, "abc")
    if kind != "unreachable":
        assert set(OwnerLocks(pool_directory).hold_all()) == {held.name, "abc"}
    held.release()


def test_a_lock_is_not_free_for_who_has_no_descriptor_left_to_try_it(pool_directory: Path) -> None:
    held = OwnerLock.acquire(pool_directory)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        is_free = owner_lock_is_free(pool_directory, held.name)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not is_free
    held.release()


def test_a_second_daemon_is_told_the_pid_of_the_first(pool_directory: Path, start_child: StartChild) -> None:
    first = start_child(
        """
import sys
from pathlib import Path
from kvtier_ops.locks import DaemonLock
lock = DaemonLock.acquire(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
""",
        pool_directory,
    )
    assert read_line(first) == "ready"
    with pytest.raises(PoolBusy, match=f"pid {first.pid}") as raised:
        DaemonLock.acquire(pool_directory)
    assert raised.value.pid == first.pid
    first.kill()
    first.wait()
    DaemonLock.acquire(pool_directory).release()


def test_a_daemon_lock_can_be_taken_again_after_its_release(pool_directory: Path) -> None:
    DaemonLock.acquire(pool_directory).release(unlink=True)
    lock = DaemonLock.acquire(pool_directory)
    assert (pool_directory / "daemon.lock").read_text().strip() == str(os.getpid())
    lock.release()
    lock.release()


def test_locks_refuse_a_directory_that_others_can_reach(pool_directory: Path) -> None:
    pool_directory.chmod(0o755)
    with pytest.raises(PoolDirectoryError, match="chmod 700"):
        OwnerLock.acquire(pool_directory)
    with pytest.raises(PoolDirectoryError, match="mode 0755"):
        DaemonLock.acquire(pool_directory)


def test_a_gate_is_the_engines_when_no_copy_runs_and_then_none_begins(pool_directory: Path) -> None:
    name = CopyGate.create(pool_directory)
    copies, engine = CopyGate.open(pool_directory, name), CopyGate.open(pool_directory, name)
    CopyGate.remove(pool_directory, name)  # who has it open keeps it
    assert copies.enter()
    assert copies.enter()
    assert not engine.take()
    copies.leave()
    assert not engine.take(), "one copy still runs"
    copies.close()  # which waits for that one
    assert not engine.take()
    copies.leave()
    assert engine.take()
    assert engine.take(), "it has it"
    assert not copies.enter()
    engine.close()
    assert not engine.take(), "it has let go of it"


def test_a_gate_is_free_when_the_process_that_copied_is_killed(
    pool_directory: Path, start_child: StartChild
) -> None:
    name = CopyGate.create(pool_directory)
    engine = CopyGate.open(pool_directory, name)
    child = start_child(
        "import sys\nfrom pathlib import Path\nfrom kvtier_ops.locks import CopyGate\n"
        "gate = CopyGate.open(Path(sys.argv[1]), sys.argv[2])\n"
        "print(gate.enter(), flush=True)\nsys.stdin.read()",
        str(pool_directory),
        name,
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "True"
    assert not engine.take()
    child.kill()
    child.wait()
    assert engine.take()


def test_a_gate_is_only_opened_by_its_name(pool_directory: Path) -> None:
    CopyGate.create(pool_directory)
    for name in ("../daemon.lock", "", "ABC", "a/b"):
        with pytest.raises(PoolDirectoryError, match="not the name of a gate"):
            CopyGate.open(pool_directory, name)
    with pytest.raises(FileNotFoundError):
        CopyGate.open(pool_directory, "abc")
    CopyGate.remove_all(pool_directory)
    assert not list((pool_directory / "gates").iterdir())
