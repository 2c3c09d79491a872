"""A progress bar on a terminal, and silence elsewhere, for demo and bench."""

from __future__ import annotations

import sys
import time
from typing import TextIO

BAR_COLUMNS = 30


class Progress:
    """One line on stderr that is rewritten: a label, a bar, a count.

    `after_s`: work that ends earlier shows nothing.
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None, after_s: float = 0.0) -> None:
        self._stream = stream or sys.stderr
        self._from_s = time.monotonic() + after_s
        self._shown = self._stream.isatty()
        self._label = label
        self._total = total
        self._done = 0
        self._draw()

    def advance(self) -> None:
        """Count one."""
        self._done += 1
        self._draw()

    def say(self, label: str) -> None:
        """Replace the label."""
        self._label = label
        self._draw()

    def close(self) -> None:
        """Take the line away."""
        if self._shown:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def _draw(self) -> None:
        if self._shown and time.monotonic() >= self._from_s:
            filled = BAR_COLUMNS * self._done // max(1, self._total)
            bar = "#" * filled + "." * (BAR_COLUMNS - filled)
            self._stream.write(f"\r\033[K{self._label}  [{bar}] {self._done}/{self._total}")
            self._stream.flush()
