"""The mooncake tier keeps the contract of tiers, on a real master."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier_server.secondary.base import JobKind, OffloadingSpec, Outcome
from kvtier_server.secondary.conformance import TierBench, TierConformance, chunk_bytes, until
from kvtier_server.secondary.mooncake.parameters import MooncakeParameters
from kvtier_server.secondary.mooncake.tier import MooncakeTier

from .conftest import Master


class OnMaster(TierBench):
    """Each test has a node of its own; what the others stored is gone with their segments."""

    metadata = ""
    segment = 16 << 20

    @pytest.fixture(autouse=True)
    def with_master(self, master: Master) -> None:
        self.master = master

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> MooncakeTier:
        metadata = (
            f"http://127.0.0.1:{self.master.metadata_port}/metadata" if self.metadata else "P2PHANDSHAKE"
        )
        parameters = MooncakeParameters.model_validate(
            {
                "master": self.master.address,
                "segment": self.segment,
                "metadata": metadata,
                "heartbeat": "100ms",
            }
        )
        tier = MooncakeTier(spec, pool, "mooncake", on_finished, parameters)
        until(lambda: not tier.stats().problem, "the tier is connected")
        return tier


class TestPeerToPeer(OnMaster, TierConformance):
    """Nodes find one another by themselves."""


class TestWithMetadataServer(OnMaster, TierConformance):
    metadata = "http"


class TestFullSegment(OnMaster):
    """What is read is leased for an hour, so the master may not evict it."""

    @pytest.fixture(autouse=True)
    def with_master(self, tmp_path: Path) -> Iterator[None]:
        self.master = Master(tmp_path, lease_ms=3_600_000)
        try:
            self.master.start()
            yield
        finally:
            self.master.kill()

    def test_a_segment_that_is_full_refuses_and_counts(self) -> None:
        with self.bench() as bench:
            number = 0
            while True:
                bench.fill(0)
                (outcome,) = bench.run(JobKind.STORE, bench.hashed(bench.chunk(number, slot=0))).outcomes
                if outcome is not Outcome.DONE:
                    break
                assert bench.run(JobKind.LOAD, bench.chunk(number, slot=1)).outcomes == (Outcome.DONE,)
                number += 1
                assert number < self.segment // chunk_bytes(), "more was stored than there is room for"
            assert outcome is Outcome.REFUSED
            assert dict(bench.tier.stats().counts) == {"no_space": 1}
            assert bench.tier.stats().problem == ""
            assert bench.run(JobKind.LOAD, bench.chunk(number - 1, slot=3)).outcomes == (Outcome.DONE,)
