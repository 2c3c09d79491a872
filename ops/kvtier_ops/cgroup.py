"""Which control groups bind this process: its own and all above it, v1 or v2. Owns no limit's meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC_ROOT = Path("/proc")
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CgroupFolder:
    """One group's files. `version`: 1 and 2 name them differently."""

    version: int
    path: Path


def cgroup_folders(
    controller: str, proc_root: Path = PROC_ROOT, cgroup_root: Path = CGROUP_ROOT
) -> Iterator[CgroupFolder]:
    """Yield every folder where a limit of `controller` ("memory", "cpu") would bind this process.

    Folders that are not there are yielded too: inside a container the path may name what only the host sees.
    """
    try:
        lines = (proc_root / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, own_path = line.split(":", 2)
        if number == "0" and not controllers:
            version, root = 2, cgroup_root
        elif controller in controllers.split(","):
            version, root = 1, cgroup_root / controller
        else:
            continue
        folder = root / own_path.lstrip("/")
        for candidate in (folder, *folder.parents):
            if candidate.is_relative_to(root):
                yield CgroupFolder(version, candidate)
