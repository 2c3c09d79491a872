"""Order a running daemon to do something.

kvtier admin clear --tier all                  everything
kvtier admin clear --tier pool                 the pool; a tier below it by its name in `kvtier status`
kvtier admin clear --namespace 0123456789ab    of every tier, what this model's engines stored
kvtier admin clear --tenant team-a             likewise; with several options only what fits all of them
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from kvtier_server.cli.confirmation import confirm
from kvtier_server.cli.connection import add_connection_arguments, explain, open_channel
from kvtier_server.cli.failure import Failure
from kvtier_server.units import format_bytes

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import ClearResponse, TierCleared

SUMMARY = "drop chunks from the pool and the tiers below it"
CLEAR = """Drop chunks. Those that an engine or a copy holds at this moment stay, and are counted as kept.

Tiers below the pool remove theirs in the background; this waits for them as long as --timeout says. Of a tier
that daemons share only what this one has stored goes, unless --others is given.
Exit code: 0 done, 1 it goes on in the background, or a tier could not be cleared, 2 a mistake or no daemon.
"""

REPLY_MARGIN_S = 0.5
"""What the daemon answers before the call's deadline."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{clear}")
    clear = actions.add_parser(
        "clear",
        help="drop chunks of a tier, a namespace or a tenant",
        description=CLEAR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    clear.add_argument("--tier", metavar="NAME", help="pool, all, or a tier's name")
    clear.add_argument("--namespace", metavar="DIGEST", help="its first digits, as in `kvtier status`")
    clear.add_argument("--tenant", metavar="NAME", help='a tenant; "" is the default one')
    clear.add_argument("--others", action="store_true", help="of a shared tier also what others have stored")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    clear.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")
    add_connection_arguments(clear)


def run(args: argparse.Namespace) -> int:
    """Clear, once it is sure that it is meant."""
    if not (args.tier or args.namespace) and args.tenant is None:
        raise Failure("say what to clear: --tier NAME, --namespace DIGEST or --tenant NAME; or --tier all", 2)
    if not args.yes:
        confirm(f"drop {_what(args)}?", "nothing was dropped")
    address, channel = open_channel(args)
    import grpc

    from kvtier.v1 import admin_pb2, admin_pb2_grpc
    from kvtier_server.stats import PRIMARY_TIER

    request = admin_pb2.ClearRequest(
        namespace=args.namespace or "",
        tier={"pool": PRIMARY_TIER, "all": "", None: ""}.get(args.tier, args.tier),
        everything=args.tier == "all",
        others=args.others,
        wait_ms=max(int((args.timeout - REPLY_MARGIN_S) * 1000), 1),
    )
    if args.tenant is not None:
        request.tenant = args.tenant
    with channel:
        try:
            cleared = admin_pb2_grpc.AdminServiceStub(channel).Clear(request, timeout=args.timeout)
        except grpc.RpcError as error:
            raise explain(error, address) from None
    if args.output == "json":
        from kvtier_server.cli.status import to_dict

        print(json.dumps(to_dict(cleared), indent=2))
    else:
        for tier in cleared.tiers:
            print(f"{tier.tier:<16} {_told(tier)}")
    return exit_code(cleared)


def exit_code(cleared: ClearResponse) -> int:
    """0 only where every tier has ended and none was left out."""
    return 0 if all(tier.over and not tier.problem for tier in cleared.tiers) else 1


def _what(args: argparse.Namespace) -> str:
    where = {"pool": "in the pool", "all": "in the pool and every tier", None: "in the pool and every tier"}
    parts = ["all chunks", where.get(args.tier, f"in the tier {args.tier}")]
    if args.namespace:
        parts.append(f"of namespace {args.namespace}")
    if args.tenant is not None:
        parts.append(f"of tenant {args.tenant}" if args.tenant else "of the default tenant")
    return " ".join(parts)


def _told(tier: TierCleared) -> str:
    if tier.problem:
        return f"not cleared: {tier.problem}"
    if not tier.over:
        return "goes on in the background; see: kvtier status"
    return f"{tier.chunks} chunks dropped, {format_bytes(tier.freed_bytes)} freed, {tier.kept_chunks} kept"
