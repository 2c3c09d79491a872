"""Whatever happens to the daemon, every request of a real vLLM finishes with the same tokens."""

from __future__ import annotations

import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.vllm.conftest import skip_before
from tests.vllm.engine_process import DEFAULT_DEADLINE_MS, EngineProcess, kvtier, plain_kvtier
from tests.vllm.workload import Answers, chat, prompt

POOL = "64MiB"


@contextmanager
def short_directory() -> Iterator[str]:
    """A directory for a socket: Linux allows 107 bytes for its path, and pytest's names are long."""
    with tempfile.TemporaryDirectory(prefix="kvtier-run-") as directory:
        yield directory


@contextmanager
def silent_listener() -> Iterator[str]:
    """Something that accepts connections and never says a word."""
    accepted: list[socket.socket] = []
    with short_directory() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/silent.sock")
        listener.listen()

        def accept() -> None:
            while True:
                try:
                    accepted.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"unix://{directory}/silent.sock"
        assert accepted, "nobody has connected"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in accepted:
            connection.close()


def busy(daemon: DaemonProcess) -> bool:
    """Tell whether an engine holds slots."""
    tier = daemon.status().tiers[0]
    return tier.reserved_slots > 0 or tier.pinned_chunks > 0


def at_rest(daemon: DaemonProcess) -> bool:
    """Tell whether no engine holds anything."""
    status = daemon.status()
    tier = status.tiers[0]
    return (
        not status.sessions
        and not tier.reserved_slots
        and not tier.pinned_chunks
        and not tier.quarantined_slots
        and not any(lease.count for lease in status.leases)
    )


def test_a_daemon_that_is_killed_while_requests_run_and_comes_back_costs_hits_only(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=kvtier(daemon.address)) as engine:

        def before_turn(turn: int) -> None:
            if turn == 3:
                daemon.start()

        def during_turn(turn: int) -> None:
            if turn == 2:
                daemon.kill()

        assert chat(engine, before_turn=before_turn, during_turn=during_turn).tokens == expected.tokens
        # The same engine, attached again: what it stores from now on it finds.
        hits = engine.external_hits()

        def is_hitting() -> bool:
            assert chat(engine).tokens == expected.tokens
            return engine.external_hits() > hits

        wait_until(is_hitting, "the engine hits again after the daemon's restart", timeout_s=120)
        assert engine.metrics()["vllm:kvtier_away_misses"] > 0


def test_without_a_daemon_every_request_is_computed(
    tiny_model: Path, expected: Answers, tmp_path: Path
) -> None:
    with short_directory() as directory:
        config = kvtier(f"unix://{directory}/nobody.sock")
        with EngineProcess(tiny_model, tmp_path, kv_transfer=config) as engine:
            assert chat(engine).tokens == expected.tokens
            assert engine.external_hits() == 0
            assert engine.metrics()["vllm:kvtier_away_misses"] > 0


def test_a_daemon_that_accepts_and_never_answers_holds_no_request(
    tiny_model: Path, expected: Answers, tmp_path: Path
) -> None:
    with (
        silent_listener() as address,
        EngineProcess(
            tiny_model, tmp_path, kv_transfer=kvtier(address, lookup_deadline_ms=DEFAULT_DEADLINE_MS)
        ) as engine,
    ):
        assert chat(engine).tokens == expected.tokens
        assert engine.external_hits() == 0
        assert engine.metrics()["vllm:kvtier_away_misses"] > 0


def test_a_daemon_that_stops_answering_holds_no_request(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    config = kvtier(daemon.address, lookup_deadline_ms=DEFAULT_DEADLINE_MS)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=config) as engine:

        def during_turn(turn: int) -> None:
            if turn == 2:
                daemon.signal(signal.SIGSTOP)

        assert chat(engine, during_turn=during_turn).tokens == expected.tokens
        assert engine.metrics()["vllm:kvtier_away_misses"] > 0


@pytest.mark.parametrize("point", ["worker.before_load", "load.after_copy"])
def test_a_request_whose_every_load_fails_is_computed(
    point: str, tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    env = {"KVTIER_FAULTS": f"{point}=error"}
    with EngineProcess(tiny_model, tmp_path, kv_transfer=kvtier(daemon.address), env=env) as engine:
        assert chat(engine).tokens == expected.tokens
        metrics = engine.metrics()

    assert metrics['vllm:kvtier_loads_failed{"reason": "error"}'] > 0


def test_under_the_plain_connector_too_a_request_whose_every_load_fails_is_computed(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    skip_before(31, "the plain connector tells no keys before the first lookup")
    daemon = start_daemon(pool_bytes=POOL)
    env = {"KVTIER_FAULTS": "worker.before_load=error"}
    config = plain_kvtier(daemon.address)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=config, env=env) as engine:
        assert chat(engine).tokens == expected.tokens
        assert engine.external_hits() > 0  # it has tried


def test_an_engine_that_is_killed_leaves_nothing_behind_and_its_successor_attaches_at_once(
    tiny_model: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    config = {**kvtier(daemon.address), "engine_id": "the-same-name"}
    prompts = [prompt(300, seed=seed) for seed in range(12)]
    for round_number in range(3):
        with EngineProcess(tiny_model, tmp_path, kv_transfer=config) as engine:
            engine.generate(prompts[:4])
            if round_number:
                assert engine.external_hits() > 0
            engine.send_generate(prompts, max_tokens=64)
            wait_until(lambda: busy(daemon), "the engine holds something in the daemon", timeout_s=10)
            engine.kill()
        wait_until(lambda: at_rest(daemon), "the daemon has everything back")
