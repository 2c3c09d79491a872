"""Keeping the copy of a tier's index in step: what has changed is written down, as often as that can be done.

Owns the retries, and the bound on what waits for them. `index.py` has the changes and the file.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from time import monotonic

from kvtier_server.secondary.index import Index, IndexFile

logger = logging.getLogger(__name__)

MAX_GONE = 1 << 16
"""Changes that may wait beside two for each chunk of the index, 14 MiB: chunks come and go while the state
directory is full, and each that went is one."""

FIRST_PAUSE_S, MAX_PAUSE_S = 2.0, 60.0
"""Between two attempts to write, doubled each time: each builds all rows anew."""


class IndexCopy:
    """Writes the changes of one index into its file. One thread: the file's."""

    def __init__(
        self, index: Index, file: IndexFile, tier_type: str, clock: Callable[[], float] = monotonic
    ) -> None:
        """`clock`: seconds; `tier_type` is for the log."""
        self._index = index
        self._file = file
        self._tier_type = tier_type
        self._clock = clock
        self._pause_s = 0.0
        self._next_at = 0.0

    def write(self, *, at_once: bool = False) -> int | None:
        """Write what has changed, and return how many chunks; None if they wait on, for lack of a file.

        `at_once`: also within the pause after an attempt that failed.
        """
        if self._index.limit_changes(MAX_GONE):
            logger.error(
                "tier %s: its index could not be written for so long that changes are given up; the next "
                "start looks for the chunks themselves. Make room in the state directory",
                self._tier_type,
            )
        if self._clock() < self._next_at and not at_once:
            return None
        changed = self._index.take_changes()
        try:
            if changed:
                self._file.write(changed)
        except (sqlite3.Error, OSError) as error:
            self._index.put_back(changed)
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), MAX_PAUSE_S)
            self._next_at = self._clock() + self._pause_s
            logger.warning(
                "tier %s: its index cannot be written: %s; tried again in %.0f s",
                self._tier_type,
                error,
                self._pause_s,
            )
            return None
        self._pause_s = self._next_at = 0.0
        return len(changed)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was given up: with all changes written, the file names every chunk."""
        return not self._index.has_lost_changes
