from __future__ import annotations

import pytest

from kvtier_server.doctor.finding import Verdict
from kvtier_server.doctor.numa import check_numa
from kvtier_server.doctor.subject import Subject

from .conftest import MadeMachine


@pytest.fixture
def two_nodes(made: MadeMachine) -> MadeMachine:
    """Two nodes, with a GPU on the second."""
    made.write("sys/devices/system/node/has_memory", "0-1\n")
    made.status(nodes="0-1")
    made.gpu("0000:81:00.0", node=1)
    return made


def test_one_node_is_near_to_everything(made: MadeMachine, subject: Subject) -> None:
    made.gpu("0000:81:00.0", node=0)
    assert check_numa(made.machine, subject, None).verdict is Verdict.PASS


def test_a_pool_that_may_lie_far_from_the_gpu_is_a_warning(two_nodes: MadeMachine, subject: Subject) -> None:
    found = check_numa(two_nodes.machine, subject, None)
    assert found.verdict is Verdict.WARN
    assert found.text == ("the pool's memory may lie on nodes 0-1 of nodes 0-1; GPU 0000:81:00.0 on node 1")
    assert found.fix == "numactl --membind=1 kvtier serve --config '/etc/kv tier.toml' --fresh"


@pytest.mark.parametrize("policy", ["bind:1", "bind=static:1", "prefer:1"])
def test_a_policy_that_keeps_it_near_is_right(two_nodes: MadeMachine, subject: Subject, policy: str) -> None:
    two_nodes.write("proc/self/numa_maps", f"561b27d59000 {policy} file=/usr/bin/python N1=2\n")
    assert check_numa(two_nodes.machine, subject, None).verdict is Verdict.PASS


@pytest.mark.parametrize("policy", ["default", "bind:0", "interleave:0-1", "local"])
def test_any_other_policy_is_not(two_nodes: MadeMachine, subject: Subject, policy: str) -> None:
    two_nodes.write("proc/self/numa_maps", f"561b27d59000 {policy} file=/usr/bin/python N1=2\n")
    assert check_numa(two_nodes.machine, subject, None).verdict is Verdict.WARN


def test_a_cpuset_keeps_it_near_too(two_nodes: MadeMachine, subject: Subject) -> None:
    two_nodes.status(nodes="1")
    assert check_numa(two_nodes.machine, subject, None).verdict is Verdict.PASS


def test_the_policy_is_that_of_the_daemon_where_one_runs(two_nodes: MadeMachine, subject: Subject) -> None:
    two_nodes.write("proc/77/numa_maps", "561b27d59000 bind:1 file=/usr/bin/python N1=2\n")
    two_nodes.status(nodes="0-1", pid="77")
    assert check_numa(two_nodes.machine, subject, 77).verdict is Verdict.PASS
    two_nodes.status(nodes="0-1", pid="78")
    found = check_numa(two_nodes.machine, subject, 78)
    assert found.fix.startswith("kill 78 && tail --pid=78 -f /dev/null && numactl --membind=1 kvtier serve ")


def test_gpus_on_every_node_leave_no_better_place(two_nodes: MadeMachine, subject: Subject) -> None:
    two_nodes.gpu("0000:1b:00.0", node=0)
    assert check_numa(two_nodes.machine, subject, None).verdict is Verdict.PASS


def test_only_the_gpus_that_the_driver_shows_count(two_nodes: MadeMachine, subject: Subject) -> None:
    two_nodes.gpu("0000:1b:00.0", node=0)
    found = check_numa(two_nodes.machine, subject, None, ["0000:1B:00.0"])
    assert found.verdict is Verdict.WARN
    assert "--membind=0 " in found.fix


@pytest.mark.parametrize("addresses", [None, ()])
def test_where_nobody_says_where_the_gpu_is_there_is_nothing_to_compare(
    two_nodes: MadeMachine, subject: Subject, addresses: tuple[str, ...] | None
) -> None:
    two_nodes.gpu("0000:81:00.0", node=-1)
    assert check_numa(two_nodes.machine, subject, None, addresses).verdict is Verdict.SKIP
