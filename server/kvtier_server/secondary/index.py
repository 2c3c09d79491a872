"""Which chunks this daemon has put into a tier, how large they are, and which goes first.

Owns the order of eviction and the bytes of what this daemon wrote; and a copy of both in sqlite, in a local
directory, which makes a restart warm. The copy is a hint: each chunk describes itself, one that is listed and
gone is a miss, and what an end out of order may have cost is the tier's to find.

The order is by use, the chunk used longest ago first. A store brings the time of its last use along, and of
one request the head counts as used last, so a prefix goes from its end however its chunks came here.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from pathlib import Path
from threading import Lock

from kvtier_ops.namespace import SpaceName

logger = logging.getLogger(__name__)

SCHEMA = 1
BATCH_ROWS = 10_000

MAX_TOUCHES = 65_536
"""Noted uses that the order does not show yet; the index's thread takes them every second."""

FOUND_STAMP, RESTORED_STAMP = -(1 << 62), -(1 << 61)
"""What was only found on disk counts as used before everything else; what an earlier daemon wrote down, in
its order, as used before anything that this one has seen."""

STALE_PLACES = 1_024
"""Places in the order that nothing is at any more, before they are swept."""

MAX_OTHERS = 1 << 20
"""Chunks of others that are known, the ones found longest ago forgotten first: some 200 MiB."""

Name = tuple[SpaceName, bytes]


class Entry:
    """One chunk: `is_own` if this daemon wrote it: it counts against the budget and may be evicted.

    `place` is where it is in the order of eviction: (stamp of its last use, a number of its own).
    """

    __slots__ = ("is_own", "num_bytes", "place")

    def __init__(self, num_bytes: int, is_own: bool, place: tuple[int, int]) -> None:
        self.num_bytes = num_bytes
        self.is_own = is_own
        self.place = place


class Index:
    """The chunks that are known, in the order of their use. Thread-safe.

    `knows` and `touch` are the core's: they take no lock, which others may hold for long.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: dict[Name, Entry] = {}
        self._order: list[tuple[int, int, Name]] = []
        """A heap of the own chunks' places. One that is not its chunk's place any more is stale."""
        self._num_places = 0
        self._num_restored = 0
        self._keys: dict[SpaceName, set[bytes]] = {}
        """The same by space: one look at a space's name, which costs as much as many keys."""
        self._touched: deque[tuple[SpaceName, Sequence[bytes], Sequence[int]]] = deque(maxlen=MAX_TOUCHES)
        """Uses that the order does not show yet."""
        self._changed: dict[Name, Entry | None] = {}
        self.own_bytes = 0
        self.num_others = 0

    def __len__(self) -> int:
        return len(self._entries)

    def knows(self, space: SpaceName, keys: Sequence[bytes]) -> list[bool]:
        """Tell which keys are known."""
        known = self._keys.get(space)
        return [key in known for key in keys] if known else [False] * len(keys)

    def add(self, name: Name, num_bytes: int, *, is_own: bool, stamp: int) -> None:
        """Note a chunk that was written, and when it was used last."""
        with self._lock:
            self._forget(name)
            self._changed[name] = self._enter(name, num_bytes, is_own, stamp)

    def add_if_new(self, name: Name, num_bytes: int, *, is_own: bool) -> None:
        """Note a chunk that was found, as one used longest ago."""
        with self._lock:
            if name not in self._entries:
                self._changed[name] = self._enter(name, num_bytes, is_own, FOUND_STAMP)

    def remove(self, name: Name) -> bool:
        """Forget a chunk; False if it was not known."""
        with self._lock:
            return self._forget(name)

    def _enter(self, name: Name, num_bytes: int, is_own: bool, stamp: int) -> Entry:
        entry = self._entries[name] = Entry(num_bytes, is_own, (stamp, 0))
        space, key = name
        self._keys.setdefault(space, set()).add(key)
        if is_own:
            self.own_bytes += num_bytes
        else:
            self.num_others += 1
        self._move(name, entry, stamp)
        return entry

    def _move(self, name: Name, entry: Entry, stamp: int) -> None:
        """Give a chunk its place in the order."""
        self._num_places += 1
        entry.place = (stamp, self._num_places)
        if not entry.is_own:
            return  # nobody evicts it
        if len(self._order) >= 2 * len(self._entries) + STALE_PLACES:
            self._order = [(*other.place, own) for own, other in self._entries.items() if other.is_own]
            heapify(self._order)
        else:
            heappush(self._order, (*entry.place, name))

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
        else:
            self.num_others -= 1
        self._changed[name] = None
        return True

    def touch(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        """Note uses."""
        self._touched.append((space, keys, stamps))

    def settle(self) -> None:
        """Bring the order up to date with the uses that were noted."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        while self._touched:
            space, keys, stamps = self._touched.popleft()
            for key, stamp in zip(keys, stamps, strict=True):
                entry = self._entries.get((space, key))
                if entry is not None and stamp > entry.place[0]:
                    self._move((space, key), entry, stamp)

    def victims(self, num_bytes: int) -> list[Name]:
        """Take own chunks of `num_bytes` together out of the order, the ones used longest ago first.

        Each is named once: whoever asks removes it, or hands it to `keep`.
        """
        found: list[Name] = []
        with self._lock:
            self._settle()
            while self._order and num_bytes > 0:
                *place, name = heappop(self._order)
                entry = self._entries.get(name)
                if entry is not None and entry.place == tuple(place):
                    found.append(name)
                    num_bytes -= entry.num_bytes
        return found

    def keep(self, names: Sequence[Name]) -> None:
        """Put victims that could not be removed back into the order, where they were."""
        with self._lock:
            for name in names:
                entry = self._entries.get(name)
                if entry is not None and entry.is_own:
                    heappush(self._order, (*entry.place, name))

    def limit_others(self, most: int) -> None:
        """Forget chunks that others wrote, the ones found longest ago, where there are more than `most`.

        They are where they were, and a probe finds them.
        """
        with self._lock:
            too_many = self.num_others - most
            if too_many <= 0:
                return
            others = (name for name, entry in self._entries.items() if not entry.is_own)
            for name in list(islice(others, too_many)):
                self._forget(name)

    def names(self) -> list[Name]:
        """Name all chunks, the ones used longest ago first."""
        with self._lock:
            self._settle()
            return sorted(self._entries, key=lambda name: self._entries[name].place)

    def covered_by(self, covers: Callable[[SpaceName], bool]) -> list[tuple[Name, int, bool]]:
        """Name the chunks of some spaces, each with its bytes and whether this daemon wrote it."""
        with self._lock:
            spaces = {space for space in self._keys if covers(space)}
            return [
                (name, entry.num_bytes, entry.is_own)
                for name, entry in self._entries.items()
                if name[0] in spaces
            ]

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
            self._num_restored += 1
            entry = self._enter(name, num_bytes, is_own, RESTORED_STAMP + self._num_restored)
            if name in self._changed:
                self._changed[name] = entry


class IndexFile:
    """The copy in sqlite. One thread at a time uses it. `open` makes a broken file anew; others raise."""

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
