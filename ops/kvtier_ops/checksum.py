"""The checksum of a part: which hash, and what 0 means."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

NOT_RECORDED = 0
"""In a slot record: nobody hashed this part, so it cannot be verified."""


def part_checksum(view: memoryview | npt.NDArray[np.uint8]) -> int:
    """Return the xxh3-64 of the bytes, never 0 (a hash of 0 is given as 1, because 0 means "not recorded").

    Releases the GIL while it hashes. `view` must be C-contiguous.
    """
    return xxhash.xxh3_64_intdigest(view if isinstance(view, memoryview) else view.data) or 1
