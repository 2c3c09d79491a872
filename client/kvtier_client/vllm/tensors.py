"""vLLM's KV tensors as kvtier's copies take them.

Owns the translation: which bytes of a device block belong to which KV-cache group, without copying any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches

from kvtier_client.vllm.device import Device
from kvtier_ops.host import Bytes, HostTensors
from kvtier_ops.ipc import HandleError, MemoryHandle
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.namespace import NamespaceFacts


class UnsupportedTensors(ValueError):
    """These tensors cannot be copied by this version. Raised when the engine starts."""


@dataclass(frozen=True, slots=True)
class BoundTensors:
    """One rank's tensors by group, and how its part of a chunk is laid out. None stands for padding."""

    groups: tuple[tuple[torch.Tensor | None, ...], ...]
    """int8, shape (num_blocks, row_bytes); rows may lie apart, and be longer than the layout's pages."""
    layouts: tuple[GroupLayout, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors, those of several groups several times."""
        return [tensor for group in self.groups for tensor in group if tensor is not None]

    def on_host(self) -> HostTensors:
        """Return them as numpy's, for memory of the CPU."""
        groups = []
        for group, layout in zip(self.groups, self.layouts, strict=True):
            num_blocks = next(len(tensor) for tensor in group if tensor is not None)
            groups.append(
                [
                    _padding(num_blocks, column.page_bytes) if tensor is None else _host_pages(tensor)
                    for tensor, column in zip(group, layout.tensors, strict=True)
                ]
            )
        return HostTensors(groups)

    def export(self, device: Device) -> list[list[MemoryHandle]]:
        """Name them all for the daemon's process. Raises HandleError."""
        exported: dict[int, MemoryHandle] = {}
        groups: list[list[MemoryHandle]] = []
        for number, group in enumerate(self.groups):
            handles = []
            for tensor in group:
                if tensor is None:
                    raise HandleError(
                        f"groups: the layers of KV-cache group {number} take fewer bytes than those of "
                        "others, and the daemon's copies have no filling for it yet; set transfer = shm"
                    )
                if id(tensor) not in exported:
                    exported[id(tensor)] = device.export(tensor)
                handles.append(exported[id(tensor)])
            groups.append(handles)
        return groups


def bind_tensors(kv_caches: CanonicalKVCaches, facts: NamespaceFacts) -> BoundTensors:
    """Look which bytes of a device block belong to which group. Copies nothing.

    Scheduler and workers agree on `part_bytes` before any tensor exists, and on the same for every group:
    all bytes that a device block of one rank takes. A group whose own layers take fewer is filled up with a
    column that has no memory behind it (padding). Raises UnsupportedTensors.
    """
    if len(kv_caches.group_data_refs) != len(facts.groups):
        raise UnsupportedTensors(
            f"vLLM registered tensors of {len(kv_caches.group_data_refs)} KV-cache groups, "
            f"its configuration names {len(facts.groups)}"
        )
    pages = [each.tensor.view(torch.int8) for each in kv_caches.tensors]
    for index, tensor in enumerate(pages):
        assert tensor.ndim == 2, f"KV tensor {index} has shape {tuple(tensor.shape)}"
    groups: list[tuple[torch.Tensor | None, ...]] = []
    layouts: list[GroupLayout] = []
    for group, refs in enumerate(kv_caches.group_data_refs):
        tensors: list[torch.Tensor | None] = [pages[ref.tensor_idx] for ref in refs]
        columns = [TensorLayout(f"tensor.{ref.tensor_idx}", ref.page_size_bytes) for ref in refs]
        missing = _missing_bytes(group, refs, facts)
        if missing:
            tensors.append(None)
            columns.append(TensorLayout("padding", missing))
        groups.append(tuple(tensors))
        layouts.append(GroupLayout(tuple(columns), facts.blocks_per_chunk))
    return BoundTensors(tuple(groups), tuple(layouts))


def _host_pages(tensor: torch.Tensor) -> Bytes:
    pages: Bytes = tensor.numpy().view(np.uint8)
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
