"""A copy process that finds a copy too old at every other look, as one that stood still does once: for tests.

It says how often it has looked as the bytes that are pinned.
"""

from __future__ import annotations

import sys

from kvtier_ops.copy_engine import HostCopyEngine
from kvtier_server.transfer import helper
from kvtier_server.transfer.wire import HANG_S


class Looked(HostCopyEngine):
    """Counts the looks."""

    num_looks = 0

    @property
    def pinned_bytes(self) -> int:
        return self.num_looks

    def oldest_s(self) -> float:
        self.num_looks += 1
        return 2 * HANG_S if self.num_looks % 2 else 0.0


if __name__ == "__main__":
    vars(helper).update(ALIVE_S=0.05, HostCopyEngine=Looked)
    helper.main(sys.argv[1:])
