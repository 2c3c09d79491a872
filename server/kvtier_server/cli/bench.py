"""Measure lookups, copies or a trace on this machine, each against a floor in the same run.

  kvtier bench lookup                            leased and unleased lookups against a bare gRPC round trip
  kvtier bench copy --bytes 1GiB                 store and load through shared memory against a plain copy
  kvtier bench replay --trace mooncake.jsonl     hit share of a trace, every loaded byte compared
  kvtier bench lookup --json                     the figures for a script

Starts a daemon of its own and removes it, or measures the one at --address: what it stores there is dropped
afterwards, but may have evicted what others stored. KVTIER_ADDRESS is not read.
Exit code: 0 measured, 1 it could not be, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable

from kvtier_server.cli.failure import Failure
from kvtier_server.units import UnitError, parse_bytes

SUMMARY = "measure lookups, copies, or a trace, on this machine"
MODULE = "kvtier_client.bench"

MAX_KEYS = 8192
"""What a daemon with default settings takes in one call."""
CHUNK_UNIT_BYTES = 32 * 4096
"""32 layers of a page each."""
MAX_CHUNK_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the kinds and their options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{lookup,copy,replay}")
    lookup = _add(kinds, "lookup", "lookups against a bare gRPC round trip of as many bytes")
    lookup.add_argument(
        "--keys",
        type=_keys,
        default=[64, 2048],
        metavar="N,...",
        help="keys in a call (default: 64,2048)",
    )
    lookup.add_argument("--calls", type=_number, default=200, metavar="N", help="of each kind (default: 200)")
    copy = _add(kinds, "copy", "store and load through shared memory against a plain copy")
    copy.add_argument(
        "--bytes",
        dest="copy_bytes",
        type=_bytes,
        default=256 << 20,
        metavar="SIZE",
        help="of all chunks; the machine needs four times as much (default: 256MiB)",
    )
    copy.add_argument(
        "--chunk-bytes",
        type=_chunk_bytes,
        default=2 << 20,
        metavar="SIZE",
        help="of a chunk of 32 layers (default: 2MiB)",
    )
    copy.add_argument("--rounds", type=_number, default=3, metavar="N", help="over all chunks (default: 3)")
    replay = _add(kinds, "replay", "hit share of a trace through the real client, every byte compared")
    replay.add_argument(
        "--trace",
        metavar="FILE",
        help='one request a line, {"hash_ids": [...]}, as the Mooncake traces (default: made of --seed)',
    )
    replay.add_argument(
        "--requests", type=_number, metavar="N", help="the first N (default: all, or 500 of the seed's)"
    )
    replay.add_argument(
        "--pool-share",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="the own daemon's pool as a part of the trace's distinct chunks (default: 0.1)",
    )
    replay.add_argument("--policy", default="lru", metavar="NAME", help="the own daemon's (default: lru)")


def _add(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
) -> argparse.ArgumentParser:
    kind = kinds.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  kvtier bench {name} --json",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of a daemon that runs (default: one of its own); its hit rate and what its alerts compare a "
        "day with count what is measured",
    )
    kind.add_argument("--seed", type=_seed, default=0, metavar="N", help="of what is made up (default: 0)")
    kind.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")
    kind.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    return kind


def run(args: argparse.Namespace) -> int:
    """Become the client's process, so that its signals and its exit code are those of this command.

    A process of its own, because the client's side and the server's side never meet in one program.
    """
    if importlib.util.find_spec(f"{MODULE}.__main__") is None:
        raise Failure(f"this installation has no {MODULE}; run: pip install kvtier")
    if args.address:
        from kvtier_server.cli.connection import knock

        knock(args.address, 5.0)
    left_out = {"command", "output", "parser"}
    settings = {
        name: value for name, value in vars(args).items() if name not in left_out and value is not None
    }
    settings["json"] = args.output == "json"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", MODULE, json.dumps(settings)])  # noqa: S606 - no shell is wanted


def _between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() else low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return number

    return parse


_number = _between(1, 10**9)
_seed = _between(0, 2**32 - 1)
_count = _between(1, MAX_KEYS)


def _keys(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _chunk_bytes(text: str) -> int:
    size = _bytes(text)
    if not 0 < size <= MAX_CHUNK_BYTES or size % CHUNK_UNIT_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 128KiB up to 1GiB")
    return size


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1")
    return share
