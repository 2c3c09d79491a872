"""Named fault points: places where a test may stop, kill or overtake the code.

Owns the table of armed points. A point that no test armed costs one look at an empty dict. Which points
exist is decided where `fault_point` is called.

A test in the same process arms a point with `arm`. A test that starts a process sets `KVTIER_FAULTS`, which
is read once at import: `name=action`, several joined by commas. Actions: `kill` (SIGKILL), `kill-parent` (the
same for the process that began this one, which runs on until it notices), `stop` (SIGSTOP),
`sleep:SECONDS`, `error` (raises FaultInjected), `wait:PATH` (while there is a FIFO, until somebody has opened
it for writing and closed it again); with `@N` behind it only when the point is passed for the Nth time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable

ENVIRONMENT_VARIABLE = "KVTIER_FAULTS"

_armed: dict[str, Callable[[], None]] = {}


class FaultInjected(RuntimeError):
    """Raised by a fault point whose action is `error`; never seen unless a test armed it."""


def fault_point(name: str) -> None:
    """Run the action armed for `name`, if any."""
    if _armed and (action := _armed.get(name)) is not None:
        action()


def arm(name: str, action: Callable[[], None]) -> None:
    """Run `action` at each pass of the point `name`, on the thread that passes, until `disarm`."""
    _armed[name] = action


def disarm(name: str | None = None) -> None:
    """Forget the action of `name`, or of every point."""
    if name is None:
        _armed.clear()
    else:
        _armed.pop(name, None)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_parent = os.getppid()


def _kill_parent() -> None:
    if os.getppid() == _parent:  # or it is gone, and another has adopted this process
        os.kill(_parent, signal.SIGKILL)


def _stop() -> None:
    # To this thread: sent to the process, it may reach another one first, and this one runs on meanwhile.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _wait(path: str) -> None:
    """Hang until a test lets go. Without the FIFO nothing happens: a test arms the point by making it."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as fifo:
        fifo.read()


def parse_faults(text: str) -> dict[str, Callable[[], None]]:
    """Read the value of KVTIER_FAULTS. Raises ValueError naming the entry that is wrong."""
    faults: dict[str, Callable[[], None]] = {}
    for entry in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, action = entry.partition("=")
        action, _, nth = action.partition("@")
        parsed = _parse_action(name, action, entry)
        if nth and not (nth.isascii() and nth.isdigit() and int(nth)):
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: {entry!r} is not a fault; behind @ stands a number from 1"
            )
        faults[name] = _at_pass(int(nth), parsed) if nth else parsed
    return faults


def _at_pass(nth: int, action: Callable[[], None]) -> Callable[[], None]:
    passes = itertools.count(1)  # counting is one step of the interpreter: no two threads get one number

    def at_pass() -> None:
        if next(passes) == nth:
            action()

    return at_pass


def _parse_action(name: str, action: str, entry: str) -> Callable[[], None]:
    kind, _, argument = action.partition(":")
    if name and action == "kill":
        return _kill
    if name and action == "kill-parent":
        return _kill_parent
    if name and action == "stop":
        return _stop
    if name and action == "error":

        def fail() -> None:
            raise FaultInjected(f"fault point {name} was armed to fail")

        return fail
    if name and kind == "wait" and argument:
        return functools.partial(_wait, argument)
    if name and kind == "sleep":
        try:
            seconds = float(argument)
        except ValueError:
            seconds = -1.0
        if seconds >= 0:
            return lambda: time.sleep(seconds)
    raise ValueError(
        f"{ENVIRONMENT_VARIABLE}: {entry!r} is not a fault; "
        "write name=kill, name=kill-parent, name=stop, name=error, name=sleep:SECONDS or name=wait:PATH, "
        "each with @N for the Nth pass only"
    )


_armed.update(parse_faults(os.environ.get(ENVIRONMENT_VARIABLE, "")))
