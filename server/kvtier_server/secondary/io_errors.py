"""What an error of an I/O is called in a metric. Owns the words only."""

from __future__ import annotations

import errno

OTHER_ERRNO = "other"
IO_ERRNOS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "ETIMEDOUT", OTHER_ERRNO)
"""Errors with a series of their own; all others are OTHER_ERRNO."""


def errno_name(error: OSError) -> str:
    """Return what an error counts as."""
    name = errno.errorcode.get(error.errno or 0, OTHER_ERRNO)
    return name if name in IO_ERRNOS else OTHER_ERRNO
