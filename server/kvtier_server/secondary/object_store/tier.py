"""The object tier: chunks as objects below one URL, which other daemons store under too.

Owns what is written, read and evicted, and when. The object's format is `chunk_file.py`, without zeros at its
end; its requests are `bucket.py`, what is known without one `index.py`. An object is there when it is whole:
stores write it in one step, and only where there is none.

    <url>/kvtier-1/<space>/<key>.chunk

    [[tiers]]
    type = "object"
    url = "s3://bucket/prefix"
    capacity = "2TiB"

All chunks of one namespace have one geometry. Where daemons disagree about it, the object is that of who was
first, and a miss for the others.

Threads: readers and writers (`TierWorkers`), one that keeps the index's copy, and one that asks whether the
store is there while it seems not to be, and removes what is cleared.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from threading import Thread

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import (
    ClearJob,
    ClearResult,
    JobKind,
    Locality,
    Medium,
    OffloadingSpec,
    Outcome,
    Presence,
    Removal,
    TierChunk,
    TierJob,
    TierStats,
)
from kvtier_server.secondary.chunk_file import (
    HEADER_BYTES,
    BrokenHeader,
    OtherFormat,
    checksums_to_store,
    payload_checksum,
    read_header,
    write_header,
)
from kvtier_server.secondary.chunk_names import FORMAT_DIRECTORY, file_name, space_directory
from kvtier_server.secondary.holdings import Name
from kvtier_server.secondary.index import MAX_OTHERS, Index, IndexFile
from kvtier_server.secondary.index_copy import IndexCopy
from kvtier_server.secondary.object_store.bucket import Bucket
from kvtier_server.secondary.object_store.parameters import ObjectParameters
from kvtier_server.secondary.state_directory import lock_state, state_file
from kvtier_server.secondary.workers import ChunkResult, KeptTier, TierWorkers

logger = logging.getLogger(__name__)

INDEX_EVERY_S = 1.0
"""How far the index's copy may be behind."""

FIRST_CHECK_S, LONGEST_CHECK_S = 1.0, 30.0
"""Between questions to a store that seems not to be there; doubled up to the longest."""

EVICT_PIECE_BYTES = 256 << 20
"""What is taken out of the order in one go where an operator wants room."""

CLEAR_OBJECTS = 1_000
"""Removed with one request, where the store has such a request."""


def object_path(name: Name) -> str:
    """Name a chunk's object, relative to the URL."""
    space, key = name
    return f"{FORMAT_DIRECTORY}/{space_directory(space)}/{file_name(key)}"


def object_bytes(chunk: TierChunk) -> int:
    """Bytes of a chunk's object."""
    return HEADER_BYTES + chunk.num_bytes


class ObjectTier(KeptTier):
    """Chunks as objects. See the module's first lines."""

    medium = Medium.STORAGE
    locality = Locality.REMOTE
    can_evict = True
    Parameters = ObjectParameters
    is_shared = True
    can_list = True

    def __init__(
        self,
        spec: OffloadingSpec,
        pool: memoryview,
        tier_type: str,
        on_finished: Callable[[], None],
        parameters: ObjectParameters,
        bucket: Bucket | None = None,
    ) -> None:
        """Begin, without waiting for the store. Raises TierError if no request can ever be made."""
        super().__init__(spec, pool, tier_type, on_finished, parameters)
        self._own = parameters
        self._bucket = bucket or Bucket(parameters)
        root = f"{parameters.endpoint} {parameters.url}"
        index_file = state_file(parameters.state_directory, "object", root)
        self._state_lock = lock_state(
            index_file, "daemons of one machine that share a bucket need a state_directory each"
        )
        self._file = IndexFile(index_file)
        self._index = Index()
        self._copy = IndexCopy(self._index, self._file, tier_type)
        self._holdings = self._index.holdings
        self._writing_bytes = 0
        self._unreachable = f"{parameters.url} has not answered yet"
        """Why nothing is asked of the store now; "" = it is used."""
        self._workers = TierWorkers(
            tier_type,
            self._run,
            on_finished,
            num_readers=parameters.readers,
            num_writers=parameters.writers,
            max_queued_bytes=parameters.max_waiting,
            deadline_s=parameters.deadline / 1e9,
        )
        self._threads = [
            Thread(target=target, name=f"kvtier-{tier_type}-{what}", daemon=True)
            for what, target in (("index", self._keep_index), ("watch", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    # The core's side

    def lookup(self, space: SpaceName, keys: Sequence[bytes]) -> Sequence[Presence]:
        return [Presence.YES if known else Presence.UNKNOWN for known in self._index.knows(space, keys)]

    def submit_store(self, job: TierJob) -> bool:
        return self._submit(job)

    def submit_load(self, job: TierJob) -> bool:
        return self._submit(job)

    def submit_probe(self, job: TierJob) -> bool:
        return self._submit(job)

    def _submit(self, job: TierJob) -> bool:
        return not self._unreachable and self._workers.submit(job)

    def touch(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        self._index.touch(space, keys, stamps)

    def stats(self) -> TierStats:
        return TierStats(
            self._own.capacity,
            self._index.own_bytes,
            len(self._index),
            self._workers.backpressure.queued_bytes,
            self._unreachable or self._workers.problem,
            io_errors=self._workers.io_errors,
        )

    def shutdown(self, timeout_s: float) -> bool:
        give_up_at = time.monotonic() + timeout_s
        all_ended = self._workers.stop(timeout_s)
        is_first = self._stop()
        for thread in self._threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))
        if all_ended and is_first and not any(thread.is_alive() for thread in self._threads):
            os.close(self._state_lock)
        return all_ended

    # One chunk at a time, on the workers' threads

    def _run(self, kind: JobKind, chunk: TierChunk) -> ChunkResult:
        if kind is JobKind.STORE:
            return self._store(chunk)
        return self._load(chunk) if kind is JobKind.LOAD else self._probe(chunk)

    def _store(self, chunk: TierChunk) -> ChunkResult:
        name, num_bytes = (chunk.space, chunk.key), object_bytes(chunk)
        if self._index.knows(chunk.space, (chunk.key,))[0]:
            return ChunkResult(Outcome.DONE)
        if num_bytes > self._own.capacity:
            return ChunkResult(Outcome.REFUSED)
        # Asked first: what another daemon has stored need not be sent only to be refused.
        path = object_path(name)
        there = self._bucket.size(path)
        if there == num_bytes:
            self._index.add_if_new(name, num_bytes, is_own=False)
            return ChunkResult(Outcome.DONE)
        data = self._as_object(chunk)
        if data is None:
            return ChunkResult(Outcome.CORRUPT)
        with self._lock:
            self._writing_bytes += num_bytes
        try:
            self._make_room()
            if there is not None:
                self._bucket.put(path, data)
            elif not self._bucket.put_new(path, data):
                # Another daemon was first, or another thread of this one: then it is known as its own.
                self._index.add_if_new(name, num_bytes, is_own=False)
                return ChunkResult(Outcome.DONE)
            self._index.add(name, num_bytes, is_own=True, stamp=chunk.stamp)
        finally:
            with self._lock:
                self._writing_bytes -= num_bytes
        return ChunkResult(Outcome.DONE)

    def _as_object(self, chunk: TierChunk) -> bytearray | None:
        """Copy a chunk out of the pool; None if it is not what its checksums say.

        A request that was given up may be sent for a while longer: it must not see the pool.
        """
        data = bytearray(object_bytes(chunk))
        header, payload = memoryview(data)[:HEADER_BYTES], memoryview(data)[HEADER_BYTES:]
        payload[:] = self.pool[chunk.offset : chunk.offset + chunk.num_bytes]
        checksums = checksums_to_store(payload, chunk)
        if checksums is None:
            return None
        write_header(header, chunk, checksums, payload_checksum(payload, memoryview(b"")))
        return data

    def _make_room(self) -> None:
        """Evict what this daemon wrote, down to the low-water mark, if what is being written is too much."""
        too_much = self._index.own_bytes + self._writing_bytes - self._own.capacity
        if too_much <= 0:
            return
        spare = int(self._own.capacity * (1 - self._own.low_water))
        victims = self._index.victims(max(too_much, spare))
        # Removed first and forgotten then: what cannot be removed still counts.
        try:
            self._bucket.delete([object_path(name) for name in victims])
        except BaseException:
            self._index.keep(victims)
            raise
        self._forget(victims, "evict")

    def _load(self, chunk: TierChunk) -> ChunkResult:
        name, num_bytes = (chunk.space, chunk.key), object_bytes(chunk)
        found = self._bucket.get(object_path(name), num_bytes, HEADER_BYTES)
        checksums = () if found is None else _verified(chunk, found.num_bytes, found.data)
        if checksums is None:
            self._remove_corrupt(name)
            return ChunkResult(Outcome.CORRUPT)
        if not checksums or found is None:
            # Gone, or another chunk's: who wrote it may want it.
            self._forget([name], "missing")
            return ChunkResult(Outcome.MISSING)
        self.pool[chunk.offset : chunk.offset + chunk.num_bytes] = found.data[HEADER_BYTES:]
        self._index.add_if_new(name, num_bytes, is_own=False)
        return ChunkResult(Outcome.DONE, checksums)

    def _probe(self, chunk: TierChunk) -> ChunkResult:
        """Look whether an object is there that has the chunk's length. The load tells the rest."""
        name, num_bytes = (chunk.space, chunk.key), object_bytes(chunk)
        if self._bucket.size(object_path(name)) != num_bytes:
            return ChunkResult(Outcome.MISSING)
        self._index.add_if_new(name, num_bytes, is_own=False)
        return ChunkResult(Outcome.DONE)

    def _remove_corrupt(self, name: Name) -> None:
        self._index.add_if_new(name, 0, is_own=False)  # known or not: it is to be told
        self._forget([name], "corrupt")
        try:
            self._bucket.delete([object_path(name)])
        except OSError as error:
            logger.warning("tier %s: a corrupt object stays: %s", self.tier_type, error.strerror)

    def _forget(self, names: Sequence[Name], reason: str) -> None:
        """Forget chunks, and tell of those that were known."""
        gone = [Removal(name[0], (name[1],), reason) for name in names if self._index.remove(name, reason)]
        self._tell_removed(gone)

    # The thread that watches the store

    def _watch(self) -> None:
        checked_at, pause_s = -LONGEST_CHECK_S, FIRST_CHECK_S
        while True:
            clearing = self._take_clearing(FIRST_CHECK_S if checked_at >= 0 else 0.0)
            if self._stopped:
                return
            self._clear_all(clearing)
            now = time.monotonic()
            if not self._unreachable and not self._workers.backpressure.is_tripped:
                if now - checked_at > LONGEST_CHECK_S:
                    pause_s = FIRST_CHECK_S
            elif now - checked_at >= pause_s:
                self._check()
                checked_at = now
                pause_s = min(2 * pause_s, LONGEST_CHECK_S)

    def _check(self) -> None:
        """Ask whether the store is there; from then on it is used, or left alone."""
        try:
            self._bucket.check()
        except OSError as error:
            problem = f"{self._own.url} cannot be used: {error.strerror}; tried again by itself"
            if problem != self._unreachable:
                logger.warning("tier %s: %s", self.tier_type, problem)
            self._unreachable = problem
            return
        self._unreachable = ""
        self._workers.try_again()

    def _clear(self, job: ClearJob) -> None:
        covered = self._index.covered_by(job.covers)
        going = [(name, num_bytes) for name, num_bytes, is_own in covered if is_own or job.others]
        num_removed = removed_bytes = 0
        for first in range(0, len(going), CLEAR_OBJECTS):
            some = going[first : first + CLEAR_OBJECTS]
            names = [name for name, _ in some]
            if self._unreachable or self._stopped:
                break
            try:
                self._bucket.delete([object_path(name) for name in names])
            except OSError as error:
                logger.warning(
                    "tier %s: what is cleared could not be removed: %s", self.tier_type, error.strerror
                )
                break
            self._forget(names, "clear")
            num_removed += len(some)
            removed_bytes += sum(num_bytes for _, num_bytes in some)
        self._tell_cleared(ClearResult(job.id, num_removed, removed_bytes, len(covered) - num_removed))

    def _evict_coldest(self, num_bytes: int) -> tuple[int, int]:
        num_removed = removed_bytes = 0
        while removed_bytes < num_bytes and not (self._unreachable or self._stopped):
            victims = self._index.victims(min(num_bytes - removed_bytes, EVICT_PIECE_BYTES))
            sizes = [self._index.size_of(name) for name in victims]
            try:
                self._bucket.delete([object_path(name) for name in victims])
            except OSError as error:
                self._index.keep(victims)
                logger.warning("tier %s: what is evicted stays: %s", self.tier_type, error.strerror)
                break
            if not victims:
                break
            self._forget(victims, "admin")
            num_removed += len(victims)
            removed_bytes += sum(sizes)
        return num_removed, removed_bytes

    # The thread of the index

    def _keep_index(self) -> None:
        try:
            self._load_index()
        except Exception:
            logger.exception("tier %s: its index could not be read; the store is asked", self.tier_type)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped, INDEX_EVERY_S)
                stopped = self._stopped
            self._index.settle()
            self._index.sweep()
            self._index.limit_others(MAX_OTHERS)
            self._copy.write(at_once=stopped)
            if stopped:
                self._close_index()
                return

    def _load_index(self) -> None:
        self._file.open()
        try:
            for name, num_bytes, is_own in self._file.read():
                self._index.restore(name, num_bytes, is_own=is_own)
        except (sqlite3.Error, ValueError) as error:
            logger.warning("tier %s: its index is broken (%s); the store is asked", self.tier_type, error)

    def _close_index(self) -> None:
        try:
            self._file.write_order(self._index.names())
        except (sqlite3.Error, OSError) as error:
            logger.warning("tier %s: the order of its index is lost: %s", self.tier_type, error)
        self._file.close(in_order=self._copy.is_whole)


def _verified(chunk: TierChunk, num_bytes: int, data: memoryview) -> tuple[int, ...] | None:
    """Return the part checksums of what was read; () if it is another chunk, None if it is corrupt."""
    try:
        header = read_header(data[:HEADER_BYTES])
    except BrokenHeader:
        return None
    except OtherFormat:
        return ()
    if not header.describes(chunk):
        return ()
    if num_bytes != object_bytes(chunk):
        return None
    if header.payload_checksum != payload_checksum(data[HEADER_BYTES:], memoryview(b"")):
        return None
    return header.checksums
