"""How much of a request's prefix can be used, given which chunks are there.

The daemon asks it to know what to lease, the scheduler shim to know what to load: one rule for both. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm


@dataclass(frozen=True, slots=True)
class GroupPresence:
    """Which chunks of one group are there.

    `present[i]` belongs to chunk `first_chunk + i` of the request; None means missing, anything else there.
    Chunks before `first_chunk` are the engine's own and count as there. `window_tokens` 0 = full attention.
    """

    present: Sequence[object | None]
    chunk_tokens: int
    first_chunk: int = 0
    window_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UsablePrefix:
    """`tokens` every group can use, and per group the range of chunk indexes [first, end) it takes."""

    tokens: int
    ranges: tuple[tuple[int, int], ...]


def first_gap(present: Sequence[object | None]) -> int:
    """Length of the leading run without None. Runs at C speed on lists."""
    try:
        return present.index(None)
    except ValueError:
        return len(present)


def usable_prefix(groups: Sequence[GroupPresence], max_tokens: int | None = None) -> UsablePrefix:
    """Find the longest prefix that all groups can use.

    A full-attention group needs every chunk before the boundary. A sliding-window group needs only those
    that the next token can see, so it is scanned from the end; every shortening by one group is put to the
    others again until the boundary stands. The boundary is a multiple of every group's chunk.
    """
    step = lcm(*(group.chunk_tokens for group in groups))
    limit = min((group.first_chunk + len(group.present)) * group.chunk_tokens for group in groups)
    for group in groups:
        if not group.window_tokens:
            limit = min(limit, (group.first_chunk + first_gap(group.present)) * group.chunk_tokens)
    if max_tokens is not None:
        limit = min(limit, max_tokens)
    tokens = limit // step * step
    windows = [group for group in groups if group.window_tokens]
    while windows and tokens > 0:
        shorter = min(_longest_window(group, tokens, step) for group in windows)
        if shorter == tokens:
            break
        tokens = shorter
    return UsablePrefix(tokens, tuple(_needed(group, tokens) for group in groups))


def _needed(group: GroupPresence, tokens: int) -> tuple[int, int]:
    """Chunk range of `group` that a prefix of `tokens` takes; empty ranges are (first_chunk, first_chunk)."""
    end = tokens // group.chunk_tokens
    first = group.first_chunk
    if group.window_tokens:
        # The next token, at position `tokens`, sees itself and the window_tokens - 1 before it.
        first = max(first, (tokens - group.window_tokens + 1) // group.chunk_tokens)
    return (first, end) if first < end else (group.first_chunk, group.first_chunk)


def _longest_window(group: GroupPresence, tokens: int, step: int) -> int:
    """Largest multiple of `step`, at most `tokens`, whose last window is wholly there."""
    while tokens > 0:
        first, end = _needed(group, tokens)
        backwards = range(end - 1, first - 1, -1)
        gap = next((chunk for chunk in backwards if group.present[chunk - group.first_chunk] is None), None)
        if gap is None:
            return tokens
        # Every boundary after the gap whose window still reaches it fails too: go to the gap's start.
        tokens = min(gap * group.chunk_tokens, tokens - 1) // step * step
    return 0
