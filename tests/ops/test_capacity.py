from __future__ import annotations

from pathlib import Path

import pytest

from kvtier_ops.pool import Pool, PoolTooLarge, check_capacity

from .conftest import MIB

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A /proc and /sys/fs/cgroup of 1 PiB of memory and no limits, to be narrowed by the test."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {2**40} kB\n")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def check(machine: Path, directory: Path, data_bytes: int) -> None:
    check_capacity(directory, data_bytes, proc_root=machine / "proc", cgroup_root=machine / "cgroup")


def test_a_pool_larger_than_the_file_system_is_refused_with_all_figures(pool_directory: Path) -> None:
    with pytest.raises(PoolTooLarge, match=r"file system .* GiB .*MemAvailable .*ask for at most") as raised:
        check_capacity(pool_directory / "missing", 1 << 50)
    assert 0 <= raised.value.available_bytes < 1 << 50


def test_what_is_said_to_fit_fits(pool_directory: Path) -> None:
    with pytest.raises(PoolTooLarge) as raised:
        check_capacity(pool_directory, 1 << 50)
    check_capacity(pool_directory, raised.value.available_bytes // 2)


def test_a_pool_larger_than_the_available_memory_is_refused(machine: Path, pool_directory: Path) -> None:
    (machine / "proc" / "meminfo").write_text(f"MemAvailable: {1 << 20} kB\n")
    check(machine, pool_directory, GIB - 8 * MIB)
    with pytest.raises(PoolTooLarge, match=r"MemAvailable 1\.00 GiB"):
        check(machine, pool_directory, 2 * GIB)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["own", "parent"])
def test_a_pool_larger_than_a_cgroup_allows_is_refused(
    machine: Path, pool_directory: Path, version: int, limited: str
) -> None:
    line, root, limit_file, usage_file, stat_name, unlimited = {
        1: (
            "4:memory,cpu:/a/b",
            machine / "cgroup" / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
            str(2**63 - 4096),
        ),
        2: ("0::/a/b", machine / "cgroup", "memory.max", "memory.current", "inactive_file", "max"),
    }[version]
    (machine / "proc" / "self" / "cgroup").write_text(f"7:cpu:/x\n{line}\n")
    for folder in (root / "a" / "b", root / "a", root):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / usage_file).write_text(f"{GIB // 2}\n")
        (folder / limit_file).write_text(unlimited + "\n")
    check(machine, pool_directory, GIB // 2)
    narrow = root / "a" / "b" if limited == "own" else root / "a"
    (narrow / limit_file).write_text(f"{GIB}\n")
    with pytest.raises(PoolTooLarge, match=r"memory cgroup 0\.50 GiB"):
        check(machine, pool_directory, GIB // 2 + MIB)
    (narrow / "memory.stat").write_text(f"cache 1\n{stat_name} {GIB // 2}\n")
    check(machine, pool_directory, GIB // 2 + MIB)


def test_what_the_present_pool_holds_counts_as_available(machine: Path, pool_directory: Path) -> None:
    pool = Pool.create(pool_directory, 32 * MIB)
    pool.back(0, 32 * MIB)
    (machine / "proc" / "meminfo").write_text(f"MemAvailable: {2 * MIB // 1024} kB\n")
    check(machine, pool_directory, 32 * MIB)
    pool.close()
    with pytest.raises(PoolTooLarge):
        check(machine, pool_directory / "other", 32 * MIB)
