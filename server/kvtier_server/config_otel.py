"""The section [otel]: where spans go. Owns the settings; spans are `tracing.py`'s and `span_export.py`'s."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kvtier_server.config_values import AbsolutePath, Count, Nanoseconds

_ENDPOINT = re.compile(r"https?://[^/\s?#@]+:\d{1,5}/?")


def _check_endpoint(endpoint: str) -> str:
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        raise ValueError(
            f"{endpoint!r} is no address of a collector that speaks OTLP over gRPC; write "
            "http://127.0.0.1:4317, or https:// for TLS"
        )
    return endpoint


class OtelConfig(BaseModel):
    """Traces by OpenTelemetry. Needs the extra `otel`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: Annotated[str, AfterValidator(_check_endpoint)] = ""
    """http://host:port or https://host:port of a collector (OTLP over gRPC); "" = no spans are made."""
    ca_file: AbsolutePath = ""
    """PEM: who signed the collector's certificate; "" = the system's authorities."""
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.01
    """Part of the calls without a trace of their caller's that get one; a caller's own decides for itself."""
    max_queued: Annotated[Count, Field(le=1 << 20)] = 8192
    """Spans that wait to be sent, some 2 KiB each; more are dropped and counted."""
    timeout: Nanoseconds = 10 * 10**9
    """For sending some spans, with everything that is tried again; then they are dropped and counted."""
