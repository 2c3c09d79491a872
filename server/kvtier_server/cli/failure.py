"""How a command ends badly: one message for the person at the terminal, and an exit code."""

from __future__ import annotations


class Failure(Exception):
    """What failed, why, and what to type next. `code`: 1 it failed, 2 a mistake in the call or no daemon."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
