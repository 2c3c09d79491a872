from __future__ import annotations

import random

import numpy as np
import pytest
from tests.ops.copy_jobs import (
    RandomMemory,
    Tensor,
    copy_slowly,
    random_copies,
    random_memory,
    run_work,
)

from kvtier_ops.fragments import (
    CopyRefused,
    Direction,
    GroupPlaces,
    Means,
    PlacedCopy,
    TensorPlace,
    assign_means,
    pieces_per_row,
    plan_fragments,
)
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy

POOL_BYTES = 1 << 20


def group(
    page: int, layers: int, bpc: int, *, stride: int = 0, spacing: int = 0, blocks: int = 64
) -> GroupPlaces:
    """Layers of equal pages, one after the other in one allocation at address 2**20."""
    stride = stride or page
    spacing = spacing or stride * blocks
    return GroupPlaces(
        GroupLayout(tuple(TensorLayout(f"layer.{i}", page) for i in range(layers)), bpc),
        tuple(TensorPlace((1 << 20) + i * spacing, stride, blocks) for i in range(layers)),
    )


def place(*block_ids: int, first: int = 0, part: int = 0) -> PlacedCopy:
    return PlacedCopy(ChunkCopy(0, 0, first, block_ids), part)


@pytest.mark.parametrize("seed", range(20))
def test_fifty_random_plans_move_the_bytes_that_a_page_by_page_loop_moves(seed: int) -> None:
    """1,000 plans in all, by every means, both directions; the descriptors are run by a plain loop."""
    rng = random.Random(seed)
    by_means = np.zeros(4, np.int64)
    for _ in range(50):
        memory = random_memory(rng)
        numbers = np.random.default_rng(rng.randrange(1 << 32))
        allocations = [numbers.integers(0, 256, size, np.uint8) for size in memory.allocation_bytes]
        pool = numbers.integers(0, 256, POOL_BYTES, np.uint8)
        copies = random_copies(rng, memory, POOL_BYTES)
        direction = rng.choice(list(Direction))
        boundaries = sorted(rng.sample(range(1, POOL_BYTES), 9))
        expected, expected_pool = [a.copy() for a in allocations], pool.copy()
        copy_slowly(memory, expected, expected_pool, copies, direction)

        fragments = plan_fragments(
            memory.places([a.ctypes.data for a in allocations]), copies, direction, POOL_BYTES, boundaries
        )
        means = Means(rng.choice([0, 0, 64, 1 << 20]), rng.random() < 0.25, rng.choice([0, 4096, 1 << 31]))
        work = assign_means(
            fragments, means, rng.choice([0, POOL_BYTES // 2, POOL_BYTES, POOL_BYTES]), boundaries
        )
        assert work.total_bytes == fragments.total_bytes
        run_work(work, pool, direction)
        assert np.array_equal(pool, expected_pool)
        for got, want in zip(allocations, expected, strict=True):
            assert np.array_equal(got, want)
        by_means += [len(work.kernel) > 0, len(work.batch) > 0, len(work.pitched) > 0, len(work.plain) > 0]
    assert by_means.all(), "each means must have been tried"


def test_consecutive_blocks_of_a_layer_are_one_fragment() -> None:
    fragments = plan_fragments([group(64, 3, 4)], [place(5, 6, 7, 8)], Direction.STORE, POOL_BYTES)
    assert fragments.nbytes.tolist() == [256, 256, 256]
    assert fragments.pool.tolist() == [0, 256, 512]
    assert fragments.device.tolist() == [(1 << 20) + i * 64 * 64 + 5 * 64 for i in range(3)]


def test_a_whole_tensor_stored_in_order_is_one_fragment_across_chunks() -> None:
    copies = [place(*range(i * 4, i * 4 + 4), part=i * 256) for i in range(16)]
    assert plan_fragments([group(64, 1, 4)], copies, Direction.LOAD, POOL_BYTES).nbytes.tolist() == [4096]


def test_rows_of_neighbouring_allocations_are_never_one_copy() -> None:
    layout = GroupLayout((TensorLayout("a", 64), TensorLayout("b", 64), TensorLayout("c", 64)), 1)
    tensors = tuple(TensorPlace(4096 + i * 64, 64, 1, allocation=i) for i in range(3))
    fragments = plan_fragments([GroupPlaces(layout, tensors)], [place(0)], Direction.STORE, POOL_BYTES)
    assert fragments.nbytes.tolist() == [64, 64, 64]
    assert assign_means(fragments, Means(0), POOL_BYTES).pitched == ()


def test_the_layers_of_a_block_are_one_pitched_run() -> None:
    fragments = plan_fragments(
        [group(4096, 32, 1)], [place(9), place(3, part=32 * 4096)], Direction.STORE, POOL_BYTES
    )
    work = assign_means(fragments, Means(kernel_below_bytes=4096), POOL_BYTES)
    assert [(run.rows, run.width_bytes, run.pool_pitch) for run in work.pitched] == [(32, 4096, 4096)] * 2
    assert work.pitched[0].device_pitch == 64 * 4096
    assert len(work.plain) == len(work.kernel) == 0


def test_a_pitch_that_the_driver_does_not_take_is_copied_row_by_row() -> None:
    fragments = plan_fragments([group(4096, 4, 1, spacing=1 << 31)], [place(9)], Direction.STORE, POOL_BYTES)
    work = assign_means(fragments, Means(kernel_below_bytes=0), POOL_BYTES)
    assert work.pitched == ()
    assert len(work.plain) == 4


def test_no_fragment_and_no_run_crosses_a_boundary_of_the_pinned_pieces() -> None:
    copies = [place(2 * i, part=i * 4096) for i in range(8)]
    fragments = plan_fragments([group(4096, 1, 1)], copies, Direction.LOAD, POOL_BYTES, [8192, 18000])
    assert fragments.nbytes.sum() == 8 * 4096
    assert not any(
        ((fragments.pool < b) & (fragments.pool + fragments.nbytes > b)).any() for b in (8192, 18000)
    )
    work = assign_means(fragments, Means(0), POOL_BYTES, [8192, 18000])
    for run in work.pitched:
        end = run.pool + (run.rows - 1) * run.pool_pitch + run.width_bytes
        assert not any(run.pool < b < end for b in (8192, 18000))
    assert work.pitched


def test_what_the_driver_does_not_know_yet_is_copied_plainly() -> None:
    copies = [place(2 * i, part=i * 4096) for i in range(8)]
    fragments = plan_fragments([group(4096, 1, 1)], copies, Direction.LOAD, POOL_BYTES)
    work = assign_means(fragments, Means(kernel_below_bytes=1 << 20), 3 * 4096 + 1)
    assert work.kernel.pool.tolist() == [0, 4096, 8192]
    assert work.plain.pool.tolist() == [4096 * i for i in range(3, 8)]


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        (place(64), r"block_ids: block 64 of group 0 is outside tensor 'layer.0', which has 64 blocks"),
        (place(-1), "block_ids: block -1 of group 0"),
        (place((1 << 64) - 1), "block_ids: block 18446744073709551615 "),
        (place(0, first=-1), "first_block: sub-blocks -1 to -1"),
        (place(0, 1, 2, first=2), "first_block: sub-blocks 2 to 4 are outside a chunk of 4 blocks"),
        (place(0, part=-1), "part_start: 512 bytes at offset -1 leave the pool"),
        (place(0, part=POOL_BYTES - 511), "part_start: 512 bytes at offset 1048065 leave the pool"),
        (place(0, part=(1 << 64) - 1), "part_start: "),
        (place(part=POOL_BYTES), "part_start: "),
        (PlacedCopy(ChunkCopy(1, 0, 0, (0,)), 0), "group: 1 is not one of the 1 groups"),
        (PlacedCopy(ChunkCopy(-1, 0, 0, (0,)), 0), "group: -1 "),
    ],
)
def test_a_copy_outside_its_memory_is_refused_naming_the_field(placed: PlacedCopy, message: str) -> None:
    good = place(1, part=4096)
    for direction in Direction:
        with pytest.raises(CopyRefused, match=f"^{message}"):
            plan_fragments([group(64, 2, 4)], [good, placed], direction, POOL_BYTES)


def test_two_copies_that_write_the_same_bytes_are_refused() -> None:
    places = [group(64, 2, 4)]
    same_slot = [place(1, 2), place(3, first=1)]
    with pytest.raises(CopyRefused, match="same bytes of a slot"):
        plan_fragments(places, same_slot, Direction.STORE, POOL_BYTES)
    assert len(plan_fragments(places, same_slot, Direction.LOAD, POOL_BYTES))
    same_block = [place(1, 2), place(2, part=4096)]
    with pytest.raises(CopyRefused, match="same bytes of a device block"):
        plan_fragments(places, same_block, Direction.LOAD, POOL_BYTES)
    assert len(plan_fragments(places, same_block, Direction.STORE, POOL_BYTES))


@pytest.mark.parametrize("page", [40000, 40001, 40004, 40008])
def test_the_kernel_moves_rows_of_several_pieces_with_any_alignment(page: int) -> None:
    memory = RandomMemory(
        (8 * page + 96, page * 8),
        ((Tensor(0, 96, page, 8, page), Tensor(1, 0, 8 * 64, 8, 64)),),
        (GroupLayout((TensorLayout("a", page), TensorLayout("b", 64)), 2),),
        1,
    )
    numbers = np.random.default_rng(page)
    allocations = [numbers.integers(0, 256, size, np.uint8) for size in memory.allocation_bytes]
    pool = np.zeros(POOL_BYTES, np.uint8)
    expected = pool.copy()
    copies = [place(1, 2, part=0), place(5, 3, part=200704)]
    copy_slowly(memory, allocations, expected, copies, Direction.STORE)
    places = memory.places([a.ctypes.data for a in allocations])
    fragments = plan_fragments(places, copies, Direction.STORE, POOL_BYTES)
    work = assign_means(fragments, Means(1 << 20), POOL_BYTES)
    assert len(work.kernel) == len(fragments)
    assert pieces_per_row(work.kernel) > 2
    run_work(work, pool, Direction.STORE)
    assert np.array_equal(pool, expected)


def test_a_job_without_blocks_has_no_fragments() -> None:
    assert len(plan_fragments([group(64, 2, 4)], [place()], Direction.LOAD, POOL_BYTES)) == 0
    work = assign_means(plan_fragments([], [], Direction.LOAD, POOL_BYTES), Means(), POOL_BYTES)
    assert work.total_bytes == 0
