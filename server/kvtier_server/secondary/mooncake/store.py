"""The store of objects below the tier: the seam between what the tier decides and who moves the bytes.

Owns the interface. `engine.py` is the real one; tests have one in memory that fails as they say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class ObjectStore(ABC):
    """Objects of a header and a chunk. Calls wait, at most their timeout; any thread may call.

    A call returns what Mooncake returns (`codes.py`), and raises OSError when nobody knows what became of it.
    Either way nothing touches the slot any more when it has come back.
    """

    headers: memoryview
    """The area of headers, `wire.HEADER_BYTES` each: a caller uses one of its own in each call."""

    @abstractmethod
    def put(self, name: str, header: int, offset: int, num_bytes: int) -> int:
        """Store a header and the pool's bytes, which may be none, as one object. One that is there stays."""

    @abstractmethod
    def get(self, name: str, header: int, offset: int, num_bytes: int) -> int:
        """Read an object into a header and the pool; returns its length, the header included."""

    @abstractmethod
    def exists(self, name: str) -> int:
        """Ask whether an object is there: 1, 0, or a code. No more than a hint: a get tells."""

    @abstractmethod
    def remove(self, name: str) -> int:
        """Remove an object, whoever reads it."""

    @abstractmethod
    def keep(self) -> str:
        """Do what has to be done now and then: look whether the store is there, and begin again if need be.

        Called by one thread. Returns what is wrong, "" if nothing is.
        """

    @abstractmethod
    def close(self, timeout_s: float) -> bool:
        """End it: calls that wait fail. False if something could not be ended. May be called again."""
