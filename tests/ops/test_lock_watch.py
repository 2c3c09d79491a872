from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtier_ops.directory import PoolDirectoryError
from kvtier_ops.lock_watch import OwnerLocks, WatchedLock
from kvtier_ops.locks import DaemonLock, OwnerLock


@pytest.fixture
def daemon_lock(pool_directory: Path) -> Iterator[DaemonLock]:
    """What a daemon holds before it watches others."""
    lock = DaemonLock.acquire(pool_directory)
    yield lock
    lock.release()


@pytest.fixture
def locks(pool_directory: Path, daemon_lock: DaemonLock) -> OwnerLocks:
    return OwnerLocks(pool_directory)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("what", ["file", "owners", "directory"])
def test_a_living_process_keeps_its_lock_whatever_is_removed_below_it(
    pool_directory: Path, locks: OwnerLocks, what: str
) -> None:
    owner = OwnerLock.acquire(pool_directory)
    assert locks.hold(owner.name)
    if what == "file":
        (pool_directory / "owners" / owner.name).unlink()
    else:
        shutil.rmtree(pool_directory / "owners" if what == "owners" else pool_directory)
    assert not locks.is_free(owner.name)
    assert locks.hold(owner.name), "it attaches again"
    owner.release()
    assert locks.is_free(owner.name)
    assert locks.is_free(owner.name), "and stays free"
    assert not locks.hold(owner.name)


def test_a_lock_without_a_file_is_free_only_in_the_directory_that_the_daemon_has_locked(
    pool_directory: Path, locks: OwnerLocks
) -> None:
    assert locks.is_free("abc")
    (pool_directory / "daemon.lock").rename(pool_directory / "aside")
    assert not locks.is_free("abc")
    (pool_directory / "daemon.lock").touch()
    assert not locks.is_free("abc"), "it is another daemon's"


@pytest.mark.parametrize(
    "kind", ["nothing", "directory", "link", "dangling link", "socket", "pipe", "unlocked"]
)
def test_what_is_no_locked_file_is_not_held(pool_directory: Path, locks: OwnerLocks, kind: str) -> None:
    owner = OwnerLock.acquire(pool_directory)
    path, before = pool_directory / "owners" / "abc", num_open()
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(owner.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "unlocked":
        path.touch()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    assert not locks.hold("abc")
    assert (len(locks), num_open()) == (0, before)
    owner.release()


def test_a_lock_costs_one_descriptor_until_it_is_free_or_let_go(
    pool_directory: Path, locks: OwnerLocks
) -> None:
    owners = [OwnerLock.acquire(pool_directory) for _ in range(8)]
    before = num_open()
    for owner in owners * 2:
        assert locks.hold(owner.name)
    assert num_open() == before + len(owners)
    for owner in owners[:4]:
        owner.release()
        assert locks.is_free(owner.name)
    assert num_open() == before
    for owner in owners:
        locks.let_go(owner.name)
    assert (len(locks), num_open()) == (0, before - 4)
    for owner in owners:
        owner.release()


def test_without_a_descriptor_nothing_is_held_and_that_is_said(
    pool_directory: Path, locks: OwnerLocks
) -> None:
    owner = OwnerLock.acquire(pool_directory)
    with no_descriptor_left(), pytest.raises(OSError, match="open files") as raised:
        locks.hold(owner.name)
    assert raised.value.errno == errno.EMFILE
    assert locks.hold(owner.name)
    with no_descriptor_left():
        assert not locks.is_free(owner.name)
    owner.release()


def test_all_locks_that_are_held_are_found_and_watched(pool_directory: Path, locks: OwnerLocks) -> None:
    assert locks.hold_all() == []
    dead, living = OwnerLock.acquire(pool_directory), OwnerLock.acquire(pool_directory)
    os.close(dead.fd)
    assert locks.hold_all() == [living.name]
    assert os.listdir(pool_directory / "owners") == [living.name]
    (pool_directory / "owners" / living.name).unlink()
    assert not locks.is_free(living.name)
    living.release()


def test_a_file_of_another_owner_in_the_place_of_a_dead_ones_is_left_alone(
    pool_directory: Path, locks: OwnerLocks
) -> None:
    owner = OwnerLock.acquire(pool_directory)
    assert locks.hold(owner.name)
    path = pool_directory / "owners" / owner.name
    path.unlink()
    path.touch()
    os.close(owner.fd)
    assert locks.is_free(owner.name)
    assert path.exists()


def test_a_lock_that_was_closed_proves_nothing(pool_directory: Path) -> None:
    owner = OwnerLock.acquire(pool_directory)
    watched = WatchedLock.open(pool_directory, owner.name)
    watched.close()
    owner.release()
    assert not watched.is_free()
    with pytest.raises(PoolDirectoryError, match="hex"):
        WatchedLock.open(pool_directory, "../daemon.lock")
