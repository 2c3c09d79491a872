"""The threads that copy, and in which order they take their tasks.

Owns at most two threads and one queue. Knows nothing of pools, sessions or what a task does.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kvtier_client.jobs import JobId, JobKind

logger = logging.getLogger(__name__)

MAX_THREADS = 2
"""Two saturate the memory of most hosts; more would only fight the engine's forward pass for the GIL."""


@dataclass(eq=False, slots=True)
class CopyTask:
    """A piece of a job. A `run` that raises is logged and over; it has to note its end all the same."""

    job_id: JobId
    kind: JobKind
    run: Callable[[], None]
    taken: bool = False


class CopyThreads:
    """Runs tasks: waited-for ones first, then loads, then stores; each kind in the order it came.

    The threads start with the first task, so that a process may fork before that.
    """

    def __init__(self, num_threads: int) -> None:
        if not 1 <= num_threads <= MAX_THREADS:
            raise ValueError(f"num_threads must be 1 to {MAX_THREADS}, not {num_threads}")
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int, CopyTask]] = []
        self._order = itertools.count()
        self._running = 0
        self._closing = False
        self._threads: list[threading.Thread] = []

    def submit(self, tasks: Iterable[CopyTask]) -> None:
        """Queue tasks. Must not be called after `close`.

        Raises RuntimeError, with nothing queued, where the system has no thread left to run them.
        """
        with self._changed:
            assert not self._closing, "a task was submitted after close"
            self._start_threads()
            for task in tasks:
                heapq.heappush(self._queue, (_rank(task, hurried=False), next(self._order), task))
            self._changed.notify_all()

    def hurry(self, job_ids: Collection[JobId]) -> None:
        """Put the queued tasks of these jobs before all others."""
        with self._changed:
            # A second entry before the first: whichever comes first takes the task, the other finds it taken.
            for _, order, task in [entry for entry in self._queue if entry[2].job_id in job_ids]:
                if not task.taken:
                    heapq.heappush(self._queue, (_rank(task, hurried=True), order, task))

    def withdraw(self) -> list[CopyTask]:
        """Take every queued task out of the queue and return it; running ones go on."""
        with self._changed:
            withdrawn: list[CopyTask] = []
            for _, _, task in self._queue:
                if not task.taken:
                    task.taken = True
                    withdrawn.append(task)
            self._queue.clear()
            return withdrawn

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; True at once if nothing does. Queued tasks do not count."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Let the running tasks finish, and end the threads. Queued tasks are not run: `withdraw` first."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        while len(self._threads) < self._num_threads:
            # Daemon: an engine that dies without `close` must not hang on them.
            name = f"kvtier-copy-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
                return  # one copies as well, only slower
            self._threads.append(thread)

    def _work(self) -> None:
        while (task := self._next()) is not None:
            try:
                task.run()
            except Exception:
                logger.exception("a task of job %d failed; the thread goes on", task.job_id)
            # A task holds views of the pool, which keep its mapping: let go before waiting for the next.
            del task
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _next(self) -> CopyTask | None:
        with self._changed:
            while True:
                if self._closing:
                    return None
                while self._queue:
                    _, _, task = heapq.heappop(self._queue)
                    if not task.taken:
                        task.taken = True
                        self._running += 1
                        return task
                self._changed.wait()


def _rank(task: CopyTask, *, hurried: bool) -> int:
    return (0 if hurried else 2) + (task.kind is JobKind.STORE)
