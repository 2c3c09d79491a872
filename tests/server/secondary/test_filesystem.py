"""The filesystem tier keeps the contract, on a disk that works and on one that does not."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvtier_server.secondary.base import (
    ClearJob,
    ClearResult,
    EvictJob,
    JobKind,
    OffloadingSpec,
    Outcome,
    Presence,
    TierChunk,
    TierError,
    TierJob,
)
from kvtier_server.secondary.chunk_file import file_bytes
from kvtier_server.secondary.conformance import (
    GEOMETRY,
    NUM_PARTS,
    PART_BYTES,
    SLOT_BYTES,
    SPACE,
    Bench,
    TierBench,
    TierConformance,
    key_of,
    parts_of,
    until,
)
from kvtier_server.secondary.filesystem import tier as filesystem_tier
from kvtier_server.secondary.filesystem.tier import FilesystemParameters, FilesystemTier
from kvtier_server.secondary.index import Index

from .faulty_disk import FaultyDisk

FILE_BYTES = 4 * 4096
"""Header and three blocks."""


def wait_until_complete(bench: Bench) -> None:
    tier = bench.tier
    assert isinstance(tier, FilesystemTier)
    until(lambda: tier.is_complete, "the index is complete")


class OnDisk(TierBench):
    """A filesystem tier below a folder of the test's; `settings` are parameters of the tier."""

    settings: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

    @pytest.fixture(autouse=True)
    def directories(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.disk = FaultyDisk()
        self.more: dict[str, Any] = {}

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> FilesystemTier:
        parameters = FilesystemParameters.model_validate(
            {
                "root": str(self.tmp_path / "root"),
                "capacity": 64 << 20,
                "reserve_free": 0,
                "state_directory": str(self.tmp_path / "state"),
                "io": "threads",
                **self.settings,
                **self.more,
            }
        )
        disk = self.disk if parameters.io == "threads" else None
        return FilesystemTier(spec, pool, "filesystem", on_finished, parameters, disk)

    @contextmanager
    def complete(self) -> Iterator[Bench]:
        """Open a bench whose tier knows its disk."""
        with self.bench() as bench:
            wait_until_complete(bench)
            yield bench

    def files(self) -> list[Path]:
        return sorted((self.tmp_path / "root").rglob("*.chunk"))

    def index(self) -> Path:
        (path,) = (self.tmp_path / "state").glob("*.sqlite")
        return path


class TestContract(OnDisk, TierConformance):
    """On this machine's disk, as it is."""

    settings: dict[str, Any] = {"io": "process"}  # noqa: RUF012


class TestContractOfThreads(OnDisk, TierConformance):
    """The same by threads of the daemon."""


class TestContractThroughThePageCacheAndDurable(OnDisk, TierConformance):
    settings: dict[str, Any] = {"direct": "off", "durability": "os", "readers": 1, "writers": 1}  # noqa: RUF012


class TestContractWithShortWritesAndReads(OnDisk, TierConformance):
    settings: dict[str, Any] = {"direct": "off"}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def short(self, directories: None) -> None:
        self.disk.most_bytes = 4096


class TestContractOfASharedRoot(OnDisk, TierConformance):
    settings: dict[str, Any] = {"shared": True}  # noqa: RUF012


class TestRestart(OnDisk):
    def test_what_was_stored_is_there_after_an_orderly_end(self) -> None:
        with self.complete() as bench:
            data = bench.store(1)
        with self.complete() as bench:
            assert bench.tier.lookup(SPACE, [key_of(1), key_of(2)]) == [Presence.YES, Presence.NO]
            assert bench.tier.stats().used_bytes == FILE_BYTES
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=5)).outcomes == (Outcome.DONE,)
            assert parts_of(bench.slot(5)) == parts_of(data)

    @pytest.mark.parametrize("what", ["lost", "garbled", "cut", "of another version", "one that lies"])
    def test_an_index_that_is_gone_or_wrong_is_made_anew_from_the_files(self, what: str) -> None:
        with self.complete() as bench:
            data = bench.store(1)
            bench.store(2)
        index = self.index()
        if what == "lost":
            index.unlink()
        elif what == "garbled":
            index.write_bytes(random.Random(3).randbytes(index.stat().st_size))
        elif what == "cut":
            os.truncate(index, index.stat().st_size // 2)
        elif what == "of another version":
            with sqlite3.connect(index) as connection:
                connection.execute("PRAGMA user_version = 99")
            connection.close()
        else:
            self.files()[1].unlink()
        with self.complete() as bench:
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=5)).outcomes == (Outcome.DONE,)
            assert parts_of(bench.slot(5)) == parts_of(data)
            second = bench.run(JobKind.LOAD, bench.chunk(2, slot=6)).outcomes
            assert second == ((Outcome.MISSING,) if what == "one that lies" else (Outcome.DONE,))
            if what == "one that lies":
                assert bench.tier.lookup(SPACE, [key_of(2)]) == [Presence.NO]
                assert [removal.reason for removal in bench.tier.get_removed()] == ["missing"]

    def test_after_a_crash_the_directories_are_read_and_remains_are_removed(self) -> None:
        with self.complete() as bench:
            bench.store(1)
            long_key = b"k" * 128
            bench.fill(1)
            chunk = TierChunk(SPACE, long_key, GEOMETRY, PART_BYTES, NUM_PARTS, SLOT_BYTES)
            bench.run(JobKind.STORE, bench.hashed(chunk))
        self.index().unlink()
        folder = self.files()[0].parent
        old, new = folder / "tmp-1-old", folder / "tmp-1-new"
        for path in (old, new):
            path.write_bytes(b"half a chunk")
        os.utime(old, (1, 1))
        with self.complete() as bench:
            assert bench.tier.lookup(SPACE, [key_of(1), long_key]) == [Presence.YES] * 2
            assert not old.exists()
            assert new.exists(), "another daemon may be writing it"
            assert bench.tier.stats().used_bytes == 2 * FILE_BYTES


class TestDamage(OnDisk):
    def test_no_flipped_bit_of_a_file_is_ever_served(self) -> None:
        generator = random.Random(17)
        with self.complete() as bench:
            bench.store(1)
            (path,) = self.files()
            whole = path.read_bytes()
            assert len(whole) == FILE_BYTES == file_bytes(bench.chunk(1, 0).num_bytes)
            positions = [generator.randrange(8 * len(whole)) for _ in range(300)]
            # Every field of the header, and both ends of the payload and of the padding behind it.
            positions += [8 * byte for byte in (0, 8, 12, 16, 24, 32, 40, 48, 52, 60, 100, 4095)]
            positions += [8 * byte for byte in (4096, 4096 + bench.chunk(1, 0).num_bytes, len(whole) - 1)]
            for position in positions:
                damaged = bytearray(whole)
                damaged[position // 8] ^= 1 << position % 8
                path.write_bytes(damaged)
                result = bench.run(JobKind.LOAD, bench.chunk(1, slot=5))
                assert result.outcomes == (Outcome.CORRUPT,), position
                assert not path.exists()
                assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.NO]
            assert {removal.reason for removal in bench.tier.get_removed()} == {"corrupt"}
            path.write_bytes(whole)
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=5)).outcomes == (Outcome.DONE,)

    def test_no_torn_file_is_ever_served(self) -> None:
        with self.complete() as bench:
            bench.store(1)
            (path,) = self.files()
            whole = path.read_bytes()
            for length in range(0, len(whole), 512):
                for torn in (whole[:length], whole[:length] + bytes(len(whole) - length)):
                    path.write_bytes(torn)
                    result = bench.run(JobKind.LOAD, bench.chunk(1, slot=5))
                    if torn != whole:
                        assert result.outcomes == (Outcome.CORRUPT,), length

    def test_files_that_were_swapped_are_refused_by_the_keys_in_them(self) -> None:
        with self.complete() as bench:
            bench.store(1)
            bench.store(2)
            first, second = self.files()
            spare = first.with_name("spare")
            shutil.move(first, spare)
            shutil.move(second, first)
            shutil.move(spare, second)
            for number in (1, 2):
                assert bench.run(JobKind.LOAD, bench.chunk(number, slot=5)).outcomes == (Outcome.MISSING,)
            assert len(self.files()) == 2, "each is some other chunk's and stays"

    def test_a_symlink_is_not_followed(self) -> None:
        with self.complete() as bench:
            bench.store(1)
            (path,) = self.files()
            elsewhere = self.tmp_path / "elsewhere"
            shutil.move(path, elsewhere)
            path.symlink_to(elsewhere)
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=5)).outcomes == (Outcome.FAILED,)
            shutil.move(path.parent, self.tmp_path / "away")
            path.parent.symlink_to(self.tmp_path / "away")
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=5)).outcomes == (Outcome.FAILED,)


class TestTrouble(OnDisk):
    @pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
    @pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
    def test_a_disk_with_errors_loses_chunks_and_works_again_when_it_is_mended(
        self, error: str, share: float
    ) -> None:
        with self.complete() as bench:
            good = bench.store(100, slot=8)
            self.disk.calls = ("write", "create", "rename")
            self.disk.break_with(error, share)
            for number in range(300, 340 if share > 0.01 else 700):
                bench.fill(0)
                chunk = bench.hashed(bench.chunk(number, 0))
                job_ids = []
                if bench.tier.submit_store(job := _job(number, chunk)):
                    job_ids.append(job.id)
                for result in bench.results(*job_ids).values():
                    assert result.outcomes[0] in (Outcome.DONE, Outcome.FAILED)
            assert self.disk.num_failed > 0
            assert not list((self.tmp_path / "root").rglob("tmp-*")), "nothing half written is left"
            if share == 1.0:
                assert "left alone" in bench.tier.stats().problem
                assert os.strerror(getattr(errno, error)) in bench.tier.stats().problem
            self.disk.mend()

            def works() -> bool:
                bench.fill(1)
                again = bench.hashed(bench.chunk(200, 1))
                if not bench.tier.submit_store(job := _job(900 + len(tried), again)):
                    return False
                tried.append(job.id)
                return bench.results(job.id)[job.id].outcomes == (Outcome.DONE,)

            tried: list[int] = []
            until(works, "it is tried again by itself")
            assert bench.tier.stats().problem == ""
            assert bench.run(JobKind.LOAD, bench.chunk(100, slot=5)).outcomes == (Outcome.DONE,)
            assert parts_of(bench.slot(5)) == parts_of(good)

    def test_a_slow_disk_holds_no_more_than_its_queue_and_takes_work_again_later(self) -> None:
        self.settings = {**self.settings, "max_waiting": 4 * 16_384, "writers": 1}
        with self.complete() as bench:
            self.disk.calls = ()
            self.disk.delay_s = 0.02
            taken = []
            for slot in range(8):
                bench.fill(slot)
            for number in range(40):
                chunk = bench.hashed(bench.chunk(number, number % 8))
                if bench.tier.submit_store(job := _job(number, chunk)):
                    taken.append(job.id)
                assert bench.tier.stats().queued_bytes <= 4 * 16_384
            assert 0 < len(taken) < 40
            assert all(r.outcomes == (Outcome.DONE,) for r in bench.results(*taken).values())
            self.disk.mend()
            bench.store(100)

    def test_an_io_that_comes_back_after_its_deadline_has_failed_and_frees_its_slot_then(self) -> None:
        self.settings = {**self.settings, "deadline": "50ms", "readers": 1}
        with self.complete() as bench:
            self.disk.delay_s = 0
            bench.fill(0)
            bench.fill(1)
            chunk = bench.hashed(bench.chunk(1, 0))
            until(lambda: bench.run(JobKind.STORE, chunk).outcomes == (Outcome.DONE,), "it is stored")
            self.disk.delay_s = 0.1
            late, behind = (bench.submit(JobKind.LOAD, [bench.chunk(1, slot=5)]) for _ in range(2))
            results = bench.results(late, behind)
            assert {result.outcomes for result in results.values()} == {(Outcome.FAILED,)}
            self.disk.mend()

            def is_read() -> bool:
                return bench.run(JobKind.LOAD, bench.chunk(1, slot=5)).outcomes == (Outcome.DONE,)

            until(is_read, "the disk is used again")

    def test_two_daemons_do_not_share_an_index(self) -> None:
        with self.complete() as bench:
            bench.store(1)
            with pytest.raises(TierError, match="another daemon keeps its index"), self.bench():
                pass
        with self.complete() as bench:
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.YES]

    def test_a_state_directory_that_cannot_be_used_says_what_to_do(self) -> None:
        (self.tmp_path / "state").write_text("a file")
        with pytest.raises(TierError, match="as state_directory"), self.bench():
            pass

    def test_a_directory_that_cannot_be_read_costs_only_what_is_in_it(self) -> None:
        with self.complete() as bench:
            for number in range(4):
                bench.store(number)
        self.index().unlink()
        folder = self.files()[0].parent
        shutil.move(folder, self.tmp_path / "away")
        folder.symlink_to(self.tmp_path / "away")
        with self.complete() as bench:
            assert bench.tier.stats().num_chunks == len(self.files())

    def test_a_pipe_in_a_chunks_place_holds_nobody(self) -> None:
        with self.complete() as bench:
            bench.store(1)
            (path,) = self.files()
            path.unlink()
            os.mkfifo(path)
            outcome = bench.run(JobKind.LOAD, bench.chunk(1, slot=5)).outcomes[0]
            assert outcome is not Outcome.DONE

    def test_a_root_that_cannot_be_used_says_what_to_do(self) -> None:
        (self.tmp_path / "root").write_text("a file")
        with pytest.raises(TierError, match=r"cannot be used .*; make it a directory"), self.bench():
            pass


def _job(number: int, chunk: TierChunk) -> TierJob:
    return TierJob(10_000 + number, JobKind.STORE, (chunk,))


class TestBudget(OnDisk):
    settings: dict[str, Any] = {"capacity": 8 * FILE_BYTES, "low_water": 0.75}  # noqa: RUF012

    def test_what_was_used_longest_ago_makes_room_down_to_the_low_water_mark(self) -> None:
        with self.complete() as bench:
            for number in range(8):
                bench.store(number)
            bench.tier.touch(SPACE, [key_of(0), key_of(1)], [102, 101])
            bench.store(8)
            assert bench.tier.stats().used_bytes <= 8 * FILE_BYTES
            known = bench.tier.lookup(SPACE, [key_of(number) for number in range(9)])
            gone = [number for number in range(9) if known[number] is not Presence.YES]
            assert gone == [2, 3]
            assert len(self.files()) == 7
            assert {removal.reason for removal in bench.tier.get_removed()} == {"evict"}

    def test_of_a_prompt_the_tail_goes_before_the_head(self) -> None:
        with self.complete() as bench:
            for number in range(8):
                bench.store(number)
            bench.tier.touch(SPACE, [key_of(number) for number in range(8)], range(108, 100, -1))
            bench.store(8)
            known = bench.tier.lookup(SPACE, [key_of(number) for number in range(8)])
            assert known == [Presence.YES] * 6 + [Presence.NO] * 2

    def test_victims_that_could_not_be_removed_go_in_their_turn(self) -> None:
        index = Index()
        for number in range(3):
            index.add((SPACE, key_of(number)), 1, is_own=True, stamp=number)
        index.keep(index.victims(2))
        assert [key for _, key in index.victims(3)] == [key_of(number) for number in range(3)]

    def test_a_chunk_that_was_found_while_the_index_was_read_stays_written_down(self) -> None:
        index = Index()
        index.add_if_new((SPACE, key_of(1)), 1, is_own=True)
        index.restore((SPACE, key_of(1)), 1, is_own=True)
        assert None not in index.take_changes().values()


class TestReserve(OnDisk):
    settings: dict[str, Any] = {"reserve_free": 0.05}  # noqa: RUF012

    def test_where_the_file_system_is_nearly_full_own_chunks_go_and_nothing_is_written(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filesystem_tier, "FREE_CHECK_S", -1.0)
        with self.complete() as bench:
            bench.store(1)
            self.disk.free = 0
            bench.fill(0)
            result = bench.run(JobKind.STORE, bench.hashed(bench.chunk(2, 0)))
            assert result.outcomes == (Outcome.REFUSED,)
            assert self.files() == [], "what this daemon wrote made room as far as it could"
            assert dict(bench.tier.stats().counts)["no_space"] == 1
            self.disk.free = None
            bench.store(3)


class TestWear(OnDisk):
    settings: dict[str, Any] = {"writes_per_day": 24 * 2 * FILE_BYTES}  # noqa: RUF012

    def test_no_more_is_written_than_the_budget_of_the_hour_allows(self) -> None:
        with self.complete() as bench:
            outcomes: list[Outcome] = []
            for number in range(4):
                bench.fill(0)
                outcomes += bench.run(JobKind.STORE, bench.hashed(bench.chunk(number, 0))).outcomes
            assert outcomes == [Outcome.DONE, Outcome.DONE, Outcome.REFUSED, Outcome.REFUSED]
            assert dict(bench.tier.stats().counts)["worn_out"] == 2


class TestOffers(OnDisk):
    settings: dict[str, Any] = {"min_offers": 2}  # noqa: RUF012

    def test_a_chunk_is_written_when_it_is_offered_again(self) -> None:
        with self.complete() as bench:
            bench.fill(0)
            chunk = bench.hashed(bench.chunk(1, 0))
            assert bench.run(JobKind.STORE, chunk).outcomes == (Outcome.REFUSED,)
            assert bench.run(JobKind.STORE, chunk).outcomes == (Outcome.DONE,)


class TestShared(OnDisk):
    settings: dict[str, Any] = {"shared": True}  # noqa: RUF012

    def test_what_another_daemon_stored_is_found_by_a_probe_and_is_not_ours_to_evict(self) -> None:
        with self.bench() as one:
            self.more = {"state_directory": str(self.tmp_path / "other-state")}
            with self.bench() as other:
                wait_until_complete(other)
                data = one.store(1)
                assert other.tier.lookup(SPACE, [key_of(1)]) == [Presence.UNKNOWN]
                result = other.run(JobKind.PROBE, other.chunk(1, 0), other.chunk(2, 0))
                assert result.outcomes == (Outcome.DONE, Outcome.MISSING)
                assert other.tier.lookup(SPACE, [key_of(1)]) == [Presence.YES]
                assert other.run(JobKind.LOAD, other.chunk(1, slot=3)).outcomes == (Outcome.DONE,)
                assert parts_of(other.slot(3)) == parts_of(data)
                assert other.tier.stats().used_bytes == 0

    def test_what_another_daemon_stored_is_cleared_only_when_that_is_asked_for(self) -> None:
        with self.bench() as one:
            self.more = {"state_directory": str(self.tmp_path / "other-state")}
            with self.bench() as other:
                wait_until_complete(other)
                for number in range(3):
                    one.store(number)
                other.store(3)
                assert other.run(JobKind.PROBE, other.chunk(0, 0)).outcomes == (Outcome.DONE,)
                assert other.clear(ClearJob(1)) == ClearResult(1, 1, FILE_BYTES, 1)
                assert len(self.files()) == 3
                # Two of them it has never heard of before.
                assert other.clear(ClearJob(2, others=True)) == ClearResult(2, 3, 3 * FILE_BYTES)
                assert self.files() == []
                assert one.run(JobKind.LOAD, one.chunk(0, slot=3)).outcomes == (Outcome.MISSING,)


class TestClear(OnDisk):
    def test_a_file_that_cannot_be_removed_stays_known_and_is_counted(self) -> None:
        with self.complete() as bench:
            bench.store(1)
            self.disk.calls = ("unlink",)
            self.disk.break_with("EROFS")
            assert bench.clear(ClearJob(1)) == ClearResult(1, 0, 0, 1)
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.YES]
            self.disk.mend()
            assert bench.clear(ClearJob(2)) == ClearResult(2, 1, FILE_BYTES)
            assert self.files() == []

    def test_a_file_that_cannot_be_removed_is_passed_over_by_an_eviction_and_may_go_later(self) -> None:
        with self.complete() as bench:
            for number in range(3):
                bench.store(number, slot=number)
            self.disk.calls = ("unlink",)
            self.disk.break_with("EROFS")
            assert bench.evict(EvictJob(1, FILE_BYTES)) == ClearResult(1, 0, 0)
            assert bench.tier.stats().num_chunks == 3
            self.disk.mend()
            assert bench.evict(EvictJob(2, FILE_BYTES)) == ClearResult(2, 1, FILE_BYTES)
            gone = [key for removal in bench.tier.get_removed() for key in removal.keys]
            assert gone == [key_of(0)], "it is still the one that goes first"

    def test_what_was_cleared_is_gone_for_the_next_daemon_too(self) -> None:
        with self.complete() as bench:
            bench.store(1)
            bench.clear(ClearJob(1))
        with self.complete() as bench:
            assert bench.tier.lookup(SPACE, [key_of(1)]) == [Presence.NO]
            assert bench.tier.stats().num_chunks == 0


class TestProcess(OnDisk):
    settings: dict[str, Any] = {"io": "process"}  # noqa: RUF012

    def test_an_io_that_hangs_is_ended_with_its_process_and_the_next_one_works(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filesystem_tier, "PATIENCE_DEADLINES", 0)
        monkeypatch.setattr(filesystem_tier, "LEAST_PATIENCE_S", 2.0)
        monkeypatch.setenv("KVTIER_FAULTS", "filesystem.before_load=stop")
        with self.complete() as bench:
            data = bench.store(1)
            monkeypatch.delenv("KVTIER_FAULTS")  # of the process that is begun next
            assert bench.run(JobKind.LOAD, bench.chunk(1, slot=2)).outcomes == (Outcome.FAILED,)

            def is_loaded() -> bool:
                return bench.run(JobKind.LOAD, bench.chunk(1, slot=3)).outcomes == (Outcome.DONE,)

            until(is_loaded, "the next process reads it")
            assert parts_of(bench.slot(3)) == parts_of(data)
