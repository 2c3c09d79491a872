"""Copies that the daemon makes: the engine's memory is registered once, and jobs go over one stream.

Owns the stream of a session and the jobs on it. Each job ends exactly once, with an answer or with the end of
everything that could still copy for it:

    stream breaks --> the copy process's lock is free --> 250 ms more --> its jobs have failed
                  --> or the next session is open: the daemon waits for the copies of the last one before

because an engine that has lost the stream in the middle of a load must not use the blocks while bytes may
still arrive. An engine whose session ends, and not the daemon, gets its answers over the stream that it has.

A channel of its own, so that the end of a session takes no answer away. Any thread may call; `done` is called
on this module's thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc

from kvtier.v1 import transfer_pb2, transfer_pb2_grpc
from kvtier_client.answers import SessionInfo
from kvtier_client.channel import open_channel, read_failure
from kvtier_client.jobs import NO_SLOT, CopyFailure, Job, JobKind
from kvtier_client.tls import TlsFiles
from kvtier_ops.ipc import MemoryHandle
from kvtier_ops.locks import owner_lock_is_free

logger = logging.getLogger(__name__)

REGISTER_S = 60.0
"""What a registration may take: the copy process has to start, and its device may have to wake up."""

GRACE_S = 0.25
"""After the end of the copy process: a device may finish what it was given."""

LOCK_POLL_S = 0.01

_NO_SUCH_SLOT = (1 << 64) - 1

_FAILURES = {
    transfer_pb2.TRANSFER_FAILURE_NOT_HELD: CopyFailure.TORN,
    transfer_pb2.TRANSFER_FAILURE_TORN: CopyFailure.TORN,
    transfer_pb2.TRANSFER_FAILURE_MISMATCH: CopyFailure.MISMATCH,
    transfer_pb2.TRANSFER_FAILURE_INCOMPLETE: CopyFailure.INCOMPLETE,
}


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of a job; columns have one entry per slot."""

    failures: list[CopyFailure | None]
    checksums: list[int]


DoneListener = Callable[[Copied], None]


@dataclass(slots=True)
class _Sent:
    job: Job
    done: DoneListener


class RemoteCopies:
    """Copies for one rank's memory, whichever session is open. `groups[g]`: a group's tensors, in order."""

    def __init__(
        self, target: str, groups: Sequence[Sequence[MemoryHandle]], tls: TlsFiles | None = None
    ) -> None:
        """`target` and `tls` as the client's, `ClientOptions.tls`."""
        self._open_channel = partial(open_channel, target, tls)
        self._groups = [
            transfer_pb2.GroupMemory(tensors=[_message_of(handle) for handle in group]) for group in groups
        ]
        self._stream: _Stream | None = None
        self._last: _Stream | None = None
        self.on_broken: Callable[[str, str], None] = lambda session_id, reason: None
        """Told when the stream breaks of a session that is still open: only the next session tells when
        nothing is copied for it any more."""
        self.problem = ""
        """Why the daemon cannot copy for this engine; "" where it can, or that is not known yet."""

    def begin(self, session: SessionInfo, pool_directory: Path) -> None:
        """Register in a session that has opened, in the background; until then no job is taken."""
        self.end()
        if self._last is not None and self._last.boot_id == session.boot_id:
            self._last.release()  # another daemon knows nothing of what this one's copied
        self._stream = self._last = _Stream(self, self._open_channel, self._groups, session, pool_directory)

    def end(self) -> None:
        """Take no more jobs: the session is over. Those that were sent are answered all the same."""
        if self._stream is not None:
            self._stream.take_no_more()
            self._stream = None

    @property
    def ready(self) -> bool:
        """Whether the daemon copies now."""
        return self._stream is not None and self._stream.ready

    def submit(self, job: Job, kind: JobKind, verify: bool, done: DoneListener) -> bool:
        """Have a job copied; False if that cannot be, and nothing was taken."""
        stream = self._stream
        return stream is not None and stream.submit(job, kind, verify, done)


class _Stream:
    """One registration and its stream."""

    def __init__(
        self,
        owner: RemoteCopies,
        connect: Callable[[], grpc.Channel],
        groups: Sequence[transfer_pb2.GroupMemory],
        session: SessionInfo,
        pool_directory: Path,
    ) -> None:
        self._owner = owner
        self._connect = connect
        self._groups = groups
        self._session_id = session.session_id
        self.boot_id = session.boot_id
        self._pool_directory = pool_directory
        self._lock = threading.Lock()
        self._open = True
        self._sent: dict[int, _Sent] = {}
        self._last_id = 0
        self._memory_id = 0
        self._waits = False
        """Whether something may still be copied for jobs without an answer."""
        self._lock_file = ""
        self._released = threading.Event()
        self._outbox: queue.SimpleQueue[transfer_pb2.TransferRequest | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kvtier-transfers", daemon=True).start()

    def submit(self, job: Job, kind: JobKind, verify: bool, done: DoneListener) -> bool:
        with self._lock:
            if not self._open or not self._memory_id:
                return False
            self._last_id += 1
            self._sent[self._last_id] = _Sent(job, done)
            self._outbox.put(_request_of(job, kind, verify, self._last_id))
        return True

    @property
    def ready(self) -> bool:
        return self._open and bool(self._memory_id)

    def take_no_more(self) -> None:
        with self._lock:
            self._open = False
            self._outbox.put(None)

    def release(self) -> None:
        """Note that nothing is copied any more for the session: the next one is open."""
        self._released.set()

    def _run(self) -> None:
        channel = None
        try:
            channel = self._connect()
            stub = transfer_pb2_grpc.TransferServiceStub(channel)
            if self._register(stub):
                self._read(stub)
        except Exception:
            logger.exception("the stream of copies failed; the engine computes instead")
        finally:
            if self.ready:
                self._owner.on_broken(self._session_id, "the stream of copies has ended")
            self.take_no_more()
            if channel is not None:
                channel.close()
            self._fail_the_rest()

    def _register(self, stub: transfer_pb2_grpc.TransferServiceStub) -> bool:
        request = transfer_pb2.RegisterMemoryRequest(session_id=self._session_id, groups=self._groups)
        try:
            answer = stub.RegisterMemory(request, timeout=REGISTER_S)
        except grpc.RpcError as error:
            failure = read_failure(error)
            if failure.reason != "session_unknown":
                self._owner.problem = failure.details
                logger.warning("the daemon cannot copy for this engine: %s", failure.details)
            return False
        self._owner.problem = ""
        self._memory_id, self._lock_file = answer.memory_id, answer.lock_file
        return True

    def _read(self, stub: transfer_pb2_grpc.TransferServiceStub) -> None:
        self._waits = True
        try:
            for answer in stub.Transfer(self._requests()):
                with self._lock:
                    sent = self._sent.pop(answer.job_id, None)
                if sent is not None:
                    sent.done(_copied(sent.job, answer))  # raises nothing: a job must end
            self._waits = False
        except grpc.RpcError as error:
            failure = read_failure(error)
            # What the daemon has begun it answers before it ends the stream.
            self._waits = not failure.boot_id
            logger.info("the stream of copies has ended: %s", failure.reason)

    def _requests(self) -> Iterator[transfer_pb2.TransferRequest]:
        while (request := self._outbox.get()) is not None:
            request.session_id, request.memory_id = self._session_id, self._memory_id
            yield request

    def _fail_the_rest(self) -> None:
        """End what was not answered, when nothing can copy for it any more."""
        with self._lock:
            left, self._sent = list(self._sent.values()), {}
        if not left:
            return
        if self._waits:
            self._wait_for_the_end_of_copies()
        for sent in left:
            count = len(sent.job.slot_ids)
            sent.done(Copied([CopyFailure.SESSION_LOST] * count, [0] * count))

    def _wait_for_the_end_of_copies(self) -> None:
        while not owner_lock_is_free(self._pool_directory, self._lock_file):
            if self._released.wait(LOCK_POLL_S):
                return
        time.sleep(GRACE_S)


def _message_of(handle: MemoryHandle) -> transfer_pb2.MemoryHandle:
    return transfer_pb2.MemoryHandle(
        kind=transfer_pb2.MemoryKind.ValueType(handle.kind),
        device_uuid=handle.device_uuid,
        handle=handle.handle,
        allocation_bytes=handle.allocation_bytes,
        offset_bytes=handle.offset_bytes,
        size_bytes=handle.size_bytes,
        block_stride_bytes=handle.block_stride_bytes,
        num_blocks=handle.num_blocks,
    )


def _request_of(job: Job, kind: JobKind, verify: bool, job_id: int) -> transfer_pb2.TransferRequest:
    is_store = kind is JobKind.STORE
    return transfer_pb2.TransferRequest(
        job_id=job_id,
        direction=(
            transfer_pb2.TRANSFER_DIRECTION_STORE if is_store else transfer_pb2.TRANSFER_DIRECTION_LOAD
        ),
        block_ids=job.block_ids,
        group_sizes=job.group_sizes,
        block_indices=job.block_indices,
        group_slots=job.group_slots or (),
        slot_ids=[_NO_SUCH_SLOT if slot_id == NO_SLOT else slot_id for slot_id in job.slot_ids],
        generations=job.generations,
        keys=job.keys,
        verify=verify,
    )


def _copied(job: Job, answer: transfer_pb2.TransferResponse) -> Copied:
    count = len(job.slot_ids)
    failures: list[CopyFailure | None] = [None] * count
    checksums = list(answer.checksums)
    if len(answer.failed) != len(answer.failures) or len(checksums) != count:
        logger.error("job %d: the daemon's answer contradicts itself", job.job_id)
        return Copied([CopyFailure.ERROR] * count, [0] * count)
    for index, why in zip(answer.failed, answer.failures, strict=True):
        if index < count:
            missing = job.slot_ids[index] == NO_SLOT
            failures[index] = CopyFailure.NOT_PINNED if missing else _FAILURES.get(why, CopyFailure.ERROR)
    if answer.message:
        logger.warning("job %d was not copied by the daemon: %s", job.job_id, answer.message)
    return Copied(failures, checksums)
