from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier_ops.host import BlockOutOfRange, HostTensors, copy_in, copy_out
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.plan import ChunkCopy

Bytes = npt.NDArray[np.uint8]


@dataclass
class Device:
    layout: GroupLayout
    tensors: list[Bytes]
    num_blocks: int


def fill(size: int) -> Bytes:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def place(pages: list[int], num_blocks: int, padding: int, how: str) -> list[Bytes]:
    """Lay tensors out as engines do: on their own, layer by layer, or all layers of a block together."""
    widest = max(pages) + padding
    if how == "layers":
        whole = fill(len(pages) * num_blocks * widest).reshape(len(pages), num_blocks, widest)
        return [whole[i][:, :size] for i, size in enumerate(pages)]
    if how == "layers, last first":
        return place(pages, num_blocks, padding, "layers")[::-1] if len(set(pages)) == 1 else []
    if how == "blocks":
        packed = fill(len(pages) * num_blocks * widest).reshape(num_blocks, len(pages), widest)
        return [packed[:, i, :size] for i, size in enumerate(pages)]
    return [fill(num_blocks * (size + padding)).reshape(num_blocks, -1)[:, :size] for size in pages]


@st.composite
def devices(draw: st.DrawFn) -> Device:
    pages = draw(
        st.one_of(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.just([64] * 4), st.just([48] * 3))
    )
    num_blocks = draw(st.integers(1, 12))
    how = draw(st.sampled_from(["layers", "layers, last first", "blocks", "separate"]))
    tensors = place(pages, num_blocks, draw(st.integers(0, 16)), how) or place(
        pages, num_blocks, 0, "separate"
    )
    layout = GroupLayout(
        tuple(TensorLayout(f"layer.{i}", size) for i, size in enumerate(pages)), draw(st.integers(1, 6))
    )
    return Device(layout, tensors, num_blocks)


@st.composite
def copies(draw: st.DrawFn, device: Device, *, distinct: bool) -> ChunkCopy:
    bpc = device.layout.blocks_per_chunk
    first = draw(st.integers(0, bpc - 1))
    longest = min(bpc - first, device.num_blocks)
    blocks = st.integers(0, device.num_blocks - 1)
    ids = draw(st.lists(blocks, max_size=longest, unique=distinct))
    return ChunkCopy(0, 0, first, tuple(ids))


def naive_pairs(device: Device, copy: ChunkCopy) -> list[tuple[int, int, slice]]:
    """(tensor, block, its bytes in the part) for each page that moves."""
    pairs = []
    for index, tensor in enumerate(device.layout.tensors):
        for i, block in enumerate(copy.block_ids):
            start = device.layout.tensor_offsets[index] + (copy.first_block + i) * tensor.page_bytes
            pairs.append((index, block, slice(start, start + tensor.page_bytes)))
    return pairs


@settings(max_examples=300)
@given(st.data())
def test_a_copy_out_equals_a_naive_loop_for_any_layout_stride_and_block_order(data: st.DataObject) -> None:
    device = data.draw(devices())
    copy = data.draw(copies(device, distinct=False))
    part = fill(device.layout.part_bytes)
    expected = part.copy()
    for tensor, block, where in naive_pairs(device, copy):
        expected[where] = device.tensors[tensor][block]
    copy_out(HostTensors([device.tensors]), device.layout, copy, part)
    assert np.array_equal(part, expected)


@settings(max_examples=300)
@given(st.data())
def test_a_copy_in_equals_a_naive_loop_and_touches_nothing_else(data: st.DataObject) -> None:
    device = data.draw(devices())
    copy = data.draw(copies(device, distinct=True))
    part = fill(device.layout.part_bytes + 1)[1:]
    expected = [tensor.copy() for tensor in device.tensors]
    for tensor, block, where in naive_pairs(device, copy):
        expected[tensor][block] = part[where]
    copy_in(HostTensors([device.tensors]), device.layout, copy, part)
    for got, want in zip(device.tensors, expected, strict=True):
        assert np.array_equal(got, want)


def test_padding_between_rows_is_never_written() -> None:
    allocation = np.full((2, 4, 20), 7, np.uint8)
    tensors = HostTensors([[layer[:, :16] for layer in allocation]])
    layout = GroupLayout((TensorLayout("a", 16), TensorLayout("b", 16)), 2)
    copy_in(tensors, layout, ChunkCopy(0, 0, 0, (1, 3)), np.zeros(64, np.uint8))
    assert (allocation[:, :, 16:] == 7).all()
    assert (allocation[:, [0, 2]] == 7).all()
    assert (allocation[:, [1, 3], :16] == 0).all()


def test_evenly_spaced_layers_move_in_one_numpy_call() -> None:
    layers = np.zeros((8, 10, 64), np.uint8)
    layout = GroupLayout(tuple(TensorLayout(str(i), 64) for i in range(8)), 2)
    assert len(HostTensors([list(layers)]).bind(0, layout)) == 1


@pytest.mark.parametrize("block", [4, -1])
def test_a_block_outside_a_tensor_is_refused_naming_both_before_a_byte_moves(block: int) -> None:
    small, large = np.ones((4, 8), np.uint8), np.ones((9, 8), np.uint8)
    layout = GroupLayout((TensorLayout("large", 8), TensorLayout("small", 8)), 2)
    part = np.zeros(layout.part_bytes, np.uint8)
    name, rows = ("small", 4) if block == 4 else ("large", 9)
    with pytest.raises(
        BlockOutOfRange, match=f"block {block} of group 0 is outside tensor '{name}'.* {rows} rows"
    ):
        copy_out(HostTensors([[large, small]]), layout, ChunkCopy(0, 0, 0, (0, block)), part)
    assert not part.any()


def test_tensors_that_cannot_be_copied_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor 1 of group 0"):
        HostTensors([[np.zeros((2, 8), np.uint8), np.zeros((2, 8), np.int8)]])
    with pytest.raises(ValueError, match="2 apart"):
        HostTensors([[np.zeros((2, 8), np.uint8)[:, ::2]]])
    tensors = HostTensors([[np.zeros((2, 8), np.uint8)]])
    with pytest.raises(ValueError, match="'a' of group 0 has rows of 8 bytes"):
        tensors.bind(0, GroupLayout((TensorLayout("a", 9),), 1))
    with pytest.raises(ValueError, match="1 tensors, its layout names 2"):
        tensors.bind(0, GroupLayout((TensorLayout("a", 8), TensorLayout("b", 8)), 1))


def test_a_copy_outside_its_chunk_or_part_is_refused() -> None:
    tensors = HostTensors([[np.zeros((4, 8), np.uint8)]])
    layout = GroupLayout((TensorLayout("a", 8),), 2)
    with pytest.raises(ValueError, match="sub-blocks 1 to 2"):
        copy_out(tensors, layout, ChunkCopy(0, 0, 1, (0, 1)), np.zeros(16, np.uint8))
    with pytest.raises(ValueError, match=r"shape \(15,\)"):
        copy_out(tensors, layout, ChunkCopy(0, 0, 0, (0,)), np.zeros(15, np.uint8))
