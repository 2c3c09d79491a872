"""Chunks by time of last use: the part that every recency-based policy is made of.

Owns the order and which chunks are out of it (pinned). Owns no decision about what to evict.

Why not an OrderedDict: stamps arrive out of order all the time. A request takes its stamps at its
lookup; what it pinned comes back, and what it computed is published, after others were touched. So
this is a calendar queue: stamps are cut into buckets of 128, a bucket is a dict (stamp -> chunk), and
a heap holds the bucket numbers. Adding and taking out is two dict operations whatever the order, and
leaves no garbage behind; only the coldest bucket is ever sorted, when victims are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Sequence
from heapq import heapify, heappop, heappush

from kvtier_server.policies.base import ChunkId, MayEvict

# Finding a victim sorts one bucket (128 numbers: 3 us); making one costs a dict and a heap push, so
# much smaller buckets slow down the hot path and much larger ones single evictions.
_BUCKET_SHIFT = 7

# Numbers of emptied buckets stay in the heap until they surface or outnumber the living.
_STALE_NUMBERS = 64

_NONE = -1
_NO_BUCKET: dict[int, ChunkId] = {}  # stays empty: only ever asked and popped from with a default


class _Buckets(dict[int, dict[int, ChunkId]]):
    """Bucket number -> (stamp -> chunk); makes buckets on demand. An emptied bucket is deleted at once."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        super().__init__()
        self._order: list[int] = []

    def __missing__(self, number: int) -> dict[int, ChunkId]:
        order = self._order
        if len(order) > 2 * len(self) + _STALE_NUMBERS:
            order[:] = self
            heapify(order)
        heappush(order, number)
        bucket: dict[int, ChunkId] = {}
        self[number] = bucket
        return bucket

    def coldest(self) -> int | None:
        """Return the smallest number that has a bucket."""
        order = self._order
        while order and order[0] not in self:
            heappop(order)
        return order[0] if order else None

    def check_integrity(self) -> None:
        assert all(self.values()), "an empty bucket was left behind"
        assert set(self) <= set(self._order), "a bucket is missing from the heap"


class RecencyList:
    """Held chunks in order of last use; pinned ones are held but in no bucket.

    Preconditions and stamps are those of `CachePolicy`.
    """

    __slots__ = ("_buckets", "_num_pinned", "_stamps")

    def __init__(self) -> None:
        self._stamps: dict[ChunkId, int] = {}
        self._buckets = _Buckets()
        self._num_pinned = 0

    def __len__(self) -> int:
        """Return the number of held chunks, evictable and pinned."""
        return len(self._stamps)

    @property
    def held(self) -> KeysView[ChunkId]:
        """The held chunks, evictable and pinned; a live view."""
        return self._stamps.keys()

    @property
    def num_pinned(self) -> int:
        return self._num_pinned

    @property
    def num_evictable(self) -> int:
        return len(self._stamps) - self._num_pinned

    def is_evictable(self, chunk_id: ChunkId) -> bool:
        """Return whether the chunk is held and not pinned."""
        stamp = self._stamps.get(chunk_id)
        return stamp is not None and stamp in self._buckets.get(stamp >> _BUCKET_SHIFT, _NO_BUCKET)

    def add(self, chunk_id: ChunkId, stamp: int, *, pinned: bool = False) -> None:
        assert chunk_id not in self._stamps, f"inserted twice: {chunk_id.hex()}"
        self._stamps[chunk_id] = stamp
        if pinned:
            self._num_pinned += 1
            return
        bucket = self._buckets[stamp >> _BUCKET_SHIFT]
        assert stamp not in bucket, f"stamp {stamp} given to two chunks"
        bucket[stamp] = chunk_id

    # The loops below run for every chunk of every lookup. Neighbours in a batch are mostly neighbours
    # in time, so each keeps the bucket of the chunk before and looks up another only when it changes.

    def touch(self, chunk_ids: Iterable[ChunkId], new_stamps: Iterable[int]) -> None:
        stamps, buckets = self._stamps, self._buckets
        number, bucket = _NONE, {}
        target_number, target = _NONE, {}
        for chunk_id, new in zip(chunk_ids, new_stamps, strict=True):
            old = stamps[chunk_id]
            if new <= old:
                continue
            stamps[chunk_id] = new
            if old >> _BUCKET_SHIFT != number:
                number = old >> _BUCKET_SHIFT
                bucket = buckets.get(number, _NO_BUCKET)
            if bucket.pop(old, None) is None:
                continue  # pinned: its new place waits in `stamps`
            if not bucket:
                del buckets[number]
                number = target_number = _NONE  # both could be the one that is gone
            if new >> _BUCKET_SHIFT != target_number:
                target_number = new >> _BUCKET_SHIFT
                target = buckets[target_number]
                number = _NONE  # this bucket may have been missing until now
            assert new not in target, f"stamp {new} given to two chunks"
            target[new] = chunk_id

    def move(self, chunk_ids: Iterable[ChunkId], new_stamps: Iterable[int], other: RecencyList) -> None:
        """Touch chunks and hand them to another list; pinned ones stay pinned."""
        stamps, buckets = self._stamps, self._buckets
        other_stamps, other_buckets = other._stamps, other._buckets
        num_pinned = 0
        for chunk_id, new in zip(chunk_ids, new_stamps, strict=True):
            old = stamps.pop(chunk_id)
            stamp = max(old, new)
            other_stamps[chunk_id] = stamp
            bucket = buckets.get(old >> _BUCKET_SHIFT, _NO_BUCKET)
            if bucket.pop(old, None) is None:
                num_pinned += 1
                continue
            if not bucket:
                del buckets[old >> _BUCKET_SHIFT]
            target = other_buckets[stamp >> _BUCKET_SHIFT]
            assert stamp not in target, f"stamp {stamp} given to two chunks"
            target[stamp] = chunk_id
        self._num_pinned -= num_pinned
        other._num_pinned += num_pinned

    def pin(self, chunk_ids: Sequence[ChunkId]) -> None:
        stamps, buckets = self._stamps, self._buckets
        number, bucket = _NONE, {}
        for chunk_id in chunk_ids:
            stamp = stamps[chunk_id]
            if stamp >> _BUCKET_SHIFT != number:
                number = stamp >> _BUCKET_SHIFT
                bucket = buckets.get(number, _NO_BUCKET)
            assert stamp in bucket, f"pinned twice: {chunk_id.hex()}"
            del bucket[stamp]
            if not bucket:
                del buckets[number]
        self._num_pinned += len(chunk_ids)

    def unpin(self, chunk_ids: Sequence[ChunkId]) -> None:
        stamps, buckets = self._stamps, self._buckets
        number, bucket = _NONE, {}
        for chunk_id in chunk_ids:
            stamp = stamps[chunk_id]
            if stamp >> _BUCKET_SHIFT != number:
                number = stamp >> _BUCKET_SHIFT
                bucket = buckets[number]
            assert stamp not in bucket, f"not pinned, or stamp {stamp} given twice: {chunk_id.hex()}"
            bucket[stamp] = chunk_id
        self._num_pinned -= len(chunk_ids)

    def remove(self, chunk_id: ChunkId) -> None:
        stamp = self._stamps.pop(chunk_id)
        number = stamp >> _BUCKET_SHIFT
        bucket = self._buckets.get(number, _NO_BUCKET)
        if bucket.pop(stamp, None) is None:
            self._num_pinned -= 1
        elif not bucket:
            del self._buckets[number]

    def pop_coldest(self, count: int, may_evict: MayEvict | None = None) -> list[ChunkId]:
        """Let go of up to `count` evictable chunks, coldest first, passing over the excused ones.

        Ends at the first chunk that `may_evict` answers None for.
        """
        victims: list[ChunkId] = []
        excused: list[tuple[int, ChunkId]] = []
        buckets = self._buckets
        try:
            while len(victims) < count and (number := buckets.coldest()) is not None:
                bucket = buckets[number]
                for stamp in sorted(bucket):
                    chunk_id = bucket.pop(stamp)
                    excused.append((stamp, chunk_id))  # until decided, so that a raise loses nothing
                    verdict = may_evict is None or may_evict(chunk_id)
                    if verdict is None:
                        return victims
                    if verdict:
                        excused.pop()
                        del self._stamps[chunk_id]
                        victims.append(chunk_id)
                        if len(victims) == count:
                            break
                if not bucket:
                    del buckets[number]
        finally:
            for stamp, chunk_id in excused:
                buckets[stamp >> _BUCKET_SHIFT][stamp] = chunk_id
        return victims

    def coldest(self, count: int) -> list[ChunkId]:
        """Name up to `count` evictable chunks, coldest first; they stay."""
        named: list[ChunkId] = []
        for number in sorted(self._buckets):
            if len(named) >= count:
                break
            bucket = self._buckets[number]
            named += [bucket[stamp] for stamp in sorted(bucket)[: count - len(named)]]
        return named

    def coldest_stamp(self) -> int | None:
        """Return the stamp of the coldest evictable chunk."""
        number = self._buckets.coldest()
        return None if number is None else min(self._buckets[number])

    def check_integrity(self) -> None:
        """Assert: in order + pinned = held, and every chunk in order is filed under its own stamp."""
        self._buckets.check_integrity()
        in_order = [
            (chunk_id, stamp, number)
            for number, bucket in self._buckets.items()
            for stamp, chunk_id in bucket.items()
        ]
        assert len(in_order) + self._num_pinned == len(self._stamps), (
            f"{len(in_order)} in order + {self._num_pinned} pinned != {len(self._stamps)} held"
        )
        for chunk_id, stamp, number in in_order:
            assert self._stamps.get(chunk_id) == stamp, f"filed under a stale stamp {stamp}: {chunk_id.hex()}"
            assert stamp >> _BUCKET_SHIFT == number, f"stamp {stamp} in bucket {number}"
        assert len(set(self._stamps.values())) == len(self._stamps), "one stamp given to two chunks"
