"""Which slots a worker may have copied for it.

Owns the answer, and which slots are written at the moment: a copy that another process makes is reported as
its worker's own, through Complete, and what the worker holds is decided there; but not before the copy is
over. That its process may still be writing, as long as a copy runs, is what its lock file says: see
`LockIsFree`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvtier_server.core.books import Books
from kvtier_server.core.instances import Role, Session
from kvtier_server.core.refused import BadRequest


class Transfers:
    """Looks slots up, and notes which ones are written. Changes nothing else."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def check_worker(self, session: Session) -> None:
        """Raise BadRequest unless the session is one that may copy."""
        if session.role is not Role.WORKER:
            raise BadRequest("session_id", "a scheduler's; its workers have the memory")

    def not_writable(
        self, session: Session, slot_ids: Sequence[int], generations: Sequence[int]
    ) -> list[int]:
        """Indexes of the slots that this rank may not write: not reserved for it, or already reported."""
        return [
            index
            for index, (slot_id, generation) in enumerate(zip(slot_ids, generations, strict=True))
            if not self._may_write(session, slot_id, generation)
        ]

    def _may_write(self, session: Session, slot_id: int, generation: int) -> bool:
        reservation = self._books.reservations.get(slot_id)
        namespace = session.instance.namespace
        part = namespace.part_of(session.rank)
        if namespace.facts.num_parts == 1 and session.rank:
            return False  # ranks hold equal bytes, so only rank 0 stores
        return (
            reservation is not None
            and reservation.generation == generation
            and reservation.instance is session.instance
            and bool(reservation.parts_left >> part & 1)
        )

    @contextmanager
    def writing(self, session: Session, slot_ids: Sequence[int]) -> Iterator[None]:
        """Keep this rank's part of the slots from being reported, and the slots from going back,
        meanwhile.
        """
        part = session.instance.namespace.part_of(session.rank)
        written = [(slot_id, part) for slot_id in slot_ids]
        being_written = self._books.being_written
        being_written.update(written)
        try:
            yield
        finally:
            for place in written:
                being_written[place] -= 1
                if not being_written[place]:
                    del being_written[place]

    def not_readable(
        self, session: Session, slot_ids: Sequence[int], generations: Sequence[int]
    ) -> list[int]:
        """Indexes of the slots that hold no chunk of this instance's space."""
        by_slot = self._books.primary.by_slot
        space = session.instance.space
        return [
            index
            for index, (slot_id, generation) in enumerate(zip(slot_ids, generations, strict=True))
            if (chunk := by_slot.get(slot_id)) is None
            or chunk.generation != generation
            or chunk.space is not space
        ]
