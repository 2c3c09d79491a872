"""The process that `engine_process.py` starts: one reference engine that runs turns of a chat when asked.

Argument: an EngineSpec as JSON. Reads commands from stdin and writes replies to stdout, a line of JSON each;
the end of stdin is the end.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from kvtier_client.demo.adapter import KvtierOffload
from kvtier_client.demo.chat import ChatConfig, Conversation, run_turn
from kvtier_client.demo.engine import Engine, RequestResult
from kvtier_client.demo.engine_process import Answer, ChatSpec, EngineSpec, EngineState
from kvtier_client.demo.model import Model, ModelConfig
from kvtier_client.options import ClientOptions

OPTIONS = ClientOptions(lookup_deadline_ms=250)
"""Daemon, engine and whatever else runs share two cores here: 50 ms may pass before the daemon gets one."""


def main(spec_json: str) -> None:
    """Build the engine, say that it is there, then do what stdin says."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    fields = json.loads(spec_json)
    spec = EngineSpec(**{**fields, "chat": ChatSpec(**fields["chat"])})
    model_config = ModelConfig(sliding_window=spec.sliding_window, seed=spec.model_seed)
    model = Model(model_config)
    cache = model.make_cache(spec.num_blocks)
    offload = None
    if spec.address is not None:
        offload = KvtierOffload(
            spec.address,
            spec.name,
            model_config,
            cache,
            blocks_per_chunk=spec.blocks_per_chunk,
            verify_loads=spec.verify_loads,
            options=OPTIONS,
        )
        offload.wait_ready(spec.wait_ready_s)
    engine = Engine(model, cache, offload=offload)
    tokens_per_chunk = spec.blocks_per_chunk * cache.tokens_per_block
    conversations = _conversations(spec.chat)
    say(state=asdict(state_of(offload)))
    for line in sys.stdin:
        match json.loads(line)["do"]:
            case "turn":
                for result in run_turn(engine, conversations):
                    say(answer=asdict(_answer(result, tokens_per_chunk)))
                engine.check_integrity()
                say(turn="done")
            case "state":
                say(state=asdict(state_of(offload)))
            case other:
                raise ValueError(f"unknown command {other!r}; there are turn and state")
    if offload is not None:
        offload.close()


def say(**reply: object) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def state_of(offload: KvtierOffload | None) -> EngineState:
    """Return what the process that drives this one may know."""
    if offload is None:
        return EngineState()
    return EngineState(ready=offload.ready, counters=offload.counters(), **asdict(offload.copies))


def _conversations(chat: ChatSpec) -> list[Conversation]:
    config = ChatConfig(seed=chat.seed, conversations=chat.conversations, system_tokens=chat.system_tokens)
    text = Path(chat.text_file).read_bytes()
    return [Conversation(text, config, number) for number in range(chat.conversations)]


def _answer(result: RequestResult, tokens_per_chunk: int) -> Answer:
    return Answer(
        request_id=result.request_id,
        output=result.output,
        prompt_tokens=result.prompt_tokens,
        device_tokens=result.device_tokens,
        loaded_tokens=result.loaded_tokens,
        missing_tokens=result.missing_tokens(tokens_per_chunk),
        computed_tokens=result.computed_tokens,
        preemptions=result.preemptions,
        failed_loads=result.failed_loads,
        first_token_s=result.first_token_s,
    )


if __name__ == "__main__":
    main(sys.argv[1])
