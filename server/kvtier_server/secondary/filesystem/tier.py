"""The filesystem tier: chunks as files, below one root, which other daemons may share.

Owns what is written, read and evicted, and when. The file's format is `chunk_file.py`, its place
`places.py`, the way of its bytes `chunk_files.py`, what is known of the disk `index.py`. A chunk is there
when its file has its name, and a file gets its name when it is whole: written under another one first, then
renamed. Nobody writes into a file that has its name.

    [[tiers]]
    type = "filesystem"
    root = "/var/lib/kvtier/chunks"
    capacity = "200GiB"

Threads: readers and writers (`TierWorkers`), which have a process of its own do the I/O, and one that keeps
the index's copy, reads directories after a crash, and removes what is cleared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kvtier_ops.directory import planted_link
from kvtier_ops.faults import fault_point
from kvtier_ops.namespace import SpaceName
from kvtier_server.config_values import Bytes, BytesOrNone, Count, Nanoseconds, Share
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
    TierDisk,
    TierError,
    TierJob,
    TierStats,
)
from kvtier_server.secondary.chunk_file import (
    HEADER_BYTES,
    BrokenHeader,
    OtherFormat,
    file_bytes,
    read_header,
)
from kvtier_server.secondary.chunk_names import FORMAT_DIRECTORY, SUFFIX, file_name, key_of
from kvtier_server.secondary.filesystem.chunk_files import ChunkFiles, ChunkIo, IoResult
from kvtier_server.secondary.filesystem.disk import Disk
from kvtier_server.secondary.filesystem.io_process import ChunkProcess, ProcessLost
from kvtier_server.secondary.filesystem.places import TEMPORARY, Places
from kvtier_server.secondary.holdings import Name
from kvtier_server.secondary.index import MAX_OTHERS, Index, IndexFile
from kvtier_server.secondary.index_copy import IndexCopy
from kvtier_server.secondary.parameters import TierParameters
from kvtier_server.secondary.state_directory import lock_state, state_file
from kvtier_server.secondary.workers import ChunkResult, KeptTier, TierWorkers

logger = logging.getLogger(__name__)

DAY_S = 86_400.0
BURST_S = 3_600.0
"""What may be written at once of a day's budget: an hour's."""

INDEX_EVERY_S = 1.0
"""How far the index's copy may be behind."""

STALE_TEMPORARY_S = 3_600.0
"""A file that has been written for so long is nobody's any more."""

EVICT_PIECE_BYTES = 64 << 20
"""What is taken out of the order in one go where an operator wants room."""

MAX_UNREMOVED = 16
"""Files that cannot be removed, after which an operator's eviction ends."""

FREE_CHECK_S = 0.2
"""How old the figure of free space may be."""

PATIENCE_DEADLINES, LEAST_PATIENCE_S = 3, 30.0
"""An I/O that takes so many of its deadlines, or so long if that is more, is ended with its process."""

MAX_OFFERS = 65_536
"""Chunks whose offers are counted, the oldest forgotten first."""


def _check_root(root: str) -> str:
    if not os.path.isabs(root):
        raise ValueError(f"{root!r} is not an absolute path")
    return root


class FilesystemParameters(TierParameters):
    """Keys of a filesystem tier."""

    root: Annotated[str, AfterValidator(_check_root)]
    """Directory of the chunks. Made if it is not there; several daemons may share it."""
    capacity: Bytes
    """Bytes of files that this daemon keeps; what others wrote does not count."""
    low_water: Share = 0.95
    """Part of the capacity that eviction frees down to, so that not every store has to evict."""
    reserve_free: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of the file system that stays free: below it this daemon evicts its own, or writes nothing."""
    durability: Literal["process", "os"] = "process"
    """What a stored chunk survives: the daemon's death, or with fsync also the machine's."""
    direct: Literal["auto", "on", "off"] = "auto"
    """O_DIRECT, so that chunks do not fill the page cache; auto = where the file system can."""
    io: Literal["process", "threads"] = "process"
    """Who reads, writes and hashes: a process of its own, or threads of the daemon. The threads save some
    40 MiB, and answers to engines wait for them."""
    shared: bool = False
    """Other daemons store here too: what is not known is looked for, and a prompt waits for that."""
    readers: Annotated[Count, Field(le=64)] = 4
    """Threads that load; loads never wait for stores."""
    writers: Annotated[Count, Field(le=64)] = 2
    """Threads that store."""
    deadline: Nanoseconds = 10 * 10**9
    """For one chunk, from its submission on."""
    max_waiting: Bytes = 256 << 20
    """Bytes of stores that the tier has taken and not written yet."""
    writes_per_day: BytesOrNone = 0
    """Endurance: bytes a day, on average; 0 = no limit."""
    min_offers: Annotated[Count, Field(le=255)] = 1
    """Store a chunk when it is offered for this many times."""
    state_directory: str = ""
    """Local directory of the index, one for each daemon; default: kvtier in $XDG_STATE_HOME."""


class FilesystemTier(KeptTier):
    """Chunks as files. See the module's first lines."""

    medium = Medium.STORAGE
    locality = Locality.LOCAL
    can_evict = True
    Parameters = FilesystemParameters
    can_list = True

    def __init__(
        self,
        spec: OffloadingSpec,
        pool: memoryview,
        tier_type: str,
        on_finished: Callable[[], None],
        parameters: FilesystemParameters,
        disk: Disk | None = None,
    ) -> None:
        """Open the root and begin. Raises TierError if the root cannot be used.

        `disk`: another one than the real; only threads of this process can use it.
        """
        super().__init__(spec, pool, tier_type, on_finished, parameters)
        self._own = parameters
        self._disk = disk or Disk()
        link = planted_link(Path(parameters.root))
        if link is not None:
            raise TierError(f"root {parameters.root} lies behind {link}, a link of another user; remove it")
        try:
            self._places = Places.below(self._disk, parameters.root)
        except OSError as error:
            raise TierError(
                f"root {parameters.root} cannot be used ({error.filename}: {error.strerror}); make it a "
                "directory that this user may write to, without links below it, or name another one"
            ) from error
        if not parameters.shared:
            self._check_owner()
        self._index = Index()
        self._holdings = self._index.holdings
        index_file = state_file(parameters.state_directory, "filesystem", os.path.realpath(parameters.root))
        try:
            self._state_lock = lock_state(
                index_file, "daemons that share a root need shared = true and a state_directory each"
            )
        except TierError:
            self._places.close()
            raise
        try:
            self._io = self._make_io(pool)
        except TierError:
            self._places.close()
            os.close(self._state_lock)
            raise
        self._file = IndexFile(index_file)
        self._copy = IndexCopy(self._index, self._file, tier_type)
        self._is_direct = parameters.direct != "off"
        self._offers: OrderedDict[Name, int] = OrderedDict()
        self._writing_bytes = 0
        self._wear = _Wear(parameters.writes_per_day)
        self._free: tuple[float, int, int] = (-1.0, 0, 0)
        self._counts = {"worn_out": 0, "no_space": 0, "too_few_offers": 0}
        self.is_complete = False
        """Whether all that was on disk at the start is in the index."""
        self.is_shared = True  # until then only the disk knows
        self._workers = TierWorkers(
            tier_type,
            self._run,
            on_finished,
            num_readers=parameters.readers,
            num_writers=parameters.writers,
            max_queued_bytes=parameters.max_waiting,
            deadline_s=parameters.deadline / 1e9,
        )
        self._keeper = Thread(target=self._keep_index, name=f"kvtier-{tier_type}-index", daemon=True)
        self._keeper.start()

    def _check_owner(self) -> None:
        """Raise TierError if what is below the root was made by another user, who may then change it."""
        owner = os.fstat(self._places.fd).st_uid
        if owner not in (0, os.geteuid()):
            self._places.close()
            raise TierError(
                f"{self._own.root}/{FORMAT_DIRECTORY} belongs to uid {owner}, who can put chunks there; "
                "remove it, name another root, or set shared = true if that is another daemon's user"
            )

    def _make_io(self, pool: memoryview) -> ChunkIo:
        own = self._own
        if own.io == "threads":
            return ChunkFiles(self._disk, self._places, pool, durability=own.durability, direct=own.direct)
        if type(self._disk) is not Disk:
            raise TierError('another disk than the real one is used by threads only; set io = "threads"')
        return ChunkProcess(
            self.tier_type,
            self.spec,
            self._places.fd,
            durability=own.durability,
            direct=own.direct,
            num_threads=own.readers + own.writers,
            patience_s=max(PATIENCE_DEADLINES * own.deadline / 1e9, LEAST_PATIENCE_S),
        )

    # The core's side

    def lookup(self, space: SpaceName, keys: Sequence[bytes]) -> Sequence[Presence]:
        otherwise = Presence.UNKNOWN if self.is_shared else Presence.NO
        return [Presence.YES if known else otherwise for known in self._index.knows(space, keys)]

    def submit_probe(self, job: TierJob) -> bool:
        return self._workers.submit(job)

    def touch(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        self._index.touch(space, keys, stamps)

    def stats(self) -> TierStats:
        with self._lock:
            counts = tuple(self._counts.items())
        return TierStats(
            self._own.capacity,
            self._index.own_bytes,
            len(self._index),
            self._workers.backpressure.queued_bytes,
            self._workers.problem,
            counts,
            self._workers.io_errors,
            self._disk_stats(),
        )

    def _disk_stats(self) -> TierDisk | None:
        """What was last seen of the file system: the core's thread must not ask a disk."""
        checked_at, free, total = self._free
        if checked_at < 0:
            return None
        return TierDisk(total, max(free, 0), int(self._own.reserve_free * total), self._own.writes_per_day)

    def shutdown(self, timeout_s: float) -> bool:
        began = time.monotonic()
        all_ended = self._workers.stop(timeout_s / 2)
        is_first = self._stop()
        # The end of its process is the end of an I/O that hangs, but for those that nothing ends.
        all_ended = self._io.close(timeout_s / 4) and (all_ended or self._workers.stop(timeout_s / 8))
        self._keeper.join(max(began + timeout_s - time.monotonic(), timeout_s / 8))
        if all_ended and not self._keeper.is_alive() and is_first:
            self._places.close()
            os.close(self._state_lock)
        return all_ended

    # One chunk at a time, on the workers' threads

    def _run(self, kind: JobKind, chunk: TierChunk) -> ChunkResult:
        if kind is JobKind.STORE:
            return self._store(chunk)
        return self._load(chunk) if kind is JobKind.LOAD else self._probe(chunk)

    def _store(self, chunk: TierChunk) -> ChunkResult:
        name = (chunk.space, chunk.key)
        num_bytes = file_bytes(chunk.num_bytes)
        if self._index.knows(chunk.space, [chunk.key])[0]:
            return ChunkResult(Outcome.DONE)
        if not self._is_worth_it(name, num_bytes):
            return ChunkResult(Outcome.REFUSED)
        with self._lock:
            self._writing_bytes += num_bytes
        try:
            self._make_room()
            found = self._written(chunk)
            if found.outcome is Outcome.DONE:
                self._index.add(name, num_bytes, is_own=True, stamp=chunk.stamp)
        finally:
            with self._lock:
                self._writing_bytes -= num_bytes
        self._note_direct(found.is_direct)
        return ChunkResult(found.outcome)

    def _written(self, chunk: TierChunk) -> IoResult:
        """Have a chunk written; if the process dies over it, nothing of it stays that nobody counts."""
        try:
            return self._io.run(JobKind.STORE, chunk)
        except ProcessLost as lost:
            left = (f"{TEMPORARY}{lost.token}-", file_name(chunk.key))
            with contextlib.suppress(OSError), self._places.directory(chunk.space, chunk.key) as fd:
                for info in list(self._disk.files(fd)):
                    if info.name.startswith(left):
                        self._disk.unlink(fd, info.name)
            raise

    def _note_direct(self, is_direct: bool) -> None:
        if self._is_direct and not is_direct:
            self._is_direct = False
            logger.info("O_DIRECT does not work in %s; the page cache is used", self._own.root)

    def _is_worth_it(self, name: Name, num_bytes: int) -> bool:
        if num_bytes > self._own.capacity:
            return False
        with self._lock:
            if self._own.min_offers > 1:
                offers = self._offers.pop(name, 0) + 1
                if offers < self._own.min_offers:
                    self._offers[name] = offers
                    if len(self._offers) > MAX_OFFERS:
                        self._offers.popitem(last=False)
                    self._counts["too_few_offers"] += 1
                    return False
            if not self._wear.admits(num_bytes, time.monotonic()):
                self._counts["worn_out"] += 1
                return False
        if self._missing_space(num_bytes) > 0:
            missing = self._missing_space(num_bytes, fresh=True)
            if missing > 0:
                self._evict(missing)
                missing = self._missing_space(num_bytes, fresh=True)
            if missing > 0:
                with self._lock:
                    self._counts["no_space"] += 1
                return False
        with self._lock:
            checked_at, free, total = self._free
            # Counted now, or a fast disk would be full before the figure is old.
            self._free = (checked_at, free - num_bytes, total)
        return True

    def _missing_space(self, num_bytes: int, *, fresh: bool = False) -> int:
        """Bytes that the file system lacks for this file and the reserve; 0 or less if there is room."""
        checked_at, free, total = self._free
        now = time.monotonic()
        if fresh or now - checked_at > FREE_CHECK_S:
            free, total = self._disk.free_bytes(self._places.fd)
            with self._lock:
                free -= self._writing_bytes
                self._free = (now, free, total)
        return int(self._own.reserve_free * total) + num_bytes - free

    def _make_room(self) -> None:
        """Evict what this daemon wrote, down to the low-water mark, if what is being written is too much."""
        too_much = self._index.own_bytes + self._writing_bytes - self._own.capacity
        if too_much > 0:
            spare = int(self._own.capacity * (1 - self._own.low_water))
            self._evict(max(too_much, spare))

    def _evict(self, num_bytes: int) -> None:
        victims = self._index.victims(num_bytes)
        for position, name in enumerate(victims):
            try:
                self._remove(name, "evict")
            except BaseException:
                self._index.keep(victims[position + 1 :])
                raise

    def _remove(self, name: Name, reason: str, *, unlink: bool = True) -> None:
        """Forget a chunk and remove its file. Raises OSError if that cannot be; it is forgotten anyway."""
        if not self._index.remove(name, reason):
            return
        space, key = name
        try:
            if unlink:
                with contextlib.suppress(FileNotFoundError), self._places.directory(space, key) as fd:
                    self._disk.unlink(fd, file_name(key))
                    fault_point("filesystem.after_delete")
        finally:
            self._tell_removed([Removal(space, (key,), reason)])  # when it is gone

    def _load(self, chunk: TierChunk) -> ChunkResult:
        name = (chunk.space, chunk.key)
        found = self._io.run(JobKind.LOAD, chunk)
        if found.outcome is Outcome.MISSING:
            # Gone, or another chunk's. Who wrote it may want it: it stays, and is not this chunk.
            self._remove(name, "missing", unlink=False)
        elif found.outcome is Outcome.CORRUPT:
            # Known or not: it is to be told, and its file removed.
            self._index.add_if_new(name, 0, is_own=False)
            self._remove(name, "corrupt")
        return ChunkResult(found.outcome, found.checksums)

    def _probe(self, chunk: TierChunk) -> ChunkResult:
        found = self._io.run(JobKind.PROBE, chunk)
        if found.outcome is Outcome.DONE:
            name = (chunk.space, chunk.key)
            self._index.add_if_new(name, found.file_bytes, is_own=not self._own.shared)
        return ChunkResult(found.outcome)

    # The index's thread

    def _keep_index(self) -> None:
        try:
            self._load_index()
        except Exception:
            logger.exception(
                "tier %s: its index could not be read; what is on disk is probed", self.tier_type
            )
        while True:
            clearing = self._take_clearing(INDEX_EVERY_S)
            stopped = self._stopped
            self._clear_all(clearing)
            self._look_at_disk()
            self._index.settle()
            self._index.sweep()
            self._index.limit_others(MAX_OTHERS)
            written = self._copy.write(at_once=stopped)
            if written:
                fault_point("filesystem.after_index")
            if stopped:
                self._close_index(written is not None and self._copy.is_whole)
                return

    def _look_at_disk(self) -> None:
        """See how much is free, also while nothing is written, for whoever watches it."""
        if self._stopped:
            return
        with contextlib.suppress(OSError):  # the next store will meet it, and say so
            self._missing_space(0)

    def _load_index(self) -> None:
        """Take over the index's copy, and what it may not know; from then on what is unknown is not there."""
        is_complete = self._file.open()
        try:
            for name, num_bytes, is_own in self._file.read():
                self._index.restore(name, num_bytes, is_own=is_own)
        except (sqlite3.Error, ValueError) as error:
            logger.warning("tier %s: its index is broken (%s); it is made anew", self.tier_type, error)
            is_complete = False
        if not is_complete:
            self._read_directories()
        if not self._stopped:
            self.is_shared = self._own.shared
            self.is_complete = True

    def _read_directories(self) -> None:
        """Find the chunks on disk that the index does not know, and remove what nobody writes any more."""
        began, found = time.monotonic(), 0
        for space_name in list(self._disk.directories(self._places.fd)):
            with self._going_on(space_name), self._places.opened(self._places.fd, space_name) as space_fd:
                space = self._places.read_space(space_fd)
                if space is None:
                    continue
                for name in list(self._disk.directories(space_fd)):
                    if self._stopped:
                        return
                    with self._going_on(name), self._places.opened(space_fd, name) as fd:
                        found += self._read_directory(space, fd)
        logger.info("tier %s: %d chunks found in %.1f s", self.tier_type, found, time.monotonic() - began)

    @contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        """Pass over a directory that cannot be read: the others are worth as much without it."""
        try:
            yield
        except OSError as error:
            logger.warning("tier %s: %s is passed over: %s", self.tier_type, name, error)

    def _read_directory(self, space: SpaceName, fd: int) -> int:
        fault_point("filesystem.before_scan")
        found = 0
        for info in list(self._disk.files(fd)):
            if info.name.startswith(TEMPORARY):
                if time.time() - info.modified_s > STALE_TEMPORARY_S:
                    with contextlib.suppress(OSError):
                        self._disk.unlink(fd, info.name)
                continue
            key = key_of(info.name)
            if key is None and info.name.endswith(SUFFIX):
                with contextlib.suppress(OSError):
                    key = self._key_in(fd, info.name)
            if key is not None:
                self._index.add_if_new((space, key), info.num_bytes, is_own=not self._own.shared)
                found += 1
        return found

    def _key_in(self, parent: int, name: str) -> bytes | None:
        """Read a key that is too long for a file's name from the header."""
        header = memoryview(bytearray(HEADER_BYTES))
        fd = self._disk.open(parent, name, direct=False)
        try:
            if self._disk.read(fd, [header], 0) != HEADER_BYTES:
                return None
            return read_header(header).key
        except (BrokenHeader, OtherFormat):
            return None
        finally:
            self._disk.close(fd)

    def _clear(self, job: ClearJob) -> None:
        """Remove what is covered; if the job says so others' chunks too, also those never heard of."""
        if job.others:
            try:
                self._read_directories()
            except OSError as error:
                logger.warning("tier %s: its directories cannot be read: %s", self.tier_type, error)
        num_removed = removed_bytes = num_kept = 0
        for name, num_bytes, is_own in self._index.covered_by(job.covers):
            if not (is_own or job.others) or self._stopped or not self._unlink(name):
                num_kept += 1
                continue
            self._remove(name, "clear", unlink=False)
            num_removed += 1
            removed_bytes += num_bytes
        self._tell_cleared(ClearResult(job.id, num_removed, removed_bytes, num_kept))

    def _evict_coldest(self, num_bytes: int) -> tuple[int, int]:
        num_removed = removed_bytes = 0
        stay: list[Name] = []
        # In pieces: a million victims at once would be out of the order for minutes.
        while removed_bytes < num_bytes and len(stay) < MAX_UNREMOVED and not self._stopped:
            victims = self._index.victims(min(num_bytes - removed_bytes, EVICT_PIECE_BYTES))
            if not victims:
                break
            for name in victims:
                size = self._index.size_of(name)
                if len(stay) >= MAX_UNREMOVED or not self._unlink(name):
                    stay.append(name)
                    continue
                self._remove(name, "admin", unlink=False)
                num_removed += 1
                removed_bytes += size
        self._index.keep(stay)
        return num_removed, removed_bytes

    def _unlink(self, name: Name) -> bool:
        """Remove a chunk's file; False if that cannot be. Not being there is as good."""
        space, key = name
        try:
            with contextlib.suppress(FileNotFoundError), self._places.directory(space, key) as fd:
                self._disk.unlink(fd, file_name(key))
        except OSError as error:
            logger.warning("tier %s: a file could not be removed: %s", self.tier_type, error)
            return False
        return True

    def _close_index(self, written: bool) -> None:
        try:
            if written:
                self._file.write_order(self._index.names())
        except (sqlite3.Error, OSError):
            written = False
        self._file.close(in_order=written and self.is_complete and not self._workers.has_work)


class _Wear:
    """A budget of bytes written a day: a bucket that fills evenly and holds an hour's worth."""

    def __init__(self, bytes_per_day: int) -> None:
        self._per_second = bytes_per_day / DAY_S
        self._most = self._per_second * BURST_S
        self._left = self._most
        self._at: float | None = None

    def admits(self, num_bytes: int, now: float) -> bool:
        """Take so much out if there is enough; without a budget there always is."""
        if not self._per_second:
            return True
        if self._at is not None:
            self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        # A chunk larger than an hour's worth goes when the bucket is full.
        if self._left < min(num_bytes, self._most):
            return False
        self._left -= num_bytes
        return True
