"""Which chunks this daemon has put on disk, how large they are, and which goes first.

Owns the order of eviction and the bytes of what this daemon wrote; and a copy of both in sqlite, in a local
directory, which makes a restart warm. The copy is a hint: each chunk file describes itself, a file that is
listed and gone is a miss, and after anything but an orderly end the directories are read again.

The order is by use, the chunk used longest ago first. Uses arrive with the head of a prompt last, so of one
prefix the tail goes before the head.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock

from kvtier_ops.namespace import SpaceName

logger = logging.getLogger(__name__)

SCHEMA = 1
BATCH_ROWS = 10_000

MAX_TOUCHES = 65_536
"""Noted uses that the order does not show yet; the index's thread takes them every second."""

Name = tuple[SpaceName, bytes]


class Entry:
    """One chunk: `is_own` if this daemon wrote it: it counts against the budget and may be evicted."""

    __slots__ = ("is_own", "num_bytes")

    def __init__(self, num_bytes: int, is_own: bool) -> None:
        self.num_bytes = num_bytes
        self.is_own = is_own


class Index:
    """The chunks that are known, in the order of their use. Thread-safe.

    `knows` and `touch` are the core's: they take no lock, which others may hold for long.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: OrderedDict[Name, Entry] = OrderedDict()
        self._keys: dict[SpaceName, set[bytes]] = {}
        """The same by space: one look at a space's name, which costs as much as many keys."""
        self._touched: deque[tuple[SpaceName, Sequence[bytes]]] = deque(maxlen=MAX_TOUCHES)
        """Uses that the order does not show yet."""
        self._changed: dict[Name, Entry | None] = {}
        self.own_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def knows(self, space: SpaceName, keys: Sequence[bytes]) -> list[bool]:
        """Tell which keys are known."""
        known = self._keys.get(space)
        return [key in known for key in keys] if known else [False] * len(keys)

    def add(self, name: Name, num_bytes: int, *, is_own: bool) -> None:
        """Note a chunk as the one used last, after every use that was noted before."""
        with self._lock:
            self._settle()
            self._forget(name)
            self._changed[name] = self._enter(name, num_bytes, is_own)

    def add_if_new(self, name: Name, num_bytes: int, *, is_own: bool) -> None:
        """Note a chunk that was found on disk, as the one used longest ago."""
        with self._lock:
            if name in self._entries:
                return
            self._changed[name] = self._enter(name, num_bytes, is_own)
            self._entries.move_to_end(name, last=False)

    def remove(self, name: Name) -> bool:
        """Forget a chunk; False if it was not known."""
        with self._lock:
            return self._forget(name)

    def _enter(self, name: Name, num_bytes: int, is_own: bool) -> Entry:
        entry = self._entries[name] = Entry(num_bytes, is_own)
        space, key = name
        self._keys.setdefault(space, set()).add(key)
        if is_own:
            self.own_bytes += num_bytes
        return entry

    def _forget(self, name: Name) -> bool:
        entry = self._entries.pop(name, None)
        if entry is None:
            return False
        space, key = name
        self._keys[space].discard(key)
        if not self._keys[space]:
            del self._keys[space]
        if entry.is_own:
            self.own_bytes -= entry.num_bytes
        self._changed[name] = None
        return True

    def touch(self, space: SpaceName, keys: Sequence[bytes]) -> None:
        """Note a use; the first key is to stay longest."""
        self._touched.append((space, keys))

    def settle(self) -> None:
        """Bring the order up to date with the uses that were noted."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        while self._touched:
            space, keys = self._touched.popleft()
            for key in reversed(keys):
                if (space, key) in self._entries:
                    self._entries.move_to_end((space, key))

    def victims(self, num_bytes: int) -> list[Name]:
        """Name own chunks of `num_bytes` together, the ones used longest ago first."""
        found: list[Name] = []
        with self._lock:
            self._settle()
            for name, entry in self._entries.items():
                if num_bytes <= 0:
                    break
                if entry.is_own:
                    found.append(name)
                    num_bytes -= entry.num_bytes
        return found

    def names(self, space: SpaceName | None) -> list[Name]:
        """Name all chunks, or all of one space."""
        with self._lock:
            self._settle()
            return [name for name in self._entries if space is None or name[0] == space]

    def take_changes(self) -> dict[Name, Entry | None]:
        """Return what has come and gone (None) since the last call."""
        with self._lock:
            changed, self._changed = self._changed, {}
        return changed

    def put_back(self, changed: dict[Name, Entry | None]) -> None:
        """Take changes back that could not be written down."""
        with self._lock:
            self._changed = changed | self._changed

    def restore(self, name: Name, num_bytes: int, *, is_own: bool) -> None:
        """Note a chunk as it was written down, as the one used last so far."""
        with self._lock:
            # Written down is surer than what a probe has found meanwhile.
            self._forget(name)
            self._enter(name, num_bytes, is_own)


class IndexFile:
    """The copy in sqlite. One thread at a time uses it; no method raises for a file that is broken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._serial = 0

    def open(self) -> bool:
        """Open it, made anew if it is missing or not to be used. False if the directories have to be read."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            was_closed = self._open()
        except (sqlite3.Error, ValueError) as error:
            logger.warning("the index %s cannot be used (%s); it is made anew", self._path, error)
            self.close()
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self._path}{suffix}").unlink()
            self._open()
            return False
        return was_closed

    def _open(self) -> bool:
        connection = self._connection = sqlite3.connect(self._path, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA):
            raise ValueError(f"schema {version}, not {SCHEMA}")
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS chunk (namespace TEXT, tenant TEXT, epoch TEXT, key BLOB, "
                "num_bytes INTEGER, is_own INTEGER, used INTEGER, "
                "PRIMARY KEY (namespace, tenant, epoch, key)) WITHOUT ROWID"
            )
            connection.execute("CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value INTEGER)")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
            row = connection.execute("SELECT value FROM state WHERE name = 'closed'").fetchone()
            # Until it is closed in order again.
            connection.execute("INSERT OR REPLACE INTO state VALUES ('closed', 0)")
        return bool(row and row[0])

    def read(self) -> Iterator[tuple[Name, int, bool]]:
        """Yield what is written, the chunk used longest ago first. Raises sqlite3.Error if it is broken."""
        assert self._connection is not None, "not open"
        rows = self._connection.execute(
            "SELECT namespace, tenant, epoch, key, num_bytes, is_own, used FROM chunk ORDER BY used"
        )
        for namespace, tenant, epoch, key, num_bytes, is_own, used in rows:
            self._serial = max(self._serial, used)
            yield (SpaceName(namespace, tenant, int(epoch)), key), num_bytes, bool(is_own)

    def write(self, changed: dict[Name, Entry | None]) -> None:
        """Write down what has changed. Raises sqlite3.Error: nothing was written then."""
        if self._connection is None:
            return
        rows = []
        gone = []
        for (space, key), entry in changed.items():
            named = (space.namespace, space.tenant, str(space.epoch), key)
            if entry is None:
                gone.append(named)
            else:
                self._serial += 1
                rows.append((*named, entry.num_bytes, int(entry.is_own), self._serial))
        with self._connection as connection:
            connection.executemany(
                "DELETE FROM chunk WHERE namespace = ? AND tenant = ? AND epoch = ? AND key = ?", gone
            )
            connection.executemany("INSERT OR REPLACE INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def write_order(self, names: Sequence[Name]) -> None:
        """Write down the order of use. Only at the end: one use a second of a million chunks is a lot."""
        if self._connection is None:
            return
        for first in range(0, len(names), BATCH_ROWS):
            rows = []
            for space, key in names[first : first + BATCH_ROWS]:
                self._serial += 1
                rows.append((self._serial, space.namespace, space.tenant, str(space.epoch), key))
            with self._connection as connection:
                connection.executemany(
                    "UPDATE chunk SET used = ? WHERE namespace = ? AND tenant = ? AND epoch = ? AND key = ?",
                    rows,
                )

    def close(self, *, in_order: bool = False) -> None:
        """Close it; `in_order` if everything is written, so that the next start need not read directories."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(sqlite3.Error):
            if in_order:
                with connection:
                    connection.execute("INSERT OR REPLACE INTO state VALUES ('closed', 1)")
        connection.close()
