"""Taking over the pool of an earlier daemon: what was published is served again.

Owns the rule what a record may become. A record that does not verify, or that somebody may still be
writing, never becomes a chunk: its slot waits until every process that was alive before this daemon is gone,
or has attached with the word that it has no pool mapped, or that its copies have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvtier_ops.namespace import SpaceName
from kvtier_server.core.books import Books


@dataclass(frozen=True, slots=True)
class KeptSlot:
    """What the slot table says of one slot. `is_settled`: free or published; else it may be being written.

    `key` is None unless the record is that of a published chunk.
    """

    slot_id: int
    slot_bytes: int
    is_settled: bool
    generation: int = 0
    space_id: int = 0
    key: bytes | None = None
    recency: int = 0


@dataclass(frozen=True, slots=True)
class Adopted:
    """What became of the slots."""

    published: int
    freed: int
    quarantined: int


def adopt(
    books: Books, spaces: Sequence[tuple[int, SpaceName]], slots: Iterable[KeptSlot], guards: set[str]
) -> Adopted:
    """File the chunks of kept slots, oldest first; free the other slots, or quarantine them behind `guards`.

    `guards` are the locks held by processes that were there before. The division into slabs must have been
    restored, and nothing else done yet.
    """
    known = {space_id: books.primary.spaces.restore(space_id, name) for space_id, name in spaces}
    chunks, free, unsettled = [], [], []
    for slot in slots:
        if slot.key is not None and slot.space_id in known:
            chunks.append((slot.recency, slot.slot_id, slot, slot.key))
        elif slot.is_settled or not guards:
            free.append(slot)
        else:
            unsettled.append(slot)
    published = 0
    for _, _, slot, key in sorted(chunks, key=lambda chunk: chunk[:2]):
        space = known[slot.space_id]
        if key in space.chunks:
            free.append(slot)
            continue
        books.primary.adopt(space, key, slot.slot_id, slot.generation, slot.slot_bytes)
        published += 1
    books.primary.adopt_free([(slot.slot_id, slot.slot_bytes) for slot in free])
    per_class: dict[int, list[int]] = {}
    for slot in unsettled:
        per_class.setdefault(slot.slot_bytes, []).append(slot.slot_id)
    for slot_bytes, slot_ids in per_class.items():
        size_class = books.primary.slabs.classes[slot_bytes]
        books.primary.adopt_quarantined(size_class, slot_ids)
        books.quarantine.add(size_class, slot_ids, guards)
    for space in known.values():
        if not space.chunks:
            books.primary.spaces.forget(space)
    if published:
        books.events.forget_all()  # a watcher that begins with the first event does not have them
    return Adopted(published, len(free), len(unsettled))
