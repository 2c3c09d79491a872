"""`make demo-vllm`: what kvtier gives a real vLLM, on this machine, in a table.

Runs the same long prompts one after the other through three engines: one without offloading, one with kvtier
and an empty pool, and a new process that finds what the one before stored. No token may differ.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.daemon_process import DaemonProcess
from tests.vllm.engine_process import DEFAULT_DEADLINE_MS, EngineProcess, kvtier
from tests.vllm.tiny_models import save_llama
from tests.vllm.workload import prompt

PROMPTS = 12
PROMPT_TOKENS = 960
LAYERS, HIDDEN = 12, 512
TTFT = "vllm:time_to_first_token_seconds"


def main() -> int:
    """Run it; 0 = all tokens were equal."""
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-vllm-") as folder,
        DaemonProcess(Path(folder), "1GiB") as daemon,
    ):
        daemon.start()
        model = save_llama(Path(folder) / "model", seed=0, layers=LAYERS, hidden=HIDDEN)
        config = kvtier(daemon.address, lookup_deadline_ms=DEFAULT_DEADLINE_MS)
        print(
            f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, a random Llama ({LAYERS} x {HIDDEN}), fp32, CPU\n"
        )
        print(f"{'engine':<32}{'hit rate':>10}{'TTFT mean':>12}")
        without = show("without kvtier", model, Path(folder), None)
        cold = show("with kvtier, empty pool", model, Path(folder), config)
        warm = show("with kvtier, engine restarted", model, Path(folder), config)
    if not without == cold == warm:
        print("\nFAILED: the tokens differ", file=sys.stderr)
        return 1
    print("\nevery token is equal")
    return 0


def show(name: str, model: Path, folder: Path, config: Mapping[str, Any] | None) -> list[list[int]]:
    """Run all prompts through one engine, print its row and return what it said."""
    tokens: list[list[int]] = []
    with EngineProcess(model, folder, kv_transfer=config) as engine:
        engine.generate([prompt(PROMPT_TOKENS, seed=999)])  # warms up what is compiled on first use
        before = engine.metrics()
        for seed in range(PROMPTS):
            tokens += [answer.token_ids for answer in engine.generate([prompt(PROMPT_TOKENS, seed)])]
        after = engine.metrics()
    (count_before, sum_before), (count, total) = before[TTFT], after[TTFT]
    hits = after.get("vllm:external_prefix_cache_hits", 0) - before.get("vllm:external_prefix_cache_hits", 0)
    share = "-" if config is None else f"{hits / (PROMPTS * PROMPT_TOKENS):.1%}"
    print(f"{name:<32}{share:>10}{1000 * (total - sum_before) / (count - count_before):>9.0f} ms", flush=True)
    return tokens


if __name__ == "__main__":
    sys.exit(main())
