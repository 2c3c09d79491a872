"""Traces of requests: recorded ones from a file, and a small one that follows from a seed.

One JSON object a line; `hash_ids` are the prefix blocks of one request, head first (the format of the
Mooncake traces). Other keys are not looked at.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_ID = 1 << 62
"""Ids are at least 0 and below it."""


class TraceError(ValueError):
    """A file that is no trace. The message names file and line."""


def load_trace(path: Path, max_requests: int = 0) -> list[list[int]]:
    """Read the prefix blocks of every request, or of the first `max_requests`. Raises TraceError."""
    try:
        with path.open(encoding="utf-8") as lines:
            return list(_requests(path, lines, max_requests))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from None


def _requests(path: Path, lines: Iterator[str], max_requests: int) -> Iterator[list[int]]:
    for number, line in enumerate(lines, start=1):
        if max_requests and number > max_requests:
            return
        try:
            hash_ids = json.loads(line)["hash_ids"]
        except (ValueError, KeyError, TypeError):
            raise TraceError(
                f'{path}:{number}: is no request; write one a line, as {{"hash_ids": [0, 1, 2]}}'
            ) from None
        if not isinstance(hash_ids, list) or not all(
            type(block) is int and 0 <= block < MAX_ID for block in hash_ids
        ):
            raise TraceError(f"{path}:{number}: hash_ids is no list of whole numbers from 0 on")
        if hash_ids:
            yield hash_ids


def synthetic_trace(seed: int, num_requests: int, longest: int = 64) -> list[list[int]]:
    """Make the requests of chats that go on in turns, each with its whole prompt so far.

    A third of the chats begin with one of four system prompts. Chats end at `longest` blocks.
    """
    rng = random.Random(seed)
    systems = [list(range(first, first + 8)) for first in range(0, 32, 8)]
    next_id = 32
    open_chats: list[list[int]] = []
    requests: list[list[int]] = []
    while len(requests) < num_requests:
        if len(open_chats) < 24 or rng.random() < 0.1:
            open_chats.append(list(rng.choice(systems)) if rng.random() < 1 / 3 else [])
        chat = rng.choice(open_chats)
        new = min(rng.randint(2, 8), longest - len(chat))
        chat += range(next_id, next_id + new)
        next_id += new
        requests.append(list(chat))
        if len(chat) == longest:
            open_chats.remove(chat)
    return requests


def num_distinct(requests: Sequence[Sequence[int]]) -> int:
    """Return how many different blocks a trace has: the chunks that a cache would need to keep them all."""
    return len({block for blocks in requests for block in blocks})


def possible_hits(requests: Sequence[Sequence[int]]) -> int:
    """Return the hits of a cache that keeps everything: no daemon can have more."""
    seen: set[int] = set()
    hits = 0
    for blocks in requests:
        hits += next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
    return hits
