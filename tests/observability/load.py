"""Load for a daemon that is watched: reference engines that chat, end and come back, until told to stop.

Each engine takes the chats in turn, so that one finds what another has stored, and all of them together leave
more than the pool holds. Owns the engines' processes and a thread for each.
"""

from __future__ import annotations

import threading
from pathlib import Path

from kvtier_client.demo.engine_process import ChatSpec, EngineEnded, EngineProcess, EngineSpec
from kvtier_client.demo.text import load_text

NUM_CHATS = 3
CONVERSATIONS, TURNS = 8, 4


class Load:
    """`num_engines` engines at a time against the daemon at `address`."""

    def __init__(self, address: str, directory: Path, num_engines: int = 2) -> None:
        self._address = address
        self._logs = directory
        self._text = directory / "text"
        self._text.write_bytes(load_text(None)[0])
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._engines: dict[int, EngineProcess] = {}
        self.answers = 0
        self.trouble = ""
        """Why an engine ended that should not have."""
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"load-{number}")
            for number in range(num_engines)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def pids(self) -> list[int]:
        """Processes that run now."""
        with self._lock:
            return [engine.pid for engine in self._engines.values()]

    def close(self) -> None:
        """End the engines. Repeating it does nothing."""
        self._stopping.set()
        with self._lock:
            for engine in self._engines.values():
                engine.kill()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _run(self, number: int) -> None:
        chat = number
        while not self._stopping.is_set():
            spec = EngineSpec(
                name=f"engine-{number + 1}",
                chat=ChatSpec(str(self._text), CONVERSATIONS, seed=chat % NUM_CHATS),
                address=self._address,
                num_blocks=160,
            )
            try:
                self._chat(number, spec)
            except EngineEnded as error:
                if not self._stopping.is_set():
                    self.trouble = str(error)
                    return
            chat += 1

    def _chat(self, number: int, spec: EngineSpec) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            engine = self._engines[number] = EngineProcess(spec, self._logs)
        try:
            with engine:
                engine.wait_started()
                for _ in range(TURNS + number):  # so that they do not end together
                    for _ in engine.turn():
                        self.answers += 1
                    if self._stopping.is_set():
                        return
        finally:
            with self._lock:
                del self._engines[number]
