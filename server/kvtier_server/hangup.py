"""What a SIGHUP means: the configuration is to be read again, or the daemon's terminal was closed.

Owns the memory of that terminal, and the signals that come before anybody can act on them. On the main
thread, which is the loop's.
"""

from __future__ import annotations

import os
import signal

import structlog

log = structlog.get_logger("kvtier.hangup")

STDIN = 0
"""By number: a daemon may have been started without one."""

LOOK_S = 1.0
"""Between two looks at the terminal."""

LOOKS_WITHOUT_TERMINAL = 5
"""So many in a row, and no SIGHUP: whoever closed the terminal wanted the daemon to live on (disown, setsid).
Where the signal comes at all, it comes with the closing. Looks, not seconds: a stopped process sees none."""


class Hangups:
    """Tells one meaning from the other. Made as the daemon starts, which has a terminal then or has none."""

    def __init__(self) -> None:
        self.has_terminal = os.isatty(STDIN)
        """False as soon as no SIGHUP can mean its end any more."""
        self.has_come = False
        """Whether a signal came before the loop took them."""
        self._looks_without = 0

    def wait_for_loop(self) -> None:
        """Only note what comes until the loop has a handler of its own; by default the process would end.

        A handler, and not SIG_IGN, which child processes would inherit.
        """
        signal.signal(signal.SIGHUP, lambda *_: setattr(self, "has_come", True))
        signal.siginterrupt(signal.SIGHUP, False)

    def means_stop(self) -> bool:
        """Tell what a SIGHUP that has just come means."""
        return self.has_terminal and not os.isatty(STDIN)

    def look(self) -> None:
        """Forget a terminal that has been gone for a while. To be called every LOOK_S."""
        if os.isatty(STDIN):
            self._looks_without = 0
            return
        self._looks_without += 1
        if self.has_terminal and self._looks_without >= LOOKS_WITHOUT_TERMINAL:
            self.has_terminal = False
            log.info("terminal_gone", effect="the daemon goes on; SIGHUP reads its configuration again")
