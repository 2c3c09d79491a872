"""What the core remembers of an engine's unfinished requests: parameters, recency, lookup leases.

Owns when a request counts as a use of a chunk: once, by its place in the request, whichever of Lookup,
PrepareLoad and publish comes first. Within a request the tail is older than the head, so a prefix is evicted
from its end; chunks stored by a request stand where the request's lookup put them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvtier_server.core.refused import Inflight
from kvtier_server.secondary.base import Locality, Medium

LOAD_TIERS = "kv_load_tiers"
"""vLLM's parameter: a list of {"medium": ..., "locality": ...}, each part optional; [] = load nothing."""


class Request:
    """One unfinished request of one instance."""

    __slots__ = (
        "_load_tiers",
        "_stamps",
        "holds_chunks",
        "id",
        "lookup_leases",
        "num_keys",
        "params",
        "runs",
        "serial",
    )

    def __init__(self, request_id: str, serial: int) -> None:
        self.id = request_id
        self.serial = serial
        self.params: bytes | None = None
        self.holds_chunks = False
        """Whether any chunk may name it as its last user: only then is there something to protect."""
        self.lookup_leases: set[int] = set()
        self.runs: list[tuple[Sequence[bytes], Sequence[int]]] = []
        self.num_keys = 0
        self._stamps: dict[bytes, int] | None = None
        self._load_tiers: tuple[bytes | None, list[dict[str, object]] | None] = (None, None)
        """The parameters that were read last, and the filter they hold."""

    def may_load_from(self, medium: Medium, locality: Locality) -> bool:
        """Tell whether the request's `kv_load_tiers` lets it load from such a tier; without one it may."""
        read_from, entries = self._load_tiers
        if read_from is not self.params:
            entries = _read_load_tiers(self.params)
            self._load_tiers = (self.params, entries)
        if entries is None:
            return True
        return any(
            entry.get("medium", medium) == medium and entry.get("locality", locality) == locality
            for entry in entries
        )

    def add_run(self, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        """Remember that the request counted as a use of `keys` at `stamps`."""
        self.runs.append((keys, stamps))
        self.num_keys += len(keys)
        if self._stamps is not None:
            self._stamps.update(zip(keys, stamps, strict=True))

    def stamp_of(self, key: bytes) -> int | None:
        """Stamp the request gave `key`; None if it never named it. Builds its table on first use."""
        if self._stamps is None:
            self._stamps = {}
            for keys, stamps in self.runs:
                self._stamps.update(zip(keys, stamps, strict=True))
        return self._stamps.get(key)

    def stamped(self, keys: Sequence[bytes], first: int, end: int) -> tuple[Sequence[bytes], Sequence[int]]:
        """Return those of `keys[first:end]` that the request has stamps for, and the stamps."""
        if self.runs and self.runs[-1][0] is keys:
            return keys[first:end], self.runs[-1][1][first:end]
        found = [(key, stamp) for key in keys[first:end] if (stamp := self.stamp_of(key)) is not None]
        return [key for key, _ in found], [stamp for _, stamp in found]

    def forget_keys(self) -> None:
        """Drop the remembered keys; later uses count as new ones."""
        self.runs = []
        self.num_keys = 0
        self._stamps = None

    def forget_run(self) -> int:
        """Drop those of the first of the calls that are remembered; returns how many they were."""
        keys, _ = self.runs.pop(0)
        self.num_keys -= len(keys)
        if self._stamps is not None:
            for key in keys:
                self._stamps.pop(key, None)
        return len(keys)


def _read_load_tiers(params: bytes | None) -> list[dict[str, object]] | None:
    """Return the entries of the filter; None where there is none, or none that can be read."""
    try:
        given = json.loads(params or b"{}")
    except (ValueError, RecursionError):  # the latter where it is nested a thousand deep
        return None
    entries = given.get(LOAD_TIERS) if isinstance(given, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return None
    return entries


class Requests:
    """Unfinished requests of one instance by id, oldest first, bounded in number and in keys.

    `add_lease` and `remove_lease` keep `Request.lookup_leases`: nobody else changes it.

    `next_serial` numbers requests over all instances, for the reuse filter.
    """

    def __init__(self, max_requests: int, max_keys: int, next_serial: Callable[[], int]) -> None:
        self._next_serial = next_serial
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._unleased: OrderedDict[str, None] = OrderedDict()
        """Those without a lease, in the order they became so."""
        self._with_keys: dict[str, Request] = {}
        """Those that keys are remembered of, in the order they became so."""
        self._max_requests = max_requests
        self._max_keys = max_keys
        self._num_keys = 0

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> Request | None:
        """Return the request, if it is known."""
        return self._requests.get(request_id)

    def get_or_add(self, request_id: str) -> Request:
        """Return the request, new if need be; the oldest without a lease makes room. Raises Inflight."""
        request = self._requests.get(request_id)
        if request is None:
            if len(self._requests) >= self._max_requests:
                if not self._unleased:
                    raise Inflight(
                        f"{len(self._requests)} unfinished requests all have leases, and no more are "
                        "remembered (limits.requests_per_instance)"
                    )
                self.pop(next(iter(self._unleased)))
            request = self._requests[request_id] = Request(request_id, self._next_serial())
            self._unleased[request_id] = None
        return request

    def add_lease(self, request: Request, lease_id: int) -> None:
        """Note that a lookup lease belongs to the request."""
        request.lookup_leases.add(lease_id)
        self._unleased.pop(request.id, None)

    def remove_lease(self, request: Request, lease_id: int) -> None:
        """Note that a lookup lease of the request has ended."""
        request.lookup_leases.discard(lease_id)
        if not request.lookup_leases:
            self._unleased[request.id] = None

    def add_run(self, request: Request, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        """Remember keys of a request; the oldest ones make room, of about as many calls as have come."""
        request.add_run(keys, stamps)
        self._num_keys += len(keys)
        self._with_keys[request.id] = request
        while self._num_keys > self._max_keys:
            oldest = next(iter(self._with_keys.values()))
            self._num_keys -= oldest.forget_run()
            if not oldest.runs:
                del self._with_keys[oldest.id]

    def forget_keys(self) -> None:
        """Drop the remembered keys of all requests: from now on they name other chunks."""
        for request in self._with_keys.values():
            request.forget_keys()
        self._with_keys.clear()
        self._num_keys = 0

    def pop_oldest(self) -> Request | None:
        """Forget the oldest request."""
        return self.pop(next(iter(self._requests))) if self._requests else None

    def pop(self, request_id: str) -> Request | None:
        """Forget a request."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._unleased.pop(request_id, None)
            self._with_keys.pop(request_id, None)
            self._num_keys -= request.num_keys
        return request
