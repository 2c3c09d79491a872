"""The template tier keeps the contract, and its one promise beyond it."""

from __future__ import annotations

from collections.abc import Callable

from kvtier_server.secondary.base import JobKind, OffloadingSpec, Outcome, Presence
from kvtier_server.secondary.conformance import SPACE, TierBench, TierConformance, chunk_bytes, key_of
from kvtier_server.secondary.example import ExampleParameters, ExampleTier


class InMemory(TierBench):
    capacity = 1 << 20

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> ExampleTier:
        return ExampleTier(spec, pool, "example", on_finished, ExampleParameters(capacity=self.capacity))


class TestExampleTier(InMemory, TierConformance):
    """The contract."""


class TestSmallExampleTier(InMemory, TierConformance):
    capacity = 8 * chunk_bytes()

    def test_the_chunk_used_longest_ago_makes_room(self) -> None:
        with self.bench() as bench:
            for number in range(8):
                bench.store(number)
            bench.tier.touch(SPACE, [key_of(0)], [100])
            bench.store(8)
            known = bench.tier.lookup(SPACE, [key_of(number) for number in range(9)])
            assert [p is Presence.YES for p in known] == [True, False] + [True] * 7
            assert [(r.keys, r.reason) for r in bench.tier.get_removed()] == [((key_of(1),), "evict")]
            assert bench.tier.stats().used_bytes <= self.capacity


class TestTinyExampleTier(InMemory):
    capacity = 1

    def test_a_chunk_larger_than_the_tier_is_refused(self) -> None:
        with self.bench() as bench:
            bench.fill(0)
            result = bench.run(JobKind.STORE, bench.hashed(bench.chunk(1, slot=0)))
            assert result.outcomes == (Outcome.REFUSED,)
