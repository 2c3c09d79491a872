"""What kvtier costs a real vLLM, against a spec in the engine that does nothing.

Run by `make bench-vllm`, in the environment that has vLLM. Both engines live at the same time and take turns,
with prompts that nobody has seen before. The machine decides the times; what counts are the ratios and the
time inside the connector's and the manager's calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROUNDS = 5
PROMPTS = 16
PROMPT_TOKENS = 320


def main() -> int:
    """Measure and print; 2 where vLLM is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    try:
        import vllm  # noqa: F401
    except ImportError:
        print("bench_vllm needs vLLM, in an environment of its own: make bench-vllm", file=sys.stderr)
        return 2
    figures = measure()
    for name, value, limit in figures:
        print(f"{name:<68}{value:>14}  {limit}")
    if arguments.json:
        arguments.json.write_text(json.dumps([{"name": n, "value": v, "limit": li} for n, v, li in figures]))
    return 0


def measure() -> list[tuple[str, str, str]]:
    """Return (name, value, limit) rows."""
    from tests.daemon_process import DaemonProcess
    from tests.vllm.engine_process import EngineProcess, kvtier, plain
    from tests.vllm.tiny_models import save_llama
    from tests.vllm.workload import prompt

    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        path = Path(folder)
        model = save_llama(path / "model", seed=0)
        ours, nothing = path / "kvtier.json", path / "nothing.json"
        with DaemonProcess(path, "256MiB") as daemon:
            daemon.start()
            timed = "tests.vllm.timed_connectors"
            with_kvtier = {
                **kvtier(daemon.address),
                "kv_connector": "TimedKVTierConnector",
                "kv_connector_module_path": timed,
            }
            with_nothing = {
                **plain("NothingSpec", "tests.vllm.other_specs"),
                "kv_connector": "TimedOffloadingConnector",
                "kv_connector_module_path": timed,
            }
            seconds: dict[str, list[float]] = {"kvtier": [], "nothing": []}
            with (
                EngineProcess(model, path, kv_transfer=with_kvtier, env={"KVTIER_TIMES": str(ours)}) as a,
                EngineProcess(model, path, kv_transfer=with_nothing, env={"KVTIER_TIMES": str(nothing)}) as b,
            ):
                for number in range(ROUNDS + 1):
                    prompts = [prompt(PROMPT_TOKENS, PROMPTS * number + i) for i in range(PROMPTS)]
                    for name, engine in (("kvtier", a), ("nothing", b)):
                        total = 0.0
                        for each in prompts:
                            engine.generate([each])
                            total += engine.seconds
                        if number:  # the first round warms up
                            seconds[name].append(total)
        return rows(json.loads(ours.read_text()), json.loads(nothing.read_text()), seconds)


def rows(
    ours: dict[str, Any], nothing: dict[str, Any], seconds: dict[str, list[float]]
) -> list[tuple[str, str, str]]:
    """Turn what was measured into a table."""
    ratios = [a / b for a, b in zip(seconds["kvtier"], seconds["nothing"], strict=True)]
    waited = sorted(real for asked, real in ours["waits"] if asked)
    asked = max((asked for asked, _ in ours["waits"]), default=0.0)
    rpcs = sum(ours["rpcs"].values())
    return [
        ("time inside calls, a request, kvtier", per_request(ours), "1 ms"),
        ("time inside calls, a request, nothing", per_request(nothing), ""),
        ("time inside calls, an empty step, kvtier", per_empty_step(ours), "20 us"),
        ("time inside calls, an empty step, nothing", per_empty_step(nothing), ""),
        ("request wall time, kvtier / nothing, median", f"{statistics.median(ratios):.3f}x", "1.05x"),
        ("of it waiting for answers, a request", f"{1000 * sum(waited) / ours['requests']:.3f} ms", ""),
        ("longest wait that was asked for", f"{1000 * asked:.2f} ms", "lookup_wait_ms = 0.5 ms"),
        ("real wait, p50", f"{1000 * quantile(waited, 0.5):.2f} ms", ""),
        ("real wait, p99", f"{1000 * quantile(waited, 0.99):.2f} ms", ""),
        ("RPCs of the scheduler, a request", f"{rpcs / ours['requests']:.2f}", ""),
        ("RPCs of the scheduler, a step", f"{rpcs / ours['steps']:.2f}", ""),
        ("by kind", ", ".join(f"{name[4:]} {count}" for name, count in ours["rpcs"].items()), ""),
    ]


def per_request(times: dict[str, Any]) -> str:
    """Time inside calls of steps that do something, by request."""
    return f"{times['busy_ns'] / 1e6 / times['requests']:.3f} ms"


def per_empty_step(times: dict[str, Any]) -> str:
    """Time inside calls of steps that do nothing."""
    if not times["empty_steps"]:
        return "none"
    return f"{times['empty_ns'] / 1e3 / times['empty_steps']:.1f} us"


def quantile(values: list[float], share: float) -> float:
    """Return a quantile of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


if __name__ == "__main__":
    sys.exit(main())
