"""The background registration with mlock in the place of cudaHostRegister: it pins memory too."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from kvtier_ops.pinning import PinnedPool, Registrar

PAGE = 4096
WAIT_S = 20.0
_libc = ctypes.CDLL(None, use_errno=True)


def mlock(address: int, nbytes: int) -> None:
    if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def munlock_page(address: int) -> None:
    if _libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(4 * PAGE)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def locked_kib() -> int:
    found = re.search(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1])


@pytest.fixture
def memory() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(mmap.mmap(-1, 14 * PAGE), np.uint8)


def test_the_pool_is_registered_piece_by_piece_and_given_back(
    memory: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> None:
    before = locked_kib()
    pinned = PinnedPool(memory, Registrar(mlock, munlock_page), 4 * PAGE)
    assert pinned.wait(WAIT_S)
    assert pinned.boundaries == (4 * PAGE, 8 * PAGE, 12 * PAGE)
    assert (pinned.ready_bytes, pinned.error) == (memory.size, "")
    assert locked_kib() == before + 14 * 4
    # The last piece is short; munlock of four pages there would reach behind the mapping.
    _libc.munlock(ctypes.c_void_p(memory.ctypes.data + 12 * PAGE), ctypes.c_size_t(2 * PAGE))
    pinned.close()
    assert locked_kib() == before
    assert pinned.ready_bytes == 0


def test_what_is_registered_is_usable_while_the_next_piece_is_under_way(
    memory: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> None:
    reached, go = threading.Semaphore(0), threading.Semaphore(0)

    def register(address: int, nbytes: int) -> None:
        reached.release()
        assert go.acquire(timeout=WAIT_S)
        mlock(address, nbytes)

    pinned = PinnedPool(memory, Registrar(register, munlock_page), 4 * PAGE)
    assert reached.acquire(timeout=WAIT_S)
    assert pinned.ready_bytes == 0
    go.release()
    assert reached.acquire(timeout=WAIT_S)
    assert pinned.ready_bytes == 4 * PAGE
    assert not pinned.wait(0.0)
    for _ in range(3):
        go.release()
    assert pinned.wait(WAIT_S)
    pinned.close()


def test_a_piece_that_is_refused_ends_it_and_says_why(
    memory: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> None:
    first = memory.ctypes.data

    def register(address: int, nbytes: int) -> None:
        mlock(address if address < first + 8 * PAGE else 0, nbytes)  # nothing is mapped at 0

    pinned = PinnedPool(memory, Registrar(register, munlock_page), 4 * PAGE)
    assert not pinned.wait(WAIT_S)
    assert pinned.ready_bytes == 8 * PAGE
    assert "at 32768 cannot be registered: [Errno 12]" in pinned.error
    assert pinned.close() == ""
