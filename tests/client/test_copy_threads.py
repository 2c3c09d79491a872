from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from kvtier_client.copy_threads import MAX_THREADS, CopyTask, CopyThreads
from kvtier_client.jobs import JobId, JobKind

LONG_S = 20.0


class Gate:
    """A task that holds its thread until the test opens it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def run(self) -> None:
        self.entered.set()
        assert self.opened.wait(LONG_S)


@pytest.fixture
def threads() -> Iterator[CopyThreads]:
    made = CopyThreads(1)
    yield made
    made.withdraw()
    made.close()


def task(job_id: int, kind: JobKind, run: Callable[[], None]) -> CopyTask:
    return CopyTask(JobId(job_id), kind, run)


def run_in_order(threads: CopyThreads, tasks: list[tuple[int, JobKind]], hurried: set[int]) -> list[int]:
    """Queue the tasks while the only thread is busy, and return the jobs in the order in which they ran."""
    gate = Gate()
    ran: list[int] = []
    threads.submit([task(99, JobKind.STORE, gate.run)])
    assert gate.entered.wait(LONG_S)
    for job_id, kind in tasks:
        threads.submit([task(job_id, kind, lambda job_id=job_id: ran.append(job_id))])  # type: ignore[misc]
    threads.hurry({JobId(job_id) for job_id in hurried})
    last = threading.Event()
    threads.submit([task(100, JobKind.STORE, last.set)])
    gate.opened.set()
    assert last.wait(LONG_S)
    return ran


def test_loads_go_before_stores_each_in_the_order_they_came(threads: CopyThreads) -> None:
    tasks = [(1, JobKind.STORE), (2, JobKind.LOAD), (3, JobKind.STORE), (4, JobKind.LOAD)]

    assert run_in_order(threads, tasks, set()) == [2, 4, 1, 3]


def test_a_job_that_is_waited_for_goes_before_all_others(threads: CopyThreads) -> None:
    tasks = [(1, JobKind.LOAD), (2, JobKind.LOAD), (3, JobKind.STORE), (4, JobKind.STORE)]

    assert run_in_order(threads, tasks, {4, 2}) == [2, 4, 1, 3]


def test_withdrawn_tasks_are_returned_once_and_never_run(threads: CopyThreads) -> None:
    gate = Gate()
    ran: list[int] = []
    threads.submit([task(1, JobKind.LOAD, gate.run)])
    assert gate.entered.wait(LONG_S)
    threads.submit(
        [task(2, JobKind.LOAD, lambda: ran.append(2)), task(3, JobKind.STORE, lambda: ran.append(3))]
    )
    threads.hurry({JobId(3)})

    assert sorted(withdrawn.job_id for withdrawn in threads.withdraw()) == [2, 3]
    assert threads.withdraw() == []
    gate.opened.set()
    assert threads.wait_idle(LONG_S)
    assert ran == []


def test_idle_is_when_nothing_runs(threads: CopyThreads) -> None:
    assert threads.wait_idle(0)
    gate = Gate()
    threads.submit([task(1, JobKind.LOAD, gate.run)])
    assert gate.entered.wait(LONG_S)
    assert not threads.wait_idle(0)
    gate.opened.set()
    assert threads.wait_idle(LONG_S)


def test_a_task_that_raises_leaves_its_thread_at_work(threads: CopyThreads) -> None:
    def fail() -> None:
        raise OSError("the device is gone")

    threads.submit([task(number, JobKind.LOAD, fail) for number in range(2 * MAX_THREADS)])
    done = threading.Event()
    threads.submit([task(9, JobKind.STORE, done.set)])
    assert done.wait(LONG_S)
    assert threads.wait_idle(LONG_S)


def test_close_ends_the_threads() -> None:
    before = threading.active_count()
    made = CopyThreads(2)
    done = threading.Event()
    made.submit([task(1, JobKind.LOAD, done.set)])
    assert done.wait(LONG_S)
    made.close()

    assert threading.active_count() == before


@pytest.mark.parametrize("count", [0, 3])
def test_more_threads_than_two_or_none_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="num_threads must be 1 to 2"):
        CopyThreads(count)
