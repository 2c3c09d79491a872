"""The gRPC server: which services it has and where it listens.

Owns the socket's mode and the message limit. Handlers are made elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvtier_server.address import socket_path
from kvtier_server.socket_lock import StartError

Handlers: TypeAlias = "dict[str, grpc.RpcMethodHandler[bytes, bytes]]"


def build_server(
    address: str, max_message_bytes: int, services: Mapping[str, Handlers]
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """Make the server, bound but not started. `services` are by full name, and get health and reflection.

    Raises StartError if the address cannot be had.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),
        ]
    )
    for name, methods in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    _bind(server, address)
    return server, health_servicer


def _bind(server: grpc.aio.Server, address: str) -> None:
    path = socket_path(address)
    previous = os.umask(0o177)  # the socket is 0600 from its first moment
    try:
        server.add_insecure_port(f"unix:{path}" if path is not None else address)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {address}: {error}; choose another --address", 1) from error
    finally:
        os.umask(previous)
