"""A child process with a deadline: for what may hang in a driver and take the whole process with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

KILL_S = 1.0
"""What a killed child may take to be gone; one that hangs in the kernel is left alone after it."""

LAST_WORDS_CHARS = 300


class ChildFailed(Exception):
    """The child gave no answer; the message says how it ended."""


def run_child(command: Sequence[str], deadline_s: float) -> str:
    """Run a command and return what it wrote to stdout. Raises ChildFailed, at the latest after the deadline.

    It has a process group of its own, which is killed with all that is in it when the time is over.
    """
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ChildFailed(f"it cannot be begun: {error.strerror}") from error
    try:
        out, err = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        _kill(child)
        raise ChildFailed(f"no answer within {deadline_s:g} s") from None
    except BaseException:
        _kill(child)
        raise
    if child.returncode == 0:
        return out
    raise ChildFailed(f"it ended with {_status(child.returncode)}: {_last_words(err)}")


def _kill(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        child.communicate(timeout=KILL_S)
    except subprocess.TimeoutExpired:
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def _status(returncode: int) -> str:
    if returncode >= 0:
        return f"status {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def _last_words(err: str) -> str:
    lines = err.strip().splitlines()
    return lines[-1][-LAST_WORDS_CHARS:] if lines else "it said nothing"
