"""The pool's directory: its name, and the proof that nobody else can put files into it.

Everything that maps, locks or measures a pool starts here, so the root of the pool's errors lives here too:

    PoolError
    +- PoolDirectoryError    the directory cannot be trusted or its name is not allowed
    +- PoolBusy              (locks) another daemon holds it
    +- PoolTooLarge          (capacity) it does not fit
    +- PoolFormatError       (header) the file is not a pool of this format
    +- PoolMismatch          (pool) the file is a pool, but not the expected one
    +- PoolClosed            (pool) used after close
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

SHARED_MEMORY_ROOT = Path("/dev/shm")

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


class PoolError(Exception):
    """Something about a pool that its operator or user can do something about; nothing was changed."""


class PoolDirectoryError(PoolError):
    """The pool directory is not a directory of ours alone."""


def planted_link(path: Path) -> Path | None:
    """Return the first link on the way to `path` that neither this user nor root has made; None = no such.

    Whoever made it decides where the path leads. Directories that others may write to are no danger on the
    way as long as no such link, and no file of theirs, is followed there.
    """
    trusted = (0, os.geteuid())
    so_far = Path(path.anchor or ".")
    for part in path.parts[1:] if path.anchor else path.parts:
        so_far /= part
        try:
            status = os.lstat(so_far)
        except OSError:
            return None  # nothing is there, or nothing that this user may look at: what uses it will say so
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in trusted:
            return so_far
    return None


def default_pool_directory(name: str) -> Path:
    """Return where the pool called `name` lives for this user. Raises PoolDirectoryError for a bad name."""
    if not _NAME.fullmatch(name):
        raise PoolDirectoryError(
            f"pool name {name!r} is not allowed: use 1 to 64 of A-Z a-z 0-9 _ . - and no dot in front"
        )
    return SHARED_MEMORY_ROOT / f"kvtier-{os.geteuid()}-{name}"


def open_directory(directory: Path, *, create: bool = False) -> int:
    """Open a pool directory and return its descriptor, having checked that it is ours alone.

    Whoever can write into the directory could hand us another file, so it must be a real directory (no
    link), owned by this user, mode 0700. With `create`, makes it if it is missing (its parent must exist).
    Raises PoolDirectoryError, or FileNotFoundError where it is missing.
    """
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except NotADirectoryError:
        raise PoolDirectoryError(
            f"{directory} is a link or not a directory; remove it or choose another pool name"
        ) from None
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    problem = ""
    if status.st_uid != os.geteuid():
        problem = f"belongs to uid {status.st_uid}, not to uid {os.geteuid()}; choose another pool name"
    elif mode & 0o077:
        problem = f"has mode {mode:04o}, so others may reach in; run: chmod 700 {directory}"
    if problem:
        os.close(fd)
        raise PoolDirectoryError(f"{directory} {problem}")
    return fd
