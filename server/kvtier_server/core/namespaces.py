"""Namespaces: the facts an instance attached with, and the geometry registered for each part of a slot.

Owns the comparison of geometries. The digest's rule is `kvtier_ops.namespace`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from kvtier_ops.layout import TensorLayout
from kvtier_ops.namespace import NamespaceFacts
from kvtier_server.core.refused import BadRequest, Refused
from kvtier_server.primary.index import Chunk
from kvtier_server.primary.size_classes import SizeClass

Geometry = tuple[tuple[TensorLayout, ...], ...]
"""Per group, the tensors of one rank in the order of their bytes in a part."""

GROUP_TAIL_BYTES = 4
"""An OffloadKey ends with its group's index, big-endian."""

GEOMETRY_DIGEST_BYTES = 16

MAX_TOLD_CHARS = 128
"""Characters of a tensor's name that a refusal repeats: trailers have little room."""

MIN_KEY_BYTES = 5
MAX_KEY_BYTES = 128
"""What a slot record has room for."""


def check_number_of_keys(keys: Sequence[bytes], max_keys: int, at_least: int = 1) -> None:
    """Raise BadRequest unless a call may have so many keys."""
    if not at_least <= len(keys) <= max_keys:
        raise BadRequest("keys", f"{len(keys)} keys; {at_least} to {max_keys} are allowed in a call")


def check_keys(keys: Sequence[bytes], max_keys: int, at_least: int = 1) -> None:
    """Raise BadRequest unless number and lengths of the keys are allowed."""
    check_number_of_keys(keys, max_keys, at_least)
    lengths = set(map(len, keys))
    if lengths and not (min(lengths) >= MIN_KEY_BYTES and max(lengths) <= MAX_KEY_BYTES):
        wrong = next(i for i, key in enumerate(keys) if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES)
        raise BadRequest(
            f"keys[{wrong}]", f"{len(keys[wrong])} bytes; {MIN_KEY_BYTES} to {MAX_KEY_BYTES} are allowed"
        )


class GeometryMismatch(Refused):
    """A rank's tensors differ from what this namespace has; no byte may be copied."""

    reason = "GEOMETRY_MISMATCH"

    def __init__(self, field: str, registered: object, given: object) -> None:
        registered, given = str(registered)[:MAX_TOLD_CHARS], str(given)[:MAX_TOLD_CHARS]
        super().__init__(
            f"{field} is {given}, but this namespace has {registered}; engines of equal model, dtype and "
            "parallelism must lay out their KV cache alike, or differ in a namespace fact",
            field=field,
            registered=registered,
            given=given,
        )


class Namespace:
    """One set of facts, with the size class of each group."""

    __slots__ = ("_geometry_digest", "classes", "digest", "facts", "geometries", "num_engines", "tails")

    def __init__(self, facts: NamespaceFacts, digest: str, classes: tuple[SizeClass, ...]) -> None:
        self.facts = facts
        self.digest = digest
        self.classes = classes
        self.geometries: dict[int, Geometry] = {}
        """By part: what is loaded by one rank may have been stored by another of the same part."""
        self._geometry_digest: tuple[int, bytes] = (0, b"")
        """Of how many parts, and the digest."""
        self.num_engines = 0
        self.tails = tuple(index.to_bytes(GROUP_TAIL_BYTES, "big") for index in range(len(classes)))

    def part_of(self, rank: int) -> int:
        """Part of a slot that a rank reads: its own, or the only one where ranks hold equal bytes."""
        return 0 if self.facts.num_parts == 1 else rank

    def forget_geometries(self) -> None:
        """Let the next engine register its own."""
        self.geometries.clear()
        self._geometry_digest = (0, b"")

    def geometry_digest(self) -> bytes | None:
        """Digest what lies where in a slot: tensors, their order and sizes, of all parts.

        None while a part is not registered. Chunks below the pool carry it: equal keys under another digest
        are other bytes.
        """
        num_parts = self.facts.num_parts
        if len(self.geometries) < num_parts:
            return None
        if self._geometry_digest[0] != num_parts:
            parts = [
                [[[tensor.name, tensor.page_bytes] for tensor in group] for group in self.geometries[part]]
                for part in range(num_parts)
            ]
            canonical = json.dumps(parts, separators=(",", ":"), ensure_ascii=True).encode()
            self._geometry_digest = (num_parts, hashlib.sha256(canonical).digest()[:GEOMETRY_DIGEST_BYTES])
        return self._geometry_digest[1]

    def register_geometry(self, rank: int, geometry: Geometry) -> None:
        """Compare with the facts and with what was registered first for the rank's part, if anything was.

        Raises GeometryMismatch, naming the field and both values; nothing is registered then.
        """
        groups = self.facts.groups
        if len(geometry) != len(groups):
            raise GeometryMismatch("geometry: number of groups", len(groups), len(geometry))
        for index, (tensors, group) in enumerate(zip(geometry, groups, strict=True)):
            part_bytes = sum(tensor.page_bytes for tensor in tensors) * self.facts.blocks_per_chunk
            if part_bytes != group.part_bytes:
                raise GeometryMismatch(f"geometry[{index}]: bytes of a part", group.part_bytes, part_bytes)
        known = self.geometries.setdefault(self.part_of(rank), geometry)
        if known != geometry:
            self._raise_difference(known, geometry)

    @staticmethod
    def _raise_difference(
        known: Sequence[Sequence[TensorLayout]], given: Sequence[Sequence[TensorLayout]]
    ) -> None:
        for index, (old, new) in enumerate(zip(known, given, strict=True)):
            if len(old) != len(new):
                raise GeometryMismatch(f"geometry[{index}]: number of tensors", len(old), len(new))
            for position, (before, now) in enumerate(zip(old, new, strict=True)):
                for field in ("name", "page_bytes"):
                    if getattr(before, field) != getattr(now, field):
                        raise GeometryMismatch(
                            f"geometry[{index}].tensors[{position}].{field}",
                            getattr(before, field),
                            getattr(now, field),
                        )

    def split(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Ranges [first, end) of each group in group-major keys. Raises BadRequest.

        With a single group the tails are not looked at: keys are opaque then.
        """
        if len(self.tails) == 1:
            return [(0, len(keys))]
        ranges = []
        position = 0
        for tail in self.tails:
            first = position
            while position < len(keys) and keys[position].endswith(tail):
                position += 1
            ranges.append((first, position))
        if position < len(keys):
            raise BadRequest(
                f"keys[{position}]",
                "its last 4 bytes are no group index of this namespace, or groups are mixed",
            )
        return ranges

    def slot_bytes_of(self, chunks: Sequence[Chunk]) -> int:
        """Bytes of the chunks' slots."""
        if len(self.classes) == 1:
            return len(chunks) * self.classes[0].slot_bytes
        return sum(chunk.size_class.slot_bytes for chunk in chunks)

    def fits(self, key: bytes, size_class: SizeClass) -> bool:
        """Whether `key` is well formed, and of a group whose chunks lie in slots of this class."""
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            return False
        tail = key[-GROUP_TAIL_BYTES:]
        return len(self.tails) == 1 or (
            tail in self.tails and self.classes[self.tails.index(tail)] is size_class
        )

    def group_of(self, key: bytes) -> int:
        """Group of one key; 0 where there is only one."""
        return 0 if len(self.tails) == 1 else self.tails.index(key[-GROUP_TAIL_BYTES:])
