"""The gRPC servers: one for each place the daemon listens at, all with the same handlers behind them.

Owns the sockets' modes, the message limit, and who is let in where. Handlers are made elsewhere.

    server.address (unix)      processes of this user: everything, unless there is an admin_address
    server.admin_address       the same, and the only socket that takes changes by operators
    server.tcp_address         with [tls]: holders of certificates, each what its role allows
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvtier_server.access import Gatekeeper, Identify
from kvtier_server.address import is_remote, parse_host_port, socket_path
from kvtier_server.callers import ENGINES, Caller, CertificateHolders
from kvtier_server.certificates import Certificates
from kvtier_server.config import Config
from kvtier_server.connections import cut_connections
from kvtier_server.rpc import CallScope
from kvtier_server.socket_lock import StartError

Handlers: TypeAlias = "dict[str, grpc.RpcMethodHandler[bytes, bytes]]"

HANDSHAKE_S = 10
"""A connection that has not said who it is by then is closed: nothing else ends one that sends nothing."""

MAX_STREAMS = 2048
"""Calls and streams of one connection at once; a client lets more of them wait. Each costs some kilobytes
before a limit of ours counts it. A process of an engine has two streams and a few calls."""

MAX_FILES = 65_536
"""Files that the daemon asks to have open at once: each connection is one, and 1,024 are soon taken."""

CANCEL_S = 0.5
"""Longest wait for gRPC, after the grace, to cancel the calls that are left and close their connections."""

CUT_S = 2.0
"""Longest wait for gRPC to notice that a connection was cut: it takes milliseconds."""

log = structlog.get_logger("kvtier.grpc")


@dataclass(frozen=True, slots=True)
class _Listener:
    """One place to listen at. `identify`: how callers are told apart there, None = all may do everything."""

    setting: str
    address: str
    credentials: grpc.ServerCredentials | None = None
    identify: Identify | None = None

    @property
    def how(self) -> str:
        """Say for people what stands in the way of strangers."""
        if socket_path(self.address) is not None:
            return "for engines and observers" if self.identify is not None else ""
        return "mTLS" if self.credentials is not None else "open to every user of this machine"


class Servers:
    """All servers of a daemon, bound but not started."""

    def __init__(self, config: Config, services: Mapping[str, Handlers], scope: CallScope) -> None:
        """Bind. `services` are by full name, and get health and reflection.

        Raises StartError if an address cannot be had, or certificates cannot be used.
        """
        self.health = health.aio.HealthServicer()
        self.listening: list[tuple[str, str]] = []
        """Each address, with the port that was found for port 0, and who is let in."""
        self._servers: list[grpc.aio.Server] = []
        self._certificates = Certificates(config.tls) if config.tls.is_on else None
        for listener in _listeners(config, self._certificates):
            server = self._build(listener, config.limits.max_message, services, scope)
            self.listening.append((_bind(server, listener), listener.how))
            if listener.credentials is None and socket_path(listener.address) is None:
                log.warning("tcp_without_tls", address=listener.address, open_to="every user of this machine")
            self._servers.append(server)

    def _build(
        self, listener: _Listener, max_message_bytes: int, services: Mapping[str, Handlers], scope: CallScope
    ) -> grpc.aio.Server:
        gate = [Gatekeeper(scope, listener.identify)] if listener.identify is not None else []
        server = grpc.aio.server(
            interceptors=gate,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
            ],
        )
        for name, methods in services.items():
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if socket_path(listener.address) is not None:
            names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, server)
        return server

    async def start(self) -> None:
        """Take calls."""
        if self._certificates is not None:
            self._certificates.follow()
        for server in self._servers:
            await server.start()

    async def stop(self, grace_s: float) -> bool:
        """Take no more calls, wait for those that run, at most so long, and end all connections.

        One whose peer does not read what it is sent is cut. False: something is left all the same, and gRPC's
        threads wait for it as long as the process lives.
        """
        if self._certificates is not None:
            self._certificates.stop()
        stops = [asyncio.ensure_future(server.stop(grace=grace_s)) for server in self._servers]
        _, late = await asyncio.wait(stops, timeout=grace_s + CANCEL_S)
        if late:
            self._cut()
            _, late = await asyncio.wait(late, timeout=CUT_S)
        for stop in stops:
            if stop not in late:
                stop.result()
        return not late

    def _cut(self) -> None:
        why = "their peers do not read what they are sent"
        try:
            num_cut = cut_connections(address for address, _ in self.listening)
        except OSError as error:
            log.warning("connections_not_cut", error=error.strerror, why=why)
        else:
            log.warning("connections_cut", connections=num_cut, why=why)


def _listeners(config: Config, certificates: Certificates | None) -> list[_Listener]:
    """Say where to listen."""
    server, tls = config.server, config.tls
    credentials = certificates.credentials() if certificates is not None else None
    holders = CertificateHolders(tls.tenants, tls.admins, tls.observers)

    def by_certificate(context: grpc.aio.ServicerContext[bytes, bytes]) -> Caller:
        return holders.holder(context.auth_context())

    local = _engines if server.admin_address else None

    def tcp(setting: str, address: str) -> _Listener:
        return _Listener(setting, address, credentials, local if credentials is None else by_certificate)

    listeners = []
    if socket_path(server.address) is None:
        listeners.append(tcp("server.address", server.address))
    else:
        listeners.append(_Listener("server.address", server.address, identify=local))
    if server.tcp_address:
        listeners.append(tcp("server.tcp_address", server.tcp_address))
    if server.admin_address:
        listeners.append(_Listener("server.admin_address", server.admin_address))
    return listeners


def _engines(_: object) -> Caller:
    return ENGINES


def _bind(server: grpc.aio.Server, listener: _Listener) -> str:
    """Listen; returns the address with its real port."""
    address, path = listener.address, socket_path(listener.address)
    previous = os.umask(0o177)  # the socket is 0600 from its first moment
    try:
        if path is not None:
            server.add_insecure_port(f"unix:{path}")
            return address
        if listener.credentials is None:
            assert not is_remote(address), f"{address} without certificates"  # the configuration forbids it
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, listener.credentials)
        return f"{address.rpartition(':')[0]}:{port}"
    except RuntimeError as error:
        if path is None and _is_in_use(address):
            message = f"{listener.setting} {address} is in use; choose another (who has it: ss -ltnp)"
            raise StartError(message, 1, listener.setting) from error
        raise StartError(f"cannot listen on {address}: {error}; choose another address", 1) from error
    finally:
        os.umask(previous)


def _is_in_use(address: str) -> bool:
    """Tell whether somebody listens at a TCP address: gRPC's error does not say."""
    host, port = parse_host_port(address)
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: only listeners count
                trial.bind(where)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def raise_file_limit() -> int:
    """Ask for as many open files as this process may have, MAX_FILES at most; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft
