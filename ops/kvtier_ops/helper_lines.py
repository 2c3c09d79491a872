"""What a helper process writes to its stderr, as lines of its parent's log.

Owns the thread that reads. A helper speaks only when something is badly wrong, often in a trace of many
lines: what comes together is one line of the log.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from threading import Thread
from typing import IO

MAX_SAID_BYTES = 16 << 10
"""Of one line of the log; the end of a trace is what tells, so the beginning goes."""
PAUSE_S = 0.1
"""Silence that ends what belongs together."""


def relay_lines(stderr: IO[bytes] | None, say: Callable[[str], None]) -> None:
    """Hand what is written to `stderr`, a pipe, to `say`, on a thread, until its last writer is gone.

    Takes the pipe: `stderr` is closed when this returns.
    """
    assert stderr is not None, "the process was begun without a pipe"
    fd = os.dup(stderr.fileno())
    stderr.close()
    Thread(target=_relay, args=(fd, say), name="kvtier-helper-lines", daemon=True).start()


def _relay(fd: int, say: Callable[[str], None]) -> None:
    said = b""
    more = select.poll()  # select.select takes no number beyond 1,023
    more.register(fd, select.POLLIN)
    try:
        while piece := os.read(fd, MAX_SAID_BYTES):
            said = (said + piece)[-MAX_SAID_BYTES:]
            if not more.poll(PAUSE_S * 1000):
                say(said.decode(errors="replace").strip())
                said = b""
    finally:
        os.close(fd)
    if said:
        say(said.decode(errors="replace").strip())
