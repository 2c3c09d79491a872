"""The jobs that travel from the scheduler to the workers, and what comes back.

Owns their shape only: plain values, frozen, picklable and small, because an engine broadcasts them to every
rank. Every rank gets the same job and copies its own part of each slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from kvtier_ops.plan import ChunkCopy, plan_job

JobId = NewType("JobId", int)

NO_SLOT = -1
"""In `Job.slot_ids`: the daemon holds nothing for this chunk, so its load fails without a copy."""


class JobKind(Enum):
    """Which way the bytes go."""

    LOAD = "load"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Job:
    """Copy between device blocks and slots.

    The slots are those of pool `pool_id` (of the grant that named them) and of no other: a worker that has
    another one mapped fails the job. 0 = there are no slots.
    `slot_ids`, `generations` and `keys` are columns, one entry per chunk in the order of `plan`.
    `block_ids`, `group_sizes` and `block_indices` are as `plan_job` takes them: blocks group after group, how
    many each group has, and the place in the request of each group's first block.
    """

    job_id: JobId
    pool_id: int
    slot_ids: tuple[int, ...]
    generations: tuple[int, ...]
    keys: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    group_sizes: tuple[int, ...]
    block_indices: tuple[int, ...]
    group_slots: tuple[int, ...] | None = field(default=None, kw_only=True)
    """How many slots each group takes, from an engine that leaves out blocks; see `plan_job`."""

    def __post_init__(self) -> None:
        columns = (len(self.slot_ids), len(self.generations), len(self.keys))
        assert len(set(columns)) == 1, f"slot_ids, generations and keys have {columns} entries"

    def plan(self, blocks_per_chunk: int) -> tuple[ChunkCopy, ...]:
        """Split into one copy per slot. Raises PlanError if the columns contradict each other."""
        return plan_job(
            self.block_ids, self.group_sizes, self.block_indices, blocks_per_chunk, self.group_slots
        )


@dataclass(frozen=True, slots=True)
class LoadJob(Job):
    """Pool -> device. Every rank names `load_lease_id` when it reports the end of its part."""

    load_lease_id: int


@dataclass(frozen=True, slots=True)
class StoreJob(Job):
    """Device -> pool, into slots this instance holds credits for. Only full chunks are stored."""

    def plan(self, blocks_per_chunk: int) -> tuple[ChunkCopy, ...]:
        return plan_job(
            self.block_ids,
            self.group_sizes,
            self.block_indices,
            blocks_per_chunk,
            self.group_slots,
            ends_whole=True,
        )


class CopyFailure(Enum):
    """Why one chunk of a job was not copied, or its copy does not count."""

    NOT_PINNED = "not_pinned"
    """The daemon held nothing for it."""
    TORN = "torn"
    """Its slot was given away before the copy, or during it."""
    MISMATCH = "mismatch"
    """Its bytes are not the ones that were stored."""
    INCOMPLETE = "incomplete"
    """Some of its blocks are not in device memory."""
    SESSION_LOST = "session_lost"
    """The session ended before the copy began."""
    ERROR = "error"
    """The copy raised; it is in the log."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """How one rank ended its part of a job. `ok` is False if any key failed: its bytes mean nothing then."""

    job_id: JobId
    kind: JobKind
    ok: bool
    failed_keys: frozenset[bytes] = frozenset()
    bytes: int = 0
    seconds: float = 0.0
    failures: Mapping[str, int] = field(default_factory=dict)
    """Chunks that failed, by `CopyFailure` value."""


def flatten(groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the block ids group after group, and how many each group has."""
    return tuple(block for group in groups for block in group), tuple(map(len, groups))
