"""What a scrape of /metrics costs: of an empty daemon, and of one whose pool holds many chunks.

The chunks are small (4 KiB) and stored through the protocol. Asked for alone, and while an engine looks keys
up as fast as it can: a scrape does not enter the core, but its thread takes turns with the loop's. What these
lookups cost while scrapes follow one another without a pause, which no scraper does, stands beside it.

    python -m tests.benchmarks.bench_metrics [--json FILE] [--chunks 100000] [--scrapes 200]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..daemon_process import DaemonProcess, wait_until
from ..raw_engine import PART_BYTES, RawEngine, to_keys

BATCH = 4096
LOOKUP_KEYS = 64
LIMIT_MS = 20.0


def _store(engine: RawEngine, count: int) -> None:
    for first in range(0, count, BATCH):
        engine.store(to_keys(range(first, min(first + BATCH, count))), request_id=f"store-{first}")


def _times_ms(call: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _scrape(daemon: DaemonProcess) -> None:
    status, _ = daemon.page("/metrics")
    assert status == 200, status


def _row(what: str, times: Sequence[float], limit: float | None = None) -> dict[str, object]:
    p99 = times[min(int(len(times) * 0.99), len(times) - 1)]
    return {
        "what": what,
        "p50_ms": statistics.median(times),
        "p99_ms": p99,
        "worst_ms": times[-1],
        "limit_ms": limit,
    }


def _while_it_is_asked(daemon: DaemonProcess, engine: RawEngine, scrapes: int) -> list[dict[str, object]]:
    """Scrape while lookups are made one after the other, and make as many without scrapes."""
    keys = to_keys(range(LOOKUP_KEYS))
    ended = threading.Event()
    lookups: list[float] = []

    def look_up() -> None:
        while not ended.is_set():
            lookups.extend(_times_ms(lambda: engine.lookup(keys), 1))

    thread = threading.Thread(target=look_up)
    thread.start()
    times = _times_ms(lambda: _scrape(daemon), scrapes)
    ended.set()
    thread.join()
    alone = _times_ms(lambda: engine.lookup(keys), len(lookups))
    return [
        _row("scrape while keys are looked up", times, LIMIT_MS),
        _row(f"lookup of {LOOKUP_KEYS} keys between scrapes", sorted(lookups)),
        _row("the same without scrapes", alone),
    ]


def run(chunks: int, scrapes: int) -> list[dict[str, object]]:
    """Measure one daemon, empty and filled."""
    pool_bytes = (chunks + 4096) * PART_BYTES
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        DaemonProcess(Path(folder), pool_bytes) as daemon,
    ):
        daemon.start()
        with RawEngine(daemon.address) as engine:
            engine.attach()
            rows = [_row("scrape of an empty pool", _times_ms(lambda: _scrape(daemon), scrapes), LIMIT_MS)]
            _store(engine, chunks)
            held = f'kvtier_tier_chunks{{tier="primary"}} {float(chunks)}'
            wait_until(lambda: held in daemon.page("/metrics")[1], "the metrics show every chunk")
            spent = _cpu_seconds(daemon.pid)
            rows.append(
                _row(f"scrape at {chunks} chunks", _times_ms(lambda: _scrape(daemon), scrapes), LIMIT_MS)
            )
            cpu_ms = (_cpu_seconds(daemon.pid) - spent) / scrapes * 1e3
            rows.append(_row("the daemon's CPU time for one, its ticks included", [cpu_ms]))
            rows += _while_it_is_asked(daemon, engine, scrapes)
    return rows


def main(arguments: Sequence[str]) -> int:
    """Print the table; 1 if a limit is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--scrapes", type=int, default=200)
    options = parser.parse_args(arguments)
    rows = run(options.chunks, options.scrapes)
    print(f"{'':<50} {'p50':>9} {'p99':>9} {'worst':>9} {'limit':>9}")
    for row in rows:
        limit = f"{row['limit_ms']:.0f} ms" if row["limit_ms"] else "-"
        figures = " ".join(f"{row[name]:>6.2f} ms" for name in ("p50_ms", "p99_ms", "worst_ms"))
        print(f"{row['what']:<50} {figures} {limit:>9}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
