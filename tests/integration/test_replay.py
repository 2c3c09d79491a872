"""Traces through the real client and daemon: right bytes, and the hits of a plain loop."""

from __future__ import annotations

import random

import pytest

from kvtier_client.bench.traces import load_trace
from kvtier_server.policies.loader import make_policy

from ..benchmarks.plain_replay import DEFAULT_TRACE, replay
from ..benchmarks.plain_tiers import PlainTiers
from ..benchmarks.replay import CAPACITY, replay_through_daemon
from ..benchmarks.replay_tiers import Moment, replay_with_tier

REQUESTS = 2_000

POOL_CHUNKS = 64
CHUNK_BYTES = 16 << 10
"""Together the smallest pool there is."""

LONGEST = POOL_CHUNKS // 8
WORKING_SET = 8 * POOL_CHUNKS


@pytest.mark.trace
@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_a_replayed_trace_hits_as_the_plain_loop_does_and_loads_right_bytes(policy: str) -> None:
    if not DEFAULT_TRACE.exists():
        pytest.skip(f"there is no trace at {DEFAULT_TRACE}")
    requests = load_trace(DEFAULT_TRACE)[:REQUESTS]
    replayed = replay_through_daemon(requests, policy)  # raises WrongByte
    plain = replay(requests, make_policy(policy, CAPACITY), CAPACITY)
    assert (replayed.hit_chunks, replayed.input_chunks) == (plain.hit_blocks, plain.input_blocks)
    assert replayed.hit_chunks > 0


def chats() -> list[list[int]]:
    """Requests of chats that go on in turns, each with its whole prompt so far: 8 pools of chunks."""
    rng = random.Random(4)
    open_chats: list[list[int]] = []
    requests: list[list[int]] = []
    num_chunks = 0
    while num_chunks < WORKING_SET:
        if len(open_chats) < 40 or rng.random() < 0.2:
            open_chats.append([])
        chat = rng.choice(open_chats)
        new = min(rng.randint(2, 4), LONGEST - len(chat), WORKING_SET - num_chunks)
        chat += range(num_chunks, num_chunks + new)
        num_chunks += new
        requests.append(list(chat))
        if len(chat) == LONGEST:
            open_chats.remove(chat)
    return requests


def test_a_working_set_of_eight_pools_is_served_from_disk_as_by_a_plain_loop_over_two_sigkills() -> None:
    requests = chats()
    kills = [(len(requests) // 3, Moment.PROMOTION), (2 * len(requests) // 3, Moment.STORE)]
    # Raises WrongByte, and AssertionError for the first request whose hits are not the plain loop's.
    row = replay_with_tier("all", requests, POOL_CHUNKS, WORKING_SET, kills, chunk_bytes=CHUNK_BYTES)
    assert row.kills == 2
    assert row.tier_hits > row.pool_hits > 0
    pool_only = replay(requests, make_policy("lru", POOL_CHUNKS), POOL_CHUNKS)
    assert row.pool_hits + row.tier_hits == row.plain_hits > pool_only.hit_blocks


def test_a_tier_that_is_full_too_serves_what_a_plain_loop_with_both_capacities_does() -> None:
    requests = chats()
    row = replay_with_tier("half", requests, POOL_CHUNKS, WORKING_SET // 2, chunk_bytes=CHUNK_BYTES)
    everything = PlainTiers(POOL_CHUNKS, WORKING_SET)
    assert 0 < row.tier_hits < sum(everything.serve(request).tier_hits for request in requests)
