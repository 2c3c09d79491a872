"""How vLLM names chunks: OffloadKeys from block hashes, group by group.

A key is the hash of a chunk's last block and 4 bytes for its KV-cache group. vLLM numbers all groups of the
model and offloads some; kvtier numbers those that are offloaded. Where the two differ the tail is exchanged
at this border. Pure; one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from kvtier_ops.namespace import NamespaceFacts

TAIL_BYTES = 4


class ChunkKeys:
    """Names the chunks of requests. `group_ids[g]` is vLLM's number of kvtier's group g."""

    def __init__(self, facts: NamespaceFacts, group_ids: Sequence[int]) -> None:
        assert len(group_ids) == len(facts.groups), f"{len(group_ids)} ids for {len(facts.groups)} groups"
        self.num_groups = len(group_ids)
        self._facts = facts
        self._hashes_per_chunk = [
            facts.chunk_tokens(group) // facts.tokens_per_hash for group in range(self.num_groups)
        ]
        self._tails = [group_id.to_bytes(TAIL_BYTES, "big") for group_id in group_ids]
        # With one group kvtier does not look at the tail.
        self._same = self.num_groups == 1 or list(group_ids) == list(range(self.num_groups))
        own = [group.to_bytes(TAIL_BYTES, "big") for group in range(self.num_groups)]
        self._to_wire = dict(zip(self._tails, own, strict=True))
        self._from_wire = dict(zip(own, self._tails, strict=True))

    def of_hashes(self, block_hashes: Sequence[bytes]) -> list[list[bytes]]:
        """Return per group kvtier's keys of all full chunks, in prefix order."""
        return [self.of_group(group, block_hashes, 0) for group in range(self.num_groups)]

    def of_group(self, group: int, block_hashes: Sequence[bytes], first_chunk: int) -> list[bytes]:
        """Return kvtier's keys of one group's full chunks from `first_chunk` on."""
        step = self._hashes_per_chunk[group]
        if len(block_hashes) < (first_chunk + 1) * step:
            return []
        tail = self._tails[group] if self._same else group.to_bytes(TAIL_BYTES, "big")
        hashes = islice(block_hashes, (first_chunk + 1) * step - 1, None, step)
        return [block_hash + tail for block_hash in hashes]

    def of_positions(self, positions: Mapping[bytes, int]) -> list[list[bytes]]:
        """Return per group kvtier's keys of all full chunks, from vLLM's notes (key -> end in tokens)."""
        keys: list[list[bytes]] = [[] for _ in range(self.num_groups)]
        for key, end_token in positions.items():
            group = self.group_of(key)
            if end_token == (len(keys[group]) + 1) * self._facts.chunk_tokens(group):
                keys[group].append(self.wire(key))
        return keys

    def group_of(self, key: bytes) -> int:
        """Return kvtier's group of one of vLLM's keys."""
        return 0 if self.num_groups == 1 else self._tails.index(key[-TAIL_BYTES:])

    def is_whole_chunk(self, key: bytes, ctx: Any) -> bool:
        """Tell whether the key names a full chunk, and no partial tail, which kvtier does not keep."""
        positions: Mapping[bytes, int] | None = getattr(ctx, "_offload_key_positions", None)
        end_token = None if positions is None else positions.get(key)
        return end_token is None or end_token % self._facts.chunk_tokens(self.group_of(key)) == 0

    def wire(self, key: bytes) -> bytes:
        """Return kvtier's key for one of vLLM's."""
        return key if self._same else key[:-TAIL_BYTES] + self._to_wire[key[-TAIL_BYTES:]]

    def wire_all(self, keys: Iterable[bytes]) -> tuple[bytes, ...]:
        """Return kvtier's keys for vLLM's, in the same order."""
        return tuple(keys) if self._same else tuple([self.wire(key) for key in keys])

    def unwire(self, key: bytes) -> bytes:
        """Return vLLM's key for one of kvtier's."""
        return key if self._same else key[:-TAIL_BYTES] + self._from_wire[key[-TAIL_BYTES:]]

    def count_by_group(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """Count kvtier's keys group by group."""
        if self.num_groups == 1:
            return (len(keys),)
        counts = [0] * self.num_groups
        for key in keys:
            counts[int.from_bytes(key[-TAIL_BYTES:], "big")] += 1
        return tuple(counts)
