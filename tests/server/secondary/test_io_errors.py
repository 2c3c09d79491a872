from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from tests.daemon_process import wait_until

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import JobKind, Outcome, TierChunk, TierJob
from kvtier_server.secondary.io_errors import IO_ERRNOS, OTHER_ERRNO, errno_name
from kvtier_server.secondary.workers import ChunkResult, RunChunk, TierWorkers

CHUNK = TierChunk(SpaceName("ns", "", 1), b"key", b"geometry", 4096, 1)


class Medium:
    """Fails as it is told."""

    def __init__(self) -> None:
        self.error = OSError(errno.EIO, "worn")

    def run(self, kind: JobKind, chunk: TierChunk) -> ChunkResult:
        raise self.error


def make_workers(run_chunk: RunChunk, deadline_s: float) -> TierWorkers:
    return TierWorkers(
        "tier",
        run_chunk,
        lambda: None,
        num_readers=1,
        num_writers=1,
        max_queued_bytes=1 << 20,
        deadline_s=deadline_s,
    )


@pytest.fixture
def medium() -> Medium:
    return Medium()


@pytest.fixture
def workers(medium: Medium) -> Iterator[TierWorkers]:
    workers = make_workers(medium.run, 60.0)
    yield workers
    workers.stop(10.0)


def run_one(workers: TierWorkers, number: int) -> None:
    """Run one job of one chunk to its end."""
    assert workers.submit(TierJob(number, JobKind.LOAD, (CHUNK,)))
    wait_until(lambda: bool(workers.get_finished()), "the job ends")


def test_errors_are_counted_by_name_and_unknown_ones_together(workers: TierWorkers, medium: Medium) -> None:
    medium.error = OSError(errno.ENOSPC, "full")
    run_one(workers, 1)
    run_one(workers, 2)
    medium.error = OSError(errno.EHOSTUNREACH, "away")
    run_one(workers, 3)
    assert dict(workers.io_errors) == {"ENOSPC": 2, OTHER_ERRNO: 1}


def test_what_comes_after_its_deadline_counts_as_timed_out() -> None:
    workers = make_workers(lambda kind, chunk: ChunkResult(Outcome.DONE), 0.0)
    try:
        run_one(workers, 1)
        assert dict(workers.io_errors) == {"ETIMEDOUT": 1}
    finally:
        workers.stop(10.0)


def test_every_error_has_one_of_the_known_names() -> None:
    names = {errno_name(OSError(number, "")) for number in errno.errorcode}
    assert names | {errno_name(OSError("without a number"))} == set(IO_ERRNOS)
