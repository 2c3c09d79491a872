"""Device blocks copied by the engine itself, through the mapped pool: the path where the daemon cannot.

Owns the gather into, and the scatter out of, one contiguous part in device memory, and the engine's pinning
of the pool. Correct and bounded before fast: a part is staged on the device (one per copy thread, the size of
the largest part), because the driver moves one large run at the speed of the link and many small ones slowly.

    blocks --index_select--> stage --one copy--> part in the pool       (a store)
    blocks <--index_copy---- stage <--one copy-- part in the pool       (a load)

Why the order holds: `follow` has the thread's stream wait for what the engine's compute was given when the
job was submitted; a copy returns when its last byte has arrived. The engine overwrites the blocks of a store,
and uses those of a load, after the job's end only, which is after that.

Calls of torch are in here, those of torch.cuda behind `Device`. NOT RUN ON A GPU yet; the tests run it on the
CPU.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from kvtier_client.vllm.device import Device, Lane
from kvtier_ops.host import BlockOutOfRange, Bytes
from kvtier_ops.layout import GroupLayout
from kvtier_ops.pinning import PinnedPool
from kvtier_ops.plan import ChunkCopy
from kvtier_ops.pool import MappedPool

logger = logging.getLogger("vllm.kvtier")  # vLLM shows what is below its own name

PIN_PIECE_BYTES = 4 << 30
"""Registered at once. Smaller than the daemon's pieces: an engine that stops waits for the one under way."""

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""What pages are seen as, the first that divides them evenly: torch gathers element by element."""


class StagedTensors:
    """The KV tensors of one rank in device memory: per group, int8 of shape (num_blocks, row_bytes) each.

    None stands for padding: bytes of a part that no tensor has; stores write zeros there. Implements
    `kvtier_ops.host.BlockTensors`.
    """

    def __init__(self, groups: Sequence[Sequence[torch.Tensor | None]], device: Device) -> None:
        self._groups = tuple(tuple(tensors) for tensors in groups)
        self._device = device
        self._of_thread = threading.local()
        self._pages: dict[int, tuple[torch.Tensor | None, ...]] = {}
        self._stage_bytes = 0
        self._lock = threading.Lock()
        self._pool: MappedPool | None = None
        self._pinned: PinnedPool | None = None

    def bind(self, group: int, layout: GroupLayout) -> tuple[torch.Tensor | None, ...]:
        found = self._pages.get(group)
        if found is None:
            tensors = self._groups[group]
            if len(tensors) != len(layout.tensors):
                raise ValueError(
                    f"group {group} has {len(tensors)} tensors, its layout names {len(layout.tensors)}"
                )
            pages = [
                _pages(tensor, expected.page_bytes, f"tensor {expected.name!r} of group {group}")
                for tensor, expected in zip(tensors, layout.tensors, strict=True)
            ]
            word = _word_of(pages, layout)
            found = tuple(None if each is None else each.view(word) for each in pages)
            self._pages[group] = found
            self._stage_bytes = max(self._stage_bytes, layout.part_bytes)
        return found

    def mark(self) -> object:
        return self._device.mark()

    def follow(self, mark: object) -> None:
        self._lane().follow(mark)

    def copy_out(self, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes) -> None:
        columns = self._columns(layout, copy, part_view)
        lane = self._lane()
        with torch.inference_mode(), lane.active():  # in place, also where vLLM made them in that mode
            try:
                self._gather(layout, copy, part_view, columns)
            finally:
                lane.settle()  # also what an error has left under way: the blocks are the engine's again

    def _gather(
        self,
        layout: GroupLayout,
        copy: ChunkCopy,
        part_view: Bytes,
        columns: Sequence[tuple[torch.Tensor | None, tuple[int, int]]],
    ) -> None:
        stage = self._stage()[: layout.part_bytes]
        if len(copy.block_ids) < layout.blocks_per_chunk:
            self._move(stage, part_view, to_pool=False)  # what is not named stays as it is
        block_ids = self._block_ids(copy)
        for pages, place in columns:
            rows = _rows(stage, place, copy, pages)
            if pages is None:
                rows.zero_()
            else:
                torch.index_select(pages, 0, block_ids, out=rows)
        self._move(stage, part_view, to_pool=True)

    def copy_in(self, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes) -> None:
        columns = self._columns(layout, copy, part_view)
        lane = self._lane()
        with torch.inference_mode(), lane.active():
            try:
                stage = self._stage()[: layout.part_bytes]
                self._move(stage, part_view, to_pool=False)
                block_ids = self._block_ids(copy)
                for pages, place in columns:
                    if pages is not None:
                        pages.index_copy_(0, block_ids, _rows(stage, place, copy, pages))
            finally:
                lane.settle()  # as in `copy_out`

    def use_pool(self, pool: MappedPool | None, *, pin: bool) -> None:
        with self._lock:
            if pool is not self._pool and self._pinned is not None:
                reason = self._pinned.close()
                if reason:
                    logger.warning("%s", reason)
                self._pinned = None
            self._pool = pool
            if pin and pool is not None and self._pinned is None:
                self._pinned = self._pin(pool)

    @property
    def pinned_bytes(self) -> int:
        """How much of the pool's front is known to the device."""
        pinned = self._pinned
        return 0 if pinned is None else pinned.ready_bytes

    def _pin(self, pool: MappedPool) -> PinnedPool | None:
        """Begin to register the pool, in the background; without it copies are staged by the driver."""
        try:
            return PinnedPool(pool.data, self._device.registrar(), PIN_PIECE_BYTES, _say_unpinned)
        except Exception as error:  # noqa: BLE001 - of a driver: copies work without
            _say_unpinned(str(error) or type(error).__name__)
            return None

    def _columns(
        self, layout: GroupLayout, copy: ChunkCopy, part_view: Bytes
    ) -> list[tuple[torch.Tensor | None, tuple[int, int]]]:
        """Return each tensor's pages and where they are in the part: offset, page bytes. Checks the copy.

        A block that a tensor does not have must be found here: on a device it would end the whole context.
        """
        first, count = copy.first_block, len(copy.block_ids)
        if first < 0 or first + count > layout.blocks_per_chunk or not count:
            raise ValueError(
                f"{count} sub-blocks from {first} are not in a chunk of {layout.blocks_per_chunk} blocks"
            )
        if part_view.shape != (layout.part_bytes,):
            raise ValueError(f"the part has shape {part_view.shape}, its layout needs ({layout.part_bytes},)")
        found = self.bind(copy.group, layout)
        lowest, highest = min(copy.block_ids), max(copy.block_ids)
        for pages, tensor in zip(found, layout.tensors, strict=True):
            if pages is not None and not (lowest >= 0 and highest < len(pages)):
                raise BlockOutOfRange(
                    f"block {lowest if lowest < 0 else highest} of group {copy.group} is outside tensor "
                    f"{tensor.name!r}, which has {len(pages)} rows"
                )
        places = zip(layout.tensor_offsets, (tensor.page_bytes for tensor in layout.tensors), strict=True)
        return list(zip(found, places, strict=True))

    def _move(self, stage: torch.Tensor, part_view: Bytes, *, to_pool: bool) -> None:
        """Copy between stage and pool, in pieces that lie in one registered piece of the pool each."""
        begin = 0
        for end in [*self._cuts(part_view), part_view.size]:
            host, device = torch.from_numpy(part_view[begin:end]), stage[begin:end]
            if to_pool:
                host.copy_(device, non_blocking=True)
            else:
                device.copy_(host, non_blocking=True)
            begin = end

    def _cuts(self, part_view: Bytes) -> list[int]:
        pool = self._pool
        if pool is None or part_view.size == 0:
            return []
        start = part_view.ctypes.data - pool.data.ctypes.data
        first = -(-start // PIN_PIECE_BYTES) * PIN_PIECE_BYTES
        return [cut - start for cut in range(first, start + part_view.size, PIN_PIECE_BYTES) if cut > start]

    def _block_ids(self, copy: ChunkCopy) -> torch.Tensor:
        return torch.tensor(copy.block_ids, dtype=torch.int64, device=self._device.torch_device)

    def _lane(self) -> Lane:
        """Return this thread's stream."""
        lane: Lane | None = getattr(self._of_thread, "lane", None)
        if lane is None:
            lane = self._of_thread.lane = self._device.lane()
        return lane

    def _stage(self) -> torch.Tensor:
        """Return this thread's memory on the device, shape (bytes of the largest part,), uint8."""
        stage: torch.Tensor | None = getattr(self._of_thread, "stage", None)
        if stage is None or stage.numel() < self._stage_bytes:
            stage = torch.empty(self._stage_bytes, dtype=torch.uint8, device=self._device.torch_device)
            self._of_thread.stage = stage
        return stage


def _say_unpinned(why: str) -> None:
    logger.warning("kvtier: the pool is not pinned in this engine, so its copies are slower: %s", why)


def _rows(
    stage: torch.Tensor, place: tuple[int, int], copy: ChunkCopy, pages: torch.Tensor | None
) -> torch.Tensor:
    """Return where the copy's sub-blocks of one tensor lie in the stage, shape (blocks, words of a page)."""
    offset, page_bytes = place
    begin = offset + copy.first_block * page_bytes
    rows = stage[begin : begin + len(copy.block_ids) * page_bytes].view(len(copy.block_ids), page_bytes)
    return rows if pages is None else rows.view(pages.dtype)


def _pages(tensor: torch.Tensor | None, page_bytes: int, name: str) -> torch.Tensor | None:
    """Return the pages of a tensor as bytes."""
    if tensor is None:
        return None
    if tensor.dtype not in (torch.int8, torch.uint8) or tensor.ndim != 2 or tensor.stride(1) != 1:
        raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not rows of bytes")
    if tensor.shape[1] < page_bytes:
        raise ValueError(f"{name} has rows of {tensor.shape[1]} bytes, its layout needs {page_bytes}")
    return tensor[:, :page_bytes].view(torch.uint8)


def _word_of(columns: Sequence[torch.Tensor | None], layout: GroupLayout) -> torch.dtype:
    """Return the largest word that divides every page, on the device and in the part."""
    numbers = [*layout.tensor_offsets, *(tensor.page_bytes for tensor in layout.tensors)]
    for pages in columns:
        if pages is not None:
            numbers += [pages.stride(0), int(pages.storage_offset()), pages.data_ptr()]
    return next(word for word in _WORDS if not any(number % word.itemsize for number in numbers))
