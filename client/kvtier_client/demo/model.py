"""A small real transformer in fp32 on the CPU, with deterministic random weights and paged attention.

Owns the weights and the arithmetic. Does not own KV: it writes and reads it through a `DeviceCache` and block
tables.

Same tokens, same position, same KV bytes give bitwise the same logits: one thread, one request per forward,
and shapes that depend on (position, number of tokens) only, never on where the KV came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvtier_client.demo.cache import BlockTable, DeviceCache, GroupSpec

BEGIN, USER, ASSISTANT, END = 256, 257, 258, 259
"""Special tokens; every other token is a byte of text."""
VOCAB_SIZE = 260


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of the model. With `sliding_window`, every second layer sees only that many tokens.

    `init_std` is far from zero on purpose: near-zero weights would produce the same tokens from wrong KV.
    """

    num_layers: int = 4
    hidden_size: int = 256
    mlp_size: int = 768
    num_heads: int = 4
    num_kv_heads: int = 2
    max_tokens: int = 4096
    sliding_window: int | None = None
    init_std: float = 0.08
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def groups(self) -> tuple[GroupSpec, ...]:
        """The KV-cache groups: all layers, or even ones (full attention) and odd ones (sliding window)."""
        if self.sliding_window is None:
            return (GroupSpec(tuple(range(self.num_layers))),)
        even, odd = range(0, self.num_layers, 2), range(1, self.num_layers, 2)
        return (GroupSpec(tuple(even)), GroupSpec(tuple(odd), self.sliding_window))


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's matrices, each shape (inputs, outputs). Norms have no weights."""

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Model:
    """Embedding, pre-norm layers (rotary grouped-query attention, gated MLP), output matrix tied to nothing.

    Sets torch's thread count to 1 for the whole process: with more, sums are split by load and low bits
    change.
    """

    def __init__(self, config: ModelConfig) -> None:
        torch.set_num_threads(1)
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * config.init_std

        hidden, head_dim = config.hidden_size, config.head_dim
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * head_dim
        self.embedding = torch.randn(VOCAB_SIZE, hidden, generator=generator)
        self.layers = [
            LayerWeights(
                qkv=matrix(hidden, qkv_size),
                out=matrix(hidden, hidden),
                gate_up=matrix(hidden, 2 * config.mlp_size),
                down=matrix(config.mlp_size, hidden),
            )
            for _ in range(config.num_layers)
        ]
        self.head = matrix(hidden, VOCAB_SIZE)
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(config.max_tokens, dtype=torch.float32), frequencies)
        self._cos, self._sin = angles.cos(), angles.sin()

    def make_cache(self, num_blocks: int, tokens_per_block: int = 16) -> DeviceCache:
        """Return an empty device cache of `num_blocks` blocks per group (one of them is the null block)."""
        config = self.config
        return DeviceCache(config.groups, num_blocks, tokens_per_block, config.num_kv_heads, config.head_dim)

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[int], position: int, cache: DeviceCache, tables: Sequence[BlockTable]
    ) -> torch.Tensor:
        """Write the tokens' KV into the cache and return the last one's logits, shape (VOCAB_SIZE,), fp32.

        The tokens stand at `position` and after, inside one block: a prefill tile, or one decoded token. The
        KV of everything before them that is still in a window must lie in the tables' blocks.
        """
        size = cache.tokens_per_block
        end = position + len(tokens)
        index = position // size
        assert (end - 1) // size == index, f"tokens {position}..{end - 1} cross a block of {size}"
        x = self.embedding[torch.tensor(tokens)]
        reads = [
            self._visible(group, table, position, end, size)
            for group, table in zip(cache.groups, tables, strict=True)
        ]
        for number, weights in enumerate(self.layers):
            group = cache.group_of[number]
            query, keys, values = self._project(weights, x, position)
            cache.write(number, tables[group][index], position % size, keys, values)
            block_ids, mask = reads[group]
            all_keys, all_values = cache.read(number, block_ids)
            visible = mask.shape[1]
            x = x + attend(query, all_keys[:visible], all_values[:visible], mask) @ weights.out
            gate, up = (norm(x) @ weights.gate_up).chunk(2, dim=-1)
            x = x + (functional.silu(gate) * up) @ weights.down
        return norm(x[-1]) @ self.head

    def _project(
        self, weights: LayerWeights, x: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, keys and values of consecutive tokens, each shape (tokens, heads, head_dim)."""
        config = self.config
        heads = (norm(x) @ weights.qkv).view(len(x), -1, config.head_dim)
        first_key, first_value = config.num_heads, config.num_heads + config.num_kv_heads
        query, keys, values = heads[:, :first_key], heads[:, first_key:first_value], heads[:, first_value:]
        return self._rotate(query, position), self._rotate(keys, position), values

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        cos = self._cos[position : position + len(x), None]
        sin = self._sin[position : position + len(x), None]
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    @staticmethod
    def _visible(
        group: GroupSpec, table: BlockTable, position: int, end: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the blocks that these tokens see, and the mask (tokens, positions): True = attend."""
        first = group.first_block(position, size)
        block_ids = torch.tensor(table[first : position // size + 1])
        queries = torch.arange(position, end)[:, None]
        keys = torch.arange(first * size, end)[None, :]
        mask = keys <= queries
        if group.window is not None:
            mask &= keys > queries - group.window
        return block_ids, mask


def norm(x: torch.Tensor) -> torch.Tensor:
    """Scale each token's vector to a root mean square of 1."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mix values by grouped-query attention; return shape (tokens, heads * head_dim).

    Shapes: query (tokens, heads, head_dim), keys and values (positions, kv_heads, head_dim), mask (tokens,
    positions).
    """
    tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    # Heads that share a KV head become rows of one matrix product, so KV is not repeated.
    rows = query.view(tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    rows = rows.reshape(num_kv_heads, -1, head_dim)
    scores = rows @ keys.permute(1, 2, 0) / math.sqrt(head_dim)
    scores = scores.view(num_kv_heads, -1, tokens, keys.shape[0]).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).view(num_kv_heads, -1, keys.shape[0])
    mixed = (weights @ values.transpose(0, 1)).view(num_heads, tokens, head_dim)
    return mixed.transpose(0, 1).reshape(tokens, num_heads * head_dim)
