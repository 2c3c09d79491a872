"""Drop chunks of a tier, a namespace or a tenant."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvtier_server.cli.admin.asking import ask, print_json, wait_ms
from kvtier_server.cli.confirmation import confirm
from kvtier_server.cli.failure import Failure
from kvtier_server.units import format_bytes

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import ClearResponse, TierCleared

SUMMARIES = {"clear": "drop chunks of a tier, a namespace or a tenant"}
DESCRIPTIONS = {
    "clear": """Drop chunks. Those that an engine or a copy holds now stay, and are counted as kept.

Tiers below the pool remove theirs in the background; this waits for them as long as --timeout says. Of a tier
that daemons share only what this one has stored goes, unless --others is given.
Exit code: 0 done, 1 it goes on in the background, or a tier could not be cleared, 2 a mistake or no daemon.

kvtier admin clear --tier all                  everything
kvtier admin clear --namespace 0123456789ab    of every tier, what this model's engines stored""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this action."""
    parser.add_argument("--tier", metavar="NAME", help="pool, all, or a tier's name")
    parser.add_argument("--namespace", metavar="DIGEST", help="its first digits, as in `kvtier status`")
    parser.add_argument("--tenant", metavar="NAME", help='a tenant; "" is the default one')
    parser.add_argument("--others", action="store_true", help="of a shared tier also what others have stored")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """Clear, once it is sure that it is meant."""
    if not (args.tier or args.namespace) and args.tenant is None:
        raise Failure("say what to clear: --tier NAME, --namespace DIGEST or --tenant NAME; or --tier all", 2)
    if not args.yes:
        confirm(f"drop {_what(args)}?", "nothing was dropped")
    from kvtier.v1 import admin_pb2
    from kvtier_server.stats import PRIMARY_TIER

    request = admin_pb2.ClearRequest(
        namespace=args.namespace or "",
        tier={"pool": PRIMARY_TIER, "all": "", None: ""}.get(args.tier, args.tier),
        everything=args.tier == "all",
        others=args.others,
        wait_ms=wait_ms(args),
    )
    if args.tenant is not None:
        request.tenant = args.tenant
    cleared = ask(args, "Clear", request, admin_pb2.ClearResponse, "chunks are dropped")
    if args.output == "json":
        print_json(cleared)
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
