"""Asking before something is lost."""

from __future__ import annotations

import sys

from kvtier_server.cli.failure import Failure


def confirm(question: str, refused: str) -> None:
    """Return if the person at the terminal says yes. Raises Failure otherwise, or where nobody can answer."""
    if not sys.stdin.isatty():
        raise Failure(f"{question} Nobody is there to ask; add --yes", 2)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Failure(refused)
