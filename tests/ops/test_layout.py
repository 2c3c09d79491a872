from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_ops.layout import (
    PART_ALIGN_BYTES,
    SLOT_UNIT_BYTES,
    GroupLayout,
    TensorLayout,
    part_offset,
    slot_bytes,
    slot_offset,
)

page_sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=6)


@given(page_sizes, st.integers(1, 8))
def test_the_pages_of_a_part_follow_each_other_without_a_gap(pages: list[int], bpc: int) -> None:
    layout = GroupLayout(tuple(TensorLayout(str(i), size) for i, size in enumerate(pages)), bpc)
    ends = [start + size * bpc for start, size in zip(layout.tensor_offsets, pages, strict=True)]
    assert [0, *ends] == [*layout.tensor_offsets, layout.part_bytes]


@given(st.integers(1, 100_000), st.integers(1, 32))
def test_parts_are_aligned_do_not_overlap_and_fit_their_slot(part_bytes: int, num_parts: int) -> None:
    offsets = [part_offset(part_bytes, part) for part in range(num_parts)]
    assert all(offset % PART_ALIGN_BYTES == 0 for offset in offsets)
    assert all(b - a >= part_bytes for a, b in pairwise(offsets))
    size = slot_bytes(part_bytes, num_parts)
    assert offsets[-1] + part_bytes <= size
    assert size % SLOT_UNIT_BYTES == 0


def test_a_slot_id_is_the_slots_offset_in_units() -> None:
    assert slot_offset(3) == 3 * SLOT_UNIT_BYTES


def test_a_layout_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer\.0"):
        TensorLayout("layer.0", 0)
    with pytest.raises(ValueError, match="at least one tensor"):
        GroupLayout((), 1)
    with pytest.raises(ValueError, match="blocks_per_chunk"):
        GroupLayout((TensorLayout("a", 1),), 0)
