"""`kvtier demo`: start a daemon, run engines against it, show what they gained, clean up.

Owns the command line, the directory that everything happens in, and the exit code: 0 = every check passed,
1 = one did not, 2 = the command line cannot be used, 130 = interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from kvtier_client.demo import report
from kvtier_client.demo.engine_process import EngineEnded
from kvtier_client.demo.scenario import QUICK, Scenario, Settings
from kvtier_client.demo.text import load_text
from kvtier_client.private_daemon import Daemon, DaemonFailed

DESCRIPTION = """\
Start a daemon and small real engines, and show hits against recomputing.

Seven engines run the same multi-turn chat: one without kvtier (the baseline), one that fills an empty pool,
one that reuses what the other stored, one that is killed in the middle of a store, one whose daemon is
killed and started again, one with a daemon whose pool is too small and has a filesystem tier below it, and
one that finds on disk what that daemon kept when it was stopped and its pool removed. A table shows what each
of them computed, loaded and waited for. Then the demo checks that no token differs from the baseline, that
the second engine loaded most of what it lacked, that nothing of the killed engine is left in the daemon, and
that the last engine was served from disk."""

EPILOG = """\
exit code: 0 every check passed, 1 a check failed, 2 the options cannot be used, 130 interrupted

examples:
  kvtier demo                             the whole thing, about a minute on two cores
  kvtier demo --quick --json result.json  few requests; every figure and every token in a file
  kvtier demo --sliding-window 64         half of the layers attend to the last 64 tokens only"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGINT, _end_once)
    signal.signal(signal.SIGTERM, _end_once)
    settings = replace(
        QUICK if options.quick else Settings(),
        sliding_window=options.sliding_window,
        seed=options.seed,
        blocks_per_chunk=options.blocks_per_chunk,
    )
    if options.pool_bytes is not None:
        settings = replace(settings, pool_bytes=options.pool_bytes)
    try:
        text, text_name = load_text(options.text)
        if options.keep_logs is not None:
            options.keep_logs.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"kvtier demo: {error}", file=sys.stderr)
        return 2
    directory = Path(tempfile.mkdtemp(prefix="kvtier-demo-"))
    logs = options.keep_logs or directory / "logs"
    logs.mkdir(exist_ok=True)
    ok = False
    try:
        (directory / "text").write_bytes(text)
        print(f"the chats are cut from {text_name}; logs in {logs}", file=sys.stderr)
        ok = _run(settings, directory, logs, options.json)
    except KeyboardInterrupt:
        print("kvtier demo: interrupted; everything was cleaned up", file=sys.stderr)
        ok = True  # nobody will ask for the logs
        return 130
    except (DaemonFailed, EngineEnded) as error:
        print(f"kvtier demo: {error}", file=sys.stderr)
    finally:
        if ok or options.keep_logs is not None:
            shutil.rmtree(directory)
        else:
            print(f"kvtier demo: FAILED; the daemons' logs are in {logs}", file=sys.stderr)
    return 0 if ok else 1


def _run(settings: Settings, directory: Path, logs: Path, json_file: Path | None) -> bool:
    """Run the scenario and show what it found, also where it ended early."""
    began = time.monotonic()
    name = f"demo-{os.getpid()}-{secrets.token_hex(4)}"
    tier = {
        "type": "filesystem",
        "root": f"{directory}/chunks",
        "capacity": "1GiB",
        "state_directory": f"{directory}/state",
    }
    with (
        Daemon(directory, "daemon", name, settings.pool_bytes, logs) as daemon,
        Daemon(directory, "disk", f"{name}-disk", settings.small_pool_bytes, logs, tier) as tiered,
    ):
        scenario = Scenario(settings, daemon.start(), tiered, directory / "text", logs)
        try:
            scenario.run()
        finally:
            print(report.table([run for run in scenario.runs if run.answers]))
            print(f"\n{report.check_lines(scenario.checks)}\n", flush=True)
            if json_file is not None:
                document = report.to_json(settings, scenario.runs, scenario.checks)
                json_file.write_text(json.dumps(document, indent=1) + "\n")
    failed = sum(not check.ok for check in scenario.checks)
    verdict = f"{failed} OF {len(scenario.checks)} CHECKS FAILED" if failed else "all checks passed"
    print(f"{verdict} in {time.monotonic() - began:.0f} s")
    return not failed


def _end_once(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does; further signals would only interrupt the cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvtier demo",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few requests, a third of the time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, runs and checks there")
    parser.add_argument(
        "--sliding-window", type=_positive, metavar="TOKENS", help="for every second layer (default: none)"
    )
    parser.add_argument(
        "--blocks-per-chunk", type=_positive, default=4, metavar="N", help="16 tokens each (default: 4)"
    )
    parser.add_argument(
        "--pool-bytes",
        metavar="SIZE",
        help="of the daemon's pool in /dev/shm (default: 256MiB, quick: 48MiB)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the chats (default: 0)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what the chats are cut from (default: the README)"
    )
    parser.add_argument(
        "--keep-logs", type=Path, metavar="DIR", help="keep the logs of the daemon and the engines there"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
