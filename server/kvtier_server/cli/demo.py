"""Start a daemon and reference engines, show hits against recomputing, clean up.

kvtier demo --quick
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from kvtier_server.cli.failure import Failure

SUMMARY = "start a daemon and engines, show hits against computing"
MODULE = "kvtier_client.demo"


OPTIONS = {
    "--quick": None,
    "--json": "FILE",
    "--sliding-window": "TOKENS",
    "--blocks-per-chunk": "N",
    "--pool-bytes": "SIZE",
    "--seed": "SEED",
    "--text": "FILE",
    "--keep-logs": "DIR",
}
"""The demo's own options with their metavars, for completion; it parses them itself."""


HELP = """\
usage: kvtier demo [options]

Start a daemon and small real engines, and show hits against recomputing.

options: {options}

The engines compute with torch, which is missing here; run in kvtier's directory: pip install '.[demo]'
With it, this help explains each option.""".format(
    options=", ".join(f"{option} {metavar}" if metavar else option for option, metavar in OPTIONS.items())
)
"""What --help says where the demo itself cannot be loaded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Name the options; everything behind `demo` belongs to the demo, which explains them."""
    for option, metavar in OPTIONS.items():
        if metavar is None:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, metavar=metavar)


def run(_: argparse.Namespace) -> int:
    """Start it without options."""
    return start([])


def start(options: Sequence[str]) -> int:
    """Start it, or print its help, which needs no torch."""
    if importlib.util.find_spec("torch") is None:
        if {"-h", "--help"} & set(options):
            print(HELP)
            return 0
        raise Failure(
            "the demo's engine computes with torch, which is missing; run in kvtier's directory: "
            "pip install '.[demo]'"
        )
    if importlib.util.find_spec(f"{MODULE}.__main__") is None:
        raise Failure(f"this installation has no {MODULE}; run in kvtier's directory: pip install '.[demo]'")
    return _become(options)


def _become(options: Sequence[str]) -> int:
    """Become the demo's process, so that its signals and its exit code are those of this command.

    A process of its own, because the client's side and the server's side never meet in one program.
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", MODULE, *options])  # noqa: S606 - no shell is wanted
