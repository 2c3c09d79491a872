"""What daemon and helper say to each other, over a socket pair that keeps messages apart.

Owns the messages and nothing else; imports nothing but the standard library, for the helper's sake. A request
names an object, where its header lies in the area of headers, and where its chunk lies in the pool. The
answer has what Mooncake returned: a length, 0, or one of its negative codes.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

HEADER_BYTES = 4096
"""Of one object, in front of the chunk; also the step of the area of headers."""

NAME_BYTES = 64
"""Of every object's name."""

READY = 0
"""Id of the helper's first message: what setup returned. Requests count from 1."""

_REQUEST = struct.Struct(f"<IBxHxxxxQQ{NAME_BYTES}s")
_ANSWER = struct.Struct("<Iq")
MAX_BYTES = 4096


class Operation(IntEnum):
    """What is asked for."""

    PUT = 1
    GET = 2
    EXISTS = 3
    REMOVE = 4


class Request(NamedTuple):
    """One object. `header`: index in the area; `offset`, `num_bytes`: of the chunk, in the pool."""

    id: int
    operation: Operation
    name: str
    header: int = 0
    offset: int = 0
    num_bytes: int = 0


def pack_request(request: Request) -> bytes:
    """Return a request as one message."""
    name = request.name.encode("ascii")
    assert len(name) == NAME_BYTES, name
    return _REQUEST.pack(
        request.id, request.operation, request.header, request.offset, request.num_bytes, name
    )


def unpack_request(message: bytes) -> Request:
    """Read a request."""
    number, operation, header, offset, num_bytes, name = _REQUEST.unpack(message)
    return Request(number, Operation(operation), name.decode("ascii"), header, offset, num_bytes)


def pack_answer(number: int, code: int) -> bytes:
    """Return an answer as one message."""
    return _ANSWER.pack(number, code)


def unpack_answer(message: bytes) -> tuple[int, int]:
    """Read an answer: id and code."""
    number, code = _ANSWER.unpack(message)
    return number, code
