"""What every tier below the pool promises.

Owns the interface between the core, which decides what goes down and comes up, and a tier, which does the
I/O. The words: *cascade* = pool to tier, *promotion* = tier to pool. Owns no I/O and no thread.

    core    lookup      answered from memory, at once
            submit_*    takes a job, or refuses it; the work runs on the tier's own threads
    tier    on_finished called from any thread: `get_finished` has something
    core    get_finished

The pool's slots of a job are pinned from `submit_*` until the job has come back through `get_finished`,
however late that is: a tier may read and write them meanwhile, and not an instant longer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

from kvtier_ops.layout import part_offset
from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.parameters import TierParameters


class Medium(StrEnum):
    """What a tier's bytes lie on; a request may exclude it (`kv_load_tiers`)."""

    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(StrEnum):
    """Where they lie; likewise."""

    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


class Presence(IntEnum):
    """What a tier knows of a chunk without looking."""

    NO = 0
    YES = 1
    """It was there when last heard of. A load may still find it gone, which is a miss."""
    UNKNOWN = 2
    """Somebody else may have stored it, or the index is not complete: only a probe tells."""


class JobKind(StrEnum):
    """What a job does with its chunks."""

    STORE = "store"
    LOAD = "load"
    PROBE = "probe"


class Outcome(IntEnum):
    """What became of one chunk of a job."""

    DONE = 1
    """Stored, loaded and verified, or, of a probe, there."""
    MISSING = 2
    """Of a load or probe: it is not there."""
    CORRUPT = 3
    """Of a load: what is there is not what was stored, and will not be found again. Of a store: the pool's
    bytes do not match their checksums; nothing was stored."""
    FAILED = 4
    """An error of the medium, or too late."""
    REFUSED = 5
    """Of a store: no room, not worth it, or more than may be written; not an error."""


@dataclass(frozen=True, slots=True)
class OffloadingSpec:
    """What a tier is told of the pool: all it may assume about offsets and sizes.

    The pool begins on a page, so offsets are what O_DIRECT asks for.
    """

    pool_bytes: int
    slot_unit_bytes: int
    """Offsets are multiples of it; no two slots share such a unit."""
    max_key_bytes: int
    pool_file: str = ""
    """The file that the pool is a mapping of, for a tier whose I/O is done by a process of its own."""
    pool_file_offset: int = 0
    """Where in it the pool begins; a multiple of a page."""
    pool_lock_fd: int = -1
    """What such a process has to inherit: nobody else takes the pool over before its end."""


@dataclass(frozen=True, slots=True)
class TierChunk:
    """One chunk of a job: its name, its shape, and where in the pool it lies or is to lie.

    Only the bytes of its group move, never the rest of the slot. `checksums`: xxh3-64 of each part, 0 where
    none was recorded; empty in loads and probes. `geometry`: digest of the order and sizes of the tensors in
    a part; equal keys of another geometry are other chunks. `stamp`: of a store, when the chunk was used
    last, as `SecondaryTier.touch` has it.
    """

    space: SpaceName
    key: bytes
    geometry: bytes
    part_bytes: int
    num_parts: int
    offset: int = 0
    checksums: tuple[int, ...] = ()
    stamp: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that move: the parts, with the padding between them."""
        return part_offset(self.part_bytes, self.num_parts - 1) + self.part_bytes


@dataclass(frozen=True, slots=True)
class TierJob:
    """A batch of chunks that go the same way. Ids are the core's, unique over all tiers."""

    id: int
    kind: JobKind
    chunks: tuple[TierChunk, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that move."""
        return sum(chunk.num_bytes for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class JobResult:
    """The end of a job: one outcome per chunk, and for each that a load has brought its part checksums."""

    job_id: int
    outcomes: tuple[Outcome, ...]
    checksums: tuple[tuple[int, ...], ...] = ()
    seconds: float = 0.0
    """What the I/O took, without the wait for its turn."""


@dataclass(frozen=True, slots=True)
class Removal:
    """Chunks that are not in the tier any more, and why: evict, corrupt, missing, clear, admin."""

    space: SpaceName
    keys: tuple[bytes, ...]
    reason: str


class Change(NamedTuple):
    """One chunk that has come into a tier's index, or left it (`is_held` False).

    `reason`: cascade, found; one of a Removal; or forgotten: it may be there, but it is not known any more.
    """

    is_held: bool
    space: SpaceName
    key: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class ClearJob:
    """What an operator wants gone. Ids are the core's, of one series with those of TierJob.

    `namespace`: its whole digest, "" = any. `tenant`: None = any, for "" is the default tenant. `others`:
    also what other daemons have stored in a shared tier.
    """

    id: int
    namespace: str = ""
    tenant: str | None = None
    others: bool = False

    def covers(self, space: SpaceName) -> bool:
        """Tell whether chunks of this space are to go."""
        return self.namespace in ("", space.namespace) and self.tenant in (None, space.tenant)


@dataclass(frozen=True, slots=True)
class EvictJob:
    """So much an operator wants out of the tier, the chunks used longest ago. Ids as those of ClearJob."""

    id: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ClearResult:
    """The end of a clearing, or of an operator's eviction.

    `num_kept`: covered and still there, as somebody else's or for an error; of an eviction 0.
    """

    job_id: int
    num_removed: int
    removed_bytes: int
    num_kept: int = 0


@dataclass(frozen=True, slots=True)
class TierDisk:
    """The file system of a tier: its size, what is free, what stays free, what may be written a day."""

    size_bytes: int
    free_bytes: int
    reserve_bytes: int = 0
    daily_budget_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a tier says of itself. `capacity_bytes` 0 = no bound of its own.

    `counts`: chunks that a limit of the tier kept out, by reason, for the metrics. `problem`: "" for a tier
    in order, else one line for people.
    """

    capacity_bytes: int
    used_bytes: int
    num_chunks: int
    queued_bytes: int = 0
    problem: str = ""
    counts: tuple[tuple[str, int], ...] = ()
    io_errors: tuple[tuple[str, int], ...] = ()
    """I/O that failed, by the names of `IO_ERRNOS`."""
    disk: TierDisk | None = None


class SecondaryTier(ABC):
    """One tier below the pool. Every method is called by the core's thread only, and none of them waits.

    A tier loses what it likes, and never hands out anything but what was stored under the same name: a load
    ends DONE only when the bytes in the slot are verified.

    A call that raises has changed nothing: of a `submit_` it counts as False, so nothing of the job may be
    read or written from then on. The core counts it and goes on; the tier is shown as out of order.
    """

    medium: Medium = Medium.STORAGE
    locality: Locality = Locality.LOCAL
    Parameters: type[TierParameters] = TierParameters
    """What may be written into its `[[tiers]]` table beyond what every tier has."""
    is_shared: bool = False
    """Whether others store here too: then UNKNOWN is worth a probe, for which a prompt may wait."""
    can_clear: bool = False
    """Whether `submit_clear` is there; an operator who asks for it is told so otherwise."""
    can_evict: bool = False
    """Whether `submit_evict` is there, likewise."""

    can_list: bool = False
    """Whether `get_changes` and `list_chunks` are there: without them watchers are told that they cannot know
    what this tier holds."""

    def __init__(
        self,
        spec: OffloadingSpec,
        pool: memoryview,
        tier_type: str,
        on_finished: Callable[[], None],
        parameters: TierParameters,
    ) -> None:
        """Keep what is needed. `parameters` is an instance of the class's `Parameters`.

        `pool`: shape (pool_bytes,), uint8, writable. Raises TierError when the tier cannot be had at all;
        what fails later is the tier's own trouble.
        """
        self.spec = spec
        self.pool = pool
        self.tier_type = tier_type
        self.on_finished = on_finished
        self.parameters = parameters

    @abstractmethod
    def lookup(self, space: SpaceName, keys: Sequence[bytes]) -> Sequence[Presence]:
        """Say what is known of each key, from memory. O(1) per key: it is in the path of every miss."""

    @abstractmethod
    def submit_store(self, job: TierJob) -> bool:
        """Take a cascade; False = no, and nothing was taken. Chunks that are there already end DONE."""

    @abstractmethod
    def submit_load(self, job: TierJob) -> bool:
        """Take a promotion; False = no."""

    # Not abstract on purpose: without a shared medium there is nothing to probe.
    def submit_probe(self, job: TierJob) -> bool:
        """Take a question whether chunks are there; False = no."""
        return False

    @abstractmethod
    def get_finished(self) -> Sequence[JobResult]:
        """Return the jobs that have ended since the last call, each exactly once."""

    def get_removed(self) -> Sequence[Removal]:
        """Return what has gone since the last call, in any order."""
        return ()

    # Not abstract on purpose: a medium may not know what it holds. `secondary/holdings.py` has both.
    def get_changes(self, max_changes: int) -> Sequence[Change] | None:
        """Take the oldest changes of what `lookup` knows; None if some were dropped since the last call.

        Those of one chunk are in the order in which they happened, and none is missing, also none that came
        from elsewhere than a job: a chunk that was found, or whose place was needed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no get_changes; see can_list")

    def list_chunks(
        self, place: int, num_places: int
    ) -> tuple[Sequence[tuple[SpaceName, bytes]], int | None]:
        """Return the chunks at the next `num_places` of a walk from 0, and the place to go on from, or None.

        The walk meets every chunk that is held from its beginning to its end. Of one that comes or goes
        meanwhile it may see either; `get_changes` tells, and not before the walk would see it so.
        """
        raise NotImplementedError(f"{type(self).__name__} has no list_chunks; see can_list")

    # Not abstract on purpose: a tier without an order of eviction has nothing to note.
    def touch(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:  # noqa: B027
        """Note that chunks were used, wherever they were read from.

        A stamp says when, a larger one later; of one request the head has the largest, so that a prefix goes
        from its end. They may arrive out of order, and a new daemon begins with small ones again.
        """

    # Not abstract on purpose: a tier whose medium removes nothing, or not by namespace, is one too.
    def submit_clear(self, job: ClearJob) -> bool:
        """Begin to remove what `job` covers; False = no, there is too much to do.

        What is gone is told as Removal with the reason `clear`, the end by `get_cleared`. No store of the
        core's that could bring back what the job covers is under way.
        """
        raise NotImplementedError(f"{type(self).__name__} has no submit_clear; see can_clear")

    # Not abstract on purpose: a tier without an order of eviction has nothing that goes first.
    def submit_evict(self, job: EvictJob) -> bool:
        """Begin to remove the chunks that would go next, `num_bytes` of them or a little more; False = no.

        What is gone is told as Removal with the reason `admin`, the end by `get_cleared`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no submit_evict; see can_evict")

    def get_cleared(self) -> Sequence[ClearResult]:
        """Return the clearings and evictions that have ended since the last call, each exactly once."""
        return ()

    @abstractmethod
    def has_work(self) -> bool:
        """Tell whether jobs are under way: a daemon that stops waits for them, up to its limit."""

    @abstractmethod
    def stats(self) -> TierStats:
        """Count what is there now."""

    @abstractmethod
    def shutdown(self, timeout_s: float) -> bool:
        """End the threads; what is queued fails. Returns in about `timeout_s` whatever the medium does.

        True: the tier touches the pool no more. False: an I/O hangs, and only the end of the process is its
        end; the daemon keeps the pool's lock until then. Called last, and may wait.
        """


class TierError(Exception):
    """A tier cannot be made. The message says what was found and what to change."""
