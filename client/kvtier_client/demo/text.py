"""The text the chats are cut from: a given file, the project's README, or the docstrings of this package."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
README = PACKAGE.parents[1] / "README.md"
"""In a checkout; an installed package has none."""

MIN_BYTES = 2000
"""Much shorter, and all conversations would say the same."""


def load_text(file: Path | None) -> tuple[bytes, str]:
    """Return the text and its name. Raises ValueError or OSError for a file that cannot be used."""
    if file is not None:
        text = file.read_bytes()
        if len(text) < MIN_BYTES:
            raise ValueError(f"{file} has {len(text)} bytes; the chats need at least {MIN_BYTES}")
        return text, str(file)
    if README.is_file() and len(text := README.read_bytes()) >= MIN_BYTES:
        return text, "the project's README.md"
    return _docstrings(), "the docstrings of kvtier_client"


def _docstrings() -> bytes:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        ast.get_docstring(node) or ""
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, documented)
    ]
    return "\n".join(filter(None, found)).encode()
