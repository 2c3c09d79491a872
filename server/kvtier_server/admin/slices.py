"""Long work of an operator's call, cut so that engines' calls get in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

SLICE_S = 1e-3
"""Work goes on for so long, and a step more; steps are made to take half of it at most."""


async def run_in_slices(steps: Iterator[None]) -> None:
    """Step to the end on the loop's thread. Who is cancelled meanwhile leaves what was done as it is."""
    slice_ends = time.perf_counter() + SLICE_S
    for _ in steps:
        if time.perf_counter() >= slice_ends:
            await asyncio.sleep(0)
            slice_ends = time.perf_counter() + SLICE_S
