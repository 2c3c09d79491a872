"""Ask the daemon whether it serves, as a load balancer would (grpc.health.v1), or whether one tier works.

  kvtier health                  for a probe: under 300 ms
  kvtier health --tier disk      a tier below the pool

Prints the answer. Exit code: 0 SERVING, 1 another answer, 2 no daemon, or it refuses to say.
"""

from __future__ import annotations

import argparse

from kvtier_server.cli.connection import DOWN, add_connection_arguments, explain, open_channel
from kvtier_server.cli.failure import Failure

SUMMARY = "ask whether the daemon serves: exit code 0, 1 or 2"
METHOD = "/grpc.health.v1.Health/Check"
STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


TIER_SERVICE = "kvtier.tier."
"""Before a tier's name: what its health is asked by."""

MAX_NAME_BYTES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--tier", metavar="NAME", help="ask for one tier below the pool")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="default: text")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Ask once."""
    address, channel = open_channel(args)
    import grpc

    with channel:
        # As raw bytes: importing the generated code would cost more than the call.
        check = channel.unary_unary(METHOD, request_serializer=bytes, response_deserializer=bytes)
        try:
            answer = parse_answer(check(request_for(args.tier), timeout=args.timeout))
        except grpc.RpcError as error:
            if args.tier is not None and error.code() is grpc.StatusCode.NOT_FOUND:
                raise Failure(
                    f"there is no tier {args.tier!r}; kvtier status names those there are", 2
                ) from None
            raise Failure(str(explain(error, address, args)), DOWN) from None
    if args.output == "json":
        import json

        print(json.dumps({"service": TIER_SERVICE + args.tier if args.tier else "", "status": answer}))
    else:
        print(answer)
    return 0 if answer == "SERVING" else 1


def request_for(tier: str | None) -> bytes:
    """Write HealthCheckRequest, which has one field: `string service = 1`; absent for the daemon itself."""
    if tier is None:
        return b""
    service = (TIER_SERVICE + tier).encode()
    if len(service) > MAX_NAME_BYTES:
        raise Failure(f"{tier!r} is no tier's name: they are shorter", 2)
    return bytes((0x0A, len(service))) + service


def parse_answer(response: bytes) -> str:
    """Read HealthCheckResponse, which has one field: `ServingStatus status = 1`, absent where it is 0."""
    if not response:
        return STATUSES[0]
    if len(response) == 2 and response[0] == 0x08 and response[1] < len(STATUSES):
        return STATUSES[response[1]]
    return STATUSES[0]
