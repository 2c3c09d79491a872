from __future__ import annotations

import pytest

from kvtier_server.doctor.finding import Verdict
from kvtier_server.doctor.limits import check_cpus, check_limits, check_locked_memory, check_open_files
from kvtier_server.doctor.subject import Subject

from .conftest import MadeMachine

SERVE = "kvtier serve --config '/etc/kv tier.toml'"


def test_a_machine_without_limits_passes(made: MadeMachine, subject: Subject) -> None:
    found = list(check_limits(made.machine, subject, None))
    assert [(each.name, each.verdict) for each in found] == [
        ("limits.memlock", Verdict.PASS),
        ("limits.files", Verdict.PASS),
        ("limits.cpus", Verdict.PASS),
    ]


@pytest.mark.parametrize(
    ("hard", "fix"),
    [
        ("unlimited", f"ulimit -l unlimited && {SERVE}"),
        ("65536", f"sudo prlimit --pid $$ --memlock=unlimited:unlimited && {SERVE}"),
    ],
)
def test_a_pool_larger_than_what_may_be_locked_is_a_warning(
    made: MadeMachine, subject: Subject, hard: str, fix: str
) -> None:
    made.limits(memlock=f"65536 {hard}")
    found = check_locked_memory(made.machine, subject, None)
    assert (found.verdict, found.fix) == (Verdict.WARN, fix)
    assert "64KiB of memory may be locked for a pool of 4MiB" in found.text


def test_the_capability_stands_above_the_limit(made: MadeMachine, subject: Subject) -> None:
    made.limits(memlock="65536 65536")
    made.status(capabilities="0000000000004000")
    assert check_locked_memory(made.machine, subject, None).verdict is Verdict.PASS
    made.status(capabilities="000001ffffffbfff")  # every one but this
    assert check_locked_memory(made.machine, subject, None).verdict is Verdict.WARN


def test_a_pool_that_just_fits_may_be_locked(made: MadeMachine, subject: Subject) -> None:
    made.limits(memlock=f"{subject.pool_bytes} {subject.pool_bytes}")
    assert check_locked_memory(made.machine, subject, None).verdict is Verdict.PASS


def test_of_a_running_daemon_its_own_limits_count(made: MadeMachine, subject: Subject) -> None:
    made.limits(memlock="65536 65536", files="1024 4096", pid="77")
    made.status(pid="77")
    assert check_locked_memory(made.machine, subject, None).verdict is Verdict.PASS
    memory = check_locked_memory(made.machine, subject, 77)
    assert memory.fix == "sudo prlimit --pid 77 --memlock=unlimited:unlimited"
    files = check_open_files(made.machine, subject, 77)
    assert files.fix == "sudo prlimit --pid 77 --nofile=2304:2304"


@pytest.mark.parametrize(("soft", "verdict"), [(2303, Verdict.WARN), (2304, Verdict.PASS)])
def test_every_session_needs_two_files(
    made: MadeMachine, subject: Subject, soft: int, verdict: Verdict
) -> None:
    made.limits(files=f"{soft} 4096")
    found = check_open_files(made.machine, subject, None)
    assert found.verdict is verdict
    if verdict is Verdict.WARN:
        assert found.fix == f"ulimit -n 2304 && {SERVE}"


def test_one_cpu_of_several_is_a_warning_with_the_others_named(made: MadeMachine, subject: Subject) -> None:
    made.status(cpus="2")
    found = check_cpus(made.machine, subject, None)
    assert (found.verdict, found.fix) == (Verdict.WARN, f"taskset -c 0-3 {SERVE}")
    assert found.text == "1 of 4 CPUs (2)"
    made.status(cpus="2", pid="77")
    assert check_cpus(made.machine, subject, 77).fix == "taskset -acp 0-3 77"


def test_a_cpu_that_is_offline_is_none(made: MadeMachine, subject: Subject) -> None:
    made.status(cpus="3-4")
    assert check_cpus(made.machine, subject, None).verdict is Verdict.WARN


def test_a_machine_with_one_cpu_has_no_command(made: MadeMachine, subject: Subject) -> None:
    made.write("sys/devices/system/cpu/online", "0\n")
    made.status(cpus="0")
    assert "give the machine another" in check_cpus(made.machine, subject, None).fix


@pytest.mark.parametrize(
    ("version", "quota", "verdict"),
    [
        (2, "150000 100000", Verdict.WARN),
        (2, "200000 100000", Verdict.PASS),
        (2, "max 100000", Verdict.PASS),
        (1, "150000", Verdict.WARN),
        (1, "200000", Verdict.PASS),
        (1, "-1", Verdict.PASS),
    ],
)
@pytest.mark.parametrize("folder", ["a/b", "a"])
def test_a_quota_of_less_than_two_cpus_is_a_warning_wherever_above_it_stands(
    made: MadeMachine, subject: Subject, version: int, quota: str, verdict: Verdict, folder: str
) -> None:
    made.write("proc/self/cgroup", {1: "4:cpu,cpuacct:/a/b\n", 2: "0::/a/b\n"}[version])
    group = {1: f"sys/fs/cgroup/cpu/{folder}", 2: f"sys/fs/cgroup/{folder}"}[version]
    made.write(f"{group}/{ {1: 'cpu.cfs_quota_us', 2: 'cpu.max'}[version] }", quota + "\n")
    made.write(f"{group}/cpu.cfs_period_us", "100000\n")
    found = check_cpus(made.machine, subject, None)
    assert found.verdict is verdict
    if verdict is Verdict.WARN:
        assert "no more than 1.5 at once" in found.text
        assert found.fix.startswith("echo max | sudo tee " if version == 2 else "echo -1 | sudo tee ")
        assert found.fix.endswith(f"{group}/{'cpu.max' if version == 2 else 'cpu.cfs_quota_us'}")


def test_what_the_kernel_does_not_tell_is_skipped(made: MadeMachine, subject: Subject) -> None:
    assert {each.verdict for each in check_limits(made.machine, subject, 4711)} == {Verdict.SKIP}
