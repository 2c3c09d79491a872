"""Engines share what they computed exactly where it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess
from tests.vllm.engine_process import TWO_RANKS, EngineProcess, kvtier
from tests.vllm.workload import Answers, chat, prompt

POOL = "64MiB"


def finds(
    model: Path,
    daemon: DaemonProcess,
    tmp_path: Path,
    extra_config: dict[str, Any] | None = None,
    **options: Any,
) -> int:
    """Return how many tokens of two long prompts a new engine finds that it never saw itself."""
    config = kvtier(daemon.address, **(extra_config or {}))
    with EngineProcess(model, tmp_path, kv_transfer=config, **options) as engine:
        engine.generate([prompt(300, seed=1), prompt(300, seed=2)])
        return engine.external_hits()


def test_a_second_engine_hits_what_the_first_one_stored(
    tiny_model: Path, expected: Answers, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    with EngineProcess(tiny_model, tmp_path, kv_transfer=kvtier(daemon.address)) as first:
        assert chat(first).tokens == expected.tokens
        of_its_own = first.external_hits()
        with EngineProcess(tiny_model, tmp_path, kv_transfer=kvtier(daemon.address)) as second:
            assert chat(second).tokens == expected.tokens
            assert second.external_hits() > of_its_own


def test_models_dtypes_and_parallel_sizes_never_cross(
    tiny_model: Path, other_model: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)

    assert finds(tiny_model, daemon, tmp_path) == 0
    assert finds(other_model, daemon, tmp_path) == 0
    assert finds(tiny_model, daemon, tmp_path, dtype="bfloat16") == 0
    assert finds(tiny_model, daemon, tmp_path, **TWO_RANKS) == 0
    assert finds(tiny_model, daemon, tmp_path, {"blocks_per_chunk": 2}) == 0
    assert finds(tiny_model, daemon, tmp_path) > 500


def test_after_a_reset_nothing_is_hit_that_was_stored_before(
    tiny_model: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL)
    prompts = [prompt(300, seed=1), prompt(300, seed=2)]
    others = [prompt(300, seed=seed) for seed in range(3, 9)]  # enough to evict the first from the device
    with EngineProcess(tiny_model, tmp_path, kv_transfer=kvtier(daemon.address)) as engine:
        before = engine.generate(prompts)
        engine.generate(others)
        assert [each.token_ids for each in engine.generate(prompts)] == [each.token_ids for each in before]
        hits = engine.external_hits()
        assert hits > 0
        assert engine.reset()
        after = engine.generate(prompts)
        assert engine.external_hits() == hits
        engine.generate(others)
        assert [each.token_ids for each in engine.generate(prompts)] == [each.token_ids for each in after]
        assert engine.external_hits() > hits  # the new epoch has a cache of its own
    assert finds(tiny_model, daemon, tmp_path) > 0  # another engine keeps what it shares
