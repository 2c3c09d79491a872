"""Is this chunk worth storing? The reuse filter: stored once it was offered often enough.

Owns how often each chunk was offered, and nothing else: quota and priority are asked elsewhere, and
whether a chunk is resident is not looked at here.

**What an offer is.** One request came by that needs the chunk, and the chunk was not there: it is
computed, and could be stored. So it is counted *once per request, when the request first names the
chunk*, and that is at its Lookup. Counting at PrepareStore would never store anything: a client
leaves out the chunks whose Lookup said that no store is wanted, so their second offer would never
come. But what a request generates itself is never looked up by it; PrepareStore is the first to name
those chunks. Hence:

* Lookup calls `offer(missing, request)` and answers "a store is wanted" with what it returns.
* PrepareStore calls `offer(asked_for, request)` too. What this request's Lookup has counted is not
  counted again; what it never looked up is.
* `wanted` is for questions that must change nothing: explain, a second Lookup, a retried call.

With threshold N the Nth request that computes a chunk is the one that stores it. The chunk stays
wanted until it is forgotten, so that one evicted later comes back with its first offer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

# About 10 MB. Must cover the chunks offered between two uses of the same prompt, or nothing is ever
# seen twice.
DEFAULT_MAX_TRACKED = 64_000


class ReuseFilter:
    """Want a chunk once it was offered `threshold` times; remember the `max_tracked` last offered.

    A chunk id is any bytes that tell chunks apart: over namespaces, tenants and epochs too.
    """

    def __init__(self, threshold: int, max_tracked: int = DEFAULT_MAX_TRACKED) -> None:
        """`threshold` <= 1 wants everything and remembers nothing. Raises ValueError if `max_tracked` < 1."""
        if max_tracked < 1:
            raise ValueError(f"max_tracked must be at least 1, got {max_tracked}")
        self._threshold = threshold
        self._max_tracked = max_tracked
        # The requests counted so far (None: of an unknown request), at most `threshold` of them: enough
        # to count each once even when requests with the same prompt are interleaved.
        self._offers: OrderedDict[bytes, tuple[int | None, ...]] = OrderedDict()

    @property
    def num_tracked(self) -> int:
        """Number of chunks remembered, at most `max_tracked`."""
        return len(self._offers)

    @property
    def threshold(self) -> int:
        """Offers until a chunk is wanted; 0 and 1 = always. A change counts from the next offer on."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: int) -> None:
        self._threshold = threshold

    def num_offers(self, chunk_id: bytes) -> int:
        """Return how often a chunk was offered, as far as that is remembered; counts nothing."""
        return len(self._offers.get(chunk_id, ()))

    @property
    def is_active(self) -> bool:
        """Whether any chunk can be unwanted."""
        return self._threshold > 1

    def wanted(self, chunk_ids: Sequence[bytes]) -> list[bool]:
        """Say for each chunk whether a store would be granted; count nothing."""
        if self._threshold <= 1:
            return [True] * len(chunk_ids)
        offers, threshold = self._offers, self._threshold
        return [len(offers.get(chunk_id, ())) >= threshold for chunk_id in chunk_ids]

    def offer(self, chunk_ids: Sequence[bytes], request: int | None = None) -> list[bool]:
        """Count one offer of each chunk and say whether to store it.

        `request`: any number that belongs to one request and is the same in all of its calls; its
        second offer of a chunk is not counted. None counts every call.
        """
        if self._threshold <= 1:
            return [True] * len(chunk_ids)
        # Tail before head: where the tracker overflows, the heads of prefixes are remembered.
        answers = [self._count(chunk_id, request) for chunk_id in reversed(chunk_ids)]
        answers.reverse()
        return answers

    def _count(self, chunk_id: bytes, request: int | None) -> bool:
        offers = self._offers
        counted = offers.get(chunk_id, ())
        if len(counted) < self._threshold and (request is None or request not in counted):
            counted = (*counted, request)
        offers[chunk_id] = counted
        offers.move_to_end(chunk_id)
        if len(offers) > self._max_tracked:
            offers.popitem(last=False)
        return len(counted) >= self._threshold
