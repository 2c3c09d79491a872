"""Copies by the engine itself through a stage on its device: byte by byte what numpy's copies do."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.client.vllm.shared_device import SharedDevice

from kvtier_client.vllm import staging
from kvtier_client.vllm.staging import StagedTensors
from kvtier_ops.host import BlockOutOfRange, HostTensors, copy_in, copy_out
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy

NUM_BLOCKS = 24


@pytest.fixture
def device() -> Iterator[SharedDevice]:
    made = SharedDevice()
    yield made
    made.close()


def filled(tensor: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    tensor.copy_(torch.from_numpy(generator.integers(-128, 128, tuple(tensor.shape), np.int8)))
    return tensor


def on_host(tensors: list[torch.Tensor]) -> HostTensors:
    return HostTensors([[tensor.numpy().view(np.uint8) for tensor in tensors]])


@pytest.mark.parametrize("seed", range(40))
def test_random_copies_move_what_numpy_moves(device: SharedDevice, seed: int) -> None:
    choice, bytes_of = random.Random(seed), np.random.default_rng(seed)
    pages = [choice.choice([8, 24, 64, 100, 7, 4096]) for _ in range(choice.randint(1, 4))]
    tensors = [
        filled(device.tensor(NUM_BLOCKS, size, choice.choice([0, 0, 8, 13])), bytes_of) for size in pages
    ]
    per_chunk = choice.randint(1, 4)
    layout = GroupLayout(tuple(TensorLayout(str(i), size) for i, size in enumerate(pages)), per_chunk)
    first = choice.randrange(per_chunk)
    blocks = tuple(choice.sample(range(NUM_BLOCKS), choice.randint(1, per_chunk - first)))
    copy = ChunkCopy(0, 0, first, blocks)
    part = bytes_of.integers(0, 256, layout.part_bytes, np.uint8)
    staged = StagedTensors([tensors], device)

    ours, theirs = part.copy(), part.copy()
    staged.copy_out(layout, copy, ours)
    copy_out(on_host(tensors), layout, copy, theirs)
    assert np.array_equal(ours, theirs)

    whole = [memory.data.copy() for memory in device.memory]
    staged.copy_in(layout, copy, part)
    loaded = [memory.data.copy() for memory in device.memory]
    for memory, before in zip(device.memory, whole, strict=True):
        memory.data[:] = before
    copy_in(on_host(tensors), layout, copy, part)
    for memory, staged_bytes in zip(device.memory, loaded, strict=True):
        assert np.array_equal(memory.data, staged_bytes)
    assert device.settled == 2, "each copy was waited for before it was called done"


def test_a_part_that_lies_in_two_registered_pieces_of_the_pool_is_copied_piece_by_piece(
    device: SharedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "PIN_PIECE_BYTES", 1000)
    tensors = [filled(device.tensor(NUM_BLOCKS, 4096), np.random.default_rng(1))]
    layout = GroupLayout((TensorLayout("rows", 4096),), 1)
    staged = StagedTensors([tensors], device)

    class Pool:
        data = np.zeros(3 * 4096, np.uint8)

    staged.use_pool(Pool(), pin=False)  # type: ignore[arg-type]  # of a pool it looks at the bytes only
    part = Pool.data[4096:8192]
    assert staged._cuts(part) == [904, 1904, 2904, 3904]
    staged.copy_out(layout, ChunkCopy(0, 0, 0, (5,)), part)
    assert np.array_equal(part, tensors[0][5].numpy().view(np.uint8))
    staged.copy_in(layout, ChunkCopy(0, 0, 0, (6,)), part)
    assert torch.equal(tensors[0][5], tensors[0][6])


@pytest.mark.parametrize("block", [-1, NUM_BLOCKS])
def test_a_block_that_is_not_there_is_refused_before_the_device_hears_of_it(
    device: SharedDevice, block: int
) -> None:
    tensors = [filled(device.tensor(NUM_BLOCKS, 64), np.random.default_rng(2))]
    layout = GroupLayout((TensorLayout("rows", 64),), 2)
    staged, part = StagedTensors([tensors], device), np.zeros(128, np.uint8)
    before = device.memory[0].data.copy()
    for copy in (staged.copy_out, staged.copy_in):
        with pytest.raises(BlockOutOfRange, match=r"which has 24 rows"):
            copy(layout, ChunkCopy(0, 0, 0, (0, block)), part)
    assert device.settled == 0
    assert not part.any()
    assert np.array_equal(device.memory[0].data, before)


def test_padding_is_zeros_in_the_pool_and_nothing_on_the_device(device: SharedDevice) -> None:
    tensor = filled(device.tensor(NUM_BLOCKS, 64), np.random.default_rng(3))
    layout = GroupLayout((TensorLayout("rows", 64), TensorLayout("padding", 32)), 2)
    staged = StagedTensors([[tensor, None]], device)
    part = np.full(layout.part_bytes, 255, np.uint8)
    staged.copy_out(layout, ChunkCopy(0, 0, 0, (1, 2)), part)
    assert np.array_equal(part[:128].reshape(2, 64), tensor[1:3].numpy().view(np.uint8))
    assert not part[128:].any()
    staged.copy_in(layout, ChunkCopy(0, 0, 0, (3, 4)), part)
    assert torch.equal(tensor[3:5], tensor[1:3])


def test_tensors_that_are_not_what_the_layout_says_are_refused_at_the_start(device: SharedDevice) -> None:
    layout = GroupLayout((TensorLayout("rows", 64),), 1)
    for tensors, said in (
        ([], "names 1"),
        ([device.tensor(4, 32)], "rows of 32 bytes"),
        ([device.tensor(4, 256)[:, ::4]], "not rows of bytes"),
        ([device.tensor(4, 64).to(torch.int32)], "not rows of bytes"),
    ):
        with pytest.raises(ValueError, match=said):
            StagedTensors([tensors], device).bind(0, layout)
