"""Look into a pool that daemons left in memory, or free it. Needs no daemon.

  kvtier pool show
  kvtier pool remove --yes

A pool outlives its daemon on purpose, so that the next one starts warm.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server.cli.confirmation import confirm
from kvtier_server.cli.failure import Failure
from kvtier_server.units import format_bytes

if TYPE_CHECKING:
    from kvtier_server.cli.pool_file import PoolContents

SUMMARY = "show or remove a pool that a daemon left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{show,remove}")
    show = actions.add_parser("show", help="sizes, slots by state, and whether a daemon holds it")
    show.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")
    remove = actions.add_parser("remove", help="free its memory; refused while a daemon holds it")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    for action in (show, remove):
        action.add_argument(
            "--name", help="name of the pool (else KVTIER_SERVER__NAME, else default)", metavar="NAME"
        )
        action.add_argument(
            "--directory",
            type=Path,
            metavar="DIR",
            help="where it lies (else KVTIER_POOL__DIRECTORY, else by its name below /dev/shm)",
        )


def run(args: argparse.Namespace) -> int:
    """Show or remove."""
    from kvtier_ops.directory import PoolError

    action: Callable[[Path, argparse.Namespace], int] = {"show": _show, "remove": _remove}[args.action]
    try:
        return action(_directory(args), args)
    except PoolError as error:
        raise Failure(str(error)) from None


def _directory(args: argparse.Namespace) -> Path:
    """Return the directory that the options name, else the one of `kvtier serve` in this environment.

    A name that was typed is stronger than a directory in the environment: what is removed is what was meant.
    """
    from kvtier_ops.directory import default_pool_directory

    if args.directory is not None:
        return Path(args.directory)
    if args.name is None and os.environ.get("KVTIER_POOL__DIRECTORY"):
        return Path(os.environ["KVTIER_POOL__DIRECTORY"])
    return default_pool_directory(args.name or os.environ.get("KVTIER_SERVER__NAME") or "default")


def _show(directory: Path, args: argparse.Namespace) -> int:
    from kvtier_server.cli.pool_file import read_contents

    try:
        contents = read_contents(directory)
    except FileNotFoundError:
        raise Failure(f"no pool in {directory}; a daemon makes it: kvtier serve") from None
    if args.output == "json":
        print(json.dumps(contents.to_dict(), indent=2))
    else:
        _print_contents(contents)
    return 0


def _print_contents(contents: PoolContents) -> None:
    if contents.daemon_pid is None:
        holder = "no daemon"
    else:
        holder = f"daemon pid {contents.daemon_pid or 'unknown'}"
    in_memory = format_bytes(contents.memory_bytes)
    print(f"pool     {contents.path}")
    print(f"id       {contents.pool_id:016x}")
    print(f"held by  {holder}; {contents.owner_locks} lock files of engine processes")
    print(f"size     {format_bytes(contents.data_bytes)} of slots, {in_memory} in memory")
    print(f"slabs    {contents.num_slabs} of {format_bytes(contents.slab_bytes)}, {contents.free_slabs} free")
    print()
    print(f"{'slot bytes':>12}  {'state':<12} {'slots':>10} {'bytes':>10}")
    for row in contents.slots:
        print(
            f"{format_bytes(row.slot_bytes):>12}  {row.state:<12} {row.count:>10} "
            f"{format_bytes(row.count * row.slot_bytes):>10}"
        )
    if not contents.slots:
        print("  no slots yet: no engine has attached to this pool")


def _remove(directory: Path, args: argparse.Namespace) -> int:
    from kvtier_ops.locks import daemon_pid
    from kvtier_server.cli.pool_file import remove_pool

    if not directory.exists():
        print(f"kvtier: nothing to remove: there is no {directory}", file=sys.stderr)
        return 0
    pid = daemon_pid(directory)
    if pid is not None:
        raise Failure(
            f"the pool {directory} is in use by the daemon with pid {pid}; stop it first: kill {pid}"
        )
    if not args.yes:
        confirm(f"remove the pool {directory} and all it holds?", "not removed")
    freed_bytes = remove_pool(directory)
    print(f"removed {directory}: {format_bytes(freed_bytes)} freed")
    return 0
