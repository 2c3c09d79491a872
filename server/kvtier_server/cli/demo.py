"""Start a daemon and a reference engine, show hits against recomputing, clean up."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from kvtier_server.cli.failure import Failure

SUMMARY = "start a daemon and a reference engine, show hits against recomputing"
MODULE = "kvtier_client.demo"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Take none here: everything behind `demo` belongs to the demo."""


def run(_: argparse.Namespace) -> int:
    """Start it without options."""
    return start([])


def start(options: Sequence[str]) -> int:
    """Become the demo's process, so that its signals and its exit code are those of this command.

    A process of its own, because the client's side and the server's side never meet in one program.
    """
    if importlib.util.find_spec("torch") is None:
        raise Failure(
            "the demo's engine computes with torch, which is missing; run: pip install 'kvtier[demo]'"
        )
    if importlib.util.find_spec(f"{MODULE}.__main__") is None:
        raise Failure(f"this installation has no {MODULE}; run: pip install 'kvtier[demo]'")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", MODULE, *options])  # noqa: S606 - no shell is wanted
