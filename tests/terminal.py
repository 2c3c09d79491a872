"""A program in a real pseudo-terminal, and the screen that a person would see.

Owns the terminal's size, its settings and the picture (pyte interprets what is written). A program's end does
not lose what it wrote last.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import pyte

from .daemon_process import WAIT_S


class Terminal:
    """One program in a terminal of its own. A context manager: on leaving, the program is gone."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], columns: int = 80, rows: int = 24
    ) -> None:
        self.columns, self.rows = columns, rows
        self.written = b""
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._fd, self._program_fd = os.openpty()
        self.resize(columns, rows)
        self.settings_before = self.settings()
        kept = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],  # in a session of its own, so that Ctrl-C is a signal for it
            env={**kept, "TERM": "xterm-256color"} | {n: env[n] for n in ("NO_COLOR",) if n in env},
            stdin=self._program_fd,
            stdout=self._program_fd,
            stderr=self._program_fd,
        )

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size."""
        self.columns, self.rows = columns, rows
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def settings(self) -> list[Any]:
        """What `stty` would show."""
        return termios.tcgetattr(self._program_fd)

    def press(self, keys: str) -> None:
        """Press keys; chr(3) is Ctrl-C."""
        os.write(self._fd, keys.encode())

    def lines(self) -> list[str]:
        """The screen as it is now."""
        self._read(0)
        return [line.rstrip() for line in self.screen.display]

    def wait_for(self, shown: Callable[[str], bool], what: str) -> list[str]:
        """Wait until the screen's text is as wanted; returns its lines."""
        deadline = time.monotonic() + WAIT_S
        while True:
            self._read(0.02)
            text = "\n".join(line.rstrip() for line in self.screen.display)
            if shown(text):
                return text.split("\n")
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for this: {what}; the screen is:\n{text}")

    def wait(self) -> int:
        """Wait for the end; the exit code."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            self._read(0.02)
            if time.monotonic() > deadline:
                raise AssertionError("the program has not ended; the screen is:\n" + "\n".join(self.lines()))
        self._read(0)
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(WAIT_S)
        os.close(self._fd)
        os.close(self._program_fd)

    def _read(self, timeout_s: float) -> None:
        while select.select([self._fd], [], [], timeout_s)[0]:
            data = os.read(self._fd, 65536)
            self.written += data
            self._stream.feed(data)
            timeout_s = 0
