"""Print the completion of commands and options for a shell, made of the parsers themselves.

source <(kvtier completion bash)                                    in ~/.bashrc
kvtier completion zsh > "${fpath[1]}/_kvtier"                       for zsh
kvtier completion fish > ~/.config/fish/completions/kvtier.fish     for fish
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

SUMMARY = "print the completion for bash, zsh or fish"
SHELLS = ("bash", "zsh", "fish")
FILES = ("FILE",)
DIRECTORIES = ("ROOT", "DIR", "DIRECTORY")
"""What a metavar says of its value."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=SHELLS, help="what completes")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    parser: argparse.ArgumentParser = args.parser
    for action in _actions(parser):
        if action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab looks for it there
        elif action.metavar in DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Return the actions of a parser and of all parsers below it."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to look into a parser
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for below in action.choices.values():
                yield from _actions(below)
