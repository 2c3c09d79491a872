from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier_ops.directory import SHARED_MEMORY_ROOT
from kvtier_ops.pool import Pool
from kvtier_server.doctor.finding import Verdict
from kvtier_server.doctor.machine import Machine
from kvtier_server.doctor.pool import (
    MAX_ORPHANS,
    check_directory,
    check_huge_pages,
    check_limits,
    check_medium,
    check_orphans,
    check_pool,
)
from kvtier_server.doctor.subject import Subject
from kvtier_server.units import parse_bytes

from .conftest import GIB, MadeMachine


def make_pool(directory: Path, num_bytes: int = 1 << 20) -> Pool:
    pool = Pool.create(directory, num_bytes)
    pool.back(0, num_bytes)
    return pool


def test_a_machine_with_room_passes_in_everything(made: MadeMachine, subject: Subject) -> None:
    found = list(check_pool(made.machine, subject, subject.pool_directory.parent))
    assert {each.verdict for each in found} == {Verdict.PASS}
    assert [each.name for each in found] == [
        "pool.directory",
        "pool.medium",
        "pool.filesystem",
        "pool.memory",
        "pool.cgroup",
        "pool.hugepages",
        "pool.orphans",
    ]


def test_looking_makes_nothing(made: MadeMachine, subject: Subject) -> None:
    list(check_pool(made.machine, subject, subject.pool_directory.parent))
    assert not subject.pool_directory.exists()


def test_a_pool_that_is_served_and_not_there_fails(made: MadeMachine, subject: Subject) -> None:
    root, path = subject.pool_directory.parent, subject.pool_directory / "pool"
    pool = make_pool(subject.pool_directory)

    def found() -> Verdict:
        return next(check_pool(made.machine, subject, root, served_path=str(path))).verdict

    assert found() is Verdict.PASS
    shutil.rmtree(subject.pool_directory)
    assert found() is Verdict.FAIL
    assert next(check_pool(made.machine, subject, root)).verdict is Verdict.PASS, "nobody serves it"
    elsewhere = check_pool(made.machine, subject, root, served_path="/dev/shm/kvtier-0-x/pool")
    assert next(elsewhere).verdict is Verdict.PASS, "another one is served"
    pool.close()


def test_a_kept_pool_says_what_it_holds_and_a_served_one_by_whom(subject: Subject) -> None:
    pool = make_pool(subject.pool_directory)
    assert f"held by the daemon with pid {os.getpid()}" in check_directory(subject).text
    assert subject.served_by(Machine()) == os.getpid()
    pool.close()
    found = check_directory(subject)
    assert found.verdict is Verdict.PASS
    assert re.search(r"[\d.]+MiB kept for a warm start", found.text)
    assert subject.served_by(Machine()) is None


def test_a_directory_that_others_may_reach_into_fails_and_its_fix_mends_it(subject: Subject) -> None:
    make_pool(subject.pool_directory).close()
    subject.pool_directory.chmod(0o755)
    found = check_directory(subject)
    assert found.verdict is Verdict.FAIL
    subprocess.run(shlex.split(found.fix), check=True)
    assert check_directory(subject).verdict is Verdict.PASS


def test_a_link_in_its_place_fails(subject: Subject, tmp_path: Path) -> None:
    subject.pool_directory.symlink_to(tmp_path)
    found = check_directory(subject)
    assert (found.verdict, "link" in found.text) == (Verdict.FAIL, True)
    assert found.fix == "kvtier serve --config '/etc/kv tier.toml' --name default-2"


def test_a_parent_that_is_missing_fails_and_its_fix_mends_it(subject: Subject) -> None:
    deep = replace(subject, pool_directory=subject.pool_directory / "a b" / "pool")
    found = check_directory(deep)
    assert found.verdict is Verdict.FAIL
    subprocess.run(shlex.split(found.fix), check=True)
    assert check_directory(deep).verdict is Verdict.PASS


def test_a_pool_on_a_disk_is_a_warning(made: MadeMachine, subject: Subject) -> None:
    on_disk = replace(subject, pool_directory=Path("/var/lib/kvtier/pool"))
    found = check_medium(made.machine, on_disk)
    assert (found.verdict, "ext4" in found.text) == (Verdict.WARN, True)


def test_too_little_memory_fails_with_a_size_that_fits(made: MadeMachine, subject: Subject) -> None:
    made.write("proc/meminfo", "MemAvailable: 5632 kB\n")
    (found,) = [each for each in check_limits(made.machine, subject) if each.verdict is Verdict.FAIL]
    assert found.name == "pool.memory"
    assert found.text == "MemAvailable has 3.5MiB for a pool of 4MiB"
    size = shlex.split(found.fix)[-1]
    smaller = replace(subject, pool_bytes=parse_bytes(size))
    assert {each.verdict for each in check_limits(made.machine, smaller)} == {Verdict.PASS}


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroup_that_is_too_small_fails(made: MadeMachine, subject: Subject, version: int) -> None:
    made.write("proc/self/cgroup", {1: "3:memory:/x\n", 2: "0::/x\n"}[version])
    folder = {1: "sys/fs/cgroup/memory/x", 2: "sys/fs/cgroup/x"}[version]
    limit, usage = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }[version]
    made.write(f"{folder}/{limit}", f"{GIB}\n")
    made.write(f"{folder}/{usage}", f"{GIB - (3 << 20)}\n")
    (found,) = [each for each in check_limits(made.machine, subject) if each.verdict is Verdict.FAIL]
    assert found.name == "pool.cgroup"
    assert found.text == "memory cgroup has 1MiB for a pool of 4MiB"
    assert found.fix.endswith("--pool-bytes 1MiB")


def test_a_file_system_that_is_too_small_fails_with_the_size_it_needs(
    made: MadeMachine, subject: Subject
) -> None:
    total = os.statvfs("/dev/shm")
    pool_bytes = total.f_blocks * total.f_frsize + GIB
    (found,) = [
        each
        for each in check_limits(made.machine, replace(subject, pool_bytes=pool_bytes))
        if each.verdict is Verdict.FAIL
    ]
    assert found.name == "pool.filesystem"
    remount, _, smaller = found.fix.partition("   or: ")
    size = re.fullmatch(r"sudo mount -o remount,size=(\d+)m /dev/shm", remount)
    assert size is not None
    assert int(size[1]) << 20 >= pool_bytes
    assert "kvtier serve" in smaller


def test_where_no_pool_would_fit_none_is_proposed(made: MadeMachine, subject: Subject) -> None:
    made.write("proc/meminfo", "MemAvailable: 2048 kB\n")
    (found,) = [each for each in check_limits(made.machine, subject) if each.verdict is Verdict.FAIL]
    assert found.text == "MemAvailable has 0B for a pool of 4MiB"
    assert "--pool-bytes" not in found.fix


def test_a_pool_of_unknown_size_is_compared_with_nothing(made: MadeMachine, subject: Subject) -> None:
    (found,) = check_limits(made.machine, replace(subject, pool_bytes=0))
    assert found.verdict is Verdict.SKIP


@pytest.mark.parametrize(
    ("option", "setting", "verdict"),
    [
        ("huge=always", "never", Verdict.PASS),
        ("huge=within_size", "advise", Verdict.PASS),
        ("huge=advise", "advise", Verdict.WARN),
        ("huge=never", "always", Verdict.WARN),
        ("rw", "never", Verdict.WARN),
        ("rw", "force", Verdict.PASS),
        ("huge=always", "deny", Verdict.WARN),
        ("huge=always", "", Verdict.SKIP),
    ],
)
def test_huge_pages_need_the_mounts_option_and_a_kernel_that_does_not_deny_them(
    made: MadeMachine, subject: Subject, option: str, setting: str, verdict: Verdict
) -> None:
    made.mount("/dev/shm", "tmpfs", f"rw,size=1g,{option}")
    made.mount("/dev/hugepages", "hugetlbfs", "rw,pagesize=2M")
    made.write("sys/kernel/mm/transparent_hugepage/shmem_enabled", f"always [{setting}] other\n")
    found = check_huge_pages(made.machine, subject)
    assert found.verdict is verdict
    if verdict is Verdict.WARN:
        assert found.fix.endswith("sudo mount -o remount,huge=within_size /dev/shm")
        assert found.fix.startswith("echo never |") == (setting == "deny")
        assert "hugetlbfs at /dev/hugepages" in found.text


def test_a_pool_on_hugetlbfs_has_huge_pages(made: MadeMachine, subject: Subject) -> None:
    made.mount("/dev/shm", "hugetlbfs", "rw,pagesize=1024M")
    found = check_huge_pages(made.machine, subject)
    assert (found.verdict, "1024M" in found.text) == (Verdict.PASS, True)


@pytest.fixture
def forgotten() -> Iterator[str]:
    """The name of a pool in /dev/shm whose daemon is gone."""
    name = f"test-doctor-{secrets.token_hex(4)}"
    directory = SHARED_MEMORY_ROOT / f"kvtier-{os.geteuid()}-{name}"
    make_pool(directory).close()
    yield name
    shutil.rmtree(directory, ignore_errors=True)


def test_a_pool_that_no_daemon_serves_is_named_with_its_bytes(subject: Subject, forgotten: str) -> None:
    found = [each for each in check_orphans(subject, SHARED_MEMORY_ROOT) if forgotten in each.text]
    assert [each.verdict for each in found] == [Verdict.WARN]
    assert found[0].fix == f"kvtier pool remove --name {forgotten}"
    assert re.search(r"holds [\d.]+MiB", found[0].text)


def test_ones_own_pool_and_those_that_are_served_are_no_orphans(subject: Subject) -> None:
    root = subject.pool_directory.parent
    own = root / f"kvtier-{os.geteuid()}-own"
    make_pool(own).close()
    served = make_pool(root / f"kvtier-{os.geteuid()}-served")
    (root / f"kvtier-{os.geteuid()}-empty").mkdir(mode=0o700)
    (found,) = check_orphans(replace(subject, pool_directory=own), root)
    assert found.verdict is Verdict.PASS
    served.close()
    (found,) = check_orphans(replace(subject, pool_directory=own), root)
    assert found.fix == "kvtier pool remove --name served"


def test_of_very_many_orphans_the_rest_is_one_line(subject: Subject) -> None:
    root = subject.pool_directory.parent
    for number in range(MAX_ORPHANS + 2):
        directory = root / f"kvtier-{os.geteuid()}-{number:03}"
        directory.mkdir(mode=0o700)
        (directory / "pool").write_bytes(bytes(4096))
    found = list(check_orphans(subject, root))
    assert len(found) == MAX_ORPHANS + 1
    assert found[-1].text == "and 2 more, with 8KiB"
