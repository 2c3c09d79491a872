"""Where the pool's memory lies, and where the GPUs are: copies between two NUMA nodes are slower."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier_server.doctor.finding import Finding, passed, skipped, warned
from kvtier_server.doctor.machine import Machine, format_ranges, parse_ranges
from kvtier_server.doctor.subject import Subject, stop_first

NAME = "numa"

BINDING_POLICIES = ("bind", "prefer", "interleave")


def check_numa(
    machine: Machine, subject: Subject, pid: int | None, addresses: Sequence[str] | None = None
) -> Finding:
    """Compare the nodes where process `pid` may take memory (this one by default) with those of the GPUs.

    `addresses`: of the GPUs on the PCI bus; by default all that are there, with or without a driver.
    """
    nodes = machine.numa_nodes()
    if len(nodes) == 1:
        return passed(NAME, "one node: memory is equally far from everywhere")
    if addresses is None:
        addresses = [slot.address for slot in machine.gpu_slots()]
    if not addresses:
        return skipped(NAME, f"{len(nodes)} nodes and no GPU: nothing to be near to")
    gpus = {address: machine.numa_node_of(address) for address in addresses}
    told = "; ".join(
        f"GPU {address} on {f'node {node}' if node >= 0 else 'an unknown node'}"
        for address, node in gpus.items()
    )
    pool_nodes = _nodes_of(machine, pid, nodes)
    text = f"the pool's memory may lie on {_nodes(pool_nodes)} of {_nodes(nodes)}; {told}"
    near = sorted({node for node in gpus.values() if node >= 0})
    if not near:
        return skipped(NAME, text)
    if set(pool_nodes) <= set(near):
        return passed(NAME, text)
    # --fresh: the pages of a pool that is kept stay where they are.
    return warned(
        NAME, text, f"{stop_first(pid)}numactl --membind={format_ranges(near)} {subject.serve('--fresh')}"
    )


def _nodes_of(machine: Machine, pid: int | None, nodes: Sequence[int]) -> list[int]:
    """Return where a process takes memory: by its policy, if it has one, within what it is allowed."""
    allowed = parse_ranges(machine.status("Mems_allowed_list", pid) or "") or list(nodes)
    policy, _, listed = machine.memory_policy(pid).partition(":")
    wanted = set(nodes)
    if policy.partition("=")[0] in BINDING_POLICIES and listed:
        wanted = set(parse_ranges(listed))
    return [node for node in nodes if node in allowed and node in wanted]


def _nodes(nodes: Sequence[int]) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {format_ranges(list(nodes))}"
