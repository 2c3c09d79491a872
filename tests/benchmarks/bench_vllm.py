"""What kvtier costs a real vLLM, against a spec in the engine that does nothing.

Run by `make bench-vllm`, in the environment that has vLLM. All engines live at the same time and take turns,
with prompts that nobody has seen before. The machine decides the times; what counts are the ratios and the
time inside the connector's and the manager's calls. A second engine that does nothing says what two equal
engines differ by on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROUNDS = 5
PROMPTS = 16
PROMPT_TOKENS = 320
NO_SPINNING = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}
"""For both engines. The model's threads spin for 200 ms after each step otherwise; on a machine of few cores
they take them from the other engine, from the daemon, and from kvtier's threads. No GPU does that."""

LOAD_S = 0.1
"""What a load takes in the part that looks at empty steps."""


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
    from tests.vllm.engine_process import DEFAULT_DEADLINE_MS, EngineProcess, kvtier, plain
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
                **kvtier(daemon.address, lookup_deadline_ms=DEFAULT_DEADLINE_MS),
                "kv_connector": "TimedKVTierConnector",
                "kv_connector_module_path": timed,
            }
            with_nothing = {
                **plain("NothingSpec", "tests.vllm.other_specs"),
                "kv_connector": "TimedOffloadingConnector",
                "kv_connector_module_path": timed,
            }
            seconds: dict[str, list[float]] = {"kvtier": [], "nothing": [], "nothing again": []}
            env_a = {
                "KVTIER_TIMES": str(ours),
                "KVTIER_FAULTS": f"worker.before_load=sleep:{LOAD_S}",
                **NO_SPINNING,
            }
            env_b = {"KVTIER_TIMES": str(nothing), **NO_SPINNING}
            env_c = {"KVTIER_TIMES": str(path / "again.json"), **NO_SPINNING}
            with (
                EngineProcess(model, path, kv_transfer=with_kvtier, env=env_a) as a,
                EngineProcess(model, path, kv_transfer=with_nothing, env=env_b) as b,
                EngineProcess(model, path, kv_transfer=with_nothing, env=env_c) as c,
            ):
                engines = [("kvtier", a), ("nothing", b), ("nothing again", c)]
                for number in range(ROUNDS + 1):
                    prompts = [prompt(PROMPT_TOKENS, PROMPTS * number + i) for i in range(PROMPTS)]
                    for name, engine in engines:
                        took = []
                        for each in prompts:
                            engine.generate([each])
                            took.append(engine.seconds)
                        if number:  # the first ones have to warm the caches that the other engine has used
                            # Of the others the median: one request that others' work held up is no figure.
                            seconds[name].append(statistics.median(took[PROMPTS // 4 :]))
                    engines = engines[1:] + engines[:1]
                    if not number:  # the first round warms up
                        before = Times.read(ours), Times.read(nothing)
                fresh = Times.read(ours), Times.read(nothing)
                # What was stored first has left the device by now: loads, slow ones, so that steps are empty.
                for number in range(PROMPTS):
                    a.generate([prompt(PROMPT_TOKENS, number)])
                loading = Times.read(ours)
        return rows(fresh[0] - before[0], fresh[1] - before[1], loading - fresh[0], seconds)


@dataclass(frozen=True)
class Times:
    """What one engine's connector has measured."""

    totals: Counter[str]
    rpcs: Counter[str]
    waits: list[tuple[float, float]]

    @classmethod
    def read(cls, path: Path) -> Times:
        told = json.loads(path.read_text())
        return cls(Counter(told["totals"]), Counter(told["rpcs"]), told["waits"])

    def __sub__(self, before: Times) -> Times:
        return Times(self.totals - before.totals, self.rpcs - before.rpcs, self.waits[len(before.waits) :])

    @property
    def per_request_ms(self) -> float:
        """Time inside calls of steps that do something, by request."""
        return self.per_request("busy_ns")

    def per_request(self, name: str) -> float:
        """Return a total of nanoseconds by request, in milliseconds."""
        return self.totals[name] / 1e6 / self.totals["requests"]

    def per_empty_step(self, name: str) -> str:
        """Return a total of nanoseconds by step that did nothing."""
        if not self.totals["empty_steps"]:
            return "none"
        return f"{self.totals[name] / 1e3 / self.totals['empty_steps']:.1f} us"


def rows(
    ours: Times, nothing: Times, loading: Times, seconds: dict[str, list[float]]
) -> list[tuple[str, str, str]]:
    """Turn what was measured into a table."""
    ratios = [a / b for a, b in zip(seconds["kvtier"], seconds["nothing"], strict=True)]
    noise = [a / b for a, b in zip(seconds["nothing again"], seconds["nothing"], strict=True)]
    waited = sorted(real for asked, real in ours.waits if asked)
    asked = max((asked for asked, _ in ours.waits), default=0.0)
    rpcs, requests = ours.rpcs.total(), ours.totals["requests"]
    more = ours.per_request_ms - nothing.per_request_ms
    return [
        ("time inside calls, a request, kvtier more than nothing", f"{more:.3f} ms", "1 ms"),
        ("time inside calls, a request, kvtier", f"{ours.per_request_ms:.3f} ms", ""),
        ("  of it inside kvtier's manager", f"{ours.per_request('busy_manager_ns'):.3f} ms", ""),
        ("time inside calls, a request, nothing", f"{nothing.per_request_ms:.3f} ms", ""),
        ("time inside calls, an empty step, kvtier", loading.per_empty_step("empty_ns"), "20 us"),
        ("  of it inside kvtier's manager", loading.per_empty_step("empty_manager_ns"), ""),
        ("  empty steps seen", f"{loading.totals['empty_steps']}", ""),
        ("request wall time, kvtier / nothing, median", f"{statistics.median(ratios):.3f}x", "1.05x"),
        ("  by round", " ".join(f"{ratio:.2f}" for ratio in ratios), ""),
        ("  kvtier", f"{1000 * statistics.median(seconds['kvtier']):.1f} ms", ""),
        ("request wall time, nothing / nothing, median", f"{statistics.median(noise):.3f}x", "the noise"),
        ("  by round", " ".join(f"{ratio:.2f}" for ratio in noise), ""),
        ("of it waiting for answers, a request", f"{1000 * sum(waited) / requests:.3f} ms", ""),
        ("longest wait that was asked for", f"{1000 * asked:.2f} ms", "lookup_wait_ms = 0.5 ms"),
        ("lookups waited for", f"{len(waited)} of {requests}", ""),
        ("real wait, p50", f"{1000 * quantile(waited, 0.5):.2f} ms", ""),
        ("real wait, p99", f"{1000 * quantile(waited, 0.99):.2f} ms", ""),
        ("RPCs of the scheduler, a request", f"{rpcs / requests:.2f}", ""),
        ("RPCs of the scheduler, a step", f"{rpcs / ours.totals['steps']:.2f}", ""),
        ("by kind", ", ".join(f"{name[4:]} {count}" for name, count in ours.rpcs.items()), ""),
    ]


def quantile(values: list[float], share: float) -> float:
    """Return a quantile of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


if __name__ == "__main__":
    sys.exit(main())
