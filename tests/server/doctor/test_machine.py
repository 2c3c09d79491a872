from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from kvtier_server.doctor.machine import UNLIMITED, Machine, format_ranges, parse_ranges

from .conftest import MadeMachine


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0,2-3,8\n", [0, 2, 3, 8]), ("", [])]
)
def test_lists_of_nodes_and_cpus_are_read_and_written_as_the_kernel_does(
    text: str, numbers: list[int]
) -> None:
    assert parse_ranges(text) == numbers
    assert format_ranges(numbers) == text.strip()


def test_of_the_mounts_around_a_path_the_deepest_and_latest_counts(made: MadeMachine) -> None:
    made.mount("/dev/shm", "tmpfs", "rw,size=1k")
    made.mount("/dev/shm/a\\040b", "hugetlbfs", "rw,pagesize=1024M")
    shared = made.machine.mount_of(Path("/dev/shm/kvtier-0-default"))
    assert shared is not None
    assert (shared.kind, shared.options["size"]) == ("tmpfs", "1k")
    huge = made.machine.mount_of(Path("/dev/shm/a b/pool"))
    assert huge is not None
    assert huge.options == {"rw": "", "pagesize": "1024M"}
    root = made.machine.mount_of(Path("/dev/shmem"))
    assert root is not None
    assert root.kind == "ext4"


def test_limits_and_status_are_those_of_the_process_asked_for(made: MadeMachine) -> None:
    made.limits(memlock="8388608 unlimited", pid="77")
    made.status(cpus="1", pid="77")
    assert made.machine.limit("Max locked memory", 77) == (8388608, UNLIMITED)
    assert made.machine.limit("Max locked memory") == (UNLIMITED, UNLIMITED)
    assert made.machine.status("Cpus_allowed_list", 77) == "1"
    assert made.machine.limit("Max locked memory", 78) is None


def test_only_nvidias_display_and_compute_devices_are_gpus(made: MadeMachine) -> None:
    made.gpu("0000:81:00.0", node=1)
    made.gpu("0000:1b:00.0", node=0, kind="0x030000")
    made.gpu("0000:1b:00.1", node=0, kind="0x040300")  # its sound device
    made.gpu("0000:02:00.0", node=0, vendor="0x1a03")
    assert [(slot.address, slot.numa_node) for slot in made.machine.gpu_slots()] == [
        ("0000:1b:00.0", 0),
        ("0000:81:00.0", 1),
    ]


def test_a_machine_that_tells_nothing_raises_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.mount_of(Path("/dev/shm")) is None
    assert machine.limit("Max open files") is None
    assert machine.status("CapEff") is None
    assert machine.memory_policy() == "default"
    assert machine.command(1) == ()
    assert machine.numa_nodes() == [0]
    assert list(machine.gpu_slots()) == []
    assert machine.lock_holder(tmp_path / "missing") is None


def test_the_real_machine_tells_what_this_process_knows_of_itself(tmp_path: Path) -> None:
    machine = Machine()
    allowed = machine.status("Cpus_allowed_list")
    assert allowed is not None
    assert set(parse_ranges(allowed)) == os.sched_getaffinity(0)
    assert machine.mount_of(Path("/proc/self")) is not None
    assert "python" in machine.command(os.getpid())[0]
    file = tmp_path / "lock"
    with file.open("w") as held:
        assert machine.lock_holder(file) is None
        fcntl.flock(held, fcntl.LOCK_EX)
        assert machine.lock_holder(file) == os.getpid()
