"""The plain replay: its own rules on traces of a few requests, known hit shares on a recorded one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvtier_server.policies.loader import make_policy
from kvtier_server.policies.lru import LruPolicy


def _load(name: str) -> ModuleType:
    """Load a script that lies beside this test: `tests` is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


plain_replay = _load("plain_replay")

# Mooncake FAST'25 conversation trace. Found by implementations of the policies that share nothing with ours.
LRU_HIT_SHARES = {1827: 0.0525, 3655: 0.0793, 9139: 0.1958, 18279: 0.2789, 36558: 0.3453, 73116: 0.3604}
ARC_HIT_SHARES = {1827: 0.0649, 3655: 0.0924, 9139: 0.2122, 18279: 0.2841, 36558: 0.3201, 73116: 0.3596}


def test_only_the_leading_run_of_cached_blocks_counts_as_a_hit() -> None:
    result = plain_replay.replay([[1, 2, 3], [1, 9, 3], [8, 2, 3]], LruPolicy(100), 100)
    assert (result.hit_blocks, result.input_blocks) == (1, 9)


def test_a_prefix_loses_its_tail_first() -> None:
    result = plain_replay.replay([[1, 2, 3, 4], [9, 8], [1, 2, 3, 4]], LruPolicy(4), 4)
    assert result.hit_blocks == 2


def test_a_request_larger_than_the_cache_keeps_its_leading_part() -> None:
    policy = LruPolicy(3)
    result = plain_replay.replay([[7], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], policy, 3)
    assert result.hit_blocks == 3
    assert len(policy) == 3
    assert policy.num_pinned == 0


def test_an_empty_trace_has_no_hits() -> None:
    assert plain_replay.replay([], LruPolicy(3), 3).hit_share == 0.0


def test_a_missing_trace_is_skipped_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.jsonl"
    assert plain_replay.main(["--trace", str(missing)]) == 0
    assert f"skipped: no trace at {missing}" in capsys.readouterr().err


def test_the_command_prints_a_line_per_capacity_and_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [1, 2, 3]}\n')
    assert plain_replay.main(["--trace", str(trace), "--capacity", "8", "--policy", "lru"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header == "2 requests, 5 blocks, 3 distinct"
    assert line.split()[:3] == ["8", "lru", "0.4000"]


@pytest.fixture(scope="module")
def conversation() -> list[list[int]]:
    path: Path = plain_replay.DEFAULT_TRACE
    if not path.exists():
        pytest.skip(f"no trace at {path}")
    requests: list[list[int]] = plain_replay.load_trace(path)
    return requests


@pytest.mark.trace
@pytest.mark.parametrize("capacity", LRU_HIT_SHARES)
def test_lru_has_the_known_hit_share_to_four_digits(conversation: list[list[int]], capacity: int) -> None:
    result = plain_replay.replay(conversation, make_policy("lru", capacity), capacity)
    assert round(result.hit_share, 4) == LRU_HIT_SHARES[capacity]


@pytest.mark.trace
@pytest.mark.parametrize("capacity", ARC_HIT_SHARES)
def test_arc_has_the_known_hit_share_within_its_freedom(conversation: list[list[int]], capacity: int) -> None:
    # The paper leaves details of the ghost lists open; they are worth up to 0.003.
    result = plain_replay.replay(conversation, make_policy("arc", capacity), capacity)
    assert result.hit_share == pytest.approx(ARC_HIT_SHARES[capacity], abs=0.003)
