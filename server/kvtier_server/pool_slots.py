"""The pool's file as the core's slot table, and the thread that gives it memory.

Owns the order of backing: slabs are usable from the start of the pool on. Does not decide what is in a slot.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence

import structlog

from kvtier_ops.faults import fault_point
from kvtier_ops.pool import Pool
from kvtier_server.secondary.io_errors import errno_name

log = structlog.get_logger("kvtier.pool")


class PoolSlots:
    """`SlotTable` over a real pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.reserve = pool.slots.reserve
        self.publish = pool.slots.publish
        self.free = pool.slots.free
        self.retire = pool.slots.retire
        self.quarantine = pool.slots.quarantine
        self.write_recency = pool.slots.write_recency
        self.generation = pool.slots.generation
        self.configure_slabs = pool.slabs.configure

    def checksums(self, slot_id: int, num_parts: int) -> tuple[int, ...]:
        """Read the part checksums from the slot's record."""
        return tuple([self._pool.part_checksum(slot_id, part) for part in range(num_parts)])

    def assign_slab(self, slab: int, slot_bytes: int, slot_ids: Sequence[int]) -> None:
        """Write down the slab's class; its records get memory first."""
        if slot_bytes:
            self._pool.back_records(slot_ids)
        self._pool.slabs.assign(slab, slot_bytes)


class PoolPlace:
    """Whether the pool's file is where engines look for it. `problem` says what to do if not; "" = it is."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.problem = ""
        self.io_errors: Mapping[str, int] = {}
        """That the file is gone, counted as an error of the tier."""

    def look(self) -> None:
        """Look once more; a problem stays, as nobody puts the file back."""
        if self.problem or self._pool.is_in_place:
            return
        self.problem = (
            f"{self._pool.path} was removed or replaced by somebody else: engines that are attached go on, "
            f"others cannot map it; restart the daemon: kill {os.getpid()}, then start it as before"
        )
        self.io_errors = {"ENOENT": 1}
        log.error("pool_file_gone", path=str(self._pool.path), fix=f"kill {os.getpid()}, then start it again")


class Backing:
    """Gives the pool its memory, piece by piece, on a thread; `on_piece(bytes so far)` is called there.

    A full file system ends it early: the capacity stays what it is then, and `shortage` says why.
    """

    def __init__(self, pool: Pool, piece_bytes: int, on_piece: Callable[[int], None]) -> None:
        self._pool = pool
        self._piece_bytes = piece_bytes
        self._on_piece = on_piece
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-backing", daemon=True)
        self.shortage = ""
        self.io_errors: Mapping[str, int] = {}
        """The error that ended it, by name."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the piece that is being backed."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        total = self._pool.data_bytes
        done = 0
        while done < total and not self._stop.is_set():
            piece = min(self._piece_bytes, total - done)
            fault_point("backing.before_piece")
            try:
                self._pool.back(done, piece)
            except OSError as error:
                self.io_errors = {errno_name(error): 1}
                self.shortage = f"only {done} of {total} bytes of the pool have memory: {error.strerror}"
                log.error(  # noqa: TRY400 a full file system needs no traceback
                    "pool_short", backed_bytes=done, wanted_bytes=total, why=error.strerror
                )
                return
            done += piece
            self._on_piece(done)
