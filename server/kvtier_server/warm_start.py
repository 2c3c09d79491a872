"""What outlives a daemon in its pool's file besides slots: key spaces and geometries; and reading it back.

Owns the registry's payload. The records are `kvtier_ops.slot_table`'s; what becomes of them is
`core.adoption`'s to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import structlog

from kvtier_ops.layout import SLOT_UNIT_BYTES, TensorLayout
from kvtier_ops.lock_watch import OwnerLocks
from kvtier_ops.namespace import SpaceName
from kvtier_ops.pool import Pool, SlotState
from kvtier_ops.registry import MAX_PAYLOAD_BYTES
from kvtier_server.core.adoption import Adopted, KeptSlot, adopt
from kvtier_server.core.lower_tiers import DAEMON
from kvtier_server.core.namespaces import Geometry
from kvtier_server.core.tiering import Core

PAYLOAD_VERSION = 1

MAX_NAMED = 8
"""Namespaces that one line of the log names."""

_Space = tuple[int, str, str, int]
"""Id, namespace digest, tenant, epoch: a line of the payload."""

log = structlog.get_logger("kvtier.warm_start")


class Registry:
    """Keeps the pool's registry in step with the core's spaces and geometries."""

    def __init__(self, pool: Pool, core: Core) -> None:
        self._pool = pool
        self._core = core
        self._written = b""

    def write(self) -> None:
        """Write what has changed; before anything is published in a new space.

        What does not fit is left out: a space on file always has the geometries of its namespace beside it.
        """
        spaces = [
            (space.id, space.name.namespace, space.name.tenant, space.name.epoch)
            for space in self._core.books.primary.spaces
        ]
        geometries = {
            digest: {
                str(part): [[[t.name, t.page_bytes] for t in tensors] for tensors in geometry]
                for part, geometry in by_part.items()
            }
            for digest, by_part in self._core.geometries().items()
        }
        raw = _payload(spaces, geometries)
        if raw == self._written:
            return
        self._written = raw
        if len(raw) > MAX_PAYLOAD_BYTES:
            fitting = _that_fit(spaces, geometries)
            ids = {space[0] for space in fitting}
            log.warning(
                "registry_full",
                needed_bytes=len(raw),
                limit_bytes=MAX_PAYLOAD_BYTES,
                left_out=sorted({space[1][:12] for space in spaces if space[0] not in ids})[:MAX_NAMED],
                spaces=f"{len(spaces) - len(fitting)} of {len(spaces)} left out",
                effect="their chunks do not survive a restart",
            )
            kept = {space[1] for space in fitting}
            raw = _payload(fitting, {digest: geometries[digest] for digest in geometries if digest in kept})
        self._pool.registry.write(raw)


def _payload(spaces: Sequence[_Space], geometries: Mapping[str, object]) -> bytes:
    return _json_of({"version": PAYLOAD_VERSION, "spaces": spaces, "geometries": geometries})


def _json_of(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _that_fit(spaces: Sequence[_Space], geometries: Mapping[str, object]) -> list[_Space]:
    """Choose spaces that fit together with all geometries of their namespaces: never one without the other.

    Small namespaces first, so that as many as possible stay; of one that does not fit, its newest spaces.
    """
    of_namespace: dict[str, list[_Space]] = {}
    for space in sorted(spaces, key=lambda space: space[0], reverse=True):
        of_namespace.setdefault(space[1], []).append(space)
    entries = {digest: _json_of({digest: geometries.get(digest, {})}) for digest in of_namespace}
    left = MAX_PAYLOAD_BYTES - len(_payload((), {}))
    fitting: list[_Space] = []
    for digest in sorted(of_namespace, key=lambda digest: (len(entries[digest]), digest)):
        num_bytes = len(entries[digest])  # its braces stand for the comma
        for space in of_namespace[digest]:
            num_bytes += len(_json_of(space)) + 1
            if num_bytes > left:
                break
            fitting.append(space)
            left -= num_bytes
            num_bytes = 0
    return fitting


def take_over(pool: Pool, core: Core, locks: OwnerLocks) -> Adopted | None:
    """Serve what an earlier daemon left in a kept pool. None if there is nothing to take over.

    Raises OSError (ENOSPC) if the records cannot be given memory.
    """
    slab_bytes, sizes = pool.slabs.read()
    if not slab_bytes or not any(sizes):
        return None
    core.books.primary.slabs.restore(slab_bytes, sizes)
    spaces, geometries = _read_registry(pool)
    guards = set(locks.hold_all())
    adopted = adopt(core.books, spaces, _slots(pool, core, _parts_known(spaces, geometries)), guards)
    for name in guards.difference(core.books.quarantine.guards):
        locks.let_go(name)  # nothing waits for its end
    # Where no chunk is left, there is nothing that another geometry could contradict.
    left = {space.name.namespace for space in core.books.primary.spaces}
    core.known_geometries.update({digest: known for digest, known in geometries.items() if digest in left})
    return adopted


def _parts_known(
    spaces: Sequence[tuple[int, SpaceName]], geometries: Mapping[str, Mapping[int, Geometry]]
) -> dict[int, int]:
    """By space id, of how many parts, from the first on, the geometry is on file."""
    counts = {}
    for space_id, name in spaces:
        known = geometries.get(name.namespace, {})
        counts[space_id] = next(part for part in count() if part not in known)
    return counts


def _slots(pool: Pool, core: Core, parts_known: Mapping[int, int]) -> Iterator[KeptSlot]:
    for size_class in core.books.primary.slabs.classes.values():
        for slab in size_class.slabs.values():
            pool.back(slab.first_unit * SLOT_UNIT_BYTES, slab.num_units * SLOT_UNIT_BYTES)
            pool.back_records(slab.slot_ids)
            for slot_id in slab.slot_ids:
                yield _kept(pool, slot_id, size_class.slot_bytes, parts_known)


def _kept(pool: Pool, slot_id: int, slot_bytes: int, parts_known: Mapping[int, int]) -> KeptSlot:
    record = pool.slots.read(slot_id)
    if record is not None and record.state is SlotState.RESERVED and record.owner == DAEMON:
        return KeptSlot(slot_id, slot_bytes, is_settled=True)  # what the daemon was writing died with it
    if record is None or record.state in (SlotState.RESERVED, SlotState.QUARANTINED):
        return KeptSlot(slot_id, slot_bytes, is_settled=False)
    if record.state is SlotState.FREE or record.slot_bytes != slot_bytes:
        return KeptSlot(slot_id, slot_bytes, is_settled=True)
    if len(record.checksums) > parts_known.get(record.space_id, 0):
        # Every part of a chunk was written by a worker that told its tensors. Where they are not known any
        # more, an engine that lays out its tensors differently could not be told from its writer.
        return KeptSlot(slot_id, slot_bytes, is_settled=True)
    return KeptSlot(slot_id, slot_bytes, True, record.generation, record.space_id, record.key, record.recency)


def _read_registry(pool: Pool) -> tuple[list[tuple[int, SpaceName]], dict[str, dict[int, Geometry]]]:
    raw = pool.registry.read()
    if raw is None:
        return [], {}
    payload = json.loads(raw)
    if payload.get("version") != PAYLOAD_VERSION:
        return [], {}
    spaces = [
        (space_id, SpaceName(namespace, tenant, epoch))
        for space_id, namespace, tenant, epoch in payload["spaces"]
    ]
    geometries = {
        digest: {
            int(part): tuple(
                tuple(TensorLayout(name, size) for name, size in tensors) for tensors in geometry
            )
            for part, geometry in by_part.items()
        }
        for digest, by_part in payload["geometries"].items()
    }
    return spaces, geometries
