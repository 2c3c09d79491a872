"""Which lookup leases may still be relied on.

Owns the client's side of a lease's time. It counts from before the call that made or renewed the lease was
sent, so it is never later than the daemon's, and gives up in the last third: a load that starts then could
outlive its pin. Correctness does not rest on it (generations do); it saves copies that would fail.

Time is passed in. Not thread-safe: the gate's lock is held around every method.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Lease:
    request_id: str
    counts_from: float
    kept: bool = False


class LeaseBook:
    """The lookup leases of one session."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._leases: dict[int, _Lease] = {}
        self._by_request: dict[str, set[int]] = {}

    def granted(self, lease_id: int, request_id: str, sent_at: float) -> None:
        """Note a lease whose call was sent at `sent_at`."""
        self._leases[lease_id] = _Lease(request_id, sent_at)
        self._by_request.setdefault(request_id, set()).add(lease_id)

    def keep(self, lease_id: int) -> None:
        """Have the lease renewed from now on."""
        if lease := self._leases.get(lease_id):
            lease.kept = True

    def forget(self, lease_id: int) -> None:
        """Stop renewing and believing in a lease."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        of_request = self._by_request[lease.request_id]
        of_request.discard(lease_id)
        if not of_request:
            del self._by_request[lease.request_id]

    def forget_request(self, request_id: str) -> None:
        """Forget all leases of a finished request."""
        for lease_id in tuple(self._by_request.get(request_id, ())):
            self.forget(lease_id)

    def forget_all(self) -> list[int]:
        """Forget every lease and return their ids."""
        lease_ids = list(self._leases)
        self._leases.clear()
        self._by_request.clear()
        return lease_ids

    def valid(self, lease_id: int, now: float) -> bool:
        """Tell whether a load may still start under the lease."""
        lease = self._leases.get(lease_id)
        return lease is not None and now < lease.counts_from + self.ttl_s * 2 / 3

    def kept(self) -> list[int]:
        """Return the leases to renew."""
        return [lease_id for lease_id, lease in self._leases.items() if lease.kept]

    def renewed(self, lease_id: int, sent_at: float) -> None:
        """Count from the renewal."""
        if lease := self._leases.get(lease_id):
            lease.counts_from = sent_at

    def expire(self, now: float) -> None:
        """Drop what the daemon has dropped too."""
        over = [i for i, lease in self._leases.items() if now >= lease.counts_from + self.ttl_s]
        for lease_id in over:
            self.forget(lease_id)
