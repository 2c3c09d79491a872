"""How long a command takes from its start to its end, beside an interpreter that does nothing.

`kvtier health` is what a probe runs every few seconds, `kvtier --help` what somebody waits for. Commands and
bare interpreters take turns.

    python -m tests.benchmarks.bench_commands [--json FILE] [--rounds 20]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from kvtier_client.bench.figures import timed_ms, timing

from ..daemon_process import DaemonProcess, child_environment

LIMIT_MS = {
    "--help": 300.0,
    "health, no daemon": 300.0,
    "health": 300.0,
    "health --tier": 300.0,
    "status": None,
    "config check": None,
}
CONFIG = '[[tiers]]\ntype = "example"\nname = "near"\ncapacity = "1MiB"\n'
FLOOR = "python -c pass"


def run(rounds: int) -> list[dict[str, object]]:
    """Measure every command."""
    env = child_environment()
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        DaemonProcess(Path(folder), "4MiB", config=CONFIG) as daemon,
    ):
        daemon.start()
        at = ["--address", daemon.address]
        commands = {
            "--help": ["--help"],
            "health, no daemon": ["health", "--address", f"unix://{folder}/none.sock"],
            "health": ["health", *at],
            "health --tier": ["health", "--tier", "near", *at],
            "status": ["status", *at],
            "config check": ["config", "check", "--pool-bytes", "4MiB"],
        }

        def ended(arguments: list[str]) -> None:
            subprocess.run(
                [sys.executable, *arguments], env=env, cwd=folder, capture_output=True, check=False
            )

        rows: list[dict[str, object]] = []
        for name, arguments in commands.items():
            real, floor = [], []
            for round_number in range(rounds + 1):
                spent = timed_ms(lambda: ended(["-m", "kvtier_server", *arguments]))  # noqa: B023 - called at once
                bare = timed_ms(lambda: ended(["-c", "pass"]))
                if round_number:  # the first one compiles
                    real.append(spent)
                    floor.append(bare)
            rows.append({**asdict(timing(name, FLOOR, real, floor)), "limit_ms": LIMIT_MS[name]})
        return rows


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=20, help="of each command (default: 20)")
    args = parser.parse_args()
    rows = run(args.rounds)
    print(f"{'kvtier ...':24}{'p50 ms':>9}{'p99 ms':>9}{'bare ms':>9}{'ratio':>8}{'limit':>9}")
    for row in rows:
        limit = f"{row['limit_ms']:.0f} ms" if row["limit_ms"] else ""
        print(
            f"{row['name']:24}{row['p50_ms']:>9.0f}{row['p99_ms']:>9.0f}{row['floor_p50_ms']:>9.0f}"
            f"{row['ratio']:>7.1f}x{limit:>9}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
