"""Chunks and the spaces of keys that file them.

Owns the mapping from (namespace, tenant, epoch) and OffloadKey to a resident chunk. Does not own slots,
eviction order or leases; `tier.py` keeps those in step with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvtier_ops.namespace import SpaceName
from kvtier_server.policies.base import ChunkId

if TYPE_CHECKING:
    from kvtier_server.primary.size_classes import SizeClass, Slab

SPACE_TAG_BYTES = 8
"""Leading bytes of a ChunkId: the key space, big-endian."""


class KeySpace:
    """The keys of one SpaceName: `chunks` are resident, `writers` counts unfinished stores.

    `used_bytes`: of the slots of `chunks`.
    """

    __slots__ = ("chunks", "id", "name", "tag", "used_bytes", "writers")

    def __init__(self, space_id: int, name: SpaceName) -> None:
        self.id = space_id
        self.name = name
        self.tag = space_id.to_bytes(SPACE_TAG_BYTES, "big")
        self.chunks: dict[bytes, Chunk] = {}
        self.writers: dict[bytes, int] = {}
        self.used_bytes = 0

    def chunk_id(self, key: bytes) -> ChunkId:
        """Name `key` uniquely over all spaces."""
        return ChunkId(self.tag + key)


class Chunk:
    """One resident chunk. `pins` counts leases that hold it; `user` is the request that used it last.

    `below` has a bit for each lower tier that is known to hold it too, so that it can go first, and
    `offered` one for each that is to get it, or has had its say. `uses` counts the requests that used it,
    beside the one that stored it; `counted` is the last of them.
    `ordered` says whether the policy has it among the evictable ones; `tier.py` brings it in step with
    `pins` before anything is evicted. `dropped`: no longer filed, its slot waits for the last pin.
    """

    __slots__ = (
        "below",
        "counted",
        "dropped",
        "generation",
        "id",
        "key",
        "offered",
        "ordered",
        "pins",
        "size_class",
        "slab",
        "slot_id",
        "space",
        "stamp",
        "user",
        "uses",
    )

    def __init__(
        self,
        space: KeySpace,
        key: bytes,
        slot_id: int,
        generation: int,
        size_class: SizeClass,
        slab: Slab,
        stamp: int,
    ) -> None:
        self.space = space
        self.key = key
        self.id = space.chunk_id(key)
        self.slot_id = slot_id
        self.generation = generation
        self.size_class = size_class
        self.slab = slab
        self.stamp = stamp
        self.pins = 0
        self.below = 0
        self.offered = 0
        self.uses = 0
        self.counted: object | None = None
        self.ordered = True
        self.dropped = False
        self.user: object | None = None


class KeySpaces:
    """All spaces by name and by tag.

    One daemon never uses an id twice. The next one may use that of a space that was forgotten: nothing was
    filed in it, and a record that still names it is retired before anything is stored (`core.adoption`).
    """

    def __init__(self) -> None:
        self._by_name: dict[SpaceName, KeySpace] = {}
        self._by_tag: dict[bytes, KeySpace] = {}
        self._next_id = 1

    def __iter__(self) -> Iterator[KeySpace]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: SpaceName) -> KeySpace | None:
        """Return the space called `name`, if there is one."""
        return self._by_name.get(name)

    def get_or_add(self, name: SpaceName) -> KeySpace:
        """Return the space called `name`, new and empty if there is none."""
        space = self._by_name.get(name)
        return space if space is not None else self.restore(self._next_id, name)

    def restore(self, space_id: int, name: SpaceName) -> KeySpace:
        """Add a space under the id an earlier daemon gave it."""
        assert name not in self._by_name, f"space added twice: {name}"
        space = KeySpace(space_id, name)
        self._by_name[name] = space
        self._by_tag[space.tag] = space
        self._next_id = max(self._next_id, space_id + 1)
        return space

    def of(self, chunk_id: ChunkId) -> tuple[KeySpace, bytes]:
        """Take a ChunkId apart."""
        return self._by_tag[chunk_id[:SPACE_TAG_BYTES]], chunk_id[SPACE_TAG_BYTES:]

    def forget(self, space: KeySpace) -> None:
        """Remove an empty space that nobody uses."""
        assert not space.chunks, f"space {space.name} holds chunks"
        assert not space.writers, f"space {space.name} is written to"
        del self._by_name[space.name], self._by_tag[space.tag]
