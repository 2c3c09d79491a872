"""Say why a key hits or misses."""

from __future__ import annotations

import argparse
import string
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtier_server.cli.admin.asking import ask, print_json
from kvtier_server.cli.failure import Failure

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import ExplainResponse

SUMMARIES = {"explain": "say why a key hits or misses"}
DESCRIPTIONS = {
    "explain": """Say what is known of a key: where it is, who brings it, why it was not stored, when it went.

resident     in the pool or in a tier below it: a lookup finds it
pending      an engine is storing it, or a tier is bringing it up
stale        in the pool, but of an epoch that engines have left: their weights were updated
quarantined  its bytes rotted, or its engine died while it wrote them
filtered     offered, but not often enough for admission.store_threshold
wanted       offered often enough; the next engine that computes it stores it
evicted      it went for the room
dropped      it went for another reason, which is told
never seen   nothing is known of it, as far back as the log of events goes

With several keys - those of a request, in their order - it says how many of them from the first on are there,
and why the next one is not. The daemon logs no keys: they are the engine's, or those of EventsService.

kvtier admin explain --namespace 0123456789ab --key 6f1c2b...00000000
kvtier admin explain --namespace 0123456789ab --tenant team-a --key - < keys.txt""",
}

MAX_SHOWN = 20
"""Keys of a request that get a line each; -o json has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this action."""
    parser.add_argument("--namespace", required=True, metavar="DIGEST", help="its first digits")
    parser.add_argument("--tenant", default="", metavar="NAME", help='a tenant; "" is the default one')
    parser.add_argument(
        "--key",
        required=True,
        action="append",
        metavar="HEX",
        help="the key in hex; again for each further one of a request; - reads them from stdin, one a line",
    )


def run(args: argparse.Namespace) -> int:
    """Ask and print."""
    texts = [text for given in args.key for text in (sys.stdin.read().split() if given == "-" else [given])]
    if not texts:
        raise Failure("--key: no key was on stdin; write one in hex on each line", 2)
    keys = [_key(text) for text in texts]
    from kvtier.v1 import admin_pb2

    request = admin_pb2.ExplainRequest(namespace=args.namespace, tenant=args.tenant)
    if len(keys) == 1:
        request.key = keys[0]
    else:
        request.keys.extend(keys)
    reply = ask(args, "Explain", request, admin_pb2.ExplainResponse, "the daemon looks")
    if args.output == "json":
        print_json(reply)
    else:
        print("\n".join(told(reply)))
    return 0


def told(reply: ExplainResponse) -> Sequence[str]:
    """Write the answer for a person."""
    lines = []
    if len(reply.keys) > 1:
        for number, explained in enumerate(reply.keys[:MAX_SHOWN], 1):
            lines.append(f"{number:>4}  {short(explained.key):<22}  {explained.verdict}")
        if len(reply.keys) > MAX_SHOWN:
            lines.append(f"... and {len(reply.keys) - MAX_SHOWN} more; -o json has them all")
        lines.append(f"the first {reply.leading_hits} of {len(reply.keys)} keys are there")
        if reply.leading_hits == len(reply.keys):
            return lines
        lines += ["", f"key {reply.leading_hits + 1}:"]
    return [*lines, reply.verdict, *(f"  {detail}" for detail in reply.details)]


def short(key: bytes) -> str:
    """Write a key's ends: the hash's first bytes, and the group."""
    text = key.hex()
    return text if len(text) <= 22 else f"{text[:12]}..{text[-8:]}"


def _key(text: str) -> bytes:
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        if set(text.removeprefix("0x")) <= set(string.hexdigits):
            raise Failure(f"--key: {text!r} has an odd number of digits; a byte is two of them", 2) from None
        raise Failure(f"--key: {text!r} is not a key in hex; write its bytes as digits 0-9a-f", 2) from None
