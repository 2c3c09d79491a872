"""`kvtier verify` finds what is wrong in a root, says so, and touches nothing that is right."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import JobKind, OffloadingSpec, TierChunk
from kvtier_server.secondary.conformance import SPACE, TierBench, key_of
from kvtier_server.secondary.filesystem.inspection import PIECE_BYTES, Inspection, Verdict
from kvtier_server.secondary.filesystem.tier import FilesystemParameters, FilesystemTier

from .conftest import Kvtier, environment

LONG_KEY = b"k" * 128
OTHER = SpaceName("m" * 32, "", 0)


class Filled(TierBench):
    """Fills a root as a daemon does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def make_tier(
        self, spec: OffloadingSpec, pool: memoryview, on_finished: Callable[[], None]
    ) -> FilesystemTier:
        parameters = FilesystemParameters.model_validate(
            {
                "root": str(self.directory / "root"),
                "capacity": 64 << 20,
                "reserve_free": 0,
                "state_directory": str(self.directory / "state"),
            }
        )
        return FilesystemTier(spec, pool, "filesystem", on_finished, parameters)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six chunks of two spaces, one of them under a key that is longer than a name may be."""
    with Filled(tmp_path).bench() as bench:
        for number in range(4):
            bench.store(number)
        bench.store(9, space=OTHER)
        bench.fill(1)
        named = bench.chunk(1, slot=1)
        chunk = TierChunk(SPACE, LONG_KEY, named.geometry, named.part_bytes, named.num_parts, named.offset)
        bench.run(JobKind.STORE, bench.hashed(chunk))
    return tmp_path / "root"


def chunks(root: Path) -> list[Path]:
    return sorted(root.rglob("*.chunk"))


def verified(kvtier: Kvtier, root: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report."""
    done = kvtier("verify", "--path", str(root), "-o", "json", *options)
    assert done.stderr == "", "there is no terminal to show progress on"
    (report,) = json.loads(done.stdout)["roots"]
    return done.returncode, report


def problems(report: dict[str, Any]) -> dict[str, str]:
    return {Path(wrong["path"]).name: wrong["problem"] for wrong in report["wrong"]}


def test_what_a_daemon_has_stored_is_right(kvtier: Kvtier, root: Path) -> None:
    code, report = verified(kvtier, root)
    assert (code, report["wrong"], report["unreadable"]) == (0, [], [])
    assert report["files"] == {"right": 6 + 2}  # and two space.json
    assert report["bytes"] == 6 * 4 * 4096
    shown = kvtier("verify", "--path", str(root))
    assert shown.returncode == 0
    assert "right" in shown.stdout
    assert "--delete" not in shown.stdout


def flip(path: Path, position: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[position // 8] ^= 1 << position % 8
    path.write_bytes(damaged)


def test_every_flipped_bit_is_found(root: Path) -> None:
    generator = random.Random(5)
    path = chunks(root)[0]
    whole = path.read_bytes()
    inspection = Inspection(str(root))
    (entry,) = [entry for entry in inspection.entries() if entry.name == path.name]
    assert inspection.look_at(entry).verdict is Verdict.RIGHT
    positions = [generator.randrange(8 * len(whole)) for _ in range(300)]
    for position in [*positions, 0, 8 * 4095, 8 * 4096, 8 * len(whole) - 1]:
        flip(path, position)
        verdict = inspection.look_at(entry).verdict
        assert verdict is (Verdict.HEADER if position < 8 * 4096 else Verdict.PAYLOAD), position
        path.write_bytes(whole)
    for length in range(0, len(whole), 512):
        path.write_bytes(whole[:length])
        assert inspection.look_at(entry).verdict is Verdict.LENGTH, length
    inspection.close()


def damage_all_ways(root: Path) -> dict[str, str]:
    """Damage five of six chunks; returns what is to be found by name."""
    header, payload, cut, other, moved = [path for path in chunks(root) if path.name[0] != "x"]
    flip(header, 8 * 20)
    flip(payload, 8 * 5000)
    os.truncate(cut, 8192)
    os.unlink(other)
    os.mkfifo(other)
    elsewhere = moved.with_name("00" * 36 + ".chunk")
    moved.rename(elsewhere)
    return {
        header.name: "broken header",
        payload.name: "wrong checksum",
        cut.name: "wrong length",
        other.name: "no regular file",
        elsewhere.name: "misplaced",
    }


def test_what_is_wrong_is_named_and_stays_until_it_is_to_be_removed(kvtier: Kvtier, root: Path) -> None:
    expected = damage_all_ways(root)
    code, report = verified(kvtier, root)
    assert (code, problems(report)) == (1, expected)
    assert report["files"]["right"] == 3
    assert len(chunks(root)) == 6

    shown = kvtier("verify", "--path", str(root))
    assert shown.returncode == 1
    assert all(name in shown.stdout and problem in shown.stdout for name, problem in expected.items())
    assert "the same command with --delete" in shown.stdout

    code, report = verified(kvtier, root, "--delete")
    assert (code, problems(report)) == (1, expected)
    assert all(wrong["removed"] for wrong in report["wrong"])
    assert [path.name[0] for path in chunks(root)] == ["x"]
    assert verified(kvtier, root)[0] == 0


@pytest.mark.parametrize("unreadable", ["{", "[" * 60_000], ids=["cut", "nested too deeply"])
def test_a_space_that_is_named_wrongly_or_not_at_all_is_found(
    kvtier: Kvtier, root: Path, unreadable: str
) -> None:
    one, other = sorted(root.rglob("space.json"))
    one.write_text(other.read_text())
    other.write_text(unreadable)
    code, report = verified(kvtier, root, "--delete")
    assert code == 1
    assert sorted(wrong["detail"] for wrong in report["wrong"]) == [
        "names no space",
        "names the space of another directory",
    ]
    code, report = verified(kvtier, root)
    assert [wrong["detail"] for wrong in report["wrong"]] == [
        "is missing: without an index its chunks are not found"
    ] * 2


def test_what_is_being_written_is_nobodys_mistake(kvtier: Kvtier, root: Path) -> None:
    unfinished = chunks(root)[0].with_name("tmp-17-abc")
    unfinished.write_bytes(b"half")
    code, report = verified(kvtier, root, "--delete")
    assert (code, report["files"]["unfinished"]) == (0, 1)
    assert unfinished.exists()


def test_a_file_that_goes_meanwhile_is_nobodys_mistake_and_one_that_comes_is_not_removed(root: Path) -> None:
    inspection = Inspection(str(root))
    by_name = {entry.name: entry for entry in inspection.entries()}
    gone, replaced = chunks(root)[:2]
    whole = replaced.read_bytes()
    gone.unlink()
    assert inspection.look_at(by_name[gone.name]).verdict is Verdict.GONE
    flip(replaced, 8 * 5000)
    finding = inspection.look_at(by_name[replaced.name])
    assert finding.verdict is Verdict.PAYLOAD
    fresh = replaced.with_name("tmp-1-fresh")
    fresh.write_bytes(whole)
    fresh.rename(replaced)
    assert not inspection.remove(finding), "a daemon has written it anew"
    assert replaced.read_bytes() == whole
    inspection.close()


def test_nothing_is_made_changed_or_locked(kvtier: Kvtier, root: Path) -> None:
    def everything() -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted(root.parent.rglob("*"))
        }

    damage = chunks(root)[0]
    flip(damage, 8 * 5000)
    before = everything()
    assert verified(kvtier, root)[0] == 1
    assert everything() == before


def test_chunks_larger_than_one_read_are_hashed_to_their_end(tmp_path: Path) -> None:
    """A file of three pieces and a bit, made by hand: tiers of tests have small slots."""
    from kvtier_ops.checksum import part_checksum
    from kvtier_ops.layout import part_offset
    from kvtier_server.secondary.chunk_file import (
        HEADER_BYTES,
        padded_bytes,
        payload_checksum,
        write_header,
    )
    from kvtier_server.secondary.chunk_names import file_name
    from kvtier_server.secondary.filesystem.disk import Disk
    from kvtier_server.secondary.filesystem.places import Places

    part_bytes, num_parts = PIECE_BYTES + 1_000, 3
    chunk = TierChunk(SPACE, key_of(1), bytes(16), part_bytes, num_parts)
    payload = random.Random(1).randbytes(chunk.num_bytes)
    starts = [part_offset(part_bytes, part) for part in range(num_parts)]
    sums = tuple(part_checksum(memoryview(payload)[start : start + part_bytes]) for start in starts)
    padded = memoryview(payload + bytes(padded_bytes(len(payload)) - len(payload)))
    header = bytearray(HEADER_BYTES)
    write_header(memoryview(header), chunk, sums, payload_checksum(padded, memoryview(b"")))
    places = Places.below(Disk(), str(tmp_path / "root"))
    with places.directory(SPACE, key_of(1), create=True) as fd:
        opened = os.open(file_name(key_of(1)), os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd)
        os.write(opened, bytes(header) + bytes(padded))
        os.close(opened)
    places.close()
    inspection = Inspection(str(tmp_path / "root"))
    assert {inspection.look_at(entry).verdict for entry in inspection.entries()} == {Verdict.RIGHT}
    (path,) = chunks(tmp_path / "root")
    flip(path, 8 * (HEADER_BYTES + 2 * PIECE_BYTES + 77))
    verdicts = [inspection.look_at(entry).verdict for entry in inspection.entries()]
    assert verdicts == [Verdict.RIGHT, Verdict.PAYLOAD]
    inspection.close()


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text(""), Path.mkdir])
def test_what_is_no_root_is_exit_2_and_stays_as_it_was(
    kvtier: Kvtier, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "nothing"
    make(path)
    was = (path.exists(), path.is_dir())
    refused = kvtier("verify", "--path", str(path))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "name the directory that a tier has as its root" in refused.stderr
    assert (path.exists(), path.is_dir()) == was
    assert not path.is_dir() or not list(path.iterdir())


def test_the_roots_of_a_configuration(kvtier: Kvtier, root: Path, tmp_path: Path) -> None:
    (tmp_path / "second" / "kvtier-1").mkdir(parents=True)
    config = tmp_path / "kvtier.toml"
    config.write_text(
        '[[tiers]]\ntype = "example"\n'
        f'[[tiers]]\ntype = "filesystem"\nname = "one"\nroot = "{root}"\ncapacity = "1GiB"\n'
        f'[[tiers]]\ntype = "filesystem"\nname = "two"\nroot = "{tmp_path}/second"\ncapacity = "1GiB"\n'
    )
    done = kvtier("verify", "--config", str(config), "-o", "json")
    assert [report["root"] for report in json.loads(done.stdout)["roots"]] == [
        str(root),
        f"{tmp_path}/second",
    ]
    done = kvtier("verify", "--config", str(config), "--tier", "two", "-o", "json")
    assert [report["root"] for report in json.loads(done.stdout)["roots"]] == [f"{tmp_path}/second"]
    refused = kvtier("verify", "--config", str(config), "--tier", "three")
    assert (refused.returncode, "it has one, two" in refused.stderr) == (2, True)
    config.write_text('[[tiers]]\ntype = "example"\n')
    refused = kvtier("verify", "--config", str(config))
    assert (refused.returncode, "has no filesystem tier" in refused.stderr) == (2, True)
    refused = kvtier("verify", "--config", str(tmp_path / "nowhere"))
    assert (refused.returncode, "cannot be read" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments", [[], ["--path", "/a", "--config", "/b"], ["--path", "/a", "--tier", "x"]]
)
def test_a_mistake_in_the_call_is_exit_2(kvtier: Kvtier, arguments: list[str]) -> None:
    assert kvtier("verify", *arguments).returncode == 2


def test_a_terminal_is_shown_how_far_it_is(root: Path, tmp_path: Path) -> None:
    """With no patience, or the test would have to be slow."""
    code = (
        "from kvtier_server.cli import main, verify\n"
        "verify.SHOW_AFTER_S = verify.SHOW_EVERY_S = 0.0\n"
        f"raise SystemExit(main(['verify', '--path', {str(root)!r}]))"
    )
    terminal, side = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=side,
        check=True,
    )
    os.close(side)
    assert select.select([terminal], [], [], 10)[0]
    shown = os.read(terminal, 65_536).decode()
    os.close(terminal)
    assert "of 8 files" in shown
    assert shown.endswith("\r"), "the line is wiped in the end"
    assert b"right" in done.stdout
