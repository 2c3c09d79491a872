"""Reaching a daemon from the command line, and saying plainly when there is none."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterable
from pathlib import Path
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


_TLS = (
    ("ca", "KVTIER_TLS_CA", "who signed the daemon's certificate"),
    ("cert", "KVTIER_TLS_CERT", "your certificate"),
    ("key", "KVTIER_TLS_KEY", "its key"),
)
_SERVER_NAME = "KVTIER_TLS_SERVER_NAME"


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
    for name, variable, text in _TLS:
        parser.add_argument(f"--tls-{name}", metavar="FILE", help=f"over TCP: {text}, PEM (else {variable})")
    parser.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help=f"what the daemon's certificate is called, if not the address' host (else {_SERVER_NAME})",
    )


def open_channel(args: argparse.Namespace) -> tuple[str, grpc.Channel]:
    """Return the address and a channel to the daemon there. Raises Failure if nobody listens.

    Knocks with a plain socket first: its error says which of the ways of not being there it is, and it is
    quicker than importing gRPC.
    """
    address = client_address(args.address, os.environ)
    tls = _tls_files(args, address)
    knock(address, args.timeout)
    import grpc

    if tls is None:
        return address, grpc.insecure_channel(address)
    name = getattr(args, "tls_server_name", None) or os.environ.get(_SERVER_NAME)
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return address, grpc.secure_channel(address, grpc.ssl_channel_credentials(*tls), options)


def _tls_files(args: argparse.Namespace, address: str) -> tuple[bytes, bytes, bytes] | None:
    """Read authority, key and certificate; None where none are given, and for a unix socket."""
    if socket_path(address) is not None:
        return None
    paths = {
        name: getattr(args, f"tls_{name}", None) or os.environ.get(variable) for name, variable, _ in _TLS
    }
    if not any(paths.values()):
        return None
    contents: dict[str, bytes] = {}
    for name, variable, text in _TLS:
        path = paths[name]
        if not path:
            raise Failure(f"--tls-{name} (or {variable}) is missing: {text}", MISTAKE)
        try:
            contents[name] = Path(path).read_bytes()
        except OSError as error:
            raise Failure(f"--tls-{name}: {path} cannot be read: {error.strerror}", MISTAKE) from None
    return contents["ca"], contents["key"], contents["cert"]


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
    if code is grpc.StatusCode.UNAVAILABLE and _is_transport(error) and socket_path(address) is None:
        return Failure(
            f"the daemon at {address} ends the connection: {details}; over TCP it may want certificates "
            "(--tls-ca, --tls-cert, --tls-key), or refuse these",
            DOWN,
        )
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
