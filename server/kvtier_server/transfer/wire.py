"""What the daemon and a helper process say to each other, over a socket pair.

Owns the messages and nothing else. A message is its length, 4 bytes little-endian, and a tuple in the
interpreter's own format, which cannot run code; both ends are one version of one program, parent and child.

    daemon  Register, Unregister, Job
    helper  Ready once, then Registered for each Register, Done for each Job, in any order, and Alive now and
            then
"""

from __future__ import annotations

import marshal
from collections.abc import Callable
from dataclasses import fields
from enum import IntEnum
from typing import Any, NamedTuple

from kvtier_ops.ipc import MemoryHandle, MemoryKind

LAYOUT = 2
"""Counted up with each change of a message: a helper may be begun after an upgrade, by an older daemon."""

HANG_S = 30.0
"""What one copy, or one message, may take: a helper that hangs ends itself, or is ended when it is silent."""

ALIVE_S = 5.0
"""How often a helper looks at itself."""

HOST_DEVICE = "host"
"""Device of memory that is no device's: POSIX shared memory."""

LENGTH_BYTES = 4


class Failure(IntEnum):
    """Why a slot was not copied; the numbers are the wire's TransferFailure."""

    NOT_HELD = 1
    TORN = 2
    MISMATCH = 3
    INCOMPLETE = 4
    ERROR = 5


class Register(NamedTuple):
    """Open memory: per group, its tensors and their page bytes, in the order of their bytes in a part.

    `gate`: the name of its CopyGate, which is held while something is copied.
    """

    memory_id: int
    blocks_per_chunk: int
    part: int
    num_parts: int
    groups: tuple[tuple[MemoryHandle, ...], ...]
    page_bytes: tuple[tuple[int, ...], ...]
    event_handle: bytes
    gate: str


class Unregister(NamedTuple):
    """Close memory; its jobs have ended."""

    memory_id: int


class Job(NamedTuple):
    """Copy. Columns as in TransferRequest; `group_slots` None: as the blocks fill.

    `not_held`: indexes of slots that the session may not have copied.
    """

    job_id: int
    memory_id: int
    is_store: bool
    verify: bool
    slot_ids: tuple[int, ...]
    generations: tuple[int, ...]
    block_ids: tuple[int, ...]
    group_sizes: tuple[int, ...]
    block_indices: tuple[int, ...]
    group_slots: tuple[int, ...] | None
    wait_value: int
    not_held: tuple[int, ...]


class Ready(NamedTuple):
    """The helper works, or has ended, if `error` says why."""

    error: str


class Alive(NamedTuple):
    """Nothing hangs; and how much of the pool is pinned, of how much, and why not all will be."""

    pinned_bytes: int
    pin_problem: str


class Registered(NamedTuple):
    """The end of a Register; `error` "" where the memory is open."""

    memory_id: int
    error: str


class Done(NamedTuple):
    """The end of a job; columns as in TransferResponse."""

    job_id: int
    failed: tuple[int, ...]
    failures: tuple[int, ...]
    checksums: tuple[int, ...]
    message: str
    num_bytes: int
    seconds: float


Message = Register | Unregister | Job | Ready | Alive | Registered | Done
_TYPES: tuple[type[Message], ...] = (Register, Unregister, Job, Ready, Alive, Registered, Done)


_AFTER_KIND = [field.name for field in fields(MemoryHandle)][1:]


def pack(message: Message) -> bytes:
    """Return a message with its length in front."""
    body: bytes = marshal.dumps([_TYPES.index(type(message)), _plain(message)])
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _plain(value: Any) -> Any:
    """Make plain values of what the format does not know."""
    if isinstance(value, MemoryHandle):
        return (int(value.kind), *[getattr(value, name) for name in _AFTER_KIND])
    if isinstance(value, tuple):
        return tuple([_plain(each) for each in value])
    return value


def unpack(body: bytes) -> Message:
    """Read a message without its length."""
    number, values = marshal.loads(body)  # noqa: S302 - from parent or child, over their own socket
    make: Callable[..., Message] = _TYPES[number]
    message = make(*values)
    if isinstance(message, Register):
        plain: Any = message.groups
        return message._replace(groups=tuple(tuple(_handle(*handle) for handle in group) for group in plain))
    return message


def _handle(kind: int, *rest: Any) -> MemoryHandle:
    return MemoryHandle(MemoryKind(kind), *rest)
