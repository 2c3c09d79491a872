"""An engine in a process of its own, as the demo and the tests drive it: started, asked for turns, killed.

Owns the process and the messages; the engine is in `engine_main.py`. Requests go in and answers come out as
lines of JSON over its stdin and stdout, its log goes to a file. Imports no torch.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from kvtier_ops.faults import ENVIRONMENT_VARIABLE

REPLY_TIMEOUT_S = 120.0
"""No single request of the demo takes a tenth of this; an engine silent for so long hangs."""

STOP_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 15


class EngineEnded(RuntimeError):
    """The process ended, or said nothing for REPLY_TIMEOUT_S; the message ends with its log."""


@dataclass(frozen=True, slots=True)
class ChatSpec:
    """The chat an engine runs (`chat.ChatConfig`). The same text and seed make the same requests."""

    text_file: str
    conversations: int = 16
    seed: int = 0
    system_tokens: int = 320


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine. `address` is the daemon's; None = no offload at all."""

    name: str
    chat: ChatSpec
    address: str | None = None
    num_blocks: int = 256
    blocks_per_chunk: int = 4
    sliding_window: int | None = None
    model_seed: int = 0
    verify_loads: Literal["always", "sampled", "off"] = "always"
    wait_ready_s: float = 10.0
    """How long it waits for the daemon before its first request; it starts in any case."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request produced and cost (`engine.RequestResult`)."""

    request_id: str
    output: tuple[int, ...]
    prompt_tokens: int
    device_tokens: int
    loaded_tokens: int
    missing_tokens: int
    """Prompt tokens in full chunks that were not in the device cache: what could have been loaded."""
    computed_tokens: int
    preemptions: int
    failed_loads: int
    first_token_s: float


@dataclass(frozen=True, slots=True)
class EngineState:
    """An engine between two turns: whether it is attached, and what it has copied since its start."""

    ready: bool = False
    loaded_bytes: int = 0
    load_s: float = 0.0
    failed_loads: int = 0
    stored_bytes: int = 0
    store_s: float = 0.0
    failed_stores: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    """The scheduler client's counters."""


class EngineProcess:
    """A running engine. Also a context manager: on leaving, the process is gone."""

    def __init__(self, spec: EngineSpec, logs: Path, faults: str = "") -> None:
        """Start it. `faults` arms points of `kvtier_ops.faults` in that process only."""
        self.spec = spec
        self.log_file = logs / f"{spec.name}.log"
        environment = {name: value for name, value in os.environ.items() if name != ENVIRONMENT_VARIABLE}
        if faults:
            environment[ENVIRONMENT_VARIABLE] = faults
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvtier_client.demo.engine_main", json.dumps(asdict(spec))],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,  # Ctrl-C is for whoever started the engine, and ends it
            )
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"read-{spec.name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_started(self) -> EngineState:
        """Wait until it takes requests: attached, or not within `wait_ready_s`."""
        return _state(self._receive())

    def turn(self) -> Iterator[Answer]:
        """Have it run the next turn of its chat; yield the answers as they come."""
        self.begin_turn()
        while "answer" in (reply := self._receive()):
            fields = reply["answer"]
            yield Answer(**{**fields, "output": tuple(fields["output"])})
        assert reply.get("turn") == "done", reply

    def begin_turn(self) -> None:
        """Have it run the next turn, and wait for nothing: for an engine that is to die in it."""
        self._send({"do": "turn"})

    def state(self) -> EngineState:
        """Ask how it is."""
        self._send({"do": "state"})
        return _state(self._receive())

    def wait_ended(self, timeout_s: float) -> int | None:
        """Wait for an end that comes by itself; return the exit code (-9: SIGKILL), None = it still runs."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it without a chance to do anything (SIGKILL)."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it end its sessions and wait for its end; kill it if it does not. Repeating it does nothing."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()  # the end of its input is the end of its work
            self._process.wait(STOP_TIMEOUT_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.kill()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()  # it may be in the middle of a turn, and nobody waits for the rest
        self.close()

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended("has ended") from None

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=REPLY_TIMEOUT_S)
        except queue.Empty:
            raise self._ended(f"has said nothing for {REPLY_TIMEOUT_S:.0f} s") from None
        if not line:
            self._replies.put("")  # whoever asks again hears the same
            raise self._ended("has ended")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _read(self) -> None:
        """Move its lines into the queue, on a thread, because a pipe cannot be read with a deadline."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def _ended(self, what: str) -> EngineEnded:
        tail = "\n".join(self.log_file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        return EngineEnded(
            f"{self.spec.name} (pid {self.pid}, exit code {self._process.poll()}) {what}; "
            f"its log {self.log_file} ends with:\n{tail}"
        )


def _state(reply: Mapping[str, Any]) -> EngineState:
    return EngineState(**reply["state"])
