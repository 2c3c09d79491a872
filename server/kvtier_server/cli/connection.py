"""Reaching a daemon from the command line, and saying plainly when there is none."""

from __future__ import annotations

import argparse
import os
import socket
from typing import TYPE_CHECKING

from kvtier_server.address import AddressError, client_address, parse_host_port, socket_path
from kvtier_server.cli.failure import Failure

if TYPE_CHECKING:
    import grpc

    from kvtier.v1.admin_pb2 import GetStatusResponse

DOWN = 2
"""Exit code where no daemon answers."""

MISTAKE = 2
"""Exit code where what was asked makes no sense."""


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --address and --timeout."""
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="unix:///path or host:port (else KVTIER_ADDRESS, else the default socket)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="longest wait for an answer (default: 5)",
    )


def open_channel(args: argparse.Namespace) -> tuple[str, grpc.Channel]:
    """Return the address and a channel to the daemon there. Raises Failure if nobody listens.

    Knocks with a plain socket first: its error says which of the ways of not being there it is, and it is
    quicker than importing gRPC.
    """
    address = client_address(args.address, os.environ)
    knock(address, args.timeout)
    import grpc

    return address, grpc.insecure_channel(address)


def ask_status(args: argparse.Namespace) -> GetStatusResponse:
    """Ask the daemon for its status, on a channel of its own. Raises Failure."""
    address, channel = open_channel(args)
    import grpc

    from kvtier.v1 import admin_pb2, admin_pb2_grpc

    with channel:
        try:
            return admin_pb2_grpc.AdminServiceStub(channel).GetStatus(
                admin_pb2.GetStatusRequest(), timeout=args.timeout
            )
        except grpc.RpcError as error:
            raise explain(error, address) from None


def knock(address: str, timeout_s: float) -> None:
    """Raise Failure if nobody listens at an address."""
    try:
        path = socket_path(address)
        if path is None:
            socket.create_connection(parse_host_port(address), timeout_s).close()
        else:
            with socket.socket(socket.AF_UNIX) as unix:
                unix.settimeout(timeout_s)
                unix.connect(os.fspath(path))
    except AddressError as error:
        raise Failure(f"--address: {error}", DOWN) from None
    except PermissionError:
        raise Failure(
            f"the socket {address} may not be opened: the daemon runs as another user; run this as that user",
            DOWN,
        ) from None
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError | ConnectionRefusedError) else f" ({error})"
        raise Failure(f"no daemon at {address}{reason}; start one: kvtier serve", DOWN) from None


def explain(error: grpc.RpcError, address: str) -> Failure:
    """Turn an RPC that failed into a message."""
    import grpc

    code, details = error.code(), error.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failure(f"the daemon at {address} does not answer in time; its log may say why", DOWN)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Failure(f"the daemon at {address} is going away: {details}; ask again: kvtier health", DOWN)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Failure(
            f"the daemon at {address} does not know this call; compare the versions: kvtier version"
        )
    code_of_exit = MISTAKE if code is grpc.StatusCode.INVALID_ARGUMENT else 1
    return Failure(f"the daemon at {address} refuses: {code.name}: {details}", code_of_exit)
