"""Print the version of this installation.

kvtier version
"""

from __future__ import annotations

import argparse

from kvtier_server import __version__

SUMMARY = "print the version"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Take none."""


def run(_: argparse.Namespace) -> int:
    """Print one line."""
    print(f"kvtier {__version__}")
    return 0
