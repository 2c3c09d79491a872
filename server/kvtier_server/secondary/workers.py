"""The threads of one tier: jobs in, chunk by chunk over readers and writers, results out.

Owns queues, deadlines and the tier's backpressure. Knows nothing of the medium: the tier hands in one
function that does the I/O of one chunk. Reads have threads of their own, so no promotion waits for a cascade.

A thread cannot be stopped in the middle of an I/O, so a job whose I/O hangs stays under way, with its slots
pinned, until the medium answers; what has not begun by then fails at its deadline.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread, current_thread

from kvtier_server.secondary.backpressure import Backpressure
from kvtier_server.secondary.base import (
    Change,
    ClearJob,
    ClearResult,
    EvictJob,
    JobKind,
    JobResult,
    OffloadingSpec,
    Outcome,
    Removal,
    SecondaryTier,
    TierChunk,
    TierJob,
)
from kvtier_server.secondary.holdings import Holdings, Name
from kvtier_server.secondary.io_errors import errno_name
from kvtier_server.secondary.parameters import TierParameters

logger = logging.getLogger(__name__)

MAX_QUEUED_READS = 16_384
"""Chunks that wait to be read or looked for."""

MAX_CLEARINGS = 64
"""Clearings that wait; one more is refused."""


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What became of one chunk; `checksums` of its parts where it was loaded."""

    outcome: Outcome
    checksums: tuple[int, ...] = ()


RunChunk = Callable[[JobKind, TierChunk], ChunkResult]
"""Does the I/O of one chunk, on a worker thread. An OSError counts as an error of the medium."""


@dataclass(slots=True)
class _Running:
    """A job, and what its chunks came to so far."""

    job: TierJob
    deadline: float
    left: int
    results: list[ChunkResult] = field(default_factory=list)
    seconds: float = 0.0


_Task = tuple[_Running, int]


class WorkedTier(SecondaryTier):
    """A tier whose jobs all go to its `_workers`."""

    _workers: TierWorkers

    def submit_store(self, job: TierJob) -> bool:
        return self._workers.submit(job)

    def submit_load(self, job: TierJob) -> bool:
        return self._workers.submit(job)

    def get_finished(self) -> Sequence[JobResult]:
        return self._workers.get_finished()

    def has_work(self) -> bool:
        return self._workers.has_work


class KeptTier(WorkedTier):
    """A tier with a thread of its own beside its workers, its keeper, which removes what is cleared.

    `_changed` wakes the keeper; `_lock` is for what the core takes; `_holdings` follow its index, in a
    class that says `can_list`.
    """

    can_clear = True
    _holdings: Holdings

    def __init__(
        self,
        spec: OffloadingSpec,
        pool: memoryview,
        tier_type: str,
        on_finished: Callable[[], None],
        parameters: TierParameters,
    ) -> None:
        super().__init__(spec, pool, tier_type, on_finished, parameters)
        self._lock = Lock()
        self._removed: list[Removal] = []
        self._cleared: list[ClearResult] = []
        self._changed = Condition()
        self._clearing: list[ClearJob | EvictJob] = []
        self._stopped = False

    def get_removed(self) -> Sequence[Removal]:
        if not self._removed:
            return ()
        with self._lock:
            removed, self._removed = self._removed, []
        return removed

    def get_changes(self, max_changes: int) -> Sequence[Change] | None:
        return self._holdings.get_changes(max_changes)

    def list_chunks(self, place: int, num_places: int) -> tuple[Sequence[Name], int | None]:
        return self._holdings.chunks_from(place, num_places)

    def submit_clear(self, job: ClearJob) -> bool:
        return self._submit_clearing(job)

    def submit_evict(self, job: EvictJob) -> bool:
        return self._submit_clearing(job)

    def _submit_clearing(self, job: ClearJob | EvictJob) -> bool:
        with self._changed:
            if self._stopped or len(self._clearing) >= MAX_CLEARINGS:
                return False
            self._clearing.append(job)
            self._changed.notify_all()
        return True

    def get_cleared(self) -> Sequence[ClearResult]:
        if not self._cleared:
            return ()
        with self._lock:
            cleared, self._cleared = self._cleared, []
        return cleared

    def _take_clearing(self, wait_s: float) -> list[ClearJob | EvictJob]:
        """Take what is to be cleared, for the keeper; wait until there is something, or the tier ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or bool(self._clearing), wait_s)
            clearing, self._clearing = self._clearing, []
        return clearing

    def _clear_all(self, jobs: Sequence[ClearJob | EvictJob]) -> None:
        for job in jobs:
            try:
                if isinstance(job, ClearJob):
                    self._clear(job)
                else:
                    self._tell_cleared(ClearResult(job.id, *self._evict_coldest(job.num_bytes)))
            except Exception:
                logger.exception("tier %s: clearing failed; this is a bug", self.tier_type)
                self._tell_cleared(ClearResult(job.id, 0, 0, self.stats().num_chunks))

    def _evict_coldest(self, num_bytes: int) -> tuple[int, int]:
        """Remove what goes first, for an operator, on the keeper's thread. Returns chunks and bytes."""
        raise NotImplementedError(f"{type(self).__name__} evicts nothing by order; see can_evict")

    @abstractmethod
    def _clear(self, job: ClearJob) -> None:
        """Remove what the job covers, on the keeper's thread, and tell its end."""

    def _tell_removed(self, removed: Iterable[Removal]) -> None:
        with self._lock:
            self._removed += removed

    def _tell_cleared(self, result: ClearResult) -> None:
        with self._lock:
            self._cleared.append(result)
        self.on_finished()

    def _stop(self) -> bool:
        """Tell the keeper to end; False if it was told before."""
        with self._changed:
            was_stopped, self._stopped = self._stopped, True
            self._changed.notify_all()
        return not was_stopped


class TierWorkers:
    """Runs the jobs of one tier. Every method may be called from any thread; none but `stop` waits."""

    def __init__(
        self,
        name: str,
        run_chunk: RunChunk,
        on_finished: Callable[[], None],
        *,
        num_readers: int,
        num_writers: int,
        max_queued_bytes: int,
        deadline_s: float,
    ) -> None:
        """Start the threads. `deadline_s`: what a chunk may take from its submission on."""
        self.name = name
        self.backpressure = Backpressure(max_queued_bytes)
        self.last_error = ""
        self._io_errors: Counter[str] = Counter()
        self._run_chunk = run_chunk
        self._on_finished = on_finished
        self._deadline_s = deadline_s
        self._lock = Lock()
        self._reads: deque[_Task] = deque()
        self._writes: deque[_Task] = deque()
        # One for each queue: a thread that waits for the other one must not be woken in vain.
        self._read_ready, self._write_ready = Condition(self._lock), Condition(self._lock)
        self._finished: deque[JobResult] = deque()
        self._num_jobs = 0
        self._running_since: dict[str, float] = {}
        self._stopped = False
        self._threads = [
            Thread(target=self._work, args=(queue, ready), name=f"kvtier-{name}-{kind}-{number}", daemon=True)
            for kind, queue, ready, num_threads in (
                ("read", self._reads, self._read_ready, num_readers),
                ("write", self._writes, self._write_ready, num_writers),
            )
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: TierJob) -> bool:
        """Take a job; False if there is too much to do, or the medium is out of order."""
        running = _Running(job, time.monotonic() + self._deadline_s, len(job.chunks))
        running.results = [ChunkResult(Outcome.FAILED)] * len(job.chunks)
        is_store = job.kind is JobKind.STORE
        with self._lock:
            now = time.monotonic()
            if self._stopped:
                return False
            if is_store:
                if not self.backpressure.admits(job.num_bytes, now):
                    return False
                self.backpressure.queued(job.num_bytes)
            elif (
                len(self._reads) + len(job.chunks) > MAX_QUEUED_READS
                or self._oldest_s(now) > self._deadline_s
                or not self.backpressure.admits_trial(now)
            ):
                return False
            self._num_jobs += 1
            queue = self._writes if is_store else self._reads
            queue.extend((running, index) for index in range(len(job.chunks)))
            (self._write_ready if is_store else self._read_ready).notify(len(job.chunks))
        return True

    def get_finished(self) -> Sequence[JobResult]:
        """Return the jobs that have ended since the last call."""
        if not self._finished:
            return ()
        with self._lock:
            finished = list(self._finished)
            self._finished.clear()
        return finished

    @property
    def has_work(self) -> bool:
        """Whether jobs are queued, running, or waiting to be taken by `get_finished`."""
        return bool(self._num_jobs or self._finished)

    @property
    def oldest_s(self) -> float:
        """Seconds that the longest I/O has been running."""
        with self._lock:
            return self._oldest_s(time.monotonic())

    def _oldest_s(self, now: float) -> float:
        began = min(self._running_since.values(), default=None)
        return 0.0 if began is None else now - began

    def try_again(self) -> None:
        """Use a medium that was left alone: something has shown that it works again."""
        with self._lock:
            self.backpressure.worked()

    @property
    def problem(self) -> str:
        """One line about what is wrong, "" if nothing is."""
        oldest_s = self.oldest_s
        if oldest_s > self._deadline_s:
            return f"an I/O has been running for {oldest_s:.0f} s; waiting for the medium"
        if self.backpressure.is_tripped:
            return f"left alone after {self.last_error}; tried again by itself"
        return ""

    @property
    def io_errors(self) -> tuple[tuple[str, int], ...]:
        """I/O that failed since the start, as `TierStats` has it."""
        with self._lock:
            return tuple(self._io_errors.items())

    def stop(self, timeout_s: float) -> bool:
        """End the threads; what has not begun fails. False if an I/O hangs: its thread is left behind."""
        give_up_at = time.monotonic() + timeout_s
        with self._lock:
            self._stopped = True
            for queue in (self._reads, self._writes):
                while queue:
                    self._end(*queue.popleft(), ChunkResult(Outcome.FAILED))
            self._read_ready.notify_all()
            self._write_ready.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self, queue: deque[_Task], ready: Condition) -> None:
        name = current_thread().name
        while True:
            with self._lock:
                ready.wait_for(lambda: queue or self._stopped)
                if not queue:
                    return
                running, index = queue.popleft()
                began = time.monotonic()
                late = began >= running.deadline
                if late:
                    self.backpressure.undecided()
                else:
                    self._running_since[name] = began
            is_error = False
            result = ChunkResult(Outcome.FAILED)
            if not late:
                found = self._run(running.job, index)
                is_error, result = found is None, found or result
            ended = time.monotonic()
            with self._lock:
                self._running_since.pop(name, None)
                if ended >= running.deadline:
                    # Whoever waited has gone on without it: the slot is freed, and nothing else.
                    result = ChunkResult(Outcome.FAILED)
                    if not is_error:
                        self._io_errors["ETIMEDOUT"] += 1
                    if not late and not is_error:
                        self._note_error(f"an I/O that took {ended - began:.1f} s")
                elif result.outcome is Outcome.REFUSED:
                    self.backpressure.undecided()
                elif not is_error:
                    self.backpressure.worked()
                running.seconds = max(running.seconds, ended - began)
                is_last = self._end(running, index, result)
                if running.job.kind is JobKind.STORE and result.outcome is Outcome.DONE:
                    self.backpressure.written(running.job.chunks[index].num_bytes, ended - began)
            if is_last:
                self._on_finished()

    def _run(self, job: TierJob, index: int) -> ChunkResult | None:
        """Do the I/O of one chunk; None for an error, which is noted."""
        try:
            return self._run_chunk(job.kind, job.chunks[index])
        except OSError as error:
            with self._lock:
                self._io_errors[errno_name(error)] += 1
                self._note_error(f"{type(error).__name__}: {error.strerror or error}")
        except Exception as error:
            with self._lock:
                self._io_errors["other"] += 1
                self._note_error(f"{type(error).__name__}: {error}")
            logger.exception("tier %s: %s failed; this is a bug", self.name, job.kind)
        return None

    def _note_error(self, what: str) -> None:
        """Note an error of the medium, with the lock held."""
        self.last_error = what
        if self.backpressure.failed(time.monotonic()):
            logger.warning("tier %s is left alone after errors in a row, the last: %s", self.name, what)

    def _end(self, running: _Running, index: int, result: ChunkResult) -> bool:
        """Note the end of one chunk, with the lock held; True if it was the job's last."""
        running.results[index] = result
        running.left -= 1
        job = running.job
        if job.kind is JobKind.STORE:
            self.backpressure.left(job.chunks[index].num_bytes)
        if running.left:
            return False
        self._num_jobs -= 1
        self._finished.append(
            JobResult(
                job.id,
                tuple([each.outcome for each in running.results]),
                tuple([each.checksums for each in running.results]),
                running.seconds,
            )
        )
        return True
