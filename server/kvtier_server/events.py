"""The event stream on the wire. UNIMPLEMENTED: both calls say so."""

from __future__ import annotations

import grpc

from kvtier_server.rpc import CallScope

SERVICE = "kvtier.v1.EventsService"


def handlers(scope: CallScope) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
    """Method handlers by RPC name."""
    return {
        method: grpc.unary_stream_rpc_method_handler(
            scope.unimplemented(f"EventsService/{method}", f"EventsService.{method}")
        )
        for method in ("Watch", "Snapshot")
    }
