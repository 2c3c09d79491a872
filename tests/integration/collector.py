"""A collector of traces: a real gRPC server that speaks OTLP and keeps what it is sent."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span as it came over the wire."""

    name: str
    trace_id: str
    parent_id: str
    attributes: dict[str, str | int | float]
    is_error: bool
    start_ns: int
    end_ns: int
    service: str


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a port of loopback; also a context manager. `answer` is waited for before each reply."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.spans: list[ReceivedSpan] = []
        self.raw: list[bytes] = []
        self.answer = threading.Event()
        self.answer.set()
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("localhost:0", credentials)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.answer.set()
        self._server.stop(None).wait()

    def Export(  # noqa: N802 gRPC names it
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        del context
        self.raw.append(request.SerializeToString())
        for resource in request.resource_spans:
            service = {a.key: _value(a.value) for a in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        ReceivedSpan(
                            span.name,
                            span.trace_id.hex(),
                            span.parent_span_id.hex(),
                            {a.key: _value(a.value) for a in span.attributes},
                            span.status.code == span.status.STATUS_CODE_ERROR,
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            str(service),
                        )
                    )
        self.answer.wait(60)
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[ReceivedSpan]:
        """Spans of one kind."""
        return [span for span in self.spans if span.name == name]


def _value(value: AnyValue) -> str | int | float:
    found: str | int | float = getattr(value, value.WhichOneof("value") or "string_value")
    return found
