"""The gRPC channel to the daemon: where it may lead, its settings, and how its errors read.

Owns everything that knows grpc's options and error objects. Whether a call may go out is for `gate.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

import grpc

from kvtier_client.tls import TlsFiles

MAX_MESSAGE_BYTES = 8 << 20
MAX_SOCKET_PATH_BYTES = 107
"""What sockaddr_un has room for."""

_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(?P<port>\d{1,5})")


def parse_address(address: str, tls: TlsFiles | None = None) -> str:
    """Return the gRPC target for `address`, or raise ValueError saying what to write instead.

    `unix:///absolute/path`, `unix:path`, or `host:port`, of another machine only with certificates.
    """
    if address.startswith("unix:"):
        return _parse_unix(address)
    if address.startswith("/"):
        raise ValueError(f"{address!r} is a path, not an address; write unix://{address}")
    match = _HOST_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 1 << 16:
        raise ValueError(f"{address!r} is no address; write unix:///path/to/socket or 127.0.0.1:port")
    if tls is None and not _is_loopback(match["host"].strip("[]")):
        raise ValueError(
            f"{address!r} is not on this machine; engines reach the daemon of their own node, by "
            "unix:///path/to/socket or 127.0.0.1:port, or with certificates (ClientOptions.tls)"
        )
    return address


def _parse_unix(address: str) -> str:
    rest = address.removeprefix("unix:")
    if rest.startswith("//") and not rest.startswith("///"):
        raise ValueError(f"{address!r} has a host where none belongs; write unix:///{rest.lstrip('/')}")
    path = rest.removeprefix("//")
    if not path.strip("/"):
        raise ValueError(f"{address!r} names no socket; write unix:///path/to/socket")
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(
            f"the socket path {path!r} has {len(path.encode())} bytes; the system takes at most "
            f"{MAX_SOCKET_PATH_BYTES}: use a shorter directory"
        )
    return address


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def open_channel(target: str, tls: TlsFiles | None = None) -> grpc.Channel:
    """Return a channel that connects when it is first used, once. Over TCP with `tls`, if that is given.

    It is made for one attempt to attach: a channel that has failed to connect imposes its own pauses, and
    makes no progress while no call waits in it. A daemon that came back was found only after seconds.
    Raises TlsUnusable.
    """
    options = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # The environment of an engine often has a proxy, and none leads to a unix socket.
        ("grpc.enable_http_proxy", 0),
        # No retry is configured, yet this is what makes deadlines hold: a call whose message exceeds this
        # buffer (or any, with retries disabled) does not return at its deadline while the message waits
        # in a full socket, that is, never when the daemon is stopped. Measured with grpcio 1.76.
        ("grpc.per_rpc_retry_buffer_size", 2 * MAX_MESSAGE_BYTES),
        ("grpc.service_config_disable_resolution", 1),
        # Two clients of one process must not stall each other in one connection.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if tls is None or target.startswith("unix:"):
        return grpc.insecure_channel(target, options=options)
    named = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.secure_channel(target, tls.credentials(), options=[*options, *named])


@dataclass(frozen=True, slots=True)
class RpcFailure:
    """Why a call has no answer. `reason` as in `answers.py`; `boot_id` is "" if the daemon did not speak."""

    reason: str
    details: str
    boot_id: str

    @property
    def is_missed_deadline(self) -> bool:
        """Whether nobody answered in time."""
        return self.reason == "deadline"

    @property
    def is_our_bug(self) -> bool:
        """Whether the daemon found fault with the message, so that a repeat would fail again."""
        return self.reason in {"bad_request", "internal", "unimplemented", "invalid_argument"}


def read_failure(error: Exception) -> RpcFailure:
    """Read what a failed call raised: RpcError, or ValueError of a channel closed with its session."""
    if not isinstance(error, grpc.Call):
        return RpcFailure("session_changed", str(error), "")
    trailers = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    code = error.code()
    reason = trailers.get("kvtier-reason", "").lower()
    if not reason:
        reason = "deadline" if code is grpc.StatusCode.DEADLINE_EXCEEDED else code.name.lower()
    return RpcFailure(reason, error.details() or "", trailers.get("kvtier-boot-id", ""))
