"""One chunk to its file and back: the writing, reading and verifying, and nothing about which or when.

Owns the way of the bytes between the pool and a file: where O_DIRECT is used, what is hashed, how a file gets
its name. `ChunkIo` is what the tier asks for; `ChunkFiles` does it on the thread that asks, and
`io_process.py` has another process do it.

    store   pool ──hash──> header ──write──> tmp-... ──rename──> <key>.chunk
    load    <key>.chunk ──read──> pool ──hash──> is it what the header says?
    probe   <key>.chunk: length and header
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from threading import local
from typing import NamedTuple, TypeVar

from kvtier_ops.faults import fault_point
from kvtier_server.secondary.base import JobKind, Outcome, TierChunk
from kvtier_server.secondary.chunk_file import (
    BLOCK_BYTES,
    HEADER_BYTES,
    BrokenHeader,
    OtherFormat,
    checksums_to_store,
    file_bytes,
    padded_bytes,
    payload_checksum,
    read_header,
    write_header,
)
from kvtier_server.secondary.chunk_names import file_name
from kvtier_server.secondary.filesystem.disk import Disk
from kvtier_server.secondary.filesystem.places import Places, temporary_name

T = TypeVar("T")


class IoResult(NamedTuple):
    """What became of one chunk: checksums of its parts where it was loaded, its file's bytes if probed.

    `is_direct`: whether O_DIRECT is in use, as far as is known by now.
    """

    outcome: Outcome
    checksums: tuple[int, ...] = ()
    file_bytes: int = 0
    is_direct: bool = False


class ChunkIo(ABC):
    """Moves one chunk at a time. Any thread may call, as many at once as were agreed on."""

    @abstractmethod
    def run(self, kind: JobKind, chunk: TierChunk) -> IoResult:
        """Do the I/O of one chunk, and wait for its end. Raises OSError.

        Outcomes: DONE; CORRUPT as `Outcome` has it; MISSING also for a file that is another chunk's. When
        this returns or raises, nothing touches the chunk's slot any more.
        """

    @abstractmethod
    def close(self, timeout_s: float) -> bool:
        """End what can be ended, and fail who waits; False if something may still touch the pool."""


class ChunkFiles(ChunkIo):
    """Does it on the thread that asks. `places` stays the caller's."""

    def __init__(
        self,
        disk: Disk,
        places: Places,
        pool: memoryview,
        *,
        durability: str,
        direct: str,
        token: str = "",
    ) -> None:
        """Begin. `durability` and `direct` as in the tier's parameters; `token`: see `temporary_name`."""
        self._disk = disk
        self._places = places
        self._pool = pool
        self._is_durable = durability == "os"
        self._may_change = direct == "auto"
        self.is_direct = direct != "off"
        self._token = token or secrets.token_hex(6)
        self._buffers = local()

    def run(self, kind: JobKind, chunk: TierChunk) -> IoResult:
        if kind is JobKind.STORE:
            found = self._store(chunk)
        else:
            found = self._load(chunk) if kind is JobKind.LOAD else self._probe(chunk)
        return found._replace(is_direct=self.is_direct)

    def close(self, timeout_s: float) -> bool:
        # Who called `run` is in it until it ends, and nobody else touches the pool.
        return True

    # To the disk

    def _store(self, chunk: TierChunk) -> IoResult:
        header, last_block = self._blocks()
        whole, rest = self._payload(chunk, last_block)
        checksums = checksums_to_store(self._pool[chunk.offset : chunk.offset + chunk.num_bytes], chunk)
        if checksums is None:
            return IoResult(Outcome.CORRUPT)
        self._fill_last_block(chunk, last_block)
        # One part of whole blocks is the payload, and has been hashed.
        is_one_part = chunk.num_parts == 1 and not rest
        write_header(header, chunk, checksums, checksums[0] if is_one_part else payload_checksum(whole, rest))
        self._without_direct_if_need_be(lambda: self._write(chunk, [header, whole, rest]))
        return IoResult(Outcome.DONE)

    def _without_direct_if_need_be(self, action: Callable[[], T]) -> T:
        """Do something again, and from now on, through the page cache where O_DIRECT is refused."""
        was_direct = self.is_direct  # another thread may have found out meanwhile
        try:
            return action()
        except OSError as error:
            if error.errno != errno.EINVAL or not self._may_change or not was_direct:
                raise
        self.is_direct = False
        return action()

    def _write(self, chunk: TierChunk, buffers: Sequence[memoryview]) -> None:
        """Write a file under a temporary name, and give it its name when it is whole."""
        temporary = temporary_name(self._token)
        with self._places.directory(chunk.space, chunk.key, create=True) as fd:
            try:
                self._write_whole(fd, temporary, buffers)
                self._disk.rename(fd, temporary, file_name(chunk.key))
                fault_point("filesystem.after_rename")
            except BaseException:
                # The first error is what matters; what is left over goes when it is an hour old.
                with contextlib.suppress(OSError):
                    self._disk.unlink(fd, temporary)
                raise
            if self._is_durable:
                self._disk.sync(fd)

    def _write_whole(self, parent: int, name: str, buffers: Sequence[memoryview]) -> None:
        fd = self._disk.create(parent, name, direct=self.is_direct)
        try:
            fault_point("filesystem.after_open")
            left = [buffer for buffer in buffers if len(buffer)]
            offset = 0
            while left:
                written = self._disk.write(fd, left, offset)
                if written <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                offset += written
                left = _behind(left, written)
            if self._is_durable:
                self._disk.sync(fd)
        finally:
            self._disk.close(fd)
        fault_point("filesystem.after_write")

    # From the disk

    def _load(self, chunk: TierChunk) -> IoResult:
        fault_point("filesystem.before_load")
        header, last_block = self._blocks()
        whole, rest = self._payload(chunk, last_block)
        is_whole = self._without_direct_if_need_be(lambda: self._read(chunk, [header, whole, rest]))
        if is_whole is None:
            return IoResult(Outcome.CORRUPT)
        if not is_whole:
            return IoResult(Outcome.MISSING)
        found = _verified(chunk, header, whole, rest)
        if found.outcome is Outcome.DONE:
            in_rest = chunk.num_bytes - len(whole)
            self._pool[chunk.offset + len(whole) : chunk.offset + chunk.num_bytes] = rest[:in_rest]
        return found

    def _read(self, chunk: TierChunk, buffers: Sequence[memoryview]) -> bool | None:
        """Read a whole file; False if there is none, None if it has another length."""
        try:
            with self._places.directory(chunk.space, chunk.key) as parent:
                # O_DIRECT as it is now, which changes while this is tried.
                fd = self._disk.open(parent, file_name(chunk.key), direct=self.is_direct)
        except FileNotFoundError:
            return False
        try:
            if self._disk.size(fd) != file_bytes(chunk.num_bytes):
                return None if self._reads_as(fd, chunk) else False
            left = [buffer for buffer in buffers if len(buffer)]
            offset = 0
            while left:
                count = self._disk.read(fd, left, offset)
                if count <= 0:
                    return None
                offset += count
                left = _behind(left, count)
        finally:
            self._disk.close(fd)
        return True

    def _reads_as(self, fd: int, chunk: TierChunk) -> bool:
        """Tell whether a file of a wrong length says that it is this chunk, or nothing that can be read."""
        header, _ = self._blocks()
        if self._disk.read(fd, [header], 0) != HEADER_BYTES:
            return True
        try:
            return read_header(header).describes(chunk)
        except BrokenHeader:
            return True
        except OtherFormat:
            return False

    def _probe(self, chunk: TierChunk) -> IoResult:
        """Look whether a chunk is there. Its payload is not read: the load does that."""
        header, _ = self._blocks()
        try:
            with self._places.directory(chunk.space, chunk.key) as parent:
                fd = self._disk.open(parent, file_name(chunk.key), direct=False)
        except FileNotFoundError:
            return IoResult(Outcome.MISSING)
        try:
            num_bytes = self._disk.size(fd)
            length = self._disk.read(fd, [header], 0)
        finally:
            self._disk.close(fd)
        with contextlib.suppress(BrokenHeader, OtherFormat):
            if length == HEADER_BYTES and read_header(header).describes(chunk):
                return IoResult(Outcome.DONE, file_bytes=num_bytes)
        return IoResult(Outcome.MISSING)

    # Buffers that O_DIRECT can use

    def _blocks(self) -> tuple[memoryview, memoryview]:
        """Return this thread's header and last block, aligned to a page."""
        memory: mmap.mmap | None = getattr(self._buffers, "memory", None)
        if memory is None:
            memory = self._buffers.memory = mmap.mmap(-1, HEADER_BYTES + BLOCK_BYTES)
        view = memoryview(memory)
        return view[:HEADER_BYTES], view[HEADER_BYTES:]

    def _payload(self, chunk: TierChunk, last_block: memoryview) -> tuple[memoryview, memoryview]:
        """Cut a chunk into its whole blocks, in the pool, and the block that ends it, if it is not whole."""
        num_whole = chunk.num_bytes // BLOCK_BYTES * BLOCK_BYTES
        rest_bytes = padded_bytes(chunk.num_bytes) - num_whole
        return self._pool[chunk.offset : chunk.offset + num_whole], last_block[:rest_bytes]

    def _fill_last_block(self, chunk: TierChunk, last_block: memoryview) -> None:
        tail_bytes = chunk.num_bytes % BLOCK_BYTES
        end = chunk.offset + chunk.num_bytes
        last_block[:tail_bytes] = self._pool[end - tail_bytes : end]
        last_block[tail_bytes:] = bytes(BLOCK_BYTES - tail_bytes)


def _verified(chunk: TierChunk, header: memoryview, whole: memoryview, rest: memoryview) -> IoResult:
    """Say whether what was read is the chunk: MISSING if it is another one."""
    try:
        found = read_header(header)
    except BrokenHeader:
        return IoResult(Outcome.CORRUPT)
    except OtherFormat:
        return IoResult(Outcome.MISSING)
    if not found.describes(chunk):
        return IoResult(Outcome.MISSING)
    if found.payload_checksum != payload_checksum(whole, rest):
        return IoResult(Outcome.CORRUPT)
    return IoResult(Outcome.DONE, found.checksums)


def _behind(buffers: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """Return what is left of buffers behind their first `num_bytes`."""
    left = list(buffers)
    while left and num_bytes >= len(left[0]):
        num_bytes -= len(left.pop(0))
    if left and num_bytes:
        left[0] = left[0][num_bytes:]
    return left
