"""Real vLLM in a process of its own, driven by JSON lines on a socket: see `engine_process.py`."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

ALWAYS = ("model_name", "engine")
ANSWERED = ("prefix_cache", "kv_offload", "kvtier", "time_to_first_token")


def main() -> None:
    """Make the engine, say so, and answer one command after the other."""
    from vllm import LLM

    options = json.loads(sys.argv[1])
    border = socket.socket(fileno=int(sys.argv[2]))
    stream = border.makefile("rw", buffering=1)
    llm = LLM(**options)
    _say(stream, {"ready": True})
    for line in stream:
        command = json.loads(line)
        try:
            _say(stream, COMMANDS[command.pop("command")](llm, **command))
        except Exception as error:
            _say(stream, {"error": f"{type(error).__name__}: {error}"})
            raise


def generate(llm: Any, requests: list[dict[str, Any]], max_tokens: int, logprobs: int) -> dict[str, Any]:
    """Run requests together; answer in their order."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            detokenize=False,
            ignore_eos=True,
            logprobs=logprobs or None,
            extra_args={"kv_transfer_params": request["params"]} if request["params"] is not None else None,
        )
        for request in requests
    ]
    began = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": request["token_ids"]} for request in requests], params, use_tqdm=False
    )
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "answers": [
            {
                "token_ids": list(each.outputs[0].token_ids),
                "finish_reason": each.outputs[0].finish_reason,
                "cached_tokens": each.num_cached_tokens,
                "gaps": [_gap(position) for position in each.outputs[0].logprobs or []],
            }
            for each in outputs
        ],
    }


def reset(llm: Any) -> dict[str, Any]:
    """Forget all KV cache, as after a weight update."""
    return {"done": llm.reset_prefix_cache(reset_connector=True)}


def metrics(llm: Any) -> dict[str, Any]:
    """Answer vLLM's own metrics that are about caches: name{labels} -> value, or [count, sum]."""
    values: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if any(part in metric.name for part in ANSWERED):
            labels = {key: value for key, value in metric.labels.items() if key not in ALWAYS}
            name = metric.name + (json.dumps(labels, sort_keys=True) if labels else "")
            values[name] = metric.value if hasattr(metric, "value") else [metric.count, metric.sum]
    return {"metrics": values}


def _gap(position: dict[int, Any]) -> float:
    """Return how far the best token's logprob is above the second's."""
    best: list[float] = sorted((entry.logprob for entry in position.values()), reverse=True)
    return best[0] - best[1]


def _say(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "generate": generate,
    "reset": reset,
    "metrics": metrics,
}

if __name__ == "__main__":
    main()
