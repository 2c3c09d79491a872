"""What orders a copy after the engine's compute: the border, and a number in shared memory that keeps it.

Owns both; the event of a device is `cuda_export.py`'s.

Why the order holds. Before: the engine records *before* it asks for the copy, and whoever copies waits for
the record *after* it has read the request, so that it waits for this record or a later one. After: a job is
answered when its last byte has arrived, and the engine uses the blocks of a load after the answer only. The
blocks of a store the engine leaves alone until the answer too; where it gives a store up instead (its stream
is lost), it may overwrite them while they are read, and what comes of that is never published.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvtier_ops.ipc import (
    HandleError,
    MemoryHandle,
    MemoryKind,
    SharedAllocation,
    open_shared,
    remove_orphan,
)

TIMELINE_BYTES = 8


class ComputeEvent(Protocol):
    """What an engine's compute reaches before a copy of its blocks may begin."""

    handle: bytes
    """What RegisterMemory is told."""

    def record(self) -> int:
        """Mark what the compute was given so far. Returns the value that a copy is to wait for, 0 where the
        event itself says it. On the engine's thread, before the copy is asked for. Raises HandleError.
        """
        ...

    def close(self) -> None:
        """Let go of it, after the registration that names it was closed. Safe to repeat."""
        ...


class SharedTimeline:
    """An engine's progress as a number in shared memory: `ComputeEvent` of engines on the CPU and of tests.

    Copies wait for `reached` to come to the value of their record; it only grows.
    """

    def __init__(self) -> None:
        """Make it. Raises OSError."""
        self._memory = SharedAllocation(TIMELINE_BYTES)
        self._value = self._memory.data.view(np.uint64)
        self.handle = self._memory.name.encode()
        self._recorded = 0

    def record(self) -> int:
        self._recorded += 1
        return self._recorded

    @property
    def recorded(self) -> int:
        """The last value that was given out."""
        return self._recorded

    def reach(self, value: int) -> None:
        """Let go on what waits for `value`, and for less."""
        self._value[0] = value

    def close(self) -> None:
        self._memory.close()


class OpenedTimeline:
    """A SharedTimeline of another process, to be read."""

    def __init__(self, handle: bytes) -> None:
        """Map it. Raises HandleError."""
        self.memory = MemoryHandle(
            MemoryKind.POSIX_SHM, b"", handle, TIMELINE_BYTES, 0, TIMELINE_BYTES, TIMELINE_BYTES, 1
        )
        try:
            self.memory.check(TIMELINE_BYTES)
            self._value = open_shared(self.memory).view(np.uint64)
        except HandleError as error:
            raise HandleError(f"event_handle: {error}") from error

    def has_reached(self, value: int) -> bool:
        """Tell whether the engine's compute has come so far."""
        return int(self._value[0]) >= value

    def is_abandoned(self) -> bool:
        """Tell whether its engine is gone, so that it reaches nothing more. Removes its file then."""
        return remove_orphan(self.memory)
