"""Real vLLM with its KV cache on a device: the daemon copies, and no token differs, whatever happens."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.integration.test_transfer import helper_pid
from tests.vllm.engine_process import DEFAULT_DEADLINE_MS, EngineProcess, kvtier
from tests.vllm.shared_device_spec import PROBLEM_VARIABLE
from tests.vllm.workload import Answers, chat

POOL = "64MiB"


def on_device(daemon: DaemonProcess, **extra_config: Any) -> dict[str, Any]:
    return kvtier(
        daemon.address,
        spec_name="SharedDeviceSpec",
        spec_module_path="tests.vllm.shared_device_spec",
        **extra_config,
    )


def loaded_bytes(daemon: DaemonProcess, path: str) -> float:
    """Bytes that were loaded so."""
    pattern = rf'kvtier_transfer_bytes_total{{direction="load",path="{path}"}} (\S+)'
    found = re.search(pattern, daemon.page("/metrics")[1])
    assert found is not None, f"no {pattern}"
    return float(found[1])


def test_the_daemon_copies_and_output_is_identical(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=on_device(daemon)) as engine:
        assert chat(engine).tokens == expected.tokens
        assert engine.external_hits() > 0
        assert not any("kvtier_transfer_fallbacks" in name for name in engine.metrics())
    assert loaded_bytes(daemon, "remote_host") > 0
    assert loaded_bytes(daemon, "shm") == 0


def test_a_copy_process_that_is_killed_again_and_again_changes_no_token(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    killed = []

    def during_turn(turn: int) -> None:
        # The first job after the last kill has begun the next one.
        wait_until(lambda: daemon.status().copy_devices[0].state == "serving", "there is a copy process")
        killed.append(helper_pid(daemon))
        os.kill(killed[-1], signal.SIGKILL)

    with EngineProcess(tiny_model, tmp_path, kv_transfer=on_device(daemon)) as engine:
        assert chat(engine, during_turn=during_turn).tokens == expected.tokens
        assert engine.external_hits() > 0
    assert len(set(killed)) == len(killed) == 5


def test_a_daemon_that_stands_still_holds_no_request(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    config = on_device(daemon, lookup_deadline_ms=DEFAULT_DEADLINE_MS)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=config) as engine:

        def during_turn(turn: int) -> None:
            if turn == 2:
                daemon.signal(signal.SIGSTOP)

        assert chat(engine, during_turn=during_turn).tokens == expected.tokens
        assert engine.metrics()["vllm:kvtier_away_misses"] > 0


def test_memory_that_cannot_be_exported_is_copied_by_the_engine_and_counted(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    env = {PROBLEM_VARIABLE: "tensor_ptr: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"}
    with EngineProcess(tiny_model, tmp_path, kv_transfer=on_device(daemon), env=env) as engine:
        assert chat(engine).tokens == expected.tokens
        assert engine.external_hits() > 0
        assert engine.metrics()['vllm:kvtier_transfer_fallbacks{"reason": "export"}'] == 1
        assert engine.log_text().count("expandable_segments:False") == 1
    assert loaded_bytes(daemon, "shm") > 0
    assert loaded_bytes(daemon, "remote_host") == 0
