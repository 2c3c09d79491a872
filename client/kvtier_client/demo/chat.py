"""A multi-turn chat over real text: the workload of the demo, the same bytes for the same text and seed.

Owns what is asked. Does not own how it is run: a driver takes prompts from conversations, has any engine
answer them, and gives the answers back (`run_turn` and `run_chat` do so on one engine).

All conversations begin with the same system prefix. Every turn sends the whole conversation so far, so an
engine whose device cache has evicted it meanwhile must compute it again, or load it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvtier_client.demo.engine import Engine, RequestResult
from kvtier_client.demo.model import ASSISTANT, BEGIN, END, USER

NUM_BLOCKS = 256
"""A device cache that holds three or four conversations of the default chat."""


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """How much is said. A token is a byte of text; the defaults make prompts of 400 to 1,200 tokens.

    At the last turn all conversations together take some 800 blocks of 16 tokens: a device cache of
    `NUM_BLOCKS` has evicted most of a conversation before its next turn.
    """

    conversations: int = 16
    turns: int = 5
    system_tokens: int = 320
    message_tokens: tuple[int, int] = (90, 170)
    """Shortest and longest user message."""
    answer_tokens: tuple[int, int] = (8, 24)
    seed: int = 0


class Conversation:
    """One chat: everything said so far as tokens, and what the user says next."""

    def __init__(self, text: bytes, config: ChatConfig, number: int) -> None:
        longest = max(config.system_tokens, config.message_tokens[1])
        if len(text) <= longest:
            raise ValueError(
                f"the text has {len(text)} bytes, the chat needs more than {longest}; use a longer file"
            )
        self._text = text
        self._config = config
        self._random = random.Random(f"{config.seed}/{number}")
        self._history = [BEGIN, *text[: config.system_tokens], END]
        self.number = number
        self.turn = 0

    def ask(self) -> tuple[list[int], int]:
        """Add the next user message; return the prompt (the conversation so far) and the answer's length."""
        length = self._random.randint(*self._config.message_tokens)
        start = self._random.randrange(len(self._text) - length)
        self._history += [USER, *self._text[start : start + length], END, ASSISTANT]
        self.turn += 1
        return list(self._history), self._random.randint(*self._config.answer_tokens)

    def hear(self, answer: tuple[int, ...]) -> None:
        """Add the engine's answer to the conversation."""
        self._history += [*answer, END]


def run_turn(engine: Engine, conversations: Sequence[Conversation]) -> Iterator[RequestResult]:
    """Have every conversation ask once and hear its answer; yield results as they finish."""
    asking: dict[str, Conversation] = {}
    for conversation in conversations:
        request_id = f"chat-{conversation.number}-turn-{conversation.turn}"
        prompt, answer_tokens = conversation.ask()
        engine.add_request(request_id, prompt, answer_tokens)
        asking[request_id] = conversation
    for result in engine.results():
        asking[result.request_id].hear(result.output)
        yield result


def run_chat(engine: Engine, text: bytes, config: ChatConfig | None = None) -> list[RequestResult]:
    """Run all conversations turn by turn on one engine; return the results by turn, then by conversation."""
    config = config or ChatConfig()
    conversations = [Conversation(text, config, number) for number in range(config.conversations)]
    results: list[RequestResult] = []
    for turn in range(config.turns):
        finished: dict[str, RequestResult] = {r.request_id: r for r in run_turn(engine, conversations)}
        results += [finished[f"chat-{number}-turn-{turn}"] for number in range(config.conversations)]
    return results
