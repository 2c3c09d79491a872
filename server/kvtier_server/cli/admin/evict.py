"""Make room: the chunks go that were used longest ago."""

from __future__ import annotations

import argparse

from kvtier_server.cli.admin.asking import ask, print_json, wait_ms
from kvtier_server.cli.confirmation import confirm
from kvtier_server.cli.failure import Failure
from kvtier_server.units import UnitError, format_bytes, parse_bytes

SUMMARIES = {"evict": "make room: drop the chunks that were used longest ago"}
DESCRIPTIONS = {
    "evict": """Evict the coldest chunks of the pool, or of a tier below it. What something holds stays.

A tier below evicts in the background; this waits for it as long as --timeout says. Chunks are whole: a little
more may go than was asked for. From the pool go first, of the coldest, those that a tier below has too.
Exit code: 0 so much is free, or all that could go has gone; 1 a tier goes on in the background; 2 a mistake
or no daemon.

kvtier admin evict --bytes 2GiB
kvtier admin evict --bytes 100GiB --tier disk --yes --timeout 60""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this action."""
    parser.add_argument("--bytes", required=True, metavar="SIZE", help='how much is to be freed: "2GiB"')
    parser.add_argument("--tier", default="pool", metavar="NAME", help="a tier's name (default: pool)")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """Evict, once it is sure that it is meant."""
    try:
        num_bytes = parse_bytes(args.bytes)
    except UnitError as error:
        raise Failure(f"--bytes: {error}", 2) from None
    if not 0 < num_bytes < 1 << 64:
        raise Failure(f'--bytes: {args.bytes} cannot be freed; write a size such as "2GiB"', 2)
    where = "the pool" if args.tier == "pool" else f"the tier {args.tier}"
    if not args.yes:
        confirm(f"evict {format_bytes(num_bytes)} of {where}?", "nothing was evicted")
    from kvtier.v1 import admin_pb2
    from kvtier_server.stats import PRIMARY_TIER

    tier = PRIMARY_TIER if args.tier == "pool" else args.tier
    request = admin_pb2.EvictRequest(bytes=num_bytes, tier=tier, wait_ms=wait_ms(args))
    reply = ask(args, "Evict", request, admin_pb2.EvictResponse, f"{where} evicts")
    if args.output == "json":
        print_json(reply)
    elif not reply.over:
        print(f"{reply.tier}: goes on in the background; see: kvtier status")
    else:
        held = f"; {reply.kept_chunks} are held and stay" if reply.kept_chunks else ""
        print(f"{reply.tier}: {reply.chunks} chunks evicted, {format_bytes(reply.freed_bytes)} freed{held}")
    return 0 if reply.over else 1
