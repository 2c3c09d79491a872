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
from heapq import heappop, heappush, heapreplace
from itertools import islice
from pathlib import Path
from threading import Lock
from time import monotonic, sleep

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.holdings import Holdings, Name

logger = logging.getLogger(__name__)

SCHEMA = 1
BATCH_ROWS = 10_000

MAX_TOUCHED_KEYS = 1 << 19
"""Keys with uses that the order does not show yet, 44 MiB; the oldest are forgotten first: only the order
suffers."""

WORK_S, REST_S = 3e-4, 3e-4
"""Long work goes on for so long, then rests: who wants the interpreter's lock from a thread that does not
rest waits 5 ms for it."""

FOUND_STAMP, RESTORED_STAMP = -(1 << 62), -(1 << 61)
"""What was only found on disk counts as used before everything else; what an earlier daemon wrote down, in
its order, as used before anything that this one has seen."""

STALE_PLACES = 1_024
"""Places in the order whose chunk is gone, before they are swept."""

SWEPT_AT_ONCE = 512

MAX_OTHERS = 1 << 20
"""Chunks of others that are known: some 200 MiB."""


class _Rest:
    """Makes long work rest now and then."""

    def __init__(self) -> None:
        self._at = monotonic() + WORK_S

    def now_and_then(self) -> None:
        if monotonic() >= self._at:
            sleep(REST_S)
            self._at = monotonic() + WORK_S


class Entry:
    """One chunk: `is_own` if this daemon wrote it: it counts against the budget and may be evicted.

    `stamp`: of its last use. `number`: of its place in the order, unique; 0 while it is a victim.
    `place`: among the holdings.
    """

    __slots__ = ("is_own", "num_bytes", "number", "place", "stamp")

    def __init__(self, num_bytes: int, is_own: bool, stamp: int, number: int, place: int) -> None:
        self.num_bytes = num_bytes
        self.is_own = is_own
        self.stamp = stamp
        self.number = number
        self.place = place


class Index:
    """The chunks that are known, in the order of their use. Thread-safe.

    `knows` and `touch` are the core's: they take no lock, which others may hold for long.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._spaces: dict[SpaceName, dict[bytes, Entry]] = {}
        """By space first: one look at a space's name costs as much as many keys."""
        self._order: list[tuple[int, int, Name]] = []
        """A heap of the own chunks' places (stamp, number), one each but for victims. A use leaves the place
        where it is: it is put right when it comes to the front."""
        self._num_places = 0
        self._num_restored = 0
        self._num_chunks = 0
        self._touched: deque[tuple[SpaceName, Sequence[bytes], Sequence[int]]] = deque()
        """Uses that the stamps do not show yet."""
        self._keys_noted = self._keys_settled = 0
        """Keys of all uses that came, which only the core counts, and of those that are settled."""
        self._changed: dict[Name, Entry | None] = {}
        self.has_lost_changes = False
        """Whether changes were given up that were never written down: a copy of it misses chunks for good."""
        self.own_bytes = 0
        self.num_others = 0
        self.holdings = Holdings()
        """Follows it, for watchers."""

    def __len__(self) -> int:
        return self._num_chunks

    def size_of(self, name: Name) -> int:
        """Return the bytes of a chunk; 0 if it is not known."""
        with self._lock:
            entry = self._get(name)
            return 0 if entry is None else entry.num_bytes

    def knows(self, space: SpaceName, keys: Sequence[bytes]) -> list[bool]:
        """Tell which keys are known."""
        known = self._spaces.get(space)
        return [key in known for key in keys] if known else [False] * len(keys)

    def add(self, name: Name, num_bytes: int, *, is_own: bool, stamp: int) -> None:
        """Note a chunk that was written, and when it was used last."""
        with self._lock:
            self._changed[name] = self._put(name, num_bytes, is_own, stamp, "cascade")

    def add_if_new(self, name: Name, num_bytes: int, *, is_own: bool) -> None:
        """Note a chunk that was found, as one used longest ago."""
        with self._lock:
            if self._get(name) is None:
                self._changed[name] = self._put(name, num_bytes, is_own, FOUND_STAMP, "found")

    def remove(self, name: Name, reason: str = "evict") -> bool:
        """Forget a chunk; False if it was not known."""
        with self._lock:
            return self._forget(name, reason)

    def _get(self, name: Name) -> Entry | None:
        space, key = name
        entries = self._spaces.get(space)
        return entries.get(key) if entries else None

    def _put(self, name: Name, num_bytes: int, is_own: bool, stamp: int, reason: str) -> Entry:
        """Enter a chunk; one that is known keeps its place among the holdings."""
        before = self._take_out(name)
        place = self.holdings.add(name, reason) if before is None else before.place
        space, key = name
        self._num_places += 1
        entry = Entry(num_bytes, is_own, stamp, self._num_places, place)
        self._spaces.setdefault(space, {})[key] = entry
        self._num_chunks += 1
        if is_own:
            self.own_bytes += num_bytes
            heappush(self._order, (stamp, entry.number, name))
        else:
            self.num_others += 1
        return entry

    def _entries(self) -> Iterator[tuple[Name, Entry]]:
        for space, entries in self._spaces.items():
            for key, entry in entries.items():
                yield (space, key), entry

    def _forget(self, name: Name, reason: str) -> bool:
        entry = self._take_out(name)
        if entry is None:
            return False
        self.holdings.remove(entry.place, reason)
        self._changed[name] = None
        return True

    def _take_out(self, name: Name) -> Entry | None:
        space, key = name
        entries = self._spaces.get(space)
        entry = entries.pop(key, None) if entries else None
        if entry is None:
            return None
        if not entries:
            del self._spaces[space]
        self._num_chunks -= 1
        if entry.is_own:
            self.own_bytes -= entry.num_bytes
        else:
            self.num_others -= 1
        return entry

    def touch(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        """Note uses."""
        self._touched.append((space, keys, stamps))
        self._keys_noted += len(keys)
        while self._keys_noted - self._keys_settled > MAX_TOUCHED_KEYS:
            with contextlib.suppress(IndexError):  # they are being settled
                self._keys_noted -= len(self._touched.popleft()[1])

    def settle(self) -> None:
        """Bring the stamps up to date with the uses that were noted until now. Takes its time."""
        rest = _Rest()
        for _ in range(len(self._touched)):
            with self._lock:
                if not self._touched:
                    return
                self._settle(*self._touched.popleft())
            rest.now_and_then()

    def _settle(self, space: SpaceName, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        self._keys_settled += len(keys)
        entries = self._spaces.get(space)
        if not entries:
            return
        for key, stamp in zip(keys, stamps, strict=True):
            entry = entries.get(key)
            if entry is not None and stamp > entry.stamp:
                entry.stamp = stamp

    def sweep(self) -> None:
        """Drop the places whose chunk is gone, where they are most of all. Takes its time.

        Meanwhile victims may be others than the ones used longest ago. For one thread at a time.
        """
        with self._lock:
            if len(self._order) < 2 * self._num_chunks + STALE_PLACES:
                return
            places, self._order = self._order, []
        rest = _Rest()
        while places:
            some = places[-SWEPT_AT_ONCE:]
            del places[-SWEPT_AT_ONCE:]
            with self._lock:
                for place in some:
                    if self._of_place(place) is not None:
                        heappush(self._order, place)
            rest.now_and_then()

    def _of_place(self, place: tuple[int, int, Name]) -> Entry | None:
        """Return the chunk of a place; None if it is gone."""
        _, number, name = place
        entry = self._get(name)
        return entry if entry is not None and entry.number == number else None

    def victims(self, num_bytes: int) -> list[Name]:
        """Take own chunks of `num_bytes` together out of the order, the ones used longest ago first.

        Each is named once: whoever asks removes it, or hands it to `keep`. Takes its time.
        """
        self.settle()
        found: list[Name] = []
        rest = _Rest()
        while num_bytes > 0:
            with self._lock:
                if not self._order:
                    break
                place = self._order[0]
                entry = self._of_place(place)
                if entry is not None and entry.stamp > place[0]:
                    heapreplace(self._order, (entry.stamp, entry.number, place[2]))
                else:
                    heappop(self._order)
                    if entry is not None:
                        entry.number = 0
                        found.append(place[2])
                        num_bytes -= entry.num_bytes
            rest.now_and_then()
        return found

    def keep(self, names: Sequence[Name]) -> None:
        """Put victims that could not be removed back into the order, where they were."""
        with self._lock:
            for name in names:
                entry = self._get(name)
                if entry is not None and not entry.number:
                    self._num_places += 1
                    entry.number = self._num_places
                    heappush(self._order, (entry.stamp, entry.number, name))

    def limit_others(self, most: int) -> None:
        """Forget chunks that others wrote where there are more than `most`, the first in the first space.

        They are where they were, and a probe finds them.
        """
        with self._lock:
            too_many = self.num_others - most
            if too_many <= 0:
                return
            others = (name for name, entry in self._entries() if not entry.is_own)
            for name in list(islice(others, too_many)):
                self._forget(name, "forgotten")

    def names(self) -> list[Name]:
        """Name all chunks, the ones used longest ago first."""
        self.settle()
        with self._lock:
            ordered = sorted((entry.stamp, entry.number, name) for name, entry in self._entries())
            return [name for _, _, name in ordered]

    def covered_by(self, covers: Callable[[SpaceName], bool]) -> list[tuple[Name, int, bool]]:
        """Name the chunks of some spaces, each with its bytes and whether this daemon wrote it."""
        with self._lock:
            spaces = [space for space in self._spaces if covers(space)]
            return [
                ((space, key), entry.num_bytes, entry.is_own)
                for space in spaces
                for key, entry in self._spaces[space].items()
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

    def limit_changes(self, most_gone: int) -> bool:
        """Give up all changes where they are more than twice the chunks and `most_gone`. True if it did."""
        with self._lock:
            if len(self._changed) <= 2 * self._num_chunks + most_gone:
                return False
            self._changed = {}
            self.has_lost_changes = True
            return True

    def restore(self, name: Name, num_bytes: int, *, is_own: bool) -> None:
        """Note a chunk as it was written down: used after those restored before it, and before all others."""
        with self._lock:
            known = self._get(name)
            if known is not None and known.stamp >= 0:
                return  # stored or used meanwhile
            # Written down is surer than what a probe has found.
            self._num_restored += 1
            entry = self._put(name, num_bytes, is_own, RESTORED_STAMP + self._num_restored, "found")
            if known is not None or name in self._changed:
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
