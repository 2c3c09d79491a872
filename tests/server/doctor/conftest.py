"""A machine made of files: what the kernel would tell, written by the test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier_server.doctor.machine import Machine
from kvtier_server.doctor.subject import Subject

GIB = 1 << 30


class MadeMachine:
    """A root with a healthy machine below it: one node, four CPUs, no limits, 1 TiB of memory, no GPU."""

    def __init__(self, root: Path) -> None:
        self.machine = Machine(root)
        self.write("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {2**30} kB\n")
        self.write("proc/self/cgroup", "0::/\n")
        self.status()
        self.limits()
        self.write("proc/self/mountinfo", "1 0 0:1 / / rw - ext4 /dev/vda rw\n")
        self.mount("/dev/shm", "tmpfs", "rw,size=67108864k,huge=within_size")
        self.write("sys/devices/system/cpu/online", "0-3\n")
        self.write("sys/devices/system/node/has_memory", "0\n")
        self.write("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always advise [never] deny force\n")

    def write(self, path: str, text: str) -> None:
        file = self.machine.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def mount(self, path: str, kind: str, options: str) -> None:
        with (self.machine.root / "proc/self/mountinfo").open("a") as file:
            file.write(f"2 1 0:2 / {path} rw,relatime shared:1 - {kind} none {options}\n")

    def status(
        self, *, cpus: str = "0-3", nodes: str = "0", capabilities: str = "0", pid: str = "self"
    ) -> None:
        self.write(
            f"proc/{pid}/status",
            f"Name:\tx\nCapEff:\t{capabilities}\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{nodes}\n",
        )

    def limits(
        self, *, memlock: str = "unlimited unlimited", files: str = "65536 65536", pid: str = "self"
    ) -> None:
        self.write(
            f"proc/{pid}/limits",
            f"Limit  Soft Limit  Hard Limit  Units\nMax open files   {files}   files\n"
            f"Max locked memory   {memlock}   bytes\n",
        )

    def gpu(self, address: str, *, node: int, vendor: str = "0x10de", kind: str = "0x030200") -> None:
        folder = f"sys/bus/pci/devices/{address}"
        self.write(f"{folder}/vendor", f"{vendor}\n")
        self.write(f"{folder}/class", f"{kind}\n")
        self.write(f"{folder}/numa_node", f"{node}\n")


@pytest.fixture
def made(tmp_path: Path) -> MadeMachine:
    return MadeMachine(tmp_path / "root")


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A directory in /dev/shm, gone after the test."""
    directory = Path(tempfile.mkdtemp(prefix="kvtier-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def subject(shared_memory: Path) -> Subject:
    """A daemon whose pool of 4 MiB is not made yet."""
    return Subject(
        address="unix:///nonexistent/kvtier.sock",
        name="default",
        pool_directory=shared_memory / "pool",
        pool_bytes=4 << 20,
        sessions=1024,
        tiers=(),
        command=("kvtier", "serve", "--config", "/etc/kv tier.toml"),
    )
