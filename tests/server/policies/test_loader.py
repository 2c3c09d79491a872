"""A policy is found by name or module path, or its refusal says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier_server.policies.arc import ArcPolicy
from kvtier_server.policies.base import ChunkId
from kvtier_server.policies.loader import PolicyLoadError, load_policy_class, make_policy
from kvtier_server.policies.lru import LruPolicy

MODULE = """
from kvtier_server.policies.base import CachePolicy
from kvtier_server.policies.lru import LruPolicy

class MostRecentFirst(LruPolicy):
    pass

class Unfinished(CachePolicy):
    pass

class Stubborn(LruPolicy):
    def __init__(self, capacity):
        raise RuntimeError("needs a licence")

class Stranger:
    pass

not_a_class = 5
"""


@pytest.fixture(autouse=True)
def out_of_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_policies.py").write_text(MODULE)
    (tmp_path / "broken_policies.py").write_text("raise RuntimeError('no such accelerator')")
    monkeypatch.syspath_prepend(tmp_path)


def test_built_in_policies_are_made_by_name() -> None:
    assert isinstance(make_policy("lru", 3), LruPolicy)
    assert isinstance(make_policy("arc", 3), ArcPolicy)
    assert make_policy("arc", 3).capacity == 3


@pytest.mark.parametrize("path", ["house_policies:MostRecentFirst", "house_policies.MostRecentFirst"])
def test_a_policy_out_of_tree_is_made_by_its_module_path(path: str) -> None:
    policy = make_policy(path, 2)
    policy.insert(ChunkId(b"chunk"), 1)
    assert type(policy).__name__ == "MostRecentFirst"
    assert policy.evict(1) == [b"chunk"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("lur", "no policy is called 'lur', did you mean 'lru'?; write arc, lru, or package.module:"),
        ("fifo", "no policy is called 'fifo'; write arc, lru, or package.module:"),
        ("", "no policy is called ''; write arc, lru"),
        ("house_policies:", "not a module path; write arc, lru"),
        (":Fifo", "not a module path; write arc, lru"),
        (".Fifo", "not a module path; write arc, lru"),
        ("no_such_package.policies:Fifo", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("broken_policies:Fifo", "importing 'broken_policies' failed: RuntimeError: no such accelerator"),
        ("house_policies:Fifo", "'house_policies' has no 'Fifo'"),
        (
            "house_policies:Stranger",
            "is not a CachePolicy; derive the class from kvtier_server.policies.base",
        ),
        ("house_policies:not_a_class", "is not a CachePolicy"),
        ("house_policies:Unfinished", "does not implement __contains__, __len__, check_integrity, "),
    ],
)
def test_a_refusal_says_why_and_what_to_write(path: str, reason: str) -> None:
    with pytest.raises(PolicyLoadError) as refusal:
        load_policy_class(path)
    assert reason in str(refusal.value)


def test_a_policy_that_cannot_be_made_is_named_with_its_error() -> None:
    with pytest.raises(PolicyLoadError, match=r"Stubborn.*capacity=3: RuntimeError: needs a licence"):
        make_policy("house_policies:Stubborn", 3)
