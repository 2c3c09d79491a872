"""Reaching a daemon from the command line, and saying plainly when there is none."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_server.address import (
    AddressError,
    client_address,
    default_address,
    parse_address,
    parse_host_port,
    socket_path,
)
from kvtier_server.cli.client_tls import (
    add_tls_arguments,
    check_signer,
    given_paths,
    read_tls_files,
    server_name,
)
from kvtier_server.cli.failure import Failure

if TYPE_CHECKING:
    import grpc

    from kvtier.v1.admin_pb2 import GetStatusResponse

DOWN = 2
"""Exit code where no daemon answers."""

MISTAKE = 2
"""Exit code where what was asked makes no sense."""


MAX_TIMEOUT_S = 86_400.0
"""Longest --timeout: system calls and gRPC take no time of any length."""


def timeout_seconds(text: str) -> float:
    """Read what was typed for --timeout. Raises argparse.ArgumentTypeError, which argparse tells."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_TIMEOUT_S:  # nan is not, either
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0 and up to {MAX_TIMEOUT_S:.0f}"
        )
    return seconds


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --address and --timeout."""
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="unix:///path or host:port (else KVTIER_ADDRESS, else the default socket)",
    )
    parser.add_argument(
        "--timeout",
        type=timeout_seconds,
        default=5.0,
        metavar="SECONDS",
        help="longest wait for an answer (default: 5)",
    )
    add_tls_arguments(parser)


def open_channel(args: argparse.Namespace) -> tuple[str, grpc.Channel]:
    """Return the address and a channel to the daemon there. Raises Failure if nobody listens.

    Knocks with a plain socket first: its error says which of the ways of not being there it is, and it is
    quicker than importing gRPC.
    """
    address = client_address(args.address, os.environ)
    tls = read_tls_files(args, address)
    knock(address, args.timeout, "--address" if args.address else "KVTIER_ADDRESS")
    if tls is not None:
        check_signer(tls, address, args.timeout)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its lines are not for the person at the terminal
    import grpc

    if tls is None:
        return address, grpc.insecure_channel(address)
    name = server_name(args)
    options = [("grpc.ssl_target_name_override", name)] if name else []
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
    return address, grpc.secure_channel(address, credentials, options)


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
            failure = explain(error, address, args)
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:  # 1 would say that it is degraded
                failure.code = MISTAKE
            raise failure from None


def knock(address: str, timeout_s: float, origin: str = "--address") -> None:
    """Raise Failure if nobody listens at an address. `origin`: who named it, if it is not the default."""
    try:
        where = parse_address(address)
    except AddressError as error:
        raise Failure(f"{origin}: {error}", DOWN) from None
    is_default = address == default_address(os.environ)
    named = f"{address} (from {origin})" if origin != "--address" and not is_default else address
    try:
        if isinstance(where, Path):
            with socket.socket(socket.AF_UNIX) as unix:
                unix.settimeout(timeout_s)
                unix.connect(os.fspath(where))
        else:
            socket.create_connection(where, timeout_s).close()
    except PermissionError:
        raise Failure(
            f"the socket {named} may not be opened: the daemon runs as another user; run this as that user",
            DOWN,
        ) from None
    except OSError as error:
        if isinstance(where, Path) and where.exists() and not where.is_socket():
            raise Failure(f"{named} is not a socket", DOWN) from None
        reason = "" if isinstance(error, FileNotFoundError | ConnectionRefusedError) else f" ({error})"
        start = "kvtier serve" if is_default else f"kvtier serve --address {address}"
        raise Failure(f"no daemon at {named}{reason}; start one: {start}", DOWN) from None


def speaks_http(address: str, timeout_s: float = 1.0) -> bool:
    """Tell whether a TCP address answers plain HTTP, as a daemon's page of metrics does."""
    try:
        with socket.create_connection(parse_host_port(address), timeout_s) as asking:
            asking.settimeout(timeout_s)
            asking.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            return asking.recv(5) == b"HTTP/"
    except OSError:
        return False


def explain(error: grpc.RpcError, address: str, args: argparse.Namespace) -> Failure:
    """Turn an RPC that failed into a message. `args`: of the command, for its certificates."""
    import grpc

    code, details = error.code(), error.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failure(f"the daemon at {address} does not answer in time; its log may say why", DOWN)
    if code is grpc.StatusCode.UNAVAILABLE and _is_transport(error) and socket_path(address) is None:
        if speaks_http(address):
            return Failure(f"{address} speaks HTTP, not gRPC; is it the daemon's metrics_address?", DOWN)
        hint = "over TCP it may want certificates (--tls-ca, --tls-cert, --tls-key)"
        if given_paths(args, address):
            hint = "it may refuse your certificate, or have another name than the address (--tls-server-name)"
        return Failure(f"the daemon at {address} ends the connection: {details}; {hint}", DOWN)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Failure(f"the daemon at {address} is going away: {details}; ask again: kvtier health", DOWN)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Failure(
            f"the daemon at {address} does not know this call; compare the versions: kvtier version"
        )
    code_of_exit = MISTAKE if code is grpc.StatusCode.INVALID_ARGUMENT else 1
    return Failure(f"the daemon at {address} refuses: {code.name}: {details}", code_of_exit)


def _is_transport(error: grpc.RpcError) -> bool:
    """Tell whether the error is gRPC's own: what the daemon says carries a reason."""
    trailers: Iterable[tuple[str, object]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    return all(name != "kvtier-reason" for name, _ in trailers)
