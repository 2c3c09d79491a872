"""What outlives a daemon in its pool's file besides slots: key spaces and geometries; and reading it back.

Owns the registry's payload. The records are `kvtier_ops.slot_table`'s; what becomes of them is
`core.adoption`'s to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import structlog

from kvtier_ops.layout import SLOT_UNIT_BYTES, TensorLayout
from kvtier_ops.locks import held_owner_locks
from kvtier_ops.namespace import SpaceName
from kvtier_ops.pool import Pool, SlotState
from kvtier_server.core.adoption import Adopted, KeptSlot, adopt
from kvtier_server.core.lower_tiers import DAEMON
from kvtier_server.core.namespaces import Geometry
from kvtier_server.core.tiering import Core

PAYLOAD_VERSION = 1

log = structlog.get_logger("kvtier.warm_start")


class Registry:
    """Keeps the pool's registry in step with the core's spaces and geometries."""

    def __init__(self, pool: Pool, core: Core) -> None:
        self._pool = pool
        self._core = core
        self._written = b""

    def write(self) -> None:
        """Write what has changed; before anything is published in a new space."""
        spaces = [
            [space.id, space.name.namespace, space.name.tenant, space.name.epoch]
            for space in self._core.books.primary.spaces
        ]
        geometries = {
            digest: {
                str(part): [[[t.name, t.page_bytes] for t in tensors] for tensors in geometry]
                for part, geometry in by_part.items()
            }
            for digest, by_part in self._core.geometries().items()
        }
        payload = {"version": PAYLOAD_VERSION, "spaces": spaces, "geometries": geometries}
        raw = json.dumps(payload, separators=(",", ":")).encode()
        if raw == self._written:
            return
        try:
            self._pool.registry.write(raw)
        except ValueError as error:
            log.warning("registry_full", why=str(error), effect="newer namespaces do not survive a restart")
        self._written = raw


def take_over(pool: Pool, core: Core) -> Adopted | None:
    """Serve what an earlier daemon left in a kept pool. None if there is nothing to take over.

    Raises OSError (ENOSPC) if the records cannot be given memory.
    """
    slab_bytes, sizes = pool.slabs.read()
    if not slab_bytes or not any(sizes):
        return None
    core.books.primary.slabs.restore(slab_bytes, sizes)
    spaces, geometries = _read_registry(pool)
    guards = set(held_owner_locks(pool.directory))
    adopted = adopt(core.books, spaces, _slots(pool, core), guards)
    # Where no chunk is left, there is nothing that another geometry could contradict.
    left = {space.name.namespace for space in core.books.primary.spaces}
    core.known_geometries.update({digest: known for digest, known in geometries.items() if digest in left})
    return adopted


def _slots(pool: Pool, core: Core) -> Iterator[KeptSlot]:
    for size_class in core.books.primary.slabs.classes.values():
        for slab in size_class.slabs.values():
            pool.back(slab.first_unit * SLOT_UNIT_BYTES, slab.num_units * SLOT_UNIT_BYTES)
            pool.back_records(slab.slot_ids)
            for slot_id in slab.slot_ids:
                yield _kept(pool, slot_id, size_class.slot_bytes)


def _kept(pool: Pool, slot_id: int, slot_bytes: int) -> KeptSlot:
    record = pool.slots.read(slot_id)
    if record is not None and record.state is SlotState.RESERVED and record.owner == DAEMON:
        return KeptSlot(slot_id, slot_bytes, is_settled=True)  # what the daemon was writing died with it
    if record is None or record.state in (SlotState.RESERVED, SlotState.QUARANTINED):
        return KeptSlot(slot_id, slot_bytes, is_settled=False)
    if record.state is SlotState.FREE or record.slot_bytes != slot_bytes:
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
