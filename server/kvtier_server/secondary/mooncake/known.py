"""Which chunks are in the store, as far as this daemon has heard.

Owns names and sizes, in the memory of the daemon, up to a number of chunks; the ones heard of longest ago are
forgotten first, which makes them unknown and not gone. Nothing here is certain: other nodes store, the master
evicts, nodes die.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.holdings import Holdings

MAX_KNOWN = 262_144
"""Chunks; about 100 MiB of memory when all of it is used."""


class Entry(NamedTuple):
    """One chunk: its object's name, and the object's bytes. `is_own` if this daemon has stored it."""

    object_name: str
    num_bytes: int
    is_own: bool = False


class Known:
    """The chunks that are known. Thread-safe; `knows` takes no lock, for the core calls it."""

    def __init__(self, max_known: int = MAX_KNOWN) -> None:
        self._max_known = max_known
        self._lock = Lock()
        self._entries: OrderedDict[tuple[SpaceName, bytes], Entry] = OrderedDict()
        self._keys: dict[SpaceName, set[bytes]] = {}
        self._places: dict[tuple[SpaceName, bytes], int] = {}
        self.num_bytes = 0
        self.holdings = Holdings()
        """Follows it, for watchers."""

    def __len__(self) -> int:
        return len(self._entries)

    def knows(self, space: SpaceName, keys: Sequence[bytes]) -> list[bool]:
        """Tell which keys are known."""
        known = self._keys.get(space)
        return [key in known for key in keys] if known else [False] * len(keys)

    def add(self, space: SpaceName, key: bytes, entry: Entry) -> None:
        """Note a chunk as the one heard of last."""
        with self._lock:
            before = self._entries.get((space, key))
            if before is None:
                reason = "cascade" if entry.is_own else "found"
                self._places[space, key] = self.holdings.add((space, key), reason)
            else:
                self.num_bytes -= before.num_bytes
                entry = entry._replace(is_own=entry.is_own or before.is_own)
            self._entries[space, key] = entry
            self._entries.move_to_end((space, key))
            self._keys.setdefault(space, set()).add(key)
            self.num_bytes += entry.num_bytes
            if len(self._entries) > self._max_known:
                self._forget(*next(iter(self._entries)), "forgotten")

    def remove(self, space: SpaceName, key: bytes, reason: str) -> bool:
        """Forget a chunk; False if it was not known."""
        with self._lock:
            return self._forget(space, key, reason)

    def entries(self, covers: Callable[[SpaceName], bool]) -> list[tuple[SpaceName, bytes, Entry]]:
        """Return the chunks of some spaces."""
        with self._lock:
            return [(*name, entry) for name, entry in self._entries.items() if covers(name[0])]

    def _forget(self, space: SpaceName, key: bytes, reason: str) -> bool:
        entry = self._entries.pop((space, key), None)
        if entry is None:
            return False
        self.num_bytes -= entry.num_bytes
        self.holdings.remove(self._places.pop((space, key)), reason)
        keys = self._keys[space]
        keys.discard(key)
        if not keys:
            del self._keys[space]
        return True
