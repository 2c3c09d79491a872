"""vLLM's KV tensors as kvtier's copies take them.

Owns the translation: which bytes of a device block belong to which KV-cache group, without copying any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches

from kvtier_ops.host import Bytes, HostTensors
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.namespace import NamespaceFacts


class UnsupportedTensors(ValueError):
    """These tensors cannot be copied by this version. Raised when the engine starts."""


def bind_tensors(
    kv_caches: CanonicalKVCaches, facts: NamespaceFacts
) -> tuple[HostTensors, tuple[GroupLayout, ...]]:
    """Return one rank's tensors by group, and how its part of a chunk is laid out.

    Scheduler and workers agree on `part_bytes` before any tensor exists, and on the same for every group:
    all bytes that a device block of one rank takes. A group whose own layers take fewer is filled up with a
    column that has no memory behind it (padding). Raises UnsupportedTensors.
    """
    if len(kv_caches.group_data_refs) != len(facts.groups):
        raise UnsupportedTensors(
            f"vLLM registered tensors of {len(kv_caches.group_data_refs)} KV-cache groups, "
            f"its configuration names {len(facts.groups)}"
        )
    pages = [_host_pages(each.tensor, index) for index, each in enumerate(kv_caches.tensors)]
    groups: list[list[Bytes]] = []
    layouts: list[GroupLayout] = []
    for group, refs in enumerate(kv_caches.group_data_refs):
        tensors = [pages[ref.tensor_idx] for ref in refs]
        columns = [TensorLayout(f"tensor.{ref.tensor_idx}", ref.page_size_bytes) for ref in refs]
        missing = _missing_bytes(group, refs, facts)
        if missing:
            tensors.append(_padding(len(tensors[0]), missing))
            columns.append(TensorLayout("padding", missing))
        groups.append(tensors)
        layouts.append(GroupLayout(tuple(columns), facts.blocks_per_chunk))
    return HostTensors(groups), tuple(layouts)


def _host_pages(tensor: torch.Tensor, index: int) -> Bytes:
    """Return a tensor of shape (num_blocks, page_bytes), int8, as uint8; rows may lie apart."""
    if tensor.device.type != "cpu":
        raise UnsupportedTensors(
            f"KV tensor {index} is on {tensor.device}: this version of kvtier copies host memory only, the "
            "CUDA path is not built yet. Run vLLM without kvtier's --kv-transfer-config on this device"
        )
    pages = tensor.view(torch.int8).numpy().view(np.uint8)
    assert pages.ndim == 2, f"KV tensor {index} has shape {pages.shape}"
    return pages


def _missing_bytes(group: int, refs: Sequence[CanonicalKVCacheRef], facts: NamespaceFacts) -> int:
    block_bytes = facts.groups[group].part_bytes // facts.blocks_per_chunk
    own_bytes: int = sum(ref.page_size_bytes for ref in refs)
    if own_bytes > block_bytes or not refs:
        raise UnsupportedTensors(
            f"the layers of KV-cache group {group} take {own_bytes} bytes a block, vLLM's configuration says "
            f"{block_bytes}; ranks with different layers (pipeline parallelism) are not supported"
        )
    return block_bytes - own_bytes


def _padding(num_blocks: int, page_bytes: int) -> Bytes:
    """Return a column of `num_blocks` rows that are all the same memory: zeros, and what loads throw away."""
    return as_strided(np.zeros(page_bytes, np.uint8), (num_blocks, page_bytes), (0, 1))
