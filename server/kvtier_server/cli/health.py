"""Ask the daemon whether it serves, as a load balancer would (grpc.health.v1).

Prints the answer. Exit code: 0 SERVING, 1 another answer, 2 no daemon.
"""

from __future__ import annotations

import argparse

from kvtier_server.cli.connection import add_connection_arguments, explain, open_channel

SUMMARY = "ask whether the daemon serves (exit 0, 1 not, 2 down)"
METHOD = "/grpc.health.v1.Health/Check"
STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Ask once."""
    address, channel = open_channel(args)
    import grpc

    with channel:
        # As raw bytes: importing the generated code would cost more than the call. An empty request asks for
        # the service "", the daemon as a whole.
        check = channel.unary_unary(METHOD, request_serializer=bytes, response_deserializer=bytes)
        try:
            answer = parse_answer(check(b"", timeout=args.timeout))
        except grpc.RpcError as error:
            raise explain(error, address) from None
    print(answer)
    return 0 if answer == "SERVING" else 1


def parse_answer(response: bytes) -> str:
    """Read HealthCheckResponse, which has one field: `ServingStatus status = 1`, absent where it is 0."""
    if not response:
        return STATUSES[0]
    if len(response) == 2 and response[0] == 0x08 and response[1] < len(STATUSES):
        return STATUSES[response[1]]
    return STATUSES[0]
