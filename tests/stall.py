"""Threads that stand still at a fault point for as long as a test wants."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .daemon_process import wait_until


class Stall:
    """Holds every thread of a daemon, or of a process of its own, that passes a fault point, until let go."""

    def __init__(self, directory: Path, point: str) -> None:
        self._pipe = directory / f"stall-{point}"
        self._fd = -1
        self.env = {"KVTIER_FAULTS": f"{point}=wait:{self._pipe}"}

    def arm(self) -> None:
        """From now on whoever passes hangs."""
        os.mkfifo(self._pipe)

    def wait_until_hung(self) -> None:
        """Return when a thread hangs."""
        wait_until(self._is_hung, "a thread comes to the point")

    def _is_hung(self) -> bool:
        try:
            self._fd = os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False
        return True

    def let_go(self) -> None:
        """Let them go on, and nobody hang any more."""
        self._pipe.unlink()
        os.close(self._fd)
