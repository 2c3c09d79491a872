"""What may be written into the `[[tiers]]` table of a mooncake tier.

[[tiers]]
type = "mooncake"
master = "10.0.0.1:50051"
segment = "64GiB"
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kvtier_server.config_values import Bytes, BytesOrNone, Count, Nanoseconds
from kvtier_server.secondary.parameters import TierParameters

P2P = "P2PHANDSHAKE"
SECOND = 10**9
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", re.ASCII)
MAX_PORT = 65_535
MIN_SEGMENT = 16 << 20
"""The engine refuses smaller ones."""


def split_address(address: str) -> tuple[str, int]:
    """Cut "host:port". Raises ValueError, saying what to write."""
    host, colon, port = address.rpartition(":")
    if not colon or not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
        raise ValueError(f'{address!r} is not an address; write host:port, as "10.0.0.1:50051"')
    return host, int(port)


def _check_address(address: str) -> str:
    split_address(address)
    return address


def _check_metadata(metadata: str) -> str:
    if metadata != P2P and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", metadata):
        raise ValueError(
            f'{metadata!r} is no metadata server; write "{P2P}", which needs none, or the URL of one, '
            'as "http://10.0.0.1:8080/metadata"'
        )
    return metadata


def _check_segment(segment: int) -> int:
    if 0 < segment < MIN_SEGMENT:
        raise ValueError('is too small; write "16MiB" or more, or 0 to lend nothing')
    return segment


def _check_host(host: str) -> str:
    if host and not _HOST.fullmatch(host):
        raise ValueError(f"{host!r} is no name or IPv4 address of this node; write one, without a port")
    if host:
        try:
            is_any = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            is_any = False
        if is_any:
            raise ValueError(f"{host!r} is no address that other nodes can reach; write this node's own")
    return host


class MooncakeParameters(TierParameters):
    """Keys of a mooncake tier."""

    master: Annotated[str, AfterValidator(_check_address)]
    """host:port of mooncake_master. It may be away when the daemon starts, and come and go."""
    segment: Annotated[BytesOrNone, AfterValidator(_check_segment)]
    """Memory of this node that it lends to the store, beside the pool; 0 = none, others have to."""
    metadata: Annotated[str, AfterValidator(_check_metadata)] = P2P
    """How nodes find one another: by themselves, or through a metadata server."""
    local_hostname: Annotated[str, AfterValidator(_check_host)] = ""
    """What other nodes call this one; default: its address on the way to the master."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """How chunks travel between nodes."""
    devices: Annotated[str, Field(max_length=256)] = ""
    """RDMA devices, as "mlx5_0,mlx5_1"; default: what the engine finds."""
    replicas: Annotated[Count, Field(le=16)] = 1
    """Copies of each chunk, on as many nodes."""
    buffer: Annotated[Bytes, Field(ge=1 << 20, le=1 << 36)] = 16 << 20
    """The engine's own buffer in each of its two processes; chunks do not go through it."""
    readers: Annotated[Count, Field(le=64)] = 8
    """Chunks that are loaded at a time; what is asked for together travels together."""
    writers: Annotated[Count, Field(le=64)] = 8
    """Chunks that are stored at a time."""
    timeout: Annotated[Nanoseconds, Field(ge=SECOND, le=600 * SECOND)] = 5 * SECOND
    """For one call of the engine; what does not answer in it is ended and begun again."""
    deadline: Annotated[Nanoseconds, Field(le=3600 * SECOND)] = 10 * SECOND
    """For one chunk, from its submission on."""
    heartbeat: Annotated[Nanoseconds, Field(ge=SECOND // 10, le=60 * SECOND)] = 2 * SECOND
    """How often the master is asked whether it is there."""
    max_waiting: Bytes = 256 << 20
    """Bytes of stores that the tier has taken and not written yet."""

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        if self.timeout > self.deadline:
            raise ValueError(
                "timeout is longer than deadline; a call that may take so long is always too late"
            )
        return self
