"""What the manager tells the workers of a job beyond vLLM's block ids.

Owns the shape only. vLLM pickles these and broadcasts them to every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.kv_offload.base import LoadStoreSpec


@dataclass(frozen=True)
class _Slots(LoadStoreSpec):
    """`slot_ids`, `generations` and `keys` are columns, one entry per chunk, in the order of the blocks.

    The slots are those of pool `pool_id`; 0 = there are none. `group_slots[g]` of them belong to group g.
    """

    req_id: str
    pool_id: int
    slot_ids: tuple[int, ...]
    generations: tuple[int, ...]
    keys: tuple[bytes, ...]
    group_slots: tuple[int, ...]

    @staticmethod
    def medium() -> str:
        """Name what is on the other side, for versions that ask."""
        return "KVTIER"


@dataclass(frozen=True)
class KVTierLoadSpec(_Slots):
    """Where a load reads. Every rank names `lease_id` when it reports the end of its part."""

    lease_id: int


@dataclass(frozen=True)
class KVTierStoreSpec(_Slots):
    """Where a store writes."""

    @classmethod
    def empty(cls) -> KVTierStoreSpec:
        """Return one that stores nothing."""
        return cls("", 0, (), (), (), ())
