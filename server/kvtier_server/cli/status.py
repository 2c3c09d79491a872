"""Show the daemon at one instant: pool, tiers, sessions, leases, hit rate.

  kvtier status
  kvtier status -o json | jq .lookup_keys.hit     every field, for a script

Exit code: 0 serving, 1 answering but degraded, starting or draining, 2 no daemon.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvtier_server.cli.connection import add_connection_arguments, ask_status

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvtier.v1.admin_pb2 import GetStatusResponse

SUMMARY = "show pool, tiers, sessions and leases once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_connection_arguments(parser)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")


def run(args: argparse.Namespace) -> int:
    """Ask once and print."""
    status = ask_status(args)
    if args.output == "json":
        print(json.dumps(to_dict(status), indent=2))
    else:
        from kvtier_server.cli.status_table import print_status

        print_status(status)
    return exit_code(status)


def exit_code(status: GetStatusResponse) -> int:
    """0 only while it serves in full."""
    return 0 if status.state == "serving" else 1


Json = str | int | float | bool | list["Json"] | dict[str, "Json"]


def to_dict(message: Message) -> dict[str, Json]:
    """Write every field under its proto name, defaults included.

    Unlike protobuf's own JSON, 64-bit numbers stay numbers: `jq` compares them, and all of them fit a double.
    """
    return {field.name: _to_json(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _to_json(value: object) -> Json:
    from google.protobuf.message import Message

    if isinstance(value, Message):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(name): _to_json(item) for name, item in sorted(value.items())}
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return value.hex()
    assert isinstance(value, Sequence), f"a field of type {type(value)}"
    return [_to_json(item) for item in value]
