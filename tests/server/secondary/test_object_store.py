"""The object tier keeps the contract, on stores that work and on one that does not.

Against a real S3 server: tests/object.
"""

from __future__ import annotations

import random
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import (
    ClearJob,
    JobKind,
    Locality,
    Medium,
    OffloadingSpec,
    Outcome,
    Presence,
    TierChunk,
    TierError,
    TierJob,
)
from kvtier_server.secondary.conformance import (
    GEOMETRY,
    NUM_PARTS,
    PART_BYTES,
    SPACE,
    Bench,
    TierBench,
    TierConformance,
    chunk_bytes,
    key_of,
    parts_of,
    until,
)
from kvtier_server.secondary.factory import BUILTIN_TIERS
from kvtier_server.secondary.index import Index
from kvtier_server.secondary.object_store import bucket as bucket_module
from kvtier_server.secondary.object_store import tier as object_tier
from kvtier_server.secondary.object_store.bucket import Bucket
from kvtier_server.secondary.object_store.parameters import ObjectParameters
from kvtier_server.secondary.object_store.tier import ObjectTier, object_path

from .faulty_bucket import FaultyBucket

OBJECT_BYTES = 4096 + chunk_bytes()


class OnStore(TierBench):
    """An object tier over the daemon's memory; `settings` are parameters of the tier."""

    settings: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

    @pytest.fixture(autouse=True)
    def directories(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.state = "state"
        self.more: dict[str, Any] = {}
        self.bucket = FaultyBucket(self.parameters())

    def parameters(self) -> ObjectParameters:
        return ObjectParameters.model_validate(
            {
                "url": "memory:///",
                "capacity": 64 << 20,
                "readers": 4,
                "writers": 2,
                "state_directory": str(self.tmp_path / self.state),
                **self.settings,
                **self.more,
            }
        )

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> ObjectTier:
        return ObjectTier(spec, pool, "object", on_finished, self.parameters(), self.bucket)

    @contextmanager
    def other_daemon(self) -> Iterator[Bench]:
        """Open a bench over the same store, with an index of its own."""
        self.state, own = "other", self.state
        try:
            with self.bench() as bench:
                yield bench
        finally:
            self.state = own

    def objects(self) -> list[str]:
        """Paths of everything in the store."""
        found = self.bucket._obstore.list(self.bucket._store).collect()
        return sorted(meta["path"] for meta in found)

    def object(self, number: int) -> bytes:
        path = object_path((SPACE, key_of(number)))
        return bytes(self.bucket._obstore.get(self.bucket._store, path).bytes())

    def put_object(self, number: int, data: bytes) -> None:
        self.bucket.put(object_path((SPACE, key_of(number))), data)


class TestContract(OnStore, TierConformance):
    """Over obstore's memory store."""


class TestContractInADirectory(OnStore, TierConformance):
    """Over obstore's store of local files."""

    @pytest.fixture(autouse=True)
    def directories(self, tmp_path: Path) -> None:
        self.tmp_path, self.state = tmp_path, "state"
        self.more = {"url": f"file://{tmp_path}/objects", "readers": 1, "writers": 1}
        self.bucket = FaultyBucket(self.parameters())


class TestStoring(OnStore):
    def test_an_object_is_the_header_and_the_bytes_of_the_chunk_and_no_more(self) -> None:
        with self.bench() as bench:
            data = bench.store(1)
        assert len(self.object(1)) == OBJECT_BYTES
        assert self.object(1)[4096:] == data

    def test_every_space_has_a_prefix_of_its_own(self) -> None:
        other = SpaceName(SPACE.namespace, "other", SPACE.epoch)
        with self.bench() as bench:
            bench.store(1)
            bench.store(1, slot=1, space=other)
        first, second = (path.split("/") for path in self.objects())
        assert first[0] == second[0] == "kvtier-1"
        assert first[1] != second[1]
        assert first[2] == second[2]

    def test_what_another_daemon_has_stored_is_there_and_is_not_sent_again(self) -> None:
        with self.bench() as bench:
            bench.store(1)
        with self.other_daemon() as other:
            other.fill(0)
            before = self.bucket.requests["put_new"]
            assert other.run(JobKind.STORE, other.hashed(other.chunk(1, 0))).outcomes == (Outcome.DONE,)
            assert self.bucket.requests["put_new"] == before
            assert other.tier.stats().used_bytes == 0, "it counts against the budget of who wrote it"
            assert other.tier.lookup(SPACE, [key_of(1)])[0] is Presence.YES

    def test_of_two_that_store_at_once_the_first_wins_and_both_succeed(self) -> None:
        with self.bench() as bench:
            data = bench.store(1)
        with self.other_daemon() as other:
            # Asked when the first has not stored yet: only the store itself finds out.
            self.bucket.size = lambda path: None  # type: ignore[method-assign]
            other.fill(0)
            assert other.run(JobKind.STORE, other.hashed(other.chunk(1, 0))).outcomes == (Outcome.DONE,)
            assert self.bucket.requests["put_new"] == 2
            assert self.object(1)[4096:] == data
            assert other.tier.stats().used_bytes == 0

    def test_a_chunk_that_two_threads_store_at_once_counts_as_its_own_once(self) -> None:
        with self.bench() as bench:
            until(lambda: not bench.tier.stats().problem, "it is well")
            self.bucket.late = ("size",)
            bench.fill(0)
            again = bench.hashed(bench.chunk(1, slot=0))
            job_id = bench.submit(JobKind.STORE, [again, again])
            until(lambda: self.bucket.requests["size"] == 2, "both ask")
            self.bucket.open.set()
            assert bench.results(job_id)[job_id].outcomes == (Outcome.DONE,) * 2
            assert bench.tier.stats().used_bytes == OBJECT_BYTES

    def test_an_object_of_a_wrong_length_is_replaced(self) -> None:
        with self.bench() as bench:
            self.put_object(1, b"")
            data = bench.store(1)
            assert self.object(1)[4096:] == data
            assert bench.tier.stats().used_bytes == OBJECT_BYTES

    def test_a_chunk_larger_than_the_budget_is_refused(self) -> None:
        self.more = {"capacity": OBJECT_BYTES - 1}
        with self.bench() as bench:
            bench.fill(0)
            assert bench.run(JobKind.STORE, bench.hashed(bench.chunk(1, 0))).outcomes == (Outcome.REFUSED,)
            assert not self.objects()


class TestBudget(OnStore):
    settings: dict[str, Any] = {"capacity": 4 * OBJECT_BYTES, "low_water": 1.0}  # noqa: RUF012

    def test_the_chunk_used_longest_ago_leaves_the_store_and_that_is_told(self) -> None:
        with self.bench() as bench:
            for number in range(4):
                bench.store(number)
            bench.tier.touch(SPACE, [key_of(0)], [100])
            bench.store(4)
            assert [(r.keys, r.reason) for r in bench.tier.get_removed()] == [((key_of(1),), "evict")]
            assert bench.tier.stats().used_bytes == 4 * OBJECT_BYTES
            assert len(self.objects()) == 4
            assert bench.tier.lookup(SPACE, [key_of(0), key_of(1)]) == [Presence.YES, Presence.UNKNOWN]

    def test_what_others_wrote_is_never_evicted(self) -> None:
        with self.other_daemon() as other:
            for number in range(10, 14):
                other.store(number)
        with self.bench() as bench:
            found = bench.run(JobKind.PROBE, *(bench.chunk(number, 0) for number in range(10, 14)))
            assert set(found.outcomes) == {Outcome.DONE}
            for number in range(6):
                bench.store(number)
            assert bench.tier.stats().used_bytes == 4 * OBJECT_BYTES
            loaded = bench.run(JobKind.LOAD, *(bench.chunk(number, number - 8) for number in range(10, 14)))
            assert set(loaded.outcomes) == {Outcome.DONE}

    def test_what_cannot_be_removed_still_counts(self) -> None:
        with self.bench() as bench:
            for number in range(4):
                bench.store(number)
            self.bucket.failing = ("delete",)
            bench.fill(0)
            assert bench.run(JobKind.STORE, bench.hashed(bench.chunk(4, 0))).outcomes == (Outcome.FAILED,)
            assert bench.tier.stats().used_bytes == 4 * OBJECT_BYTES
            self.bucket.mend()
            bench.store(4)
            assert len(self.objects()) == 4

    def test_the_budget_outlives_the_daemon(self) -> None:
        with self.bench() as bench:
            for number in range(4):
                bench.store(number)
        with self.bench() as bench:
            until(lambda: bench.tier.stats().num_chunks == 4, "the index is read")
            assert bench.tier.stats().used_bytes == 4 * OBJECT_BYTES
            bench.store(4)
            assert len(self.objects()) == 4

    def test_a_broken_index_costs_the_budget_and_no_chunk(self) -> None:
        with self.bench() as bench:
            data = bench.store(1)
        (index,) = (self.tmp_path / "state").glob("*.sqlite")
        index.write_bytes(b"no index at all")
        with self.bench() as bench:
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.DONE,)
            assert parts_of(bench.slot(3)) == parts_of(data)
            bench.store(2)
        with sqlite3.connect(index) as connection:
            assert connection.execute("SELECT count(*) FROM chunk").fetchone() == (2,)
        connection.close()

    def test_two_daemons_of_one_machine_need_an_index_each(self) -> None:
        with self.bench(), pytest.raises(TierError, match="need a state_directory each"), self.bench():
            pass


class TestLooking(OnStore):
    def test_it_is_shared_remote_storage_that_does_not_know_what_it_has_not_seen(self) -> None:
        with self.bench() as bench:
            assert (bench.tier.medium, bench.tier.locality) == (Medium.STORAGE, Locality.REMOTE)
            assert bench.tier.is_shared
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.UNKNOWN]

    def test_a_probe_finds_what_another_daemon_stored_and_only_that(self) -> None:
        with self.other_daemon() as other:
            data = other.store(1)
        with self.bench() as bench:
            found = bench.run(JobKind.PROBE, bench.chunk(1, 0), bench.chunk(2, 0))
            assert found.outcomes == (Outcome.DONE, Outcome.MISSING)
            assert bench.tier.lookup(SPACE, [key_of(1), key_of(2)]) == [Presence.YES, Presence.UNKNOWN]
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.DONE,)
            assert parts_of(bench.slot(3)) == parts_of(data)

    def test_a_probe_of_another_length_is_a_miss(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            longer = TierChunk(SPACE, key_of(1), GEOMETRY, PART_BYTES + 64, NUM_PARTS)
            assert bench.run(JobKind.PROBE, longer).outcomes == (Outcome.MISSING,)

    def test_what_another_daemon_has_evicted_is_a_miss_and_is_told(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.bucket.delete(self.objects())
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.MISSING,)
            assert [(r.keys, r.reason) for r in bench.tier.get_removed()] == [((key_of(1),), "missing")]
            bench.store(1)
            assert len(self.objects()) == 1

    def test_no_more_chunks_of_others_are_known_than_the_limit(self) -> None:
        index = Index()
        names = [(SPACE, key_of(number)) for number in range(10)]
        for number, name in enumerate(names):
            index.add_if_new(name, 1, is_own=number % 2 == 0)
        index.limit_others(2)
        known = index.knows(SPACE, [key for _, key in names])
        assert [number for number, is_known in enumerate(known) if is_known] == [0, 2, 4, 6, 7, 8, 9]
        assert (index.num_others, index.own_bytes) == (2, 5)


class TestCorruptObjects(OnStore):
    @pytest.mark.parametrize("seed", range(20))
    def test_a_flipped_bit_anywhere_is_found_and_the_object_removed(self, seed: int) -> None:
        bit = random.Random(seed).randrange(8 * OBJECT_BYTES)
        with self.bench() as bench:
            bench.store(1)
            before = bench.slot(3)
            self.bucket.flip_bit = bit
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.CORRUPT,), bit
            assert bench.slot(3) == before
            assert [(r.keys, r.reason) for r in bench.tier.get_removed()] == [((key_of(1),), "corrupt")]
            assert not self.objects()
            assert bench.tier.stats().used_bytes == 0

    @pytest.mark.parametrize("cut_bytes", [1, 512, chunk_bytes(), OBJECT_BYTES - 1, OBJECT_BYTES])
    def test_an_object_that_was_cut_is_corrupt(self, cut_bytes: int) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.put_object(1, self.object(1)[: OBJECT_BYTES - cut_bytes])
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.CORRUPT,)
            assert not self.objects()

    def test_an_answer_that_was_cut_is_corrupt(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.bucket.cut_bytes = 100
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.CORRUPT,)

    def test_an_object_with_more_bytes_is_corrupt_and_not_read_whole(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.put_object(1, self.object(1) + bytes(1 << 20))
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.CORRUPT,)

    def test_two_objects_that_were_swapped_are_misses_and_stay(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            bench.store(2)
            first, second = self.object(1), self.object(2)
            self.put_object(1, second)
            self.put_object(2, first)
            missing = (Outcome.MISSING,) * 2
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3), bench.chunk(2, 4)).outcomes == missing
            assert len(self.objects()) == 2

    def test_a_corrupt_object_that_cannot_be_removed_is_corrupt_all_the_same(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.put_object(1, self.object(1)[:-1] + bytes([self.object(1)[-1] ^ 1]))
            self.bucket.failing = ("delete",)
            for _ in range(2):
                assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.CORRUPT,)


class TestBadStores(OnStore):
    @pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
    def test_errors_are_misses_and_never_wrong_bytes(self, share: float) -> None:
        with self.bench() as bench:
            stored = {number: bench.store(number, slot=number) for number in range(8)}
            self.bucket.failing, self.bucket.share = ("get", "size", "put_new"), share
            for number, data in stored.items():
                (outcome,) = bench.run(JobKind.LOAD, bench.chunk(number, 8)).outcomes
                assert outcome in ({Outcome.FAILED} if share == 1.0 else {Outcome.DONE, Outcome.FAILED})
                if outcome is Outcome.DONE:
                    assert parts_of(bench.slot(8)) == parts_of(data)
            self.bucket.mend()
            assert bench.run(JobKind.LOAD, bench.chunk(0, 9)).outcomes == (Outcome.DONE,)

    def test_a_store_that_does_not_answer_at_the_start_is_used_when_it_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_tier, "FIRST_CHECK_S", 0.05)
        self.bucket.break_all()
        with self.bench() as bench:
            until(lambda: "503 Slow Down" in bench.tier.stats().problem, "it says why")
            job = TierJob(1, JobKind.PROBE, (bench.chunk(1, 0),))
            assert not bench.tier.submit_probe(job), "nobody waits for it"
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.UNKNOWN]
            self.bucket.mend()
            until(lambda: not bench.tier.stats().problem, "it is well")
            bench.store(1)

    def test_it_is_left_alone_after_errors_and_is_well_again_without_being_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_tier, "FIRST_CHECK_S", 0.05)
        with self.bench() as bench:
            bench.store(1)
            self.bucket.break_all()
            for number in range(10, 15):
                bench.run(JobKind.LOAD, bench.chunk(number, 0))
            until(lambda: "503 Slow Down" in bench.tier.stats().problem, "it says why")
            until(lambda: self.bucket.requests["check"] >= 3, "it is asked")
            assert not bench.tier.submit_load(TierJob(1, JobKind.LOAD, (bench.chunk(1, 0),)))
            self.bucket.mend()
            until(lambda: not bench.tier.stats().problem, "it is well")
            assert bench.run(JobKind.LOAD, bench.chunk(1, 3)).outcomes == (Outcome.DONE,)

    def test_an_answer_that_is_late_frees_its_slot_and_is_not_served(self) -> None:
        self.more = {"deadline": "50ms"}
        with self.bench() as bench:
            until(lambda: not bench.tier.stats().problem, "it is well")
            self.bucket.late = ("get",)
            job_id = bench.submit(JobKind.LOAD, [bench.chunk(1, 3)])
            assert self.bucket.waiting.wait(20)
            until(lambda: "has been running" in bench.tier.stats().problem, "it says what it waits for")
            assert not bench.tier.get_finished(), "the store may still write into the slot"
            self.bucket.open.set()
            assert bench.results(job_id)[job_id].outcomes == (Outcome.FAILED,)

    def test_no_more_requests_are_under_way_than_there_are_threads(self) -> None:
        self.more = {"readers": 3}
        under_way, most = 0, 0
        lock = threading.Lock()
        ask = self.bucket.size

        def counted(path: str) -> int | None:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            try:
                self.bucket.waiting.wait(0.01)
                return ask(path)
            finally:
                with lock:
                    under_way -= 1

        self.bucket.size = counted  # type: ignore[method-assign]
        with self.bench() as bench:
            bench.run(JobKind.PROBE, *(bench.chunk(number, 0) for number in range(40)))
        assert most == 3

    def test_a_store_that_hangs_does_not_hold_up_the_end_for_longer_than_it_may(self) -> None:
        with self.bench() as bench:
            until(lambda: not bench.tier.stats().problem, "it is well")
            self.bucket.late = ("get",)
            job_id = bench.submit(JobKind.LOAD, [bench.chunk(1, 3)])
            assert self.bucket.waiting.wait(20)
            assert not bench.tier.shutdown(0.1)
            self.bucket.open.set()
            bench.results(job_id)
            assert bench.tier.shutdown(20)

    def test_what_cannot_be_cleared_is_counted_as_kept_and_can_be_cleared_later(self) -> None:
        with self.bench() as bench:
            bench.store(1)
            self.bucket.failing = ("delete",)
            result = bench.clear(ClearJob(1))
            assert (result.num_removed, result.num_kept) == (0, 1)
            assert len(self.objects()) == 1
            self.bucket.mend()
            assert bench.clear(ClearJob(2)).num_removed == 1
            assert self.objects() == []

    def test_no_thread_is_left(self) -> None:
        before = threading.active_count()
        with self.bench() as bench:
            bench.store(1)
        until(lambda: threading.active_count() == before, "the threads are gone")


class TestMaking:
    def test_without_the_package_it_says_what_to_type(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "obstore", None)
        parameters = BUILTIN_TIERS.parameters(
            "object", {"url": "memory:///", "capacity": "1MiB", "state_directory": str(tmp_path)}
        )
        with pytest.raises(TierError, match=r"pip install '\.\[server,object\]'"):
            BUILTIN_TIERS.create(
                "object",
                parameters,
                OffloadingSpec(4096, 4096, 128),
                memoryview(bytearray(4096)),
                lambda: None,
            )

    @pytest.mark.parametrize(
        ("text", "said"), [(None, "cannot be read"), (" \n", "is empty"), (b"\xff\xfe", "cannot be read")]
    )
    def test_a_secret_that_cannot_be_read_is_named(
        self, text: str | bytes | None, said: str, tmp_path: Path
    ) -> None:
        access, secret = tmp_path / "access", tmp_path / "secret"
        access.write_text("an id")
        if text is not None:
            secret.write_bytes(text if isinstance(text, bytes) else text.encode())
        parameters = ObjectParameters.model_validate(
            {
                "url": "s3://bucket",
                "capacity": 1 << 20,
                "access_key_file": str(access),
                "secret_key_file": str(secret),
            }
        )
        with pytest.raises(TierError, match=f"secret_key_file .*{said}"):
            Bucket(parameters)

    @pytest.mark.parametrize(
        ("table", "said"),
        [
            ({"url": "gs://b", "service_account_file": "/no/such.json"}, "service account file"),
            ({"url": "az://b"}, "Account must be specified"),
            ({"url": "s3://b", "ca_file": __file__}, "PEM"),
            ({"url": f"file://{__file__}"}, "cannot be used"),
        ],
    )
    def test_what_can_never_work_is_said_at_the_start(self, table: dict[str, str], said: str) -> None:
        with pytest.raises(TierError, match=said):
            Bucket(ObjectParameters.model_validate({"capacity": 1 << 20, **table}))

    def test_secrets_are_read_anew_and_one_that_is_gone_is_an_error_of_the_store(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # So short that the library asks for each request.
        monkeypatch.setattr(bucket_module, "CREDENTIALS_S", 1.0)
        for name in ("access", "secret"):
            (tmp_path / name).write_text(name)
        parameters = ObjectParameters.model_validate(
            {
                "url": "s3://bucket",
                "capacity": 1 << 20,
                "endpoint": "https://127.0.0.1:1",
                "access_key_file": str(tmp_path / "access"),
                "secret_key_file": str(tmp_path / "secret"),
                "deadline": "200ms",
            }
        )
        bucket = Bucket(parameters)
        with pytest.raises(OSError, match="error sending request"):
            bucket.size("a")
        (tmp_path / "secret").unlink()
        with pytest.raises(
            OSError, match=r"\] secret_key_file .* cannot be read \(No such file or directory\)"
        ):
            bucket.size("a")

    def test_a_store_that_is_not_there_is_an_error_in_one_line(self, tmp_path: Path) -> None:
        for name in ("access", "secret"):
            (tmp_path / name).write_text(name)
        parameters = ObjectParameters.model_validate(
            {
                "url": "s3://bucket",
                "capacity": 1 << 20,
                "allow_http": True,
                "endpoint": "http://127.0.0.1:1",
                "access_key_file": str(tmp_path / "access"),
                "secret_key_file": str(tmp_path / "secret"),
                "deadline": "500ms",
            }
        )
        with pytest.raises(OSError, match=r"http://127.0.0.1:1/bucket: error sending request$") as raised:
            Bucket(parameters).check()
        assert "\n" not in str(raised.value)
