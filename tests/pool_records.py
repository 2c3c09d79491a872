"""What a pool's file says is published, read beside its daemon."""

from __future__ import annotations

import json
from pathlib import Path

from kvtier_ops.header import HEADER_BYTES, read_header
from kvtier_ops.layout import SLOT_UNIT_BYTES
from kvtier_ops.pool import MappedPool, SlotState

Published = tuple[str, str, int, bytes]
"""Namespace, tenant, epoch and key."""


def published_in(path: Path) -> set[Published]:
    """Read the slot records of a pool whose daemon is at rest."""
    with path.open("rb") as file:
        header = read_header(file.read(HEADER_BYTES), path.stat().st_size)
    pool = MappedPool.open(path, header.pool_id)
    try:
        raw = pool.registry.read()
        spaces = {space[0]: space[1:] for space in json.loads(raw)["spaces"]} if raw else {}
        slab_bytes, sizes = pool.slabs.read()
        found = set()
        for slab, slot_bytes in enumerate(sizes):
            end = min((slab + 1) * slab_bytes, header.data_bytes)
            for offset in range(slab * slab_bytes, end, slot_bytes) if slot_bytes else ():
                record = pool.slots.read(offset // SLOT_UNIT_BYTES)
                if record is not None and record.state is SlotState.PUBLISHED:
                    namespace, tenant, epoch = spaces[record.space_id]
                    found.add((namespace, tenant, epoch, record.key))
        return found
    finally:
        pool.close()
