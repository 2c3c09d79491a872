"""The requests that the tests run: a chat of several turns, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.vllm.engine_process import Answer, EngineProcess

CONVERSATIONS = 8
TURNS = 5
FIRST_TOKEN, LAST_TOKEN = 10, 4000


@dataclass
class Answers:
    """What a chat answered, in order, and how many prompt tokens it had."""

    tokens: list[list[int]] = field(default_factory=list)
    gaps: list[list[float]] = field(default_factory=list)
    prompt_tokens: int = 0
    seconds: float = 0.0


def prompt(length: int, seed: int) -> list[int]:
    """Return random token ids."""
    generator = random.Random(seed)
    return [generator.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]


def chat(
    engine: EngineProcess,
    *,
    logprobs: int = 0,
    seed: int = 5,
    before_turn: Callable[[int], None] = lambda turn: None,
    during_turn: Callable[[int], None] = lambda turn: None,
    forced: Answers | None = None,
) -> Answers:
    """Run 40 requests: 8 conversations of 5 turns, each turn a longer prompt with the answer before in it.

    All conversations of a turn run together, and the 40 blocks of the device hold three or four of them.
    `during_turn` is called while a turn runs. With `forced` the conversations go on with those answers
    instead of their own, so that the prompts of two runs are equal even where a token differs.
    """
    generator = random.Random(seed)
    conversations = [_tokens(generator, 60, 160) for _ in range(CONVERSATIONS)]
    answers = Answers()
    for turn in range(TURNS):
        before_turn(turn)
        engine.send_generate(conversations, logprobs=logprobs)
        during_turn(turn)
        replies = engine.receive_answers()
        answers.seconds += engine.seconds
        answers.prompt_tokens += sum(map(len, conversations))
        _check_finished(replies)
        for index, reply in enumerate(replies):
            said = reply.token_ids if forced is None else forced.tokens[len(answers.tokens)]
            answers.tokens.append(reply.token_ids)
            answers.gaps.append(reply.gaps)
            conversations[index] = conversations[index] + said + _tokens(generator, 40, 90)
    return answers


def _tokens(generator: random.Random, low: int, high: int) -> list[int]:
    return [generator.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(generator.randrange(low, high))]


def _check_finished(replies: Sequence[Answer]) -> None:
    assert all(reply.finish_reason == "length" for reply in replies), [r.finish_reason for r in replies]
