"""What is printed on stdout, where stdout cannot be written: its reader is gone, its disk full.

Standard library only: every command imports it.
"""

from __future__ import annotations

import os
import sys


def drop_output() -> None:
    """Drop what is still to be written, and all that follows: the interpreter complains of it at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
