"""What the daemon and its I/O process say to each other, over sockets that keep messages apart.

Owns the messages and nothing else. Parent and child are one program, so a message is a tuple in the
interpreter's own format, which cannot run code.
"""

from __future__ import annotations

import marshal
import os

from kvtier_ops.namespace import SpaceName
from kvtier_server.secondary.base import JobKind, Outcome, TierChunk
from kvtier_server.secondary.filesystem.chunk_files import IoResult

MAX_BYTES = 64 << 10

LAYOUT = 1
"""Counted up with each change of a message: a process may be begun after an upgrade, by an older daemon."""


def pack_request(kind: JobKind, chunk: TierChunk) -> bytes:
    """Return a request: what to do with which chunk. Its stamp stays at home."""
    return marshal.dumps(
        (
            str(kind),
            (chunk.space.namespace, chunk.space.tenant, chunk.space.epoch),
            chunk.key,
            chunk.geometry,
            chunk.part_bytes,
            chunk.num_parts,
            chunk.offset,
            chunk.checksums,
        )
    )


def unpack_request(message: bytes) -> tuple[JobKind, TierChunk]:
    """Read a request."""
    kind, space, *rest = marshal.loads(message)  # noqa: S302 - from the parent, over its own socket
    return JobKind(kind), TierChunk(SpaceName(*space), *rest)


def pack_result(result: IoResult) -> bytes:
    """Return what became of a chunk."""
    return marshal.dumps(("result", int(result.outcome), *result[1:]))


def pack_error(error: OSError) -> bytes:
    """Return an error of the medium."""
    return marshal.dumps(("error", error.errno or 0, error.strerror or str(error)))


def pack_bug(trace: str) -> bytes:
    """Return what only a bug raises."""
    return marshal.dumps(("bug", trace[-MAX_BYTES // 8 :]))


def unpack_answer(message: bytes) -> IoResult:
    """Read an answer. Raises what it says was raised: OSError, or RuntimeError for a bug."""
    what, *told = marshal.loads(message)  # noqa: S302 - from the child, over our own socket
    if what == "result":
        outcome, *rest = told
        return IoResult(Outcome(outcome), *rest)
    if what == "error":
        number, text = told
        raise OSError(number, text or os.strerror(number))
    raise RuntimeError(f"in the I/O process: {told[0]}")
