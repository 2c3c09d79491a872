"""Ask a running daemon what it has and why a key misses, and order it to do something.

kvtier admin sessions                          who is attached
kvtier admin namespaces                        whose chunks can be shared: models, with chunks and engines
kvtier admin tenants                           who uses how much of the pool
kvtier admin explain --namespace 0123456789ab --key 6f1c...00000000
kvtier admin evict --bytes 2GiB                the coldest chunks of the pool; --tier NAME for one below it
kvtier admin clear --tier all                  everything
kvtier admin clear --tier pool                 the pool; a tier below it by its name in `kvtier status`
kvtier admin clear --namespace 0123456789ab    of every tier, what this model's engines stored
kvtier admin clear --tenant team-a             likewise; with several options only what fits all of them
kvtier admin drain --wait                      stop the daemon in order; exit 0 when it is gone

`kvtier admin ACTION --help` explains one. Settings are read again with: kill -HUP PID
"""

from __future__ import annotations

import argparse
from types import ModuleType

from kvtier_server.cli.admin import clear, drain, evict, explain, listings
from kvtier_server.cli.connection import add_connection_arguments

SUMMARY = "list what is in there, explain a miss, evict, clear, drain"

ACTIONS: dict[str, ModuleType] = {
    "sessions": listings,
    "namespaces": listings,
    "tenants": listings,
    "explain": explain,
    "evict": evict,
    "clear": clear,
    "drain": drain,
}
"""Each has SUMMARIES and DESCRIPTIONS by action, add_arguments(parser) and run(args) -> exit code."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, module in ACTIONS.items():
        action = actions.add_parser(
            name,
            help=module.SUMMARIES[name],
            description=module.DESCRIPTIONS[name],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(action)
        action.add_argument(
            "-o", "--output", choices=("table", "json"), default="table", help="default: table"
        )
        add_connection_arguments(action)


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    code: int = ACTIONS[args.action].run(args)
    return code
