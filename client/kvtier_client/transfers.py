"""Copies that the daemon makes: the engine's memory is registered once, and jobs go over one stream.

Owns the stream of a session and the jobs on it. Each job ends exactly once, with an answer or with the end of
everything that could still copy for it:

    stream breaks, or the daemon is silent   --> stores have failed
                                             --> the gate is ours, or the copy process's lock is free
                                             --> 250 ms more --> loads have failed
                                             --> or the same daemon has opened the next session: it waits for
                                                 the copies of the last one before

because an engine that has lost the stream in the middle of a load must not use the blocks while bytes may
still arrive. The gate (`kvtier_ops.locks`) is what makes that end without anybody's answer: a copy process
that works lets go of it in a moment, one that dies too, and one that has not begun will not. Only one that
stands still in the middle of a copy keeps a load waiting, and rightly: nobody can tell what it will write
when it goes on. Of a store nothing is published that was not reported, so that nobody need wait for what it
still reads. The next session of another daemon says nothing about the copies of the one before: the gate
stays taken until the processes of that one are gone.

An engine whose session ends, and not the daemon, gets its answers over the stream that it has.

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
from kvtier_client.channel import RpcFailure, open_channel, read_failure
from kvtier_client.jobs import NO_SLOT, CopyFailure, Job, JobKind
from kvtier_client.tls import TlsFiles
from kvtier_ops.directory import PoolError
from kvtier_ops.ipc import MemoryHandle
from kvtier_ops.lock_watch import WatchedLock
from kvtier_ops.locks import CopyGate, is_lock_name
from kvtier_ops.timeline import ComputeEvent

logger = logging.getLogger(__name__)

REGISTER_S = 60.0
"""What a registration may take: the copy process has to start, and its device may have to wake up."""

REGISTER_PAUSE_S = 1.0
"""Before a registration that nobody answered is tried again."""

PING_S = 1.0
"""While jobs are under way the daemon is asked this often whether it is there."""

MAX_UNANSWERED = 5
"""A daemon that was asked so often in a row and has said nothing is given up: it is stopped, or starved.
Copies that take long do not count, it answers all the same; nor does a time when this process stood still."""

MAX_SENT = 512
"""Jobs under way where the daemon names no limit; more are copied by the engine itself."""

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
    kind: JobKind
    done: DoneListener

    def fail(self) -> None:
        """End it: the session is lost."""
        count = len(self.job.slot_ids)
        self.done(Copied([CopyFailure.SESSION_LOST] * count, [0] * count))


class RemoteCopies:
    """Copies for one rank's memory, whichever session is open. `groups[g]`: a group's tensors, in order.

    `event`: what a copy waits for before it touches the memory; None = the engine has synchronized. It has to
    stay for as long as the process: the daemon's process may wait for it until it is told of the end.
    """

    def __init__(
        self,
        target: str,
        groups: Sequence[Sequence[MemoryHandle]],
        event: ComputeEvent | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """`target` and `tls` as the client's, `ClientOptions.tls`."""
        self._open_channel = partial(open_channel, target, tls)
        self._event = event
        self._groups = [
            transfer_pb2.GroupMemory(tensors=[_message_of(handle) for handle in group]) for group in groups
        ]
        self._stream: _Stream | None = None
        self._last: _Stream | None = None
        self._others: list[_Stream] = []
        """The last ones of other daemons: their gates stay until those are gone."""
        self._others_lock = threading.Lock()
        self._cannot_record = False
        self.on_broken: Callable[[str, str], None] = lambda session_id, reason: None
        """Told when the stream breaks of a session that is still open: only the next session tells when
        nothing is copied for it any more."""
        self.on_refused: Callable[[str], None] = lambda reason: None
        """Told when the daemon says why it cannot copy; then the engine does."""
        self.problem = ""
        """Why the daemon cannot copy for this engine; "" where it can, or that is not known yet."""

    def begin(self, session: SessionInfo, pool_directory: Path) -> None:
        """Register in a session that has opened, in the background; until then no job is taken."""
        self._end_stream()
        if self._last is not None:
            if self._last.boot_id == session.boot_id:
                self._last.release()
                self._last.close_gate()  # no copy of it begins any more: its session is over
            else:  # another daemon knows nothing of what this one's copied, or will copy
                with self._others_lock:
                    self._others.append(self._last)
        self._close_gates_of_the_gone()
        self.problem = ""
        event_handle = self._event.handle if self._event is not None else b""
        self._stream = self._last = _Stream(
            self, self._open_channel, self._groups, event_handle, session, pool_directory
        )

    def end(self) -> None:
        """Take no more jobs: the session is over. Those that were sent are answered all the same."""
        self._end_stream()
        self._close_gates_of_the_gone()

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.take_no_more()
            self._stream = None

    def _close_gates_of_the_gone(self) -> None:
        with self._others_lock:
            self._others = [stream for stream in self._others if not stream.close_gate_if_alone()]

    @property
    def ready(self) -> bool:
        """Whether the daemon copies now."""
        return self._stream is not None and self._stream.ready

    def submit(self, job: Job, kind: JobKind, verify: bool, done: DoneListener) -> bool:
        """Have a job copied; False if that cannot be, and nothing was taken.

        Raises ValueError or TypeError for a job that no message can hold; nothing was taken then either.
        """
        stream = self._stream
        if stream is None or not stream.has_room:
            return False
        try:
            wait_value = 0 if self._event is None else self._event.record()
        except Exception:
            if not self._cannot_record:
                self._cannot_record = True
                logger.exception("the engine's compute cannot be waited for, so the engine copies itself")
            return False
        return stream.submit(job, kind, verify, wait_value, done)


class _Stream:
    """One registration and its stream."""

    def __init__(
        self,
        owner: RemoteCopies,
        connect: Callable[[], grpc.Channel],
        groups: Sequence[transfer_pb2.GroupMemory],
        event_handle: bytes,
        session: SessionInfo,
        pool_directory: Path,
    ) -> None:
        self._owner = owner
        self._connect = connect
        self._groups = groups
        self._event_handle = event_handle
        self._session_id = session.session_id
        self.boot_id = session.boot_id
        self._pool_directory = pool_directory
        self._changed = threading.Condition()
        self._open = True
        self._has_ended = False
        self._sent: dict[int, _Sent] = {}
        self._unanswered = 0
        self._last_id = 0
        self._memory_id = 0
        self._max_sent = MAX_SENT
        self._waits = False
        """Whether something may still be copied for jobs without an answer."""
        self._lock: WatchedLock | None = None
        """Of the process that copies; None = nothing will prove its end."""
        self._call: grpc.Call | None = None
        self._gate: CopyGate | None = None
        self._released = threading.Event()
        self._outbox: queue.SimpleQueue[transfer_pb2.TransferRequest | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kvtier-transfers", daemon=True).start()

    def submit(self, job: Job, kind: JobKind, verify: bool, wait_value: int, done: DoneListener) -> bool:
        """As `RemoteCopies.submit`. Raises ValueError or TypeError for a job that no message can hold."""
        with self._changed:
            if not self.has_room:
                return False
            self._last_id += 1
            request = _request_of(job, kind, verify, wait_value, self._last_id)  # or it raises, and no job is
            self._sent[self._last_id] = _Sent(job, kind, done)
            self._outbox.put(request)
            self._changed.notify_all()
        return True

    @property
    def ready(self) -> bool:
        return self._open and bool(self._memory_id)

    @property
    def has_room(self) -> bool:
        """Whether one more job would be taken."""
        return self.ready and len(self._sent) < self._max_sent

    def take_no_more(self) -> None:
        with self._changed:
            self._open = False
            self._end_requests_if_over()
            self._changed.notify_all()

    def _end_requests_if_over(self) -> None:
        """With the lock held: say nothing more after the last answer; until then the daemon is asked."""
        if not self._open and not self._sent:
            self._outbox.put(None)

    def release(self) -> None:
        """Note that nothing is copied any more for the session: the next one is open."""
        self._released.set()

    def close_gate(self) -> None:
        """Let go of the gate: the session is over for the daemon too, and no copy of it begins."""
        if self._gate is not None:
            self._gate.close()
        if self._lock is not None:
            self._lock.close()

    def close_gate_if_alone(self) -> bool:
        """Let go of the gate if no process is left that could copy; False while there is one."""
        if self._gate is not None or self._lock is not None:
            if not self._copier_is_gone():
                return False
            self.close_gate()
        return True

    def _copier_is_gone(self) -> bool:
        return self._lock is not None and self._lock.is_free()

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
        """Register, as often as nobody answers; False if the daemon refuses, or the session is over."""
        request = transfer_pb2.RegisterMemoryRequest(
            session_id=self._session_id, groups=self._groups, event_handle=self._event_handle
        )
        while self._open:
            try:
                answer = stub.RegisterMemory(request, timeout=REGISTER_S)
            except grpc.RpcError as error:
                failure = read_failure(error)
                if failure.boot_id:
                    self._refused(failure)
                    return False
                with self._changed:
                    self._changed.wait_for(lambda: not self._open, REGISTER_PAUSE_S)
            else:
                return self._take_registration(answer)
        return False

    def _refused(self, failure: RpcFailure) -> None:
        if failure.reason != "session_unknown":
            self._give_up(failure.details)

    def _give_up(self, problem: str) -> None:
        self._owner.problem = problem
        self._owner.on_refused(problem)

    def _take_registration(self, answer: transfer_pb2.RegisterMemoryResponse) -> bool:
        """Take jobs from now on; False if the session is over, or the end of copies could not be told."""
        if not is_lock_name(answer.lock_file):
            self._give_up(f"lock_file: {answer.lock_file!r} is no name of a lock, only lower-case hex is")
            return False
        gate = lock = None
        if answer.gate_file:
            try:
                gate = CopyGate.open(self._pool_directory, answer.gate_file)
            except (OSError, PoolError) as error:
                logger.warning("the gate of the copies cannot be opened: %s", error)
        try:
            # Now, while its file is there: once that is removed, its path would prove nothing.
            lock = WatchedLock.open(self._pool_directory, answer.lock_file)
        except (OSError, PoolError) as error:
            logger.warning("the lock of the process that copies cannot be opened: %s", error)
        if gate is None and lock is None:
            self._give_up(f"files of {self._pool_directory} are missing: the end of copies cannot be told")
            return False
        with self._changed:
            if self._open:
                self._max_sent = answer.max_jobs or MAX_SENT
                self._gate, self._lock = gate, lock
                self._memory_id = answer.memory_id
                return True
        for opened in (gate, lock):
            if opened is not None:
                opened.close()  # no job was sent whose end it could tell
        return False

    def _read(self, stub: transfer_pb2_grpc.TransferServiceStub) -> None:
        self._waits = True
        call = self._call = stub.Transfer(self._requests())
        threading.Thread(target=self._watch, args=(call,), name="kvtier-transfer-watch", daemon=True).start()
        try:
            for answer in call:
                with self._changed:
                    self._unanswered = 0
                    sent = self._sent.pop(answer.job_id, None)
                    self._end_requests_if_over()
                if sent is not None:
                    sent.done(_copied(sent.job, answer))  # raises nothing: a job must end
            self._waits = False
        except grpc.RpcError as error:
            failure = read_failure(error)
            # What the daemon has begun it answers before it ends the stream.
            self._waits = not failure.boot_id
            logger.info("the stream of copies has ended: %s", failure.reason)
        finally:
            with self._changed:
                self._has_ended = True
                self._outbox.put(None)
                self._changed.notify_all()

    def _watch(self, call: grpc.Call) -> None:
        """End the stream of a daemon that says nothing while jobs are under way."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._sent or self._has_ended)
                if self._changed.wait_for(lambda: self._has_ended, PING_S):
                    return
                self._unanswered = self._unanswered + 1 if self._sent else 0
                is_silent = self._unanswered > MAX_UNANSWERED
            if is_silent:
                logger.warning(
                    "the daemon has not answered for %.0f s; its copies are given up, and the engine "
                    "computes instead",
                    MAX_UNANSWERED * PING_S,
                )
                call.cancel()
                return
            self._outbox.put(transfer_pb2.TransferRequest())

    def _requests(self) -> Iterator[transfer_pb2.TransferRequest]:
        while (request := self._outbox.get()) is not None:
            request.session_id, request.memory_id = self._session_id, self._memory_id
            yield request

    def _fail_the_rest(self) -> None:
        """End what was not answered, when nothing can copy for it any more."""
        with self._changed:
            left, self._sent = list(self._sent.values()), {}
        for sent in left:
            if sent.kind is JobKind.STORE:
                sent.fail()
        loads = [sent for sent in left if sent.kind is JobKind.LOAD]
        if loads and self._waits:
            self._wait_for_the_end_of_copies()
        for sent in loads:
            sent.fail()

    def _wait_for_the_end_of_copies(self) -> None:
        while not self._nothing_is_copied():
            if self._released.wait(LOCK_POLL_S):
                return
        time.sleep(GRACE_S)

    def _nothing_is_copied(self) -> bool:
        if self._gate is not None and self._gate.take():
            return True
        return self._copier_is_gone()


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


def _request_of(
    job: Job, kind: JobKind, verify: bool, wait_value: int, job_id: int
) -> transfer_pb2.TransferRequest:
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
        wait_value=wait_value,
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
