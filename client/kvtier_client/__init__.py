"""The engine side of kvtier: what an inference engine imports to reach the daemon of its node.

Nothing here raises for anything that the daemon or the network does: what is not answered in time is a miss.
Imports grpc, protobuf and numpy, and no torch, no GPU library and nothing of the daemon.
"""

from kvtier_client.answers import (
    LoadGrant,
    LookupAnswer,
    LookupStatus,
    SessionInfo,
    SessionLimits,
    StoreGrant,
    StoreVerdict,
)
from kvtier_client.client import OffloadClient
from kvtier_client.context import ReqContext
from kvtier_client.listener import ClientListener
from kvtier_client.lookups import PendingLookup
from kvtier_client.options import ClientOptions, EngineIdentity, Role, new_instance_nonce
from kvtier_client.reports import ChecksumMismatch, LoadReportItem, StoreReportItem
from kvtier_client.stats import ClientStats
from kvtier_client.tls import TlsFiles

__version__ = "0.1.0"

__all__ = [
    "ChecksumMismatch",
    "ClientListener",
    "ClientOptions",
    "ClientStats",
    "EngineIdentity",
    "LoadGrant",
    "LoadReportItem",
    "LookupAnswer",
    "LookupStatus",
    "OffloadClient",
    "PendingLookup",
    "ReqContext",
    "Role",
    "SessionInfo",
    "SessionLimits",
    "StoreGrant",
    "StoreReportItem",
    "StoreVerdict",
    "TlsFiles",
    "__version__",
    "new_instance_nonce",
]
