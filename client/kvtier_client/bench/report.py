"""What `kvtier bench` says to a person, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = "{:<22}{:>10}{:>10}{:>12}{:>12}{:>8}"


def lines(kind: str, result: Mapping[str, Any]) -> Iterator[str]:
    """Write the result of one kind."""
    return {"lookup": _lookup, "copy": _copy, "replay": _replay}[kind](result)


def _lookup(result: Mapping[str, Any]) -> Iterator[str]:
    yield COLUMNS.format("keys", "p50 ms", "p99 ms", "floor p50", "floor p99", "ratio")
    for row in result["rows"]:
        yield COLUMNS.format(
            row["name"],
            f"{row['p50_ms']:.3f}",
            f"{row['p99_ms']:.3f}",
            f"{row['floor_p50_ms']:.3f}",
            f"{row['floor_p99_ms']:.3f}",
            f"{row['ratio']:.2f}x",
        )
    yield f"floor: {result['rows'][0]['floor']}, in turns; ratio: of the medians"


def _copy(result: Mapping[str, Any]) -> Iterator[str]:
    size = result["chunk_bytes"] / (1 << 20)
    yield COLUMNS.format(f"a chunk of {size:g} MiB", "p50 ms", "p99 ms", "GiB/s", "floor GiB/s", "ratio")
    for row in result["rows"]:
        yield COLUMNS.format(
            row["name"],
            f"{row['p50_ms']:.3f}",
            f"{row['p99_ms']:.3f}",
            f"{row['gib_s']:.2f}",
            f"{row['floor_gib_s']:.2f}",
            f"{row['ratio']:.2f}x",
        )
    yield f"floor: {result['rows'][0]['floor']}, in turns; ratio: time over the floor's, of the medians"


def _replay(result: Mapping[str, Any]) -> Iterator[str]:
    where = f"pool of {result['pool_chunks']:,} chunks, {result['policy']}" if result["pool_chunks"] else ""
    yield f"trace      {result['trace']}: {result['requests']:,} requests, {result['chunks']:,} chunks"
    yield f"distinct   {result['distinct_chunks']:,} chunks" + (f"; {where}" if where else "")
    yield f"hits       {result['hits']:,} chunks, {result['hit_share']:.1%} of what was asked for"
    yield f"possible   {result['possible_hit_share']:.1%}, where nothing is ever evicted"
    yield f"a request  {result['p50_ms']:.2f} ms p50, {result['p99_ms']:.2f} ms p99"
    yield f"every loaded byte was right ({result['seconds']:.1f} s)"
