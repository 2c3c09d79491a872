"""A real vLLM engine as a child process, which a test can drive, look into and kill.

Owns the child, all its own children, and the configuration that every test starts from: a device cache of 40
blocks, small enough to evict all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.daemon_process import child_environment

START_S = 240.0
COMMAND_S = 240.0
BLOCK_TOKENS = 32

PATIENCE_MS = 5000
"""The `lookup_deadline_ms` of tests about what is stored and loaded: every process of a vLLM for CPUs spins,
and where two engines share two cores the daemon waits for its turn. Tests of a daemon that does not answer
use the default, as users do."""

DEFAULT_DEADLINE_MS = 50

TWO_RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|0"}}
"""Both ranks on one CPU: they yield in a loop where they wait for each other, and with one on each of two
CPUs Linux gives every other process of the machine, the daemon too, no turn for seconds."""


def kvtier(address: str, *, lookup_deadline_ms: float = PATIENCE_MS, **extra_config: Any) -> dict[str, Any]:
    """Return what a user writes into --kv-transfer-config."""
    return {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier_client.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "address": address,
            "lookup_deadline_ms": lookup_deadline_ms,
            **extra_config,
        },
    }


def plain(spec_name: str, spec_module_path: str, **extra_config: Any) -> dict[str, Any]:
    """Return a --kv-transfer-config of vLLM's own connector with a spec from elsewhere."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": spec_name,
            "spec_module_path": spec_module_path,
            **extra_config,
        },
    }


def plain_kvtier(address: str) -> dict[str, Any]:
    """Return what has vLLM's own connector work with kvtier."""
    return plain(
        "KVTierOffloadingSpec",
        "kvtier_client.vllm",
        address=address,
        weights_id="tiny",
        lookup_deadline_ms=PATIENCE_MS,
    )


@dataclass(frozen=True)
class Answer:
    """One request's outcome."""

    token_ids: list[int]
    finish_reason: str
    cached_tokens: int
    gaps: list[float]


class EngineDied(AssertionError):
    """The engine ended, or did not answer in time."""


class EngineProcess:
    """One vLLM engine. A context manager: it is there when entered, and gone with all its children after."""

    def __init__(
        self,
        model: Path,
        tmp_dir: Path,
        *,
        kv_transfer: Mapping[str, Any] | None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self._options = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "block_size": BLOCK_TOKENS,
            "num_gpu_blocks_override": 40,
            "max_model_len": 1024,
            "enforce_eager": True,
            "seed": 0,
            "disable_log_stats": False,
            "kv_transfer_config": None if kv_transfer is None else dict(kv_transfer),
            **options,
        }
        self._env = child_environment(
            HF_HUB_OFFLINE="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_LOGGING_LEVEL="INFO",
            VLLM_NO_USAGE_STATS="1",
            **(env or {}),
        )
        # What was put before kvtier by hand, an overlay of another vLLM, comes first here too.
        before = os.environ.get("KVTIER_TEST_VLLM_PATH")
        if before:
            self._env["PYTHONPATH"] = os.pathsep.join([before, self._env["PYTHONPATH"]])
        tmp_dir.mkdir(parents=True, exist_ok=True)
        self.log = tmp_dir / f"engine-{os.urandom(4).hex()}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def start(self) -> Self:
        """Start it and wait until it can take requests."""
        self.launch()
        self._receive(START_S)
        return self

    def launch(self) -> Self:
        """Start it and wait for nothing."""
        ours, theirs = socket.socketpair()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.vllm.engine_main",
                    json.dumps(self._options),
                    str(theirs.fileno()),
                ],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self._socket = ours
        self._stream = ours.makefile("rw", buffering=1)
        return self

    @property
    def pid(self) -> int:
        """Process id of the child; its session holds the engine core and the workers."""
        assert self._process is not None, "not started"
        return self._process.pid

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        params: Sequence[Mapping[str, Any] | None] | None = None,
        max_tokens: int = 8,
        logprobs: int = 0,
    ) -> list[Answer]:
        """Run requests together."""
        self.send_generate(prompts, params=params, max_tokens=max_tokens, logprobs=logprobs)
        return self.receive_answers()

    def send_generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        params: Sequence[Mapping[str, Any] | None] | None = None,
        max_tokens: int = 8,
        logprobs: int = 0,
    ) -> None:
        """Begin to run requests together."""
        requests = [
            {"token_ids": list(prompt), "params": None if params is None else params[index]}
            for index, prompt in enumerate(prompts)
        ]
        options = {"max_tokens": max_tokens, "logprobs": logprobs}
        self._send({"command": "generate", "requests": requests, **options})

    def receive_answers(self) -> list[Answer]:
        """Wait for the requests that were begun."""
        reply = self._receive(COMMAND_S)
        self.seconds = float(reply["seconds"])
        return [Answer(**answer) for answer in reply["answers"]]

    def reset(self) -> bool:
        """Tell the engine that its weights have changed."""
        self._send({"command": "reset"})
        return bool(self._receive(COMMAND_S)["done"])

    def metrics(self) -> dict[str, Any]:
        """Return vLLM's metrics about caches."""
        self._send({"command": "metrics"})
        values: dict[str, Any] = self._receive(COMMAND_S)["metrics"]
        return values

    def external_hits(self) -> int:
        """Return the prompt tokens that came from outside the device so far."""
        return int(self.metrics()["vllm:external_prefix_cache_hits"])

    def found_tokens(self) -> int:
        """Return the prompt tokens that were not computed so far: on the device, or from outside.

        Which of the two it was depends on who was scheduled first, and so on what else the machine does.
        """
        metrics = self.metrics()
        return int(metrics["vllm:prefix_cache_hits"] + metrics["vllm:external_prefix_cache_hits"])

    def log_text(self) -> str:
        """Return what the engine has logged."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL the engine and everything it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def stop(self) -> None:
        """Let the engine end by itself, as at the end of a script; then make sure."""
        if self._process is None:
            return
        self._close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        self.kill()
        # What kvtier says where it has caught an exception that would have ended the engine.
        bugs = [line for line in self.log_text().splitlines() if "this is a bug" in line.lower()]
        assert not bugs, "\n".join(bugs)

    def _close(self) -> None:
        if self._socket is not None:
            # The file object holds the socket open: without a shutdown the child would not see the end.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                self._stream.close()
            self._socket.close()
            self._socket = None

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()
        except OSError as error:
            raise self._died("takes no command") from error

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        assert self._socket is not None, "not started"
        self._socket.settimeout(timeout_s)
        try:
            line = self._stream.readline()
        except TimeoutError as error:
            raise self._died(f"did not answer in {timeout_s:.0f} s") from error
        if not line:
            raise self._died("ended")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._died(reply["error"])
        return reply

    def _died(self, what: str) -> EngineDied:
        return EngineDied(f"the engine {what}; the end of its log:\n{self.log_text()[-6000:]}")
