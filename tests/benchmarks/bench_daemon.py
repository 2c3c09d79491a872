"""What a daemon costs when nobody asks anything: CPU, memory, and the time until it serves.

The pool's memory is shared memory and not counted as the daemon's own. While the pool is being backed the
daemon already serves: the worst answer time of that period stands in the table too.

    python -m tests.benchmarks.bench_daemon [--json FILE] [--pool-bytes 4GiB] [--seconds 10]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import grpc

from kvtier.v1 import offload_pb2 as pb
from kvtier.v1 import offload_pb2_grpc
from kvtier_server.units import parse_bytes

from ..daemon_process import DaemonProcess, wait_until

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def _own_memory_mib(pid: int) -> float:
    """Resident memory without shared mappings."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {
        line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))
    }
    return (sizes["RssAnon"] + sizes["RssFile"]) / 1024


def _serves(daemon: DaemonProcess) -> bool:
    try:
        return daemon.health() == "SERVING"
    except grpc.RpcError:
        return False


def _loop_lag(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        for line in page.read().decode().splitlines():
            if line.startswith("kvtier_loop_lag_seconds"):
                return float(line.split()[1])
    raise AssertionError("no loop lag among the metrics")


def run(pool_bytes: str, seconds: float) -> list[dict[str, object]]:
    """Measure one daemon from its start."""
    wanted = parse_bytes(pool_bytes)
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        daemon = DaemonProcess(Path(folder), pool_bytes)
        start = time.perf_counter()
        with daemon:
            daemon.launch()
            wait_until(lambda: _serves(daemon), "the daemon serves")
            wait_until(daemon._has_announced, "the daemon says where its metrics are")
            serving_s = time.perf_counter() - start
            slowest_ms, lag_s = 0.0, 0.0
            with grpc.insecure_channel(daemon.address) as channel:
                stub = offload_pb2_grpc.OffloadServiceStub(channel)
                while daemon.status().pool.backed_bytes < wanted:
                    asked = time.perf_counter()
                    stub.Describe(pb.DescribeRequest())
                    slowest_ms = max(slowest_ms, (time.perf_counter() - asked) * 1e3)
                    lag_s = max(lag_s, _loop_lag(daemon.metrics_port))
            backed_s = time.perf_counter() - start
            cpu, clock = _cpu_seconds(daemon.pid), time.perf_counter()
            time.sleep(seconds)  # the measurement itself: an idle daemon over this time
            cpu_percent = (_cpu_seconds(daemon.pid) - cpu) / (time.perf_counter() - clock) * 100
            memory = _own_memory_mib(daemon.pid)
    return [
        {"what": f"SERVING with a pool of {pool_bytes}", "value": serving_s, "unit": "s", "limit": 1.5},
        {"what": "all of the pool backed", "value": backed_s, "unit": "s", "limit": None},
        {"what": "slowest Describe while backing", "value": slowest_ms, "unit": "ms", "limit": None},
        {"what": "loop lag while backing", "value": lag_s * 1e3, "unit": "ms", "limit": 20},
        {"what": "CPU when idle", "value": cpu_percent, "unit": "%", "limit": 1},
        {"what": "own memory when idle", "value": memory, "unit": "MiB", "limit": 150},
    ]


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--pool-bytes", default="4GiB")
    parser.add_argument("--seconds", type=float, default=10, help="how long to watch it idle (default: 10)")
    args = parser.parse_args()
    rows = run(args.pool_bytes, args.seconds)
    print(f"{'daemon':40}{'value':>10}{'limit':>10}")
    for row in rows:
        limit = f"{row['limit']} {row['unit']}" if row["limit"] is not None else ""
        print(f"{row['what']:40}{row['value']:>8.2f} {row['unit']:2}{limit:>9}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
