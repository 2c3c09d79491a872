"""The worker half of an engine's offloading: copies one rank's part of each job, and says how it ended.

Owns the jobs of one rank from submission to result. Every job that is submitted comes out of `get_finished`
exactly once, whatever happens to the daemon: a job that cannot be copied has failed, and the engine computes.

What keeps a copy from doing harm (see `kvtier_ops.host`): a load compares the slot's generation before and
after and, mostly, the checksum of what it read; a store writes only into a slot that is still reserved under
the generation it was granted. When the session ends, queued jobs fail at once and running copies finish
behind that fence; `drain` tells the client when none runs any more, and only then may it attach again.

The engine's thread submits and collects; copy threads copy and report; the listener's methods come from the
client's threads.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal

from kvtier_client.answers import SessionInfo
from kvtier_client.client import OffloadClient
from kvtier_client.copy_threads import CopyTask, CopyThreads
from kvtier_client.jobs import NO_SLOT, CopyFailure, Job, JobId, JobKind, JobResult, LoadJob, StoreJob
from kvtier_client.listener import ClientListener
from kvtier_client.reports import ChecksumMismatch, LoadReportItem, StoreReportItem
from kvtier_client.transfers import Copied, RemoteCopies
from kvtier_ops.checksum import part_checksum
from kvtier_ops.faults import fault_point
from kvtier_ops.host import BlockTensors, LoadOutcome, load_part, store_part
from kvtier_ops.layout import GroupLayout, part_offset
from kvtier_ops.plan import ChunkCopy, PlanError
from kvtier_ops.pool import MappedPool
from kvtier_ops.slot_table import SlotState

logger = logging.getLogger(__name__)

VerifyLoads = Literal["always", "sampled", "off"]

SAMPLE_EVERY = 16
"""With verify_loads="sampled", every so many loaded chunks one is verified."""

TASK_BYTES = 32 << 20
"""A job is cut into tasks of about this size: a few ms each, so that both threads work on a large load and a
load does not wait for the whole of a large store."""

_NO_SESSION = -1

MAX_UNTOLD_JOBS = 1024
"""Jobs that were given while no session was open, kept to be reported in the next one. Beyond it the oldest
are dropped: their slots come free with the engine's session."""


_FAILURE_OF_LOAD = {
    LoadOutcome.OK: None,
    LoadOutcome.TORN: CopyFailure.TORN,
    LoadOutcome.MISMATCH: CopyFailure.MISMATCH,
}


@dataclass(slots=True)
class _Progress:
    """A job under way. Columns have one entry per slot, each written by the one task that owns it."""

    job: Job
    kind: JobKind
    session: int
    """Counts sessions: the one in which the job was submitted; _NO_SESSION if there was none of its pool."""
    copies: tuple[ChunkCopy, ...] = ()
    failures: list[CopyFailure | None] = field(default_factory=list)
    """None: copied."""
    checksums: list[int] = field(default_factory=list)
    tasks_left: int = 0
    started_at: float | None = None
    """When the first task began to copy."""
    mark: object = None
    """What the engine's compute was given when the job was submitted."""
    is_remote: bool = False
    """The daemon copies: it counts the bytes and the time itself."""


class WorkerShim(ClientListener):
    """One rank's copies between its device blocks and the pool.

    `layouts[g]` is how this rank's part of a chunk of group g is laid out, `part` which part of a slot is
    its own. Where slots have one part for several ranks, because their bytes are equal, rank 0 stores and the
    others acknowledge without a copy. Raises ValueError if the tensors do not have these layouts.
    """

    def __init__(
        self,
        client: OffloadClient,
        tensors: BlockTensors,
        layouts: Sequence[GroupLayout],
        blocks_per_chunk: int,
        part: int,
        *,
        verify_loads: VerifyLoads = "always",
        num_threads: int = 2,
        remote: RemoteCopies | None = None,
    ) -> None:
        """`remote`: has the daemon copy, where it can."""
        for group, layout in enumerate(layouts):
            if layout.blocks_per_chunk != blocks_per_chunk:
                raise ValueError(
                    f"group {group} is laid out for {layout.blocks_per_chunk} blocks a chunk, "
                    f"not {blocks_per_chunk}"
                )
            tensors.bind(group, layout)
        self._client = client
        self._tensors = tensors
        self._layouts = tuple(layouts)
        self._blocks_per_chunk = blocks_per_chunk
        self._part = part
        self._verify_every = {"always": 1, "sampled": SAMPLE_EVERY, "off": 0}[verify_loads]
        self._stores = client.facts.num_parts > 1 or client.identity.rank == 0
        self._num_threads = num_threads
        self._remote = remote
        self._loaded_chunks = count()
        self._session = 0
        self._closed = False
        if remote is not None:
            remote.on_broken = client.reattach
            remote.on_refused = self._remote_refused
        self._begin()
        client.listener = self
        if client.session is not None:
            self.on_attached(client.session)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._threads = CopyThreads(self._num_threads)
        self._changed = threading.Condition()
        self._jobs: dict[JobId, _Progress] = {}
        self._finished: list[JobResult] = []
        self._pool: MappedPool | None = None
        self._pool_use = threading.Lock()
        """Held while the tensors hear of a pool, which may take long. Taken before `_changed`."""
        self._untold: deque[_Progress] = deque(maxlen=MAX_UNTOLD_JOBS)
        self._num_refused = 0

    def _notice_fork(self) -> None:
        """In the child of a fork begin anew, without a pool: every job fails at once.

        The parent's slots are not the child's to write, its copy threads do not exist here, and a lock that
        one of them held will never be free.
        """
        if self._pid != os.getpid() and self._client.forked:
            self._remote = None
            self._begin()

    # The engine's calls

    def submit_store(self, job: StoreJob) -> None:
        """Queue a store. The blocks must stay unchanged until its result, or until `wait` returns."""
        self._notice_fork()
        if self._stores or self._client.forked:
            self._submit(job, JobKind.STORE)
        else:
            with self._changed:
                self._finished.append(JobResult(job.job_id, JobKind.STORE, ok=True))

    def submit_load(self, job: LoadJob) -> None:
        """Queue a load. The blocks hold nothing of use until its result says so."""
        self._notice_fork()
        self._submit(job, JobKind.LOAD)

    def get_finished(self) -> list[JobResult]:
        """Return the jobs that ended since the last call, each once, in any order."""
        self._notice_fork()
        with self._changed:
            finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: Collection[JobId]) -> None:
        """Wait until these jobs have ended, and copy them before all others. Unknown ids are passed over.

        Has no bound, because who waits is about to give the blocks away and a copy may still use them. It
        ends all the same: a job ends with its last task, whatever that raises, a task is a copy in memory,
        and the threads that take tasks outlive every error. A copy that the daemon makes ends with its
        answer, or with the daemon's silence: a store then at once, a load when its copy process is in no
        copy for it. One that stands still in the middle of a load is ended by its daemon after 30 s; where
        that is stopped as well, by whoever kills it, and the load waits so long.
        """
        self._notice_fork()
        wanted = frozenset(job_ids)
        self._threads.hurry(wanted)
        with self._changed:
            self._changed.wait_for(lambda: wanted.isdisjoint(self._jobs))

    def close(self) -> None:
        """Fail what is queued, let running copies finish and end the threads. Results can still be got."""
        self._notice_fork()
        with self._changed:
            self._closed = True
        if self._remote is not None:
            self._remote.end()
        self._fail_queued()
        self._threads.close()
        with self._pool_use:
            self._tensors.use_pool(None, pin=False)

    def take_refusals(self) -> int:
        """Return how often the daemon has refused to copy since the last call; the engine copies then."""
        with self._changed:
            refused, self._num_refused = self._num_refused, 0
        return refused

    def _remote_refused(self, reason: str) -> None:
        """Copy from now on, and say so."""
        with self._changed:
            self._num_refused += 1
            pool = self._pool
        logger.warning(
            "the daemon cannot copy for this engine, which copies through shared memory itself now, more "
            "slowly: %s",
            reason,
        )
        with self._pool_use:
            with self._changed:
                is_in_use = pool is not None and pool is self._pool and not self._closed
            if is_in_use:
                self._tensors.use_pool(pool, pin=True)

    # The client's listener, on the client's threads

    def on_attached(self, session: SessionInfo) -> None:
        """Copy into this session's pool from now on. A running copy keeps the pool that it began with."""
        with self._pool_use:
            if not self._closed:
                self._tensors.use_pool(session.pool, pin=self._remote is None)
            with self._changed:
                self._pool = session.pool
                untold = [progress for progress in self._untold if self._pool_is_open(progress.job.pool_id)]
                self._untold.clear()
        if self._remote is not None and session.pool is not None and not self._closed:
            self._remote.begin(session, session.pool.path.parent)
        for progress in untold:
            # The scheduler was attached before this rank was: the daemon waits for the ends of these.
            self._report(progress, 0, 0.0)
        if untold:
            self._client.flush()

    def on_detached(self, reason: str) -> None:
        """Fail what is queued: the daemon may give the slots away now."""
        if self._remote is not None:
            self._remote.end()
        with self._changed:
            self._pool = None
            self._session += 1
        self._fail_queued()

    def drain(self, timeout_s: float) -> bool:
        """Wait until no copy runs; those that were queued have failed when the session ended."""
        return self._threads.wait_idle(timeout_s)

    # Jobs

    def _submit(self, job: Job, kind: JobKind) -> None:
        """Cut a job into tasks, or fail it at once where no session of its pool is open.

        A job that contradicts itself fails, and is logged.
        """
        with self._changed:
            assert job.job_id not in self._jobs, f"job {job.job_id} was submitted twice"
            is_of_session = self._pool_is_open(job.pool_id)
            pool = self._pool if is_of_session and not self._closed else None
            progress = _Progress(job, kind, self._session if is_of_session else _NO_SESSION)
            # What is not copied for another reason keeps this one.
            uncopied = CopyFailure.SESSION_LOST if job.pool_id else CopyFailure.NOT_PINNED
            progress.failures = [uncopied] * len(job.slot_ids)
            progress.checksums = [0] * len(job.slot_ids)
            self._jobs[job.job_id] = progress
            if pool is not None and self._begin_copies(progress, pool):
                return
        self._end(progress)

    def _pool_is_open(self, pool_id: int) -> bool:
        """Tell whether the open session is one of this pool. With the lock held."""
        return self._pool is not None and self._pool.pool_id == pool_id

    def _begin_copies(self, progress: _Progress, pool: MappedPool) -> bool:
        """Have a job copied, by the daemon or the threads; False where nobody does, and it has failed."""
        job = progress.job
        try:
            progress.copies = self._plan(job)
            if not progress.copies:
                progress.failures = [CopyFailure.ERROR] * len(job.slot_ids)
                return False
            if self._submit_remote(progress):
                return True
            if not self._mark(progress):
                return False
            tasks = [
                CopyTask(job.job_id, progress.kind, partial(self._run, progress, pool, piece))
                for piece in self._pieces(progress.copies)
            ]
        except Exception:
            logger.exception("job %d cannot be copied; this is a bug of whoever made it", job.job_id)
            progress.failures = [CopyFailure.ERROR] * len(job.slot_ids)
            progress.is_remote = False
            return False
        progress.tasks_left = len(tasks)
        return self._queue(tasks)

    def _submit_remote(self, progress: _Progress) -> bool:
        """Have the daemon copy; False where it cannot."""
        if self._remote is None:
            return False
        verify = False
        if progress.kind is JobKind.LOAD and self._verify_every:
            loaded = [next(self._loaded_chunks) for _ in progress.copies]
            verify = any(number % self._verify_every == 0 for number in loaded)
        progress.started_at = time.monotonic()
        progress.is_remote = True  # before its end, which another thread tells
        if self._remote.submit(progress.job, progress.kind, verify, partial(self._end_remote, progress)):
            return True
        progress.is_remote, progress.started_at = False, None
        return False

    def _mark(self, progress: _Progress) -> bool:
        """Note what the copy has to come after; False, and the job fails, where the device does not say."""
        try:
            progress.mark = self._tensors.mark()
        except Exception:
            logger.exception("job %d cannot be ordered after the engine's compute", progress.job.job_id)
            progress.failures = [CopyFailure.ERROR] * len(progress.job.slot_ids)
            return False
        return True

    def _end_remote(self, progress: _Progress, copied: Copied) -> None:
        progress.failures, progress.checksums = copied.failures, copied.checksums
        self._end(progress)

    def _queue(self, tasks: Sequence[CopyTask]) -> bool:
        """Hand tasks to the threads; False where there are none.

        With the lock held, so that a session that ends now finds the tasks in the queue and fails them.
        """
        try:
            self._threads.submit(tasks)
        except RuntimeError:
            logger.exception("no thread can be started to copy; the engine computes instead")
            return False
        return True

    def _plan(self, job: Job) -> tuple[ChunkCopy, ...]:
        try:
            copies = job.plan(self._blocks_per_chunk)
            if len(job.group_sizes) > len(self._layouts):
                raise PlanError(
                    f"group_sizes: {len(job.group_sizes)} groups, this rank has {len(self._layouts)}"
                )
            if not len(copies) == len(job.slot_ids) == len(job.generations) == len(job.keys):
                raise PlanError(f"slot_ids: {len(job.slot_ids)} entries, the blocks fill {len(copies)} slots")
        except Exception:
            logger.exception("job %d cannot be copied; this is a bug of whoever made it", job.job_id)
            return ()
        return copies

    def _pieces(self, copies: Sequence[ChunkCopy]) -> Iterator[range]:
        """Cut the slots of a job into ranges of about TASK_BYTES."""
        first = size = 0
        for copy in copies:
            size += self._layouts[copy.group].part_bytes
            if size >= TASK_BYTES:
                yield range(first, copy.slot_index + 1)
                first, size = copy.slot_index + 1, 0
        if first < len(copies):
            yield range(first, len(copies))

    def _run(self, progress: _Progress, pool: MappedPool, piece: range) -> None:
        """Copy a piece of a job, on a copy thread."""
        try:
            self._copy(progress, pool, piece)
        finally:
            self._end_task(progress)

    def _copy(self, progress: _Progress, pool: MappedPool, piece: range) -> None:
        if progress.started_at is None:
            progress.started_at = time.monotonic()
        try:
            self._tensors.follow(progress.mark)
        except Exception:
            logger.exception("job %d cannot be ordered after the engine's compute", progress.job.job_id)
            for index in piece:
                progress.failures[index] = CopyFailure.ERROR
            return
        copy_slot: Callable[[_Progress, MappedPool, int], CopyFailure | None]
        copy_slot = self._load_slot if progress.kind is JobKind.LOAD else self._store_slot
        for index in piece:
            try:
                progress.failures[index] = copy_slot(progress, pool, index)
            except Exception:
                progress.failures[index] = CopyFailure.ERROR
                # The pool of a broken daemon, blocks that do not exist: the engine computes all the same.
                logger.exception("slot %d of job %d was not copied", index, progress.job.job_id)

    def _load_slot(self, progress: _Progress, pool: MappedPool, index: int) -> CopyFailure | None:
        job, copy = progress.job, progress.copies[index]
        slot_id, layout = job.slot_ids[index], self._layouts[copy.group]
        if slot_id == NO_SLOT:
            return CopyFailure.NOT_PINNED
        if not copy.block_ids:
            return CopyFailure.INCOMPLETE
        fault_point("worker.before_load")
        verify = self._verify_every and next(self._loaded_chunks) % self._verify_every == 0
        expected = pool.part_checksum(slot_id, self._part) if verify else None
        generation = job.generations[index]
        outcome = load_part(pool, slot_id, generation, self._part, layout, self._tensors, copy, expected)
        if outcome is LoadOutcome.MISMATCH:
            view = pool.part_view(slot_id, part_offset(layout.part_bytes, self._part), layout.part_bytes)
            progress.checksums[index] = part_checksum(view)
        fault_point("worker.after_load_copy")
        return _FAILURE_OF_LOAD[outcome]

    def _store_slot(self, progress: _Progress, pool: MappedPool, index: int) -> CopyFailure | None:
        job, copy = progress.job, progress.copies[index]
        slot_id, layout = job.slot_ids[index], self._layouts[copy.group]
        if len(copy.block_ids) < self._blocks_per_chunk:
            # A chunk that is not wholly written is never published: nothing to copy for.
            return CopyFailure.INCOMPLETE
        fault_point("worker.before_store")
        record = pool.slots.read(slot_id)
        # A slot that went back keeps its generation until it is given out again: look at its state as well.
        if record is None or record.state is not SlotState.RESERVED:
            return CopyFailure.TORN
        generation = job.generations[index]
        outcome = store_part(
            pool, slot_id, generation, self._part, layout, self._tensors, copy, checksum=True
        )
        fault_point("worker.after_store_copy")
        progress.checksums[index] = outcome.checksum
        return None if outcome.ok else CopyFailure.TORN

    def _end_task(self, progress: _Progress) -> None:
        with self._changed:
            progress.tasks_left -= 1
            if progress.tasks_left:
                return
        self._end(progress)

    def _fail_queued(self) -> None:
        withdrawn = self._threads.withdraw()
        for task in withdrawn:
            with self._changed:
                progress = self._jobs[task.job_id]
            self._end_task(progress)

    def _end(self, progress: _Progress) -> None:
        """Report a job whose last task is over to the daemon, then to the engine. Never raises."""
        job = progress.job
        result = JobResult(job.job_id, progress.kind, ok=False, failed_keys=frozenset(job.keys))
        try:
            result = self._conclude(progress)
        except Exception:
            logger.exception("job %d could not be reported; this is a bug of whoever made it", job.job_id)
        with self._changed:
            del self._jobs[job.job_id]
            self._finished.append(result)
            self._changed.notify_all()

    def _conclude(self, progress: _Progress) -> JobResult:
        """Report a job to the daemon, if it was one of the session that is open, and return how it ended."""
        job, kind = progress.job, progress.kind
        seconds = 0.0 if progress.started_at is None else time.monotonic() - progress.started_at
        num_bytes = self._copied_bytes(progress)
        with self._changed:
            same_session = progress.session == self._session
            reports = same_session
            if progress.session == _NO_SESSION and job.pool_id:
                # The session of its pool may have opened since the job was looked at.
                reports = self._pool_is_open(job.pool_id)
                if not reports:
                    self._untold.append(progress)
        if reports:
            figures = (0, 0.0) if progress.is_remote else (num_bytes, seconds)  # the daemon counts its own
            self._report(progress, *figures)
            self._client.flush()
        failures = [
            # What was stored for a session that is over will not be published.
            failure or CopyFailure.SESSION_LOST if kind is JobKind.STORE and not same_session else failure
            for failure in progress.failures
        ]
        # A load that has blocks and no slots for them has nothing to fail, and has filled none of them.
        has_nowhere_to_read = kind is JobKind.LOAD and bool(job.block_ids) and not job.slot_ids
        return JobResult(
            job.job_id,
            kind,
            not any(failures) and not has_nowhere_to_read,
            frozenset(key for key, failure in zip(job.keys, failures, strict=True) if failure),
            num_bytes,
            seconds,
            Counter(failure.value for failure in failures if failure),
        )

    def _copied_bytes(self, progress: _Progress) -> int:
        total = 0
        for copy, failure in zip(progress.copies, progress.failures, strict=False):
            if failure is None:
                layout = self._layouts[copy.group]
                total += layout.part_bytes * len(copy.block_ids) // layout.blocks_per_chunk
        return total

    def _report(self, progress: _Progress, num_bytes: int, seconds: float) -> None:
        report = self._report_load if progress.kind is JobKind.LOAD else self._report_store
        report(progress, num_bytes, seconds)

    def _report_store(self, progress: _Progress, num_bytes: int, seconds: float) -> None:
        job = progress.job
        failed = [index for index, failure in enumerate(progress.failures) if failure]
        self._client.report_store(
            StoreReportItem(
                part=self._part,
                slot_ids=job.slot_ids,
                generations=job.generations,
                keys=job.keys,
                checksums=progress.checksums,
                failed=failed,
                num_bytes=num_bytes,
                seconds=seconds,
            )
        )

    def _report_load(self, progress: _Progress, num_bytes: int, seconds: float) -> None:
        job = progress.job
        assert isinstance(job, LoadJob)
        slots = list(zip(job.slot_ids, job.generations, progress.failures, progress.checksums, strict=False))
        self._client.report_load(
            LoadReportItem(
                lease_id=job.load_lease_id,
                torn_slot_ids=[slot_id for slot_id, _, failure, _ in slots if failure is CopyFailure.TORN],
                mismatches=[
                    ChecksumMismatch(slot_id, generation, checksum)
                    for slot_id, generation, failure, checksum in slots
                    if failure is CopyFailure.MISMATCH
                ],
                num_bytes=num_bytes,
                seconds=seconds,
            )
        )
