"""The command `kvtier`: one file a command, found here by name.

Data goes to stdout, messages to stderr. Commands import what they need when they run: `kvtier --help` and
`kvtier health` must answer in a fraction of a second, and gRPC, pydantic and rich cost that much together.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from kvtier_server import __version__
from kvtier_server.cli import (
    admin,
    bench,
    completion,
    config,
    demo,
    doctor,
    health,
    pool,
    serve,
    status,
    top,
    verify,
    version,
)
from kvtier_server.cli.failure import Failure
from kvtier_server.output import drop_output

GROUPS: dict[str, dict[str, ModuleType]] = {
    "run": {"serve": serve, "config": config, "doctor": doctor},
    "watch": {"status": status, "top": top, "health": health},
    "look after": {"admin": admin, "pool": pool, "verify": verify},
    "try and measure": {"demo": demo, "bench": bench},
    "this installation": {"version": version, "completion": completion},
}
"""Each command has SUMMARY, add_arguments(parser) and run(args) -> exit code."""

COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}

FIRST_THINGS = """\
first things to type:
  kvtier doctor                     what on this machine is in the way
  kvtier serve --pool-bytes 4GiB    run the daemon; Ctrl-C ends it
  kvtier status                     in another shell: what it holds, who is attached

`kvtier COMMAND --help` explains a command, with examples."""

EXTRA_MODULES = {
    "pydantic",
    "pydantic_core",
    "structlog",
    "prometheus_client",
    "rich",
    "grpc_health",
    "grpc_status",
    "shtab",
}
"""What only the extra `server` installs; an engine's environment has the command without them."""

OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""Of stdout, where no file is named: a full disk, a file too long, a terminal that is gone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 well, 1 a failure, 2 a mistake in the call or no daemon."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["demo"]:  # its options are its own, --help included
            return demo.start(arguments[1:])
        parser = make_parser()
        args = parser.parse_args(arguments)
        args.parser = parser  # completion is made of it
        code: int = COMMANDS[args.command].run(args)
        print(end="", flush=True)  # not flush(): there is no stdout where it was closed
        return code
    except Failure as failure:
        print(f"kvtier: {failure}", file=sys.stderr)
        return failure.code
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_MODULES:
            raise
        print(
            f"kvtier: {error.name} is missing, this installation is for engines only; "
            "run in kvtier's directory: pip install '.[server]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        drop_output()  # the reader (head, less) has what it wanted
        return 0
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS or error.filename is not None:
            raise
        drop_output()
        with contextlib.suppress(OSError):  # it may be as full as stdout
            print(f"kvtier: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1


class GroupedParser(argparse.ArgumentParser):
    """The parser of `kvtier` itself: its help lists the commands by what they are for."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; a command that is nearly one is answered with that."""
        typed = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
        if typed is not None:
            import difflib

            close = difflib.get_close_matches(typed[1], COMMANDS, n=1)
            if close:
                message = f"{typed[1]!r} is no command; did you mean {close[0]!r}?"
        super().error(message)

    def format_help(self) -> str:
        """Return usage, commands by group, options, and the first things to type."""
        groups = [
            f"{title}:\n" + "".join(f"    {name:<12}{module.SUMMARY}\n" for name, module in commands.items())
            for title, commands in GROUPS.items()
        ]
        options = "options:\n    -h, --help  show this help\n    --version   print the version\n"
        return "\n".join([self.format_usage(), f"{self.description}\n", *groups, options, f"{self.epilog}\n"])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = GroupedParser(
        prog="kvtier",
        description="A node-local cache daemon for the KV-cache chunks of LLM inference engines.",
        epilog=FIRST_THINGS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvtier {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser
