"""Finds the commands that documentation shows: in fenced blocks, and in `inline code`.

A fenced block of a shell (```sh, bash, shell, console) has a command on every line. A block without a
language has commands if its first line begins with a program of PROGRAMS; else it is output or a picture.
Blocks of other languages (```text) have none. Inline code is a command if its first word is a program of
PROGRAMS.

Owns no opinion on whether a command is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHELLS = {"sh", "bash", "shell", "console"}
PROGRAMS = {
    "cd", "cp", "curl", "docker", "export", "fuser", "git", "helm", "jq", "kill", "kubectl", "kustomize",
    "kvtier", "make", "mkdir", "mooncake_master", "openssl", "pip", "podman", "promtool", "python", "python3",
    "sh", "source", "sudo", "systemctl", "uv", "vllm",
}  # fmt: skip

_FENCE = re.compile(r"^( *)(```+|~~~+) *([\w+-]*)")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_COMMENT = re.compile(r"(^|\s)#\s.*$")
_ASSIGNMENT = re.compile(r"^[A-Z_][A-Z0-9_]*=\S*$")


@dataclass(frozen=True, slots=True)
class Shown:
    """One command where it stands."""

    file: str
    line: int
    text: str
    """On one line, without prompt and comment."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def program_of(command: str) -> str:
    """Return the program that a command starts, behind variables for it; "" where there is none."""
    words = command.split()
    while words and _ASSIGNMENT.match(words[0]):
        words.pop(0)
    return words[0] if words else ""


def commands(name: str, text: str) -> Iterator[Shown]:
    """Return the commands of one document in their order."""
    found: list[Shown] = []
    prose: list[str] = []
    block: list[tuple[int, str]] | None = None
    fence, language = "", ""
    for number, line in enumerate(text.splitlines(), start=1):
        opened = _FENCE.match(line)
        if block is None and opened:
            fence, language, block = opened[2], opened[3].lower(), []
            prose.append("")
        elif block is not None:
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                found += _in_block(name, language, block)
                block = None
            else:
                block.append((number, line))
            prose.append("")
        else:
            prose.append(line)
    found += _inline(name, "\n".join(prose))
    return iter(sorted(found, key=lambda shown: shown.line))


def _in_block(name: str, language: str, lines: list[tuple[int, str]]) -> Iterator[Shown]:
    joined = list(_joined(lines))
    if language in SHELLS:
        is_console = language == "console" or any(text.startswith("$ ") for _, text in joined)
    elif language == "" and joined and program_of(_bare(joined[0][1])) in PROGRAMS:
        is_console = any(text.startswith("$ ") for _, text in joined)
    else:
        return
    for number, text in joined:
        if is_console and not text.startswith("$ "):
            continue  # what the command above answered
        if _bare(text):
            yield Shown(name, number, _bare(text))


def _joined(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Put lines that end with a backslash together with those that follow."""
    begun, start = "", 0
    for number, line in lines:
        start = start if begun else number
        begun += line.strip()
        if begun.endswith("\\"):
            begun = begun[:-1]
            continue
        if begun.strip():
            yield start, begun.strip()
        begun = ""


def _bare(text: str) -> str:
    return _COMMENT.sub("", text.removeprefix("$ ")).strip()


def _inline(name: str, text: str) -> Iterator[Shown]:
    for match in _INLINE.finditer(text):
        command = " ".join(match[1].split())
        if program_of(command) in PROGRAMS:
            yield Shown(name, text.count("\n", 0, match.start()) + 1, command)


def documents(root: Path) -> list[Path]:
    """Return the documents whose commands must work; what has changed is history."""
    rooms = ("proto", "ops", "server", "client", "tests", "docker")
    found = [*root.glob("*.md"), *(file for room in rooms for file in (root / room).rglob("*.md"))]
    return sorted(file for file in found if file.name != "CHANGELOG.md")
