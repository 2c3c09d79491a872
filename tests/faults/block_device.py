"""Device memory of the block engines: what a chunk is called, what it holds, and the blocks that hold it.

Chunks are named "prompt/index". Owns names, contents and numpy arrays; knows no daemon.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
from collections.abc import Sequence

import numpy as np

from kvtier_ops.host import Bytes
from kvtier_ops.layout import GroupLayout, TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts

LAYERS = 3
PAGE_BYTES = 4096
BLOCKS_PER_CHUNK = 2
TOKENS_PER_BLOCK = 4
CHUNK_TOKENS = BLOCKS_PER_CHUNK * TOKENS_PER_BLOCK
PART_BYTES = LAYERS * BLOCKS_PER_CHUNK * PAGE_BYTES
NUM_BLOCKS = 1024
UNWRITTEN = 0xEE
"""What blocks hold that nothing was written to."""

LAYOUT = GroupLayout(tuple(TensorLayout(f"layer.{n}", PAGE_BYTES) for n in range(LAYERS)), BLOCKS_PER_CHUNK)


def facts(weights_id: str = "w0") -> NamespaceFacts:
    """The namespace of all block engines."""
    return NamespaceFacts(
        model="blocks",
        weights_id=weights_id,
        kv_dtype="uint8",
        hash_algorithm="sha256",
        tokens_per_hash=TOKENS_PER_BLOCK,
        blocks_per_chunk=BLOCKS_PER_CHUNK,
        kv_cache_layout="NHD",
        groups=(GroupFacts(TOKENS_PER_BLOCK, PART_BYTES),),
    )


def key_of(name: str) -> bytes:
    """Key of a chunk: a hash of its name, and group 0."""
    return hashlib.sha256(name.encode()).digest()[:16] + bytes(4)


def content_of(key: bytes, weights: str = "") -> Bytes:
    """What an engine with these weights computes for a chunk, shape (part_bytes,)."""
    digest = hashlib.shake_128(weights.encode() + b"|" + key).digest(PART_BYTES)
    return np.frombuffer(digest, np.uint8)


def chunk_names(prompt: str, count: int) -> list[str]:
    """Names of a prompt's chunks."""
    return [f"{prompt}/{index}" for index in range(count)]


def chunk_blocks(blocks: Sequence[int], index: int) -> Sequence[int]:
    """Blocks of a request's chunk."""
    return blocks[index * BLOCKS_PER_CHUNK : (index + 1) * BLOCKS_PER_CHUNK]


class Device:
    """Device memory: shape (layers, blocks, page), in a mapping of its own so that it can be taken away."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, LAYERS * NUM_BLOCKS * PAGE_BYTES)
        self.pages: Bytes = np.frombuffer(self._memory, np.uint8).reshape(LAYERS, NUM_BLOCKS, PAGE_BYTES)
        self._free = list(range(NUM_BLOCKS - 1, 0, -1))  # 0 is the null block

    def allocate(self, num_chunks: int) -> list[int]:
        """Take blocks; what was in them is gone."""
        blocks = [self._free.pop() for _ in range(num_chunks * BLOCKS_PER_CHUNK)]
        self.pages[:, blocks] = UNWRITTEN
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back."""
        self._free.extend(blocks)

    def write(self, blocks: Sequence[int], content: Bytes) -> None:
        """Compute a chunk."""
        self.pages[:, blocks] = content.reshape(LAYERS, BLOCKS_PER_CHUNK, PAGE_BYTES)

    def holds(self, blocks: Sequence[int], content: Bytes) -> bool:
        """Tell whether these blocks hold exactly this chunk."""
        return bool(np.array_equal(self.pages[:, blocks].reshape(-1), content))

    def forbid_last_layer(self) -> None:
        """Let every copy die in its middle: the last layer's pages can be touched no more."""
        layer = self.pages[-1]
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(layer.ctypes.data)
        if libc.mprotect(address, ctypes.c_size_t(layer.nbytes), 0):  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
