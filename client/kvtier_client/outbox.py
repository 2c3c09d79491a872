"""The thread that starts calls.

Owns one queue and one thread. Starting an asynchronous call costs the thread that does it a quarter of a
millisecond in gRPC, which is more than an engine's scheduler should pay for a whole step; handing it over
costs some microseconds. Calls leave in the order in which they came.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)

STOP_S = 0.5
"""What `stop` may take: the thread only starts calls, it waits for none."""


class Outbox:
    """Runs what is handed over, one after the other.

    The thread starts with the first, so that a process may fork before that.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def hand_over(self, start_call: Callable[[], None]) -> None:
        """Have `start_call` run soon. After `stop` it never does: there is no session to call in."""
        if self._thread is None and not self._start():
            return
        self._queue.put(start_call)

    def stop(self) -> None:
        """End the thread; what is queued is not run any more."""
        with self._lock:
            self._stopped = True
            thread = self._thread
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(STOP_S)

    def _start(self) -> bool:
        """Start the thread; False if there can be none."""
        with self._lock:
            if self._thread is None and not self._stopped:
                thread = threading.Thread(target=self._run, name="kvtier-outbox", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    logger.exception("no thread can be started to call the daemon; it is as if it were away")
                    return False
                self._thread = thread
            return self._thread is not None

    def _run(self) -> None:
        while (start_call := self._queue.get()) is not None and not self._stopped:
            try:
                start_call()
            except Exception:
                logger.exception("a call could not be started; this is a bug")
