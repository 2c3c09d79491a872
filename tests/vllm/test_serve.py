"""`vllm serve` with kvtier turned on exactly as a user does, and its API server's metrics."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import StartDaemon
from tests.daemon_process import child_environment, wait_until
from tests.vllm.engine_process import BLOCK_TOKENS
from tests.vllm.workload import prompt

START_S = 240.0


class Server:
    """`vllm serve` on a loopback port."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self._port = port
        self._process = process
        self._log = log

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Send one HTTP request."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def is_up(self) -> bool:
        """Tell whether it serves; fails the test if it has ended."""
        assert self._process.poll() is None, f"vllm serve ended:\n{self._log.read_text()[-6000:]}"
        try:
            return self.call("GET", "/health")[0] == 200
        except OSError:
            return False

    def complete(self, token_ids: list[int]) -> list[int]:
        """Generate 8 tokens."""
        sampling = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
        status, text = self.call(
            "POST", "/inference/v1/generate", {"token_ids": token_ids, "sampling_params": sampling}
        )
        assert status == 200, text
        tokens: list[int] = json.loads(text)["choices"][0]["token_ids"]
        return tokens

    def metric(self, name: str, **labels: str) -> float | None:
        """Return the value of a metric; None if it is not there."""
        status, text = self.call("GET", "/metrics")
        assert status == 200
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in text.splitlines():
            if line.startswith(f"{name}{{") and all(each in line for each in wanted):
                return float(line.rsplit(" ", 1)[1])
        return None


@contextmanager
def vllm_serve(model: Path, address: str, log: Path) -> Iterator[Server]:
    """Start it as a user would, with log statistics on (the default)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier_client.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": address},
    }
    arguments = [
        "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--tokens-only",
        "--dtype", "float32", "--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", "40",
        "--max-model-len", "1024", "--enforce-eager", "--kv-transfer-config", json.dumps(config),
    ]  # fmt: skip
    env = child_environment(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    with log.open("ab") as out:
        process = subprocess.Popen(
            # What `vllm serve` runs; the command itself fails in builds whose package is not called vllm.
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        server = Server(port, process, log)
        wait_until(server.is_up, "vllm serve answers", timeout_s=START_S)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_one_flag_turns_it_on_and_the_api_server_lives_with_its_metrics(
    tiny_model: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes="64MiB")
    prompts = [prompt(300, seed) for seed in range(8)]
    with vllm_serve(tiny_model, daemon.address, tmp_path / "serve.log") as server:
        first = [server.complete(each) for each in prompts]

        def is_hitting() -> bool:
            assert [server.complete(each) for each in prompts] == first
            return (server.metric("vllm:external_prefix_cache_hits_total") or 0) > 0

        wait_until(is_hitting, "hits are counted")
        assert (server.metric("vllm:kvtier_lookup_wait_seconds_count") or 0) > 0

        # What is only emitted when the daemon is gone must be declared too, or the API server dies of it.
        daemon.kill()
        assert [server.complete(each) for each in prompts] == first
        wait_until(lambda: (server.metric("vllm:kvtier_away_misses_total") or 0) > 0, "misses are counted")
        wait_until(
            lambda: (server.metric("vllm:kvtier_stores_skipped_total", reason="away") or 0) > 0,
            "stores that were skipped are counted",
        )
        assert server.is_up()
