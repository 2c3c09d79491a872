"""What a job costs on its way through the daemon and its copy process, over the CPU's memory.

Each turn is an empty round trip on a Transfer stream and jobs of one chunk of 2 MiB on the same stream; of a
job the copy itself is taken off. With a GPU the same rows are in bench_gpu.

    python -m tests.benchmarks.bench_transfer [--json FILE] [--rounds 500]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from kvtier_ops.ipc import SharedAllocation, export_shared

from ..daemon_process import DaemonProcess
from .transfer_jobs import (
    NUM_BLOCKS,
    NUM_TENSORS,
    PAGE_BYTES,
    TENSOR_BYTES,
    measure_jobs,
    print_rows,
)


def run(rounds: int) -> list[dict[str, object]]:
    """Measure with a daemon and memory of its own."""
    memory = SharedAllocation(NUM_TENSORS * TENSOR_BYTES)
    handles = [
        export_shared(memory, number * TENSOR_BYTES, TENSOR_BYTES, PAGE_BYTES, NUM_BLOCKS)
        for number in range(NUM_TENSORS)
    ]
    try:
        with (
            tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
            DaemonProcess(Path(folder), "64MiB") as daemon,
        ):
            daemon.start()
            return measure_jobs(daemon, handles, rounds, "host memory")
    finally:
        memory.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=500, help="turns (default: 500)")
    options = parser.parse_args()
    rows = run(options.rounds)
    print_rows(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
