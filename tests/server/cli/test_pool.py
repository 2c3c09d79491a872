from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier_ops.pool import Pool

from .conftest import Kvtier, environment

DATA_BYTES = 1 << 20
SLOT_BYTES = 8192


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture
def pool(directory: Path) -> Path:
    """A pool with one slab of 64 slots: 1 published, 2 reserved, 1 quarantined, 60 free."""
    pool = Pool.create(directory, DATA_BYTES)
    slab_bytes = 64 * SLOT_BYTES
    pool.slabs.configure(slab_bytes, 2)
    pool.slabs.assign(0, SLOT_BYTES)
    slot_ids = [index * SLOT_BYTES // 4096 for index in range(4)]
    pool.back(0, slab_bytes)
    pool.back_records(slot_ids)
    pool.slots.reserve(slot_ids, 1, SLOT_BYTES)
    pool.slots.publish(slot_ids[0], 1, b"k" * 36, [7])
    pool.slots.quarantine(slot_ids[3:], 1)
    pool.close()
    return directory


@pytest.fixture
def daemon(pool: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the pool as a daemon does."""
    code = (
        "import sys; from pathlib import Path; from kvtier_ops.pool import Pool\n"
        f"pool = Pool.create(Path(sys.argv[1]), {DATA_BYTES})\nprint('holds', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(pool)],
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_show_counts_slots_by_size_and_state(kvtier: Kvtier, pool: Path) -> None:
    shown = json.loads(kvtier("pool", "show", "--directory", str(pool), "-o", "json").stdout)
    assert {(row["slot_bytes"], row["state"]): row["count"] for row in shown["slots"]} == {
        (SLOT_BYTES, "published"): 1,
        (SLOT_BYTES, "reserved"): 2,
        (SLOT_BYTES, "quarantined"): 1,
        (SLOT_BYTES, "free"): 60,
    }
    assert (shown["num_slabs"], shown["free_slabs"]) == (2, 1)
    assert shown["data_bytes"] == DATA_BYTES
    assert shown["daemon_pid"] is None


def test_show_is_readable_without_a_daemon(kvtier: Kvtier, pool: Path) -> None:
    shown = kvtier("pool", "show", "--directory", str(pool))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "no daemon" in shown.stdout
    assert "1MiB of slots" in shown.stdout
    assert "published" in shown.stdout


def test_show_gives_no_memory_to_what_has_none(kvtier: Kvtier, pool: Path) -> None:
    before = os.stat(pool / "pool").st_blocks
    assert kvtier("pool", "show", "--directory", str(pool)).returncode == 0
    assert os.stat(pool / "pool").st_blocks == before


def test_show_names_the_daemon_that_holds_it(
    kvtier: Kvtier, pool: Path, daemon: subprocess.Popen[str]
) -> None:
    assert f"daemon pid {daemon.pid};" in kvtier("pool", "show", "--directory", str(pool)).stdout


def test_a_record_that_does_not_verify_is_shown_as_such(kvtier: Kvtier, pool: Path) -> None:
    file = pool / "pool"
    raw = bytearray(file.read_bytes())
    raw[(2 << 20) + 64] ^= 1  # the published record's key
    with file.open("r+b") as writer:
        writer.write(raw)
    shown = json.loads(kvtier("pool", "show", "--directory", str(pool), "-o", "json").stdout)
    assert {row["state"] for row in shown["slots"]} == {"unreadable", "reserved", "quarantined", "free"}


@pytest.mark.parametrize("damage", [b"", b"x" * 4096])
def test_show_of_what_is_no_pool_says_so(kvtier: Kvtier, pool: Path, damage: bytes) -> None:
    (pool / "pool").write_bytes(damage)
    refused = kvtier("pool", "show", "--directory", str(pool))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is not usable: it does not begin like a pool; run: kvtier serve --fresh" in refused.stderr


def test_show_without_a_pool_says_who_makes_one(kvtier: Kvtier, directory: Path) -> None:
    refused = kvtier("pool", "show", "--directory", str(directory))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"kvtier: no pool in {directory}; a daemon makes it: kvtier serve\n"
    assert not directory.exists()


def test_remove_frees_the_memory_and_leaves_nothing(kvtier: Kvtier, pool: Path) -> None:
    removed = kvtier("pool", "remove", "--directory", str(pool), "--yes")
    assert (removed.returncode, removed.stderr) == (0, "")
    assert f"removed {pool}: " in removed.stdout
    assert not pool.exists()


@pytest.mark.parametrize("damage", [b"", b"x" * 4096])
def test_remove_takes_a_damaged_pool_too(kvtier: Kvtier, pool: Path, damage: bytes) -> None:
    (pool / "pool").write_bytes(damage)
    assert kvtier("pool", "remove", "--directory", str(pool), "--yes").returncode == 0
    assert not pool.exists()


def test_remove_refuses_while_a_daemon_holds_the_pool(
    kvtier: Kvtier, pool: Path, daemon: subprocess.Popen[str]
) -> None:
    refused = kvtier("pool", "remove", "--directory", str(pool), "--yes")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"pid {daemon.pid}" in refused.stderr
    assert (pool / "pool").exists()


def test_a_killed_daemon_holds_nothing(kvtier: Kvtier, pool: Path, daemon: subprocess.Popen[str]) -> None:
    daemon.send_signal(signal.SIGKILL)
    daemon.wait(30)
    assert "no daemon" in kvtier("pool", "show", "--directory", str(pool)).stdout
    assert kvtier("pool", "remove", "--directory", str(pool), "--yes").returncode == 0


def test_remove_asks_and_where_nobody_can_answer_it_refuses(kvtier: Kvtier, pool: Path) -> None:
    refused = kvtier("pool", "remove", "--directory", str(pool), stdin="y\n")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "add --yes" in refused.stderr
    assert (pool / "pool").exists()


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("\n", False), ("yess\n", False)])
def test_remove_takes_only_a_yes_from_the_terminal(
    pool: Path, tmp_path: Path, answer: str, removed: bool
) -> None:
    keyboard, terminal = os.openpty()
    try:
        os.write(keyboard, answer.encode())
        done = subprocess.run(
            [sys.executable, "-m", "kvtier_server", "pool", "remove", "--directory", str(pool)],
            env=environment(tmp_path),
            stdin=terminal,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert "and all it holds? [y/N]" in done.stderr
    assert (done.returncode, pool.exists()) == ((0, False) if removed else (1, True))


def test_removing_what_is_not_there_is_done(kvtier: Kvtier, directory: Path) -> None:
    done = kvtier("pool", "remove", "--directory", str(directory))
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing to remove" in done.stderr


def test_a_name_is_a_name_and_no_path(kvtier: Kvtier) -> None:
    refused = kvtier("pool", "remove", "--yes", "--name", "../../etc")
    assert refused.returncode == 1
    assert "is not allowed" in refused.stderr


def test_the_pool_is_that_of_the_daemon_in_the_same_environment(kvtier: Kvtier, pool: Path) -> None:
    shown = kvtier("pool", "show", "-o", "json", KVTIER_POOL__DIRECTORY=str(pool))
    assert json.loads(shown.stdout)["path"] == str(pool / "pool")
    named = kvtier("pool", "show", KVTIER_SERVER__NAME="not-there-1")
    assert "kvtier-" in named.stderr
    assert "not-there-1" in named.stderr
    typed = kvtier("pool", "remove", "--yes", "--name", "not-there-2", KVTIER_POOL__DIRECTORY=str(pool))
    assert "not-there-2" in typed.stderr
    assert (pool / "pool").exists(), "a name that was typed is meant"
