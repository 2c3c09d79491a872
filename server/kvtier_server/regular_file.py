"""Reading a small file that somebody else may have replaced by anything.

Owns that opening never waits - for the other end of a fifo, say - and that no more is read than was allowed.
A file system that does not answer holds the caller all the same: who must not be held reads on a thread.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class FileUnusable(Exception):
    """It is no file that can be used. The message completes "<file> ..."."""


class FileUnreadable(FileUnusable):
    """The system refuses it now, and may not the next time, with nothing to be seen on the file itself."""


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Return the content. Raises FileUnusable, FileUnreadable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FileUnusable("is no regular file")
            with open(fd, "rb", closefd=False) as file:
                content = file.read(max_bytes + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise FileUnreadable(f"cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise FileUnusable(f"has more than {max_bytes} bytes, the most that is read")
    return content
