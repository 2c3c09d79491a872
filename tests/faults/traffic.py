"""Requests without end, on a thread of their own, and how the process that makes them fares."""

from __future__ import annotations

import logging
import random
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.faults.block_device import chunk_names

RunRequest = Callable[[str, list[str]], dict[str, Any]]
"""Runs a request, by its id and the names of its chunks, and says what became of each chunk."""


class Heartbeat:
    """Measures how long this process has not been given the processor when it wanted to run."""

    PERIOD_S = 0.002

    def __init__(self) -> None:
        self.worst_s = 0.0
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        while True:
            started = time.monotonic()
            time.sleep(self.PERIOD_S)
            self.worst_s = max(self.worst_s, time.monotonic() - started - self.PERIOD_S)


class ErrorRecords(logging.Handler):
    """Keeps what was logged as an error: nothing should be."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


class Traffic:
    """Requests over a few prompts, so that some hit and some are new."""

    def __init__(self, run: RunRequest, seed: int, num_prompts: int, max_chunks: int) -> None:
        self._run_request = run
        self._random = random.Random(seed)
        self._num_prompts = num_prompts
        self._max_chunks = max_chunks
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._exceptions: list[str] = []
        self.requests = 0
        self.names: dict[str, list[str]] = {"loaded": [], "failed": [], "wrong": [], "stored": [], "lost": []}

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """End after the request that runs."""
        self._ending.set()
        self._thread.join()
        counts = {name: len(names) for name, names in self.names.items()}
        return counts | {
            "requests": self.requests,
            "exceptions": self._exceptions,
            "wrong": self.names["wrong"],
        }

    def _run(self) -> None:
        while not self._ending.is_set():
            prompt = self._random.randrange(self._num_prompts)
            names = chunk_names(f"traffic{prompt}", self._random.randint(1, self._max_chunks))
            try:
                answer = self._run_request(f"traffic-{self.requests}", names)
            except Exception:  # noqa: BLE001 whatever it is, the test is to see it
                self._exceptions.append(traceback.format_exc())
                return
            self.requests += 1
            for fate, names_so_far in self.names.items():
                names_so_far.extend(answer[fate])
