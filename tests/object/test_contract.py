"""The object tier keeps the contract over a real S3 server."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier_server.secondary.base import JobKind, OffloadingSpec, Outcome, Presence
from kvtier_server.secondary.conformance import SPACE, TierConformance, key_of, parts_of, until
from kvtier_server.secondary.object_store.bucket import Bucket
from kvtier_server.secondary.object_store.parameters import ObjectParameters
from kvtier_server.secondary.object_store.tier import ObjectTier, object_path

from .ceph import Ceph

OF_EVERY_TIER = ("type", "name", "probe_wait")


class TestContractOnS3(TierConformance):
    @pytest.fixture(autouse=True)
    def parameters(self, s3_table: str, tmp_path: Path) -> None:
        (table,) = tomllib.loads(s3_table)["tiers"]
        own = {key: value for key, value in table.items() if key not in OF_EVERY_TIER}
        self.more = {**own, "deadline": "10s"}
        self.state = tmp_path / "state"

    def read_parameters(self) -> ObjectParameters:
        return ObjectParameters.model_validate({**self.more, "state_directory": str(self.state)})

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> ObjectTier:
        return ObjectTier(spec, pool, "object", on_finished, self.read_parameters())

    def test_of_two_that_store_at_once_the_first_wins(self) -> None:
        bucket = Bucket(self.read_parameters())
        assert bucket.put_new("a/b", b"first")
        assert not bucket.put_new("a/b", b"second")
        found = bucket.get("a/b", 5, 4096)
        assert found is not None
        assert bytes(found.data) == b"first"
        bucket.put("a/b", b"third")
        assert bucket.size("a/b") == 5
        bucket.delete(["a/b", "a/nothing"])
        assert bucket.size("a/b") is None
        assert bucket.get("a/b", 5, 4096) is None

    def test_of_an_object_of_another_length_only_the_first_bytes_are_read(self) -> None:
        bucket = Bucket(self.read_parameters())
        bucket.put("long", bytes(1 << 20))
        found = bucket.get("long", 100_000, 4096)
        assert found is not None
        assert (found.num_bytes, len(found.data)) == (1 << 20, 4096)
        bucket.put("empty", b"")
        found = bucket.get("empty", 100_000, 4096)
        assert found is not None
        assert (found.num_bytes, len(found.data)) == (0, 0)

    def test_an_object_that_was_changed_is_corrupt_and_is_removed(self) -> None:
        bucket, path = Bucket(self.read_parameters()), object_path((SPACE, key_of(1)))
        with self.bench() as bench:
            bench.store(1)
            num_bytes = bucket.size(path)
            assert num_bytes is not None
            found = bucket.get(path, num_bytes, 4096)
            assert found is not None
            bucket.put(path, bytes(found.data[:-1]) + bytes([found.data[-1] ^ 1]))
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.CORRUPT,)
            assert bucket.size(path) is None

    def test_what_another_daemon_stored_is_found_and_loaded(self) -> None:
        with self.bench() as other:
            data = other.store(1)
        self.state = self.state.with_name("other")
        with self.bench() as bench:
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.UNKNOWN]
            found = bench.run(JobKind.PROBE, bench.chunk(1, 0), bench.chunk(2, 0))
            assert found.outcomes == (Outcome.DONE, Outcome.MISSING)
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.DONE,)
            assert parts_of(bench.slot(3)) == parts_of(data)

    def test_a_bucket_that_is_not_there_or_a_secret_that_is_wrong_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "wrong").write_text("wrong")
        for key, value, said in (
            ("url", "s3://no-such-bucket/chunks", "404 Not Found (NoSuchBucket)"),
            ("secret_key_file", str(tmp_path / "wrong"), "403 Forbidden (SignatureDoesNotMatch)"),
        ):
            own, self.more = self.more, {**self.more, key: value}
            with self.bench() as bench:
                until(lambda said=said: said in bench.tier.stats().problem, f"it says {said}")  # type: ignore[misc]
            self.more = own

    def test_a_server_that_says_nothing_costs_the_deadline_and_no_more(self, ceph: Ceph) -> None:
        self.more = {**self.more, "deadline": "1s"}
        bucket = Bucket(self.read_parameters())
        bucket.put("here", b"bytes")
        with ceph.stopped_gateway():
            for request in (
                lambda: bucket.get("here", 5, 4096),
                lambda: bucket.put_new("new", b"bytes"),
                lambda: bucket.size("here"),
                bucket.check,
            ):
                with pytest.raises(OSError, match="error sending request"):
                    request()
        assert bucket.size("here") == 5
