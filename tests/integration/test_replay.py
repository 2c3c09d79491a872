"""The recorded trace through the real client and daemon: right bytes, and the hits of a plain loop."""

from __future__ import annotations

import pytest

from kvtier_server.policies.loader import make_policy

from ..benchmarks.plain_replay import DEFAULT_TRACE, load_trace, replay
from ..benchmarks.replay import CAPACITY, replay_through_daemon

REQUESTS = 2_000


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
