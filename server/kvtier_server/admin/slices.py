"""Long work of operators' calls, cut so that engines' calls get in between.

However many operators ask at once, one of them works at a time, for a slice, and rests as long: each with its
own slices, 64 calls held an engine's up by 0.3 s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

SLICE_S = 1e-3
"""Work goes on for so long, and a step more; steps are made to take half of it at most."""

REST_S = 1e-3
"""Between two slices, whoever has them: the loop is the engines' for half of the time at least."""

_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

AnswerT = TypeVar("AnswerT")


async def run_in_slices(steps: Iterator[None]) -> None:
    """Step to the end on the loop's thread. Who is cancelled meanwhile leaves what was done as it is."""
    while True:
        async with _turn():
            slice_ends = time.perf_counter() + SLICE_S
            for _ in steps:
                if time.perf_counter() >= slice_ends:
                    break
            else:
                return
            await asyncio.sleep(REST_S)


async def run_in_turn(work: Callable[[], AnswerT]) -> AnswerT:
    """Do what takes about a slice, when it is its turn."""
    async with _turn():
        answer = work()
        await asyncio.sleep(REST_S)
    return answer


def _turn() -> asyncio.Lock:
    return _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
