"""One tier below the pool, seen from the core: how it is used, what waits to go there, what happened.

Owns the rules of a tier and its counts. Does no I/O; `cascades.py` and `promotions.py` decide.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.guarded_tier import GuardedTier
from kvtier_server.primary.index import Chunk, KeySpace
from kvtier_server.secondary.base import ClearJob, Presence, SecondaryTier

DAEMON = 0
"""Owner of slots that the daemon itself writes: no engine has this nonce."""

MAX_JOB_BYTES = 16 << 20
MAX_JOB_CHUNKS = 64
"""A batch is over when its slowest chunk is: small enough that the first chunks of a prompt do not wait long
for the last, large enough that a job costs little."""

PACE_WEIGHT = 0.25
"""Of the newest load in the average pace of a tier."""


class CascadeWhen(StrEnum):
    """When a chunk goes down."""

    PUBLISHED = "published"
    """At once: every chunk is below before it can be evicted, if the tier keeps up."""
    USED = "used"
    """After `min_uses` uses: what nobody asks for again is not worth the writing."""
    COLD = "cold"
    """Before it is evicted: of the chunks that go next, `clean_share` of the pool's slots, all are below."""
    NEVER = "never"
    """The tier is read only."""


@dataclass(frozen=True, slots=True)
class TierRules:
    """How one tier is used. Sizes in bytes."""

    name: str
    cascade: CascadeWhen = CascadeWhen.PUBLISHED
    max_queued_bytes: int = 1 << 30
    """Chunks that wait to go down, without holding their slots; what comes beyond it is dropped."""
    max_running_bytes: int = 64 << 20
    """Chunks that are being written, and so cannot be evicted."""
    min_uses: int = 1
    """Of USED: requests that used a chunk after it was stored."""
    clean_share: float = 0.125
    """Of COLD: so much of a size class is free or has a copy below, for stores to take without a loss."""
    probe_wait_ns: int = 20_000_000
    """How long a request waits to hear whether a chunk is there; if it is, the load has its own time."""


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """What a tier must know of a chunk's inside."""

    part_bytes: int
    num_parts: int
    geometry: bytes


ShapeOf = Callable[[KeySpace, bytes], ChunkShape | None]


class LowerTier:
    """One tier, its rules, what waits to go there, and what happened. `bit` marks chunks that it holds."""

    def __init__(self, tier: SecondaryTier, rules: TierRules, index: int) -> None:
        self.tier = GuardedTier(tier, rules.name)
        self.rules = rules
        self.index = index
        self.bit = 1 << index
        self.waiting: deque[Chunk] = deque()
        self.waiting_bytes = 0
        self.num_taken = 0
        """Chunks that have left the queue so far."""
        self.cleared: list[tuple[int, ClearJob]] = []
        """Clearings, each with the number of the last chunk in the queue that it covers."""
        self.being_cleared: list[Callable[[SpaceName], bool]] = []
        """What clearings that are not over cover: nothing of it comes up from here or goes down."""
        self.running_bytes = 0
        self.queued_promotion_bytes = 0
        """Chunks it has that wait for a slot to come up into."""
        self.ns_per_byte = 0.0
        """Average pace of loads; 0 = none was seen yet."""
        self.last_load_ns = 0
        """When a load ended last."""
        self.counts: Counter[str] = Counter()
        """cascade:<outcome> and promotion:<outcome> in chunks, cascade_bytes, promotion_bytes, dropped."""

    def holds(self, space: KeySpace, key: bytes) -> bool:
        """Tell whether the tier is known to have a chunk."""
        return self.tier.lookup(space.name, (key,))[0] is Presence.YES

    def note_load(self, num_bytes: int, began_ns: int, now_ns: int) -> None:
        """Learn from a load how fast chunks come up, all loads together."""
        if num_bytes:  # what failed, and a probe, says nothing of it
            pace = (now_ns - max(began_ns, self.last_load_ns)) / num_bytes
            self.last_load_ns = now_ns
            self.ns_per_byte += (pace - self.ns_per_byte) * (PACE_WEIGHT if self.ns_per_byte else 1.0)

    def is_being_cleared(self, space: SpaceName) -> bool:
        """Tell whether chunks of this space are about to be removed."""
        return any(covers(space) for covers in self.being_cleared)

    def was_cleared(self, chunk: Chunk) -> bool:
        """Tell whether the chunk that has just left the queue was cleared while it waited."""
        self.forget_cleared(self.num_taken - 1)
        return any(job.covers(chunk.space.name) for _, job in self.cleared)

    def forget_cleared(self, num_passed: int) -> None:
        """Forget clearings that the first `num_passed` chunks of the queue were all to be asked about."""
        if self.cleared:
            self.cleared = [(last, job) for last, job in self.cleared if last > num_passed]
