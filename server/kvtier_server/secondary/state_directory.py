"""Where a tier keeps its index: a file in a local directory, which one daemon at a time has.

Owns the file's name and its lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from kvtier_ops.directory import planted_link
from kvtier_server.secondary.base import TierError


def state_file(directory: str, tier_type: str, root: str) -> Path:
    """Name the index of what lies at `root`. `directory`: "" = kvtier in $XDG_STATE_HOME."""
    if directory:
        base = Path(directory)
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kvtier"
    digest = hashlib.blake2b(root.encode(), digest_size=8).hexdigest()
    return base / f"{tier_type}-{digest}.sqlite"


def lock_state(file: Path, if_taken: str) -> int:
    """Take the index for this process; returns the descriptor that holds the lock.

    Raises TierError, which ends with `if_taken` where another daemon has it.
    """
    link = planted_link(file.parent)
    if link is not None:
        raise TierError(
            f"no index is kept behind {link}, a link of another user; name another state_directory"
        )
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise TierError(
            f"no index can be kept in {file.parent} ({error.strerror}); name a local directory that "
            "this user may write to as state_directory"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise TierError(
            f"another daemon keeps its index of this root in {file.parent}; {if_taken}"
        ) from error
    return fd
