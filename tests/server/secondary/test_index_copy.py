"""What becomes of an index whose copy cannot be written for long: a full or read-only state directory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.holdings import Name
from kvtier_server.secondary.index import Index, IndexFile
from kvtier_server.secondary.index_copy import FIRST_PAUSE_S, MAX_GONE, MAX_PAUSE_S, IndexCopy

SPACE = SpaceName("n" * 64, "", 1)


class Bench:
    """An index, its file and its copy; and a clock that moves when it is told to."""

    def __init__(self, path: Path) -> None:
        self.index = Index()
        self.file = IndexFile(path)
        self.was_closed = self.file.open()
        for name, num_bytes, is_own in self.file.read():
            self.index.restore(name, num_bytes, is_own=is_own)
        self.now = 0.0
        self.numbers = itertools.count(1_000)
        self.copy = IndexCopy(self.index, self.file, "disk", lambda: self.now)

    def let_write(self, *, is_allowed: bool) -> None:
        """Let sqlite refuse to write, as in a directory that is read-only, or not any more."""
        assert self.file._connection is not None
        self.file._connection.execute(f"PRAGMA query_only = {int(not is_allowed)}")

    def add(self, number: int) -> None:
        self.index.add(name(number), 1, is_own=True, stamp=number)

    def close(self) -> None:
        written = self.copy.write(at_once=True)
        self.file.close(in_order=written is not None and self.copy.is_whole)


def name(number: int) -> Name:
    return SPACE, number.to_bytes(8, "big")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def bench(path: Path) -> Iterator[Bench]:
    made = Bench(path)
    yield made
    made.file.close()


def churn(bench: Bench, count: int) -> None:
    """Let chunks come and go, each another one."""
    for number in itertools.islice(bench.numbers, count):
        bench.add(number)
        bench.index.remove(name(number))


def test_changes_that_cannot_be_written_are_bounded_and_then_the_copy_is_not_trusted(
    bench: Bench, path: Path
) -> None:
    bench.add(1)
    assert bench.copy.write() == 1
    bench.let_write(is_allowed=False)
    for _ in range(4):
        churn(bench, MAX_GONE // 2)
        bench.add(2)
        assert bench.copy.write() is None
        assert len(bench.index._changed) <= 2 * len(bench.index) + MAX_GONE
        churn(bench, MAX_GONE // 2 + 10)
        bench.copy.write()
    assert not bench.copy.is_whole
    bench.let_write(is_allowed=True)
    bench.add(3)
    bench.close()
    assert not Bench(path).was_closed, "what is on disk is looked for"


def test_a_few_changes_wait_until_the_copy_can_be_written_and_nothing_is_lost(
    bench: Bench, path: Path
) -> None:
    bench.add(1)
    bench.add(2)
    bench.let_write(is_allowed=False)
    assert bench.copy.write() is None
    bench.index.remove(name(1))
    bench.add(3)
    bench.let_write(is_allowed=True)
    bench.close()
    after = Bench(path)
    assert after.was_closed
    assert after.index.names() == [name(2), name(3)]


def test_a_copy_that_cannot_be_written_is_tried_less_and_less_often(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.let_write(is_allowed=False)
    bench.add(1)
    tried = []
    for _ in range(300):
        with caplog.at_level(logging.WARNING):
            bench.copy.write()
        if caplog.records:
            tried.append(bench.now)
        caplog.clear()
        bench.now += 1.0
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (FIRST_PAUSE_S, MAX_PAUSE_S)
    bench.let_write(is_allowed=True)
    bench.now += MAX_PAUSE_S
    assert bench.copy.write() == 1
    bench.add(2)
    assert bench.copy.write() == 1, "and at once again after that"
