"""The policies that the contract suite runs over.

A policy out of tree runs it too: `KVTIER_TEST_POLICIES="my.package:MyPolicy" pytest tests/server/policies`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from kvtier_server.policies.base import CachePolicy
from kvtier_server.policies.loader import BUILTIN_POLICIES, make_policy

POLICIES = [*sorted(BUILTIN_POLICIES), *os.environ.get("KVTIER_TEST_POLICIES", "").split()]


@pytest.fixture(params=POLICIES)
def policy_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(policy_name: str) -> Callable[[int], CachePolicy]:
    return lambda capacity: make_policy(policy_name, capacity)
