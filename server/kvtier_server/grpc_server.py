"""The gRPC server: which services it has and where it listens.

Owns the list of services, those included that this daemon does not have yet and says so. Handlers are made
elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvtier_server import admin, service
from kvtier_server.address import socket_path
from kvtier_server.core.clearing import Clearings
from kvtier_server.rpc import CallScope
from kvtier_server.service import OffloadService
from kvtier_server.sessions import Sessions
from kvtier_server.socket_lock import StartError
from kvtier_server.stats import StatsSnapshot
from kvtier_server.transfer import service as transfer
from kvtier_server.transfer.service import TransferService

Handlers: TypeAlias = "dict[str, grpc.RpcMethodHandler[bytes, bytes]]"


def build_server(
    address: str,
    max_message_bytes: int,
    scope: CallScope,
    offload: OffloadService,
    sessions: Sessions,
    snapshot: Callable[[], StatsSnapshot],
    clearings: Clearings,
    transfers: TransferService,
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """Make the server, bound but not started. Raises StartError if the address cannot be had."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),
        ]
    )
    services: dict[str, Handlers] = {
        service.SERVICE: offload.handlers() | {"Attach": sessions.handler()},
        admin.SERVICE: admin.handlers(scope, snapshot, clearings),
        transfer.SERVICE: transfers.handlers(),
        "kvtier.v1.EventsService": _events(scope),
    }
    for name, methods in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    _bind(server, address)
    return server, health_servicer


def _events(scope: CallScope) -> Handlers:
    return {
        method: grpc.unary_stream_rpc_method_handler(
            scope.unimplemented(f"EventsService/{method}", f"EventsService.{method}")
        )
        for method in ("Watch", "Snapshot")
    }


def _bind(server: grpc.aio.Server, address: str) -> None:
    path = socket_path(address)
    previous = os.umask(0o177)  # the socket is 0600 from its first moment
    try:
        server.add_insecure_port(f"unix:{path}" if path is not None else address)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {address}: {error}; choose another --address", 1) from error
    finally:
        os.umask(previous)
