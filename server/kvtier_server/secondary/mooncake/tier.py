"""The mooncake tier: chunks in memory that many nodes lend to one store.

Owns what is stored, loaded and removed, and what is believed of it. An object is a header of 4 KiB, which
says whose bytes follow (`secondary/chunk_file.py` has the format), and the chunk's bytes as they lie in the
slot; the engine gathers the two, so nothing is copied in between. What the store says of itself is a hint: a
chunk is there when its header and all its bytes have been read and verified, and at no other time.

    [[tiers]]
    type = "mooncake"
    master = "10.0.0.1:50051"
    segment = "64GiB"

Threads: readers and writers (`TierWorkers`), and one keeper, which watches the store and removes what is
cleared; each has a header of its own. The engine is in processes of its own (`helper.py`).
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from itertools import count
from threading import Event, Thread, local

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import (
    ClearJob,
    ClearResult,
    EvictJob,
    JobKind,
    Locality,
    Medium,
    OffloadingSpec,
    Outcome,
    Presence,
    Removal,
    TierChunk,
    TierError,
    TierJob,
    TierStats,
)
from kvtier_server.secondary.chunk_file import (
    BrokenHeader,
    OtherFormat,
    checksums_to_store,
    payload_checksum,
    read_header,
    write_header,
)
from kvtier_server.secondary.mooncake import codes
from kvtier_server.secondary.mooncake.engine import EngineStore
from kvtier_server.secondary.mooncake.known import Entry, Known
from kvtier_server.secondary.mooncake.names import object_name, trial_name
from kvtier_server.secondary.mooncake.parameters import MooncakeParameters
from kvtier_server.secondary.mooncake.store import ObjectStore
from kvtier_server.secondary.mooncake.wire import HEADER_BYTES
from kvtier_server.secondary.workers import ChunkResult, KeptTier, TierWorkers

logger = logging.getLogger(__name__)

REFUSALS = frozenset({codes.NO_SPACE, codes.OVER_QUOTA})
STARTING = "not connected yet"

_NO_BYTES = memoryview(b"")


class MooncakeTier(KeptTier):
    """Chunks as objects of Mooncake's store. See the module's first lines."""

    medium = Medium.CPU
    locality = Locality.REMOTE
    Parameters = MooncakeParameters
    is_shared = True
    can_list = True

    def __init__(
        self,
        spec: OffloadingSpec,
        pool: memoryview,
        tier_type: str,
        on_finished: Callable[[], None],
        parameters: MooncakeParameters,
        store: ObjectStore | None = None,
    ) -> None:
        """Begin; the store may be away. Raises TierError if the engine is not installed."""
        super().__init__(spec, pool, tier_type, on_finished, parameters)
        self._own = parameters
        if store is None:
            check_installed()
            store = EngineStore(spec, parameters, parameters.readers + parameters.writers + 1)
        self._store = store
        self._headers = count()
        self._local = local()
        self._counts = {"no_space": 0}
        self._known = Known()
        self._holdings = self._known.holdings
        self._problem = STARTING
        self._store_closed = Event()
        self._workers = TierWorkers(
            tier_type,
            self._run,
            on_finished,
            num_readers=parameters.readers,
            num_writers=parameters.writers,
            max_queued_bytes=parameters.max_waiting,
            deadline_s=parameters.deadline / 1e9,
        )
        self._keeper = Thread(target=self._keep, name=f"kvtier-{tier_type}-keeper", daemon=True)
        self._keeper.start()

    # The core's side

    def lookup(self, space: SpaceName, keys: Sequence[bytes]) -> Sequence[Presence]:
        # Nobody is to wait for a store that is away.
        otherwise = Presence.NO if self._problem else Presence.UNKNOWN
        yes = Presence.NO if self._problem else Presence.YES
        return [yes if known else otherwise for known in self._known.knows(space, keys)]

    def submit_store(self, job: TierJob) -> bool:
        return not self._problem and self._workers.submit(job)

    def submit_load(self, job: TierJob) -> bool:
        return not self._problem and self._workers.submit(job)

    def submit_probe(self, job: TierJob) -> bool:
        return not self._problem and self._workers.submit(job)

    def stats(self) -> TierStats:
        with self._lock:
            counts = tuple(self._counts.items())
        return TierStats(
            0,
            self._known.num_bytes,
            len(self._known),
            self._workers.backpressure.queued_bytes,
            self._problem or self._workers.problem,
            counts,
            self._workers.io_errors,
        )

    def shutdown(self, timeout_s: float) -> bool:
        give_up_at = time.monotonic() + timeout_s
        self._workers.stop(timeout_s / 2)
        self._stop()
        # Ends the calls that workers and keeper wait in, if any do.
        all_ended = self._store.close(give_up_at - time.monotonic())
        self._store_closed.set()
        self._keeper.join(1.0)
        return self._workers.stop(1.0) and all_ended

    # The keeper

    def _keep(self) -> None:
        clearing: list[ClearJob | EvictJob] = []
        while not self._stopped:
            self._note(self._store.keep())
            self._clear_all(clearing)
            clearing = self._take_clearing(self._own.heartbeat / 1e9)
        # The processes that it began end with this thread, whatever they are about.
        self._store_closed.wait()

    def _note(self, problem: str) -> None:
        before, self._problem = self._problem, problem
        if problem and problem != before:
            logger.warning("tier %s: %s; tried again by itself", self.tier_type, problem)
        if before and not problem:
            logger.info("tier %s: the store is there", self.tier_type)
            self._workers.try_again()
        elif not problem and self._workers.backpressure.is_tripped and self._passes_trial():
            self._workers.try_again()

    def _passes_trial(self) -> bool:
        """Store something, read it and remove it: does the way to the nodes' memory work as well?"""
        name, pattern = trial_name(), os.urandom(HEADER_BYTES)
        index, header = self._header()
        header[:] = pattern
        try:
            code = self._store.put(name, index, 0, 0)
            if code in REFUSALS:
                return True  # an answer; where there is no room there may be much to read
            header[:] = bytes(HEADER_BYTES)
            is_same = not code and self._store.get(name, index, 0, 0) == HEADER_BYTES and header == pattern
            self._store.remove(name)
        except OSError:
            return False
        return is_same

    def _clear(self, job: ClearJob) -> None:
        num_removed = removed_bytes = num_kept = 0
        for space, key, entry in self._known.entries(job.covers):
            may_go = (entry.is_own or job.others) and not self._problem and not self._stopped
            if may_go and self._remove_object(entry.object_name):
                self._forget(space, key, "clear")
                num_removed += 1
                removed_bytes += entry.num_bytes
            else:
                num_kept += 1
        self._tell_cleared(ClearResult(job.id, num_removed, removed_bytes, num_kept))

    def _remove_object(self, name: str) -> bool:
        try:
            code = self._store.remove(name)
        except OSError as error:
            logger.warning("tier %s: an object could not be removed: %s", self.tier_type, error)
            return False
        if code not in {codes.DONE, codes.NOT_FOUND}:
            logger.warning(
                "tier %s: an object could not be removed: %s", self.tier_type, codes.describe(code)
            )
        return code in {codes.DONE, codes.NOT_FOUND}

    # One chunk at a time, on the workers' threads

    def _run(self, kind: JobKind, chunk: TierChunk) -> ChunkResult:
        if kind is JobKind.STORE:
            return self._put(chunk)
        return self._get(chunk) if kind is JobKind.LOAD else self._probe(chunk)

    def _put(self, chunk: TierChunk) -> ChunkResult:
        if self._known.knows(chunk.space, [chunk.key])[0]:
            return ChunkResult(Outcome.DONE)
        checksums = checksums_to_store(self._payload(chunk), chunk)
        if checksums is None:
            return ChunkResult(Outcome.CORRUPT)
        index, header = self._header()
        write_header(header, chunk, checksums, payload_checksum(self._payload(chunk), _NO_BYTES))
        name = object_name(chunk)
        code = self._store.put(name, index, chunk.offset, chunk.num_bytes)
        if code in REFUSALS:
            with self._lock:
                self._counts["no_space"] += 1
            return ChunkResult(Outcome.REFUSED)
        if code not in {codes.DONE, codes.EXISTS}:
            raise OSError(errno.EIO, codes.describe(code))
        self._heard_of(chunk, name, is_own=code == codes.DONE)
        return ChunkResult(Outcome.DONE)

    def _get(self, chunk: TierChunk) -> ChunkResult:
        name = object_name(chunk)
        index, header = self._header()
        code = self._store.get(name, index, chunk.offset, chunk.num_bytes)
        if code in {codes.NOT_FOUND, codes.NOT_READY, 0}:
            self._forget(chunk.space, chunk.key, "missing")
            return ChunkResult(Outcome.MISSING)
        if code < 0 and code != codes.TOO_SMALL:
            raise OSError(errno.EIO, codes.describe(code))
        checksums = self._verified(chunk, header) if code == HEADER_BYTES + chunk.num_bytes else None
        if checksums is None:
            self._remove_object(name)
            self._heard_of(chunk, name)  # known or not: it is to be told
            self._forget(chunk.space, chunk.key, "corrupt")
            return ChunkResult(Outcome.CORRUPT)
        self._heard_of(chunk, name)
        return ChunkResult(Outcome.DONE, checksums)

    def _verified(self, chunk: TierChunk, header: memoryview) -> tuple[int, ...] | None:
        """Return the part checksums of what was read; None if it is not what was stored under this name."""
        try:
            found = read_header(header)
        except (BrokenHeader, OtherFormat):
            return None
        if not found.describes(chunk):
            return None
        if found.payload_checksum != payload_checksum(self._payload(chunk), _NO_BYTES):
            return None
        return found.checksums

    def _probe(self, chunk: TierChunk) -> ChunkResult:
        """Ask the master, which may be wrong for seconds after a node's death: the load finds out."""
        name = object_name(chunk)
        code = self._store.exists(name)
        if code < 0 and code not in {codes.NOT_FOUND, codes.NOT_READY}:
            raise OSError(errno.EIO, codes.describe(code))
        if code <= 0:
            return ChunkResult(Outcome.MISSING)
        self._heard_of(chunk, name)
        return ChunkResult(Outcome.DONE)

    def _heard_of(self, chunk: TierChunk, name: str, *, is_own: bool = False) -> None:
        self._known.add(chunk.space, chunk.key, Entry(name, HEADER_BYTES + chunk.num_bytes, is_own))

    def _forget(self, space: SpaceName, key: bytes, reason: str) -> None:
        if self._known.remove(space, key, reason):
            self._tell_removed([Removal(space, (key,), reason)])

    def _payload(self, chunk: TierChunk) -> memoryview:
        return self.pool[chunk.offset : chunk.offset + chunk.num_bytes]

    def _header(self) -> tuple[int, memoryview]:
        """Return this thread's header, and its index."""
        index: int | None = getattr(self._local, "index", None)
        if index is None:
            with self._lock:
                index = self._local.index = next(self._headers)
        return index, self._store.headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES]


def check_installed() -> None:
    """Raise TierError if Mooncake's client is not installed here."""
    if importlib.util.find_spec("mooncake") is None:
        raise TierError(
            "Mooncake's client is not installed in the daemon's environment; type in kvtier's directory: "
            "pip install '.[server,mooncake]', or with CUDA: pip install mooncake-transfer-engine"
        )
