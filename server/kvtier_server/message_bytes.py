"""How long the message of each call may be: as long as its fields can make it, and no longer.

The message limit of gRPC is one for all calls, and fits the longest. A call that needs a kilobyte could then
bring millions of empty items, and reading those alone stops the loop for a quarter of a second. Owns the
table of methods; `rpc.py` compares before it parses. What one field may hold is checked by who reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvtier_server.core.explaining import MAX_EXPLAINED_KEYS
from kvtier_server.core.namespaces import MAX_KEY_BYTES

ITEMS_PER_KEY = 2
"""Items of one Complete per key that a call may have: a step may both announce and report what it stores."""

BLOCKS_PER_KEY = 64
"""Device blocks of one Transfer per key that a call may have: chunks of 1,024 tokens in blocks of 16."""

CALL_BYTES = 64 << 10
"""Of every call, beside what is counted below: ids, and fields that newer clients have."""

ATTACH_BYTES = 512 << 10
"""Facts and geometry: more than twice what they have at their limits (`kvtier_ops.namespace`)."""

MEMORY_BYTES = 1 << 20
"""Of RegisterMemory: 1,024 tensors with a handle each, some 150 bytes long."""

_LENGTH_BYTES = 4
"""Tag and length of an item."""
_NUMBER_BYTES = 10
"""The longest number of 64 bits."""
KEY_BYTES = MAX_KEY_BYTES + _LENGTH_BYTES
ITEM_BYTES = 256 + _LENGTH_BYTES
"""The longest item of a Complete: a request's id. A slot with key, generation and checksum has 170."""
SLOT_BYTES = KEY_BYTES + 2 * _NUMBER_BYTES + BLOCKS_PER_KEY * 5
"""A slot of a Transfer with its blocks."""


def message_bytes(max_keys: int, max_params_bytes: int) -> Mapping[str, int]:
    """Return by method the longest message in bytes, for calls of at most `max_keys` keys."""
    few = CALL_BYTES
    keyed = CALL_BYTES + max_params_bytes + max_keys * KEY_BYTES
    return {
        "OffloadService/Describe": few,
        "OffloadService/Attach": ATTACH_BYTES,
        "OffloadService/Lookup": keyed,
        "OffloadService/PrepareLoad": keyed,
        "OffloadService/PrepareStore": keyed,
        "OffloadService/Complete": few + ITEMS_PER_KEY * max_keys * ITEM_BYTES,
        "OffloadService/RenewLeases": few + max_keys * _NUMBER_BYTES,
        "OffloadService/Touch": keyed,
        "OffloadService/FinishRequest": few + max_keys * ITEM_BYTES,
        "OffloadService/Reset": few,
        "TransferService/RegisterMemory": MEMORY_BYTES,
        "TransferService/Transfer": few + max_keys * SLOT_BYTES,
        "EventsService/Watch": few,
        "EventsService/Snapshot": few,
        "AdminService/GetStatus": few,
        "AdminService/ListSessions": few,
        "AdminService/ListNamespaces": few,
        "AdminService/ListTenants": few,
        "AdminService/Explain": few + MAX_EXPLAINED_KEYS * KEY_BYTES,
        "AdminService/Evict": few,
        "AdminService/Clear": few,
        "AdminService/SetQuota": few,
        "AdminService/Drain": few,
    }
