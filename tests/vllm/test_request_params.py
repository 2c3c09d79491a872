"""What a request may say in its kv_transfer_params means what vLLM says it means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.daemon_process import DaemonProcess, wait_until
from tests.vllm.engine_process import BLOCK_TOKENS, EngineProcess, kvtier
from tests.vllm.workload import prompt

LENGTH = 320


@pytest.fixture(scope="module")
def pair(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DaemonProcess, EngineProcess]]:
    folder = tmp_path_factory.mktemp("params")
    with DaemonProcess(folder, "64MiB") as daemon:
        daemon.start()
        with EngineProcess(tiny_model, folder, kv_transfer=kvtier(daemon.address)) as engine:
            yield daemon, engine


def chunks(daemon: DaemonProcess) -> int:
    return daemon.status().tiers[0].chunks


def store_and_evict(pair: tuple[DaemonProcess, EngineProcess], seed: int) -> list[int]:
    """Have a prompt stored, and push it out of the device; return it."""
    daemon, engine = pair
    stored = prompt(LENGTH, seed)
    before = chunks(daemon)
    engine.generate([stored])
    wait_until(lambda: chunks(daemon) == before + LENGTH // BLOCK_TOKENS, "the prompt is stored")
    for other in range(6):
        engine.generate([prompt(LENGTH, 1000 * seed + other)], params=[{"max_offload_tokens": 0}])
    return stored


def test_max_offload_tokens_caps_what_is_stored(pair: tuple[DaemonProcess, EngineProcess]) -> None:
    daemon, engine = pair
    before = chunks(daemon)
    engine.generate([prompt(LENGTH, 50)], params=[{"max_offload_tokens": 0}])
    engine.generate([prompt(LENGTH, 51)], params=[{"max_offload_tokens": 2 * BLOCK_TOKENS}])
    wait_until(lambda: chunks(daemon) == before + 2, "two chunks are stored")
    # A value that is no number of tokens is ignored: the whole prompt is stored, and only then this ends.
    engine.generate([prompt(LENGTH, 52)], params=[{"max_offload_tokens": True}])
    wait_until(lambda: chunks(daemon) == before + 2 + LENGTH // BLOCK_TOKENS, "the whole prompt is stored")


@pytest.mark.parametrize(
    ("params", "loaded_tokens"),
    [
        (None, LENGTH),
        ({"max_load_tokens": 0}, 0),
        ({"max_load_tokens": 100}, 3 * BLOCK_TOKENS),
        ({"kv_load_tiers": []}, 0),
        ({"kv_load_tiers": [{"medium": "STORAGE"}]}, 0),
        ({"kv_load_tiers": [{"medium": "CPU", "locality": "LOCAL"}]}, LENGTH),
    ],
)
def test_what_may_be_loaded(
    params: dict[str, object] | None, loaded_tokens: int, pair: tuple[DaemonProcess, EngineProcess]
) -> None:
    _, engine = pair
    stored = store_and_evict(pair, seed=60 + len(repr(params)))
    before = engine.external_hits()
    engine.generate([stored], params=[params])

    # vLLM computes the last token of a prompt in any case.
    assert engine.external_hits() - before in {loaded_tokens, loaded_tokens - 1}
