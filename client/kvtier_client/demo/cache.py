"""The device cache: KV tensors in blocks, block tables, reference counts, prefix hashes and eviction.

Owns which block holds which tokens and the bytes of every block. Does not know requests, scheduling or
offloading: the engine hands block ids to an offload adapter, which copies whole pages through
`DeviceCache.pages`.

Only blocks filled by prefill tiles of prompt tokens may be published here (and so be shared or offloaded). A
decoded token's KV is computed with other matrix shapes and differs in its low bits, so reusing it would
change later logits.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

import numpy as np
import numpy.typing as npt
import torch

BlockHash = NewType("BlockHash", bytes)
OffloadKey = NewType("OffloadKey", bytes)
BlockTable = list[int]
"""Block ids of one request in one group, by logical block; NULL_BLOCK where the window has moved on."""

NULL_BLOCK = 0
"""Reserved in every group: stands for "not needed", is never written and never read by attention."""

ROOT_HASH = BlockHash(bytes(32))


def block_hashes(tokens: Sequence[int], tokens_per_block: int) -> list[BlockHash]:
    """Return one hash per full block; each covers its block and, through its parent, everything before it."""
    hashes: list[BlockHash] = []
    parent = ROOT_HASH
    for start in range(0, len(tokens) - tokens_per_block + 1, tokens_per_block):
        block = np.asarray(tokens[start : start + tokens_per_block], dtype="<u4").tobytes()
        parent = BlockHash(hashlib.sha256(parent + block).digest())
        hashes.append(parent)
    return hashes


def offload_key(block_hash: BlockHash, group: int) -> OffloadKey:
    """Return the name of a block outside this engine: its hash, then its group as 4 bytes big-endian."""
    return OffloadKey(block_hash + group.to_bytes(4, "big"))


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A KV-cache group: the layers whose KV shares block ids. `window` is None for full attention."""

    layers: tuple[int, ...]
    window: int | None = None

    def first_block(self, position: int, tokens_per_block: int) -> int:
        """Return the first logical block that the token at `position` attends to.

        A window of W tokens includes the token itself, so it reaches back to `position - W + 1`.
        """
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // tokens_per_block


class BlockPool:
    """Block ids of one group: who references them, which prefix they hold, which one is evicted next.

    A block is referenced (count > 0) or free. A free block keeps its published hash and stays usable as a
    prefix until `allocate` takes it. Free blocks wait in order of release; those without a hash are taken
    first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, num_blocks))
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self) -> dict[int, int]:
        """Return the reference count of every block that has one."""
        return {block_id: count for block_id, count in enumerate(self._references) if count}

    def find(self, block_hash: BlockHash) -> int | None:
        """Return the block published under this hash, if it has not been evicted."""
        return self._block_of.get(block_hash)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, evicting what they held. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = 1
            evicted = self._hash_of.pop(block_id, None)
            if evicted is not None:
                del self._block_of[evicted]
        return block_ids

    def acquire(self, block_id: int) -> None:
        """Add a reference: the block is neither evicted nor reused until as many releases."""
        self._references[block_id] += 1
        self._free.pop(block_id, None)

    def release(self, block_id: int) -> None:
        """Drop a reference; with the last one the block becomes free."""
        assert self._references[block_id] > 0, f"block {block_id} released more often than acquired"
        self._references[block_id] -= 1
        if self._references[block_id] == 0:
            self._free[block_id] = None
            self._free.move_to_end(block_id, last=block_id in self._hash_of)

    def publish(self, block_id: int, block_hash: BlockHash) -> None:
        """Let others find this block. Of two equal blocks the first stays findable."""
        assert self._references[block_id] > 0, f"block {block_id} published without a reference"
        if block_hash not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def check_integrity(self) -> None:
        """Assert that free + referenced + null = all blocks, and that the prefix index has no loose ends."""
        free = {block_id for block_id, count in enumerate(self._references) if count == 0} - {NULL_BLOCK}
        assert free == set(self._free), f"unreferenced {sorted(free)}, in the free list {sorted(self._free)}"
        assert self._references[NULL_BLOCK] == 0, "the null block is referenced"
        assert {block: key for key, block in self._block_of.items()} == self._hash_of, (
            "index and blocks differ"
        )


class DeviceCache:
    """The blocks of all groups: their bytes and their pools. Methods that take tables change all groups or
    none.

    Each group is one allocation, shape (layers in group, num_blocks, page_bytes), uint8. A page is one block
    of one layer: keys then values, each shape (tokens_per_block, kv_heads, head_dim), fp32.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        num_blocks: int,
        tokens_per_block: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        self.groups = tuple(groups)
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.page_bytes = 2 * tokens_per_block * kv_heads * head_dim * torch.float32.itemsize
        self.group_of = {layer: number for number, group in enumerate(groups) for layer in group.layers}
        self.pools = [BlockPool(num_blocks) for _ in groups]
        self._bytes = [
            torch.zeros(len(group.layers), num_blocks, self.page_bytes, dtype=torch.uint8) for group in groups
        ]
        page_shape = (2, tokens_per_block, kv_heads, head_dim)
        self._pages = {
            layer: raw[row].view(torch.float32).view(num_blocks, *page_shape)
            for group, raw in zip(self.groups, self._bytes, strict=True)
            for row, layer in enumerate(group.layers)
        }

    def pages(self, group: int) -> list[npt.NDArray[np.uint8]]:
        """Return the group's memory itself: per layer shape (num_blocks, page_bytes), uint8, C order."""
        return [layer.numpy() for layer in self._bytes[group]]

    def write(self, layer: int, block_id: int, offset: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the KV of consecutive tokens of one block, from token `offset` on."""
        assert block_id != NULL_BLOCK, f"KV of layer {layer} written to the null block"
        page = self._pages[layer][block_id]
        page[0, offset : offset + len(keys)] = keys
        page[1, offset : offset + len(values)] = values

    def read(self, layer: int, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of the keys and values of whole blocks, each shape (tokens, kv_heads, head_dim)."""
        pages = self._pages[layer].index_select(0, block_ids)
        return pages[:, 0].flatten(0, 1), pages[:, 1].flatten(0, 1)

    def match_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Return the most leading blocks from which every group can continue.

        Full attention needs all of them, a sliding window only those that the next token can see.
        """
        matched = len(hashes)
        while matched and not all(
            pool.find(hashes[index]) is not None
            for group, pool in zip(self.groups, self.pools, strict=True)
            for index in range(self._first_block(group, matched), matched)
        ):
            matched -= 1
        return matched

    def start_tables(
        self, hashes: Sequence[BlockHash], hit_blocks: int, ready_blocks: int, num_blocks: int
    ) -> list[BlockTable] | None:
        """Build the tables of a request of `num_blocks` blocks, or return None and change nothing but
        recency.

        [0, hit_blocks) are shared from this cache, [hit_blocks, ready_blocks) are new and will be loaded, the
        rest is new and will be computed. Blocks that no token from `ready_blocks` on can see are NULL_BLOCK.
        """
        tables: list[BlockTable] = []
        for group, pool in zip(self.groups, self.pools, strict=True):
            first = self._first_block(group, ready_blocks)
            hits = [pool.find(block_hash) for block_hash in hashes[first:hit_blocks]]
            assert None not in hits, f"a block of the matched prefix of {hit_blocks} blocks is gone"
            tables.append([NULL_BLOCK] * first + [block_id for block_id in hits if block_id is not None])
        # Hits first: a hit is often free, and allocating before would evict it.
        self.acquire(tables)
        missing = [num_blocks - len(table) for table in tables]
        if any(count > pool.num_free for count, pool in zip(missing, self.pools, strict=True)):
            self.release(tables)
            return None
        for table, pool, count in zip(tables, self.pools, missing, strict=True):
            table.extend(pool.allocate(count))
        return tables

    def grow(self, tables: Sequence[BlockTable]) -> bool:
        """Append one new block to each group's table; False, and nothing changed, when one has none left."""
        if any(pool.num_free == 0 for pool in self.pools):
            return False
        for table, pool in zip(tables, self.pools, strict=True):
            table.extend(pool.allocate(1))
        return True

    def acquire(self, tables: Sequence[BlockTable]) -> None:
        """Add a reference to every block of the tables."""
        for table, pool in zip(tables, self.pools, strict=True):
            for block_id in table:
                if block_id != NULL_BLOCK:
                    pool.acquire(block_id)

    def release(self, tables: Sequence[BlockTable]) -> None:
        """Drop a reference to every block, last block first: a prefix without its head is worth nothing."""
        for table, pool in zip(tables, self.pools, strict=True):
            for block_id in reversed(table):
                if block_id != NULL_BLOCK:
                    pool.release(block_id)

    def release_out_of_window(self, tables: Sequence[BlockTable], position: int) -> None:
        """Give back blocks that no token from `position` on can see; they stay published until evicted."""
        for group, table, pool in zip(self.groups, tables, self.pools, strict=True):
            index = group.first_block(position, self.tokens_per_block) - 1
            while index >= 0 and table[index] != NULL_BLOCK:
                pool.release(table[index])
                table[index] = NULL_BLOCK
                index -= 1

    def publish(
        self, tables: Sequence[BlockTable], hashes: Sequence[BlockHash], first: int, end: int
    ) -> None:
        """Let others find the prompt blocks [first, end). Their KV is final: from prefill, or loaded."""
        for table, pool in zip(tables, self.pools, strict=True):
            for block_id, block_hash in zip(table[first:end], hashes[first:end], strict=True):
                if block_id != NULL_BLOCK:
                    pool.publish(block_id, block_hash)

    def _first_block(self, group: GroupSpec, ready_blocks: int) -> int:
        return group.first_block(ready_blocks * self.tokens_per_block, self.tokens_per_block)
