"""What the kernel tells of the machine: files below /proc and /sys, read and taken apart.

Owns no verdict. A file that is missing or cannot be read is None, or nothing in a list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_OCTAL = re.compile(r"\\([0-7]{3})")

UNLIMITED = -1
"""Of a limit: there is none."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    path: Path
    kind: str
    """Type of the file system: tmpfs, hugetlbfs, ext4 ..."""
    options: dict[str, str]
    """Of the file system itself, as "huge" and "size"; "" for those without a value."""


@dataclass(frozen=True, slots=True)
class GpuSlot:
    """An NVIDIA display or compute device on the PCI bus, driver or not."""

    address: str
    """As in sysfs: lower case, with the domain in four digits."""
    numa_node: int
    """-1 where the firmware does not say."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as this process sees it. `root` is another one in tests only."""

    root: Path = Path("/")

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    @property
    def sys(self) -> Path:
        return self.root / "sys"

    @property
    def cgroup(self) -> Path:
        return self.sys / "fs" / "cgroup"

    def read(self, path: Path) -> str | None:
        """Return a file's text without the white space around it."""
        try:
            return path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def mounts(self) -> list[Mount]:
        """Return what is mounted, in the order of mounting."""
        lines = (self.read(self.proc / "self" / "mountinfo") or "").splitlines()
        return [mount for line in lines if (mount := _parse_mount(line)) is not None]

    def mount_of(self, path: Path) -> Mount | None:
        """Return what `path` lies on, or would lie on; of mounts on one place the last hides the others."""
        around = [mount for mount in self.mounts() if path.is_relative_to(mount.path)]
        if not around:
            return None
        deepest = max(len(mount.path.parts) for mount in around)
        return [mount for mount in around if len(mount.path.parts) == deepest][-1]

    def limit(self, name: str, pid: int | None = None) -> tuple[int, int] | None:
        """Return the soft and the hard limit called `name` of a process, by default of this one."""
        text = self.read(self.proc / (str(pid) if pid else "self") / "limits") or ""
        for line in text.splitlines():
            if line.startswith(name + " "):
                soft, hard = line.removeprefix(name).split()[:2]
                return _limit_value(soft), _limit_value(hard)
        return None

    def status(self, field: str, pid: int | None = None) -> str | None:
        """Return a field of /proc/PID/status, of this process by default."""
        text = self.read(self.proc / (str(pid) if pid else "self") / "status") or ""
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return value.strip()
        return None

    def command(self, pid: int) -> tuple[str, ...]:
        """Return the arguments that a process was started with, none where they cannot be read."""
        text = self.read(self.proc / str(pid) / "cmdline") or ""
        return tuple(filter(None, text.split("\0")))

    def memory_policy(self, pid: int | None = None) -> str:
        """Return a process's NUMA policy as the kernel writes it: default, bind:0, interleave:0-1 ...

        It is that of the first mapping, which is the program's and has none of its own.
        """
        text = self.read(self.proc / (str(pid) if pid else "self") / "numa_maps") or ""
        words = text.partition("\n")[0].split()
        return words[1] if len(words) > 1 else "default"

    def lock_holder(self, path: Path) -> int | None:
        """Return the process that holds a flock on a file, without trying the lock; None if none is seen."""
        try:
            status = path.stat()
        except OSError:
            return None
        file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in (self.read(self.proc / "locks") or "").splitlines():
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == file and words[4].isdigit():
                return int(words[4])
        return None

    def numa_nodes(self) -> list[int]:
        """Return the nodes that have memory; [0] where the kernel knows no NUMA."""
        nodes = self.sys / "devices" / "system" / "node"
        listed = self.read(nodes / "has_memory") or self.read(nodes / "online") or "0"
        return parse_ranges(listed)

    def gpu_slots(self) -> Iterator[GpuSlot]:
        """Yield the NVIDIA GPUs on the PCI bus, in the order of their addresses."""
        devices = self.sys / "bus" / "pci" / "devices"
        try:
            addresses = sorted(os.listdir(devices))
        except OSError:
            return
        for address in addresses:
            vendor = self.read(devices / address / "vendor")
            kind = self.read(devices / address / "class") or ""
            if vendor == "0x10de" and kind.startswith("0x03"):
                yield GpuSlot(address, self.numa_node_of(address))

    def numa_node_of(self, address: str) -> int:
        """Return the NUMA node of a PCI device, -1 where nobody says."""
        text = self.read(self.sys / "bus" / "pci" / "devices" / address.lower() / "numa_node")
        return int(text) if text is not None and text.lstrip("-").isdigit() else -1


def parse_ranges(text: str) -> list[int]:
    """Read "0-2,5" as the kernel writes lists of nodes and CPUs."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def format_ranges(numbers: list[int]) -> str:
    """Write ascending numbers as the kernel does: [0, 1, 2, 5] is "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _limit_value(text: str) -> int:
    return UNLIMITED if text == "unlimited" else int(text)


def _parse_mount(line: str) -> Mount | None:
    before, separator, after = line.partition(" - ")
    fields, rest = before.split(" "), after.split(" ")
    if not separator or len(fields) < 5 or len(rest) < 3:
        return None
    path = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
    options = dict(option.partition("=")[::2] for option in rest[2].split(","))
    return Mount(Path(path), rest[0], options)
