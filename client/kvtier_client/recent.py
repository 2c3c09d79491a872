"""Which keys this engine has stored lately, so that it does not offer the same chunk twice.

Owns a bounded memory, no truth: a key that fell out is stored again, and the daemon drops the second copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from math import inf

MAX_RECENT_KEYS = 65_536
"""About 10 MB of keys and entries; far more than an engine stores between two lookups of one prompt."""


class RecentStores:
    """Keys handed to the workers, and when their store ended. Times are the caller's, in seconds."""

    def __init__(self, max_keys: int = MAX_RECENT_KEYS) -> None:
        self._ended: OrderedDict[bytes, float] = OrderedDict()
        self._max_keys = max_keys

    def __contains__(self, key: bytes) -> bool:
        return key in self._ended

    def __len__(self) -> int:
        return len(self._ended)

    def begin(self, keys: Iterable[bytes]) -> None:
        """Note that stores of these keys are on their way."""
        for key in keys:
            self._ended[key] = inf
            self._ended.move_to_end(key)
        while len(self._ended) > self._max_keys:
            self._ended.popitem(last=False)

    def end(self, keys: Iterable[bytes], now: float) -> None:
        """Note that these stores are over, published or not."""
        for key in keys:
            if key in self._ended:
                self._ended[key] = now

    def missed(self, key: bytes, asked_at: float) -> None:
        """Forget a key that the daemon did not have when asked at `asked_at`, after its store was over.

        Its store failed, or it has been evicted since: it is worth storing again.
        """
        if self._ended.get(key, inf) < asked_at:
            del self._ended[key]

    def clear(self) -> None:
        """Forget everything: another daemon, or another epoch."""
        self._ended.clear()
