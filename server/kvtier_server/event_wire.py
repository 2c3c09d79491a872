"""Events and rows of a snapshot as messages, made once for all who are to get them.

Owns the bytes of WatchResponse and SnapshotResponse. Protobuf messages can be joined by joining their bytes:
repeated fields add up, and of the others the last one counts. So an event is made into bytes once, however
many watchers there are, and what a watcher costs is its stream.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.v1 import events_pb2 as pb
from kvtier_ops.namespace import SpaceName
from kvtier_server.core.events import REMOVED, STORED, EventLog, OffloadingEvent
from kvtier_server.core.index_walk import Rows

KINDS = {STORED: pb.EVENT_KIND_STORED, REMOVED: pb.EVENT_KIND_REMOVED}

MAX_EVENT_KEYS, KEY_BYTES = 1_024, 512
"""Of one event: some 40 KiB as keys usually are, and no more than a message has room for. A key takes 130
bytes at most, and where each is of another tenant, 400."""

MAX_BATCH_KEYS = 2_048
EVENT_COST = 16
"""What an event costs beside its keys, in keys. A batch takes half a millisecond."""

LOOK_COST = 1
"""What an event of another namespace costs, likewise."""

MAX_CACHED_BATCHES = 64
MAX_CACHED_BYTES = 8 << 20
"""Watchers that keep up ask for the same batch within a tenth of a second."""

REASON = "snapshot"


def max_keys_of_a_message(max_message_bytes: int) -> int:
    """Return how many keys an event, or a slice of a snapshot, may have."""
    return min(MAX_EVENT_KEYS, max_message_bytes // KEY_BYTES)


@dataclass(frozen=True, slots=True)
class Batch:
    """Events from one sequence number to another, `end`, which is not in it. `wire` is empty without any."""

    end: int
    wire: bytes


class Batches:
    """The events of a log, in batches for watchers."""

    def __init__(self, log: EventLog, boot_id: str, max_message_bytes: int) -> None:
        self._log = log
        self._boot_id = boot_id
        self._max_bytes = max_message_bytes // 2
        """Above the largest event; with one more event it is a message still."""
        self._cached: OrderedDict[tuple[int, str], Batch] = OrderedDict()
        self._cached_bytes = 0

    def get(self, first: int, namespace: str) -> Batch:
        """Return the next events from `first` on, which must be one that is kept; "" = of all namespaces."""
        batch = self._cached.get((first, namespace))
        if batch is not None:
            return batch
        batch = self._make(first, namespace)
        self._cached[first, namespace] = batch
        self._cached_bytes += len(batch.wire)
        while len(self._cached) > MAX_CACHED_BATCHES or self._cached_bytes > MAX_CACHED_BYTES:
            _, oldest = self._cached.popitem(last=False)
            self._cached_bytes -= len(oldest.wire)
        return batch

    def _make(self, first: int, namespace: str) -> Batch:
        pieces: list[bytes] = []
        num_bytes, cost = 0, 0
        sequence, end = first, self._log.next_sequence
        while sequence < end and cost < MAX_BATCH_KEYS:
            event = self._log.get(sequence)
            cost += LOOK_COST
            if namespace in ("", event.space.namespace):
                piece = _event_bytes(event)
                if pieces and num_bytes + len(piece) > self._max_bytes:
                    break
                pieces.append(piece)
                num_bytes += len(piece)
                cost += EVENT_COST + len(event.keys)
            sequence += 1
        if not pieces:
            return Batch(sequence, b"")
        return Batch(sequence, b"".join([*pieces, self.heartbeat(sequence)]))

    def heartbeat(self, next_sequence: int) -> bytes:
        """Return the message of a watcher to whom there is nothing to tell."""
        return pb.WatchResponse(boot_id=self._boot_id, next_sequence=next_sequence).SerializeToString()

    def overflow(self, next_sequence: int) -> bytes:
        """Return the message of a watcher whose events are gone."""
        told = pb.WatchResponse(boot_id=self._boot_id, overflow=True, next_sequence=next_sequence)
        return told.SerializeToString()


def _event_bytes(event: OffloadingEvent) -> bytes:
    told = _event(event.space, event.tier, event.reason, event.keys, KINDS[event.kind], event.sequence)
    return pb.WatchResponse(events=[told]).SerializeToString()


def _event(
    space: SpaceName,
    tier: str,
    reason: str,
    keys: Sequence[bytes],
    kind: pb.EventKind.ValueType,
    sequence: int = 0,
) -> pb.OffloadingEvent:
    return pb.OffloadingEvent(
        sequence=sequence,
        kind=kind,
        namespace=space.namespace,
        tenant=space.tenant,
        epoch=space.epoch,
        tier=tier,
        reason=reason,
        keys=keys,
    )


def snapshot_rows(boot_id: str, rows: Rows) -> bytes:
    """Return the message of a slice of a snapshot."""
    events = [_event(space, tier, REASON, keys, pb.EVENT_KIND_STORED) for (tier, space), keys in rows.items()]
    return pb.SnapshotResponse(boot_id=boot_id, events=events).SerializeToString()
