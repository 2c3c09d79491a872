from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_ops.plan import ChunkCopy, PlanError, plan_job

Placed = dict[tuple[int, int, int], int]


def naive(ids: list[int], sizes: list[int], indices: list[int], bpc: int) -> tuple[Placed, int]:
    """Where each block goes, block by block: (group, slot of the job, sub-block) -> block id."""
    placed: Placed = {}
    first_slot = position = 0
    for group, (size, index) in enumerate(zip(sizes, indices, strict=True)):
        skip = index % bpc
        for i in range(size):
            placed[group, first_slot + (skip + i) // bpc, (skip + i) % bpc] = ids[position + i]
        position += size
        first_slot += -(-(skip + size) // bpc) if size else 0
    return placed, first_slot


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    sizes = draw(st.lists(st.integers(0, 20), max_size=4))
    indices = draw(st.lists(st.integers(0, 50), min_size=len(sizes), max_size=len(sizes)))
    ids = draw(st.lists(st.integers(0, 1000), min_size=sum(sizes), max_size=sum(sizes)))
    return ids, sizes, indices, draw(st.integers(1, 8))


@given(jobs())
def test_a_plan_puts_every_block_where_a_naive_loop_puts_it(
    job: tuple[list[int], list[int], list[int], int],
) -> None:
    copies = plan_job(*job)
    placed, num_slots = naive(*job)
    assert [copy.slot_index for copy in copies] == list(range(num_slots))
    assert placed == {
        (copy.group, copy.slot_index, copy.first_block + i): block
        for copy in copies
        for i, block in enumerate(copy.block_ids)
    }


def test_a_load_may_start_and_end_inside_a_chunk() -> None:
    assert plan_job([30, 31, 32, 33, 34], [5], [6], 4) == (
        ChunkCopy(0, 0, 2, (30, 31)),
        ChunkCopy(0, 1, 0, (32, 33, 34)),
    )


def test_a_group_without_blocks_takes_no_slot_even_in_the_middle_of_a_chunk() -> None:
    assert plan_job([7], [0, 1], [3, 0], 4) == (ChunkCopy(1, 0, 0, (7,)),)


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (([1], [1], [0], 0), "blocks_per_chunk"),
        (([1, 2], [1], [0], 1), "group_sizes"),
        (([1], [2, -1], [0, 0], 1), "group_sizes"),
        (([1], [1], [], 1), "block_indices"),
        (([1], [1], [-1], 1), "block_indices"),
        (([-1], [1], [0], 1), "block_ids"),
    ],
)
def test_a_job_that_contradicts_itself_is_refused_naming_the_field(
    job: tuple[list[int], list[int], list[int], int], field: str
) -> None:
    with pytest.raises(PlanError, match=f"^{field}: "):
        plan_job(*job)
