"""Reading every chunk file below a root, and saying which are not what they say.

Owns the checks of `kvtier verify`. Needs no daemon and disturbs none: it takes no lock, makes nothing, reads
past the page cache where it can, and a file that goes while it is looked at was somebody's to remove.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import xxhash

from kvtier_ops.layout import part_offset
from kvtier_server.secondary.chunk_file import (
    BLOCK_BYTES,
    HEADER_BYTES,
    BrokenHeader,
    Header,
    OtherFormat,
    file_bytes,
    padded_bytes,
    read_header,
)
from kvtier_server.secondary.chunk_names import SUFFIX, file_name, space_directory
from kvtier_server.secondary.filesystem.disk import Disk
from kvtier_server.secondary.filesystem.places import (
    SPACE_FILE,
    TEMPORARY,
    Places,
    spread_directory,
)

PIECE_BYTES = 4 << 20
"""Read at once: a multiple of what O_DIRECT asks for."""


class Verdict(StrEnum):
    """What was found."""

    RIGHT = "right"
    GONE = "gone"
    """Removed since it was listed."""
    UNFINISHED = "unfinished"
    """Under a temporary name: somebody writes it, or did when he died. A daemon removes it after an hour."""
    OTHER_FORMAT = "other format"
    """Whole, and of another version of kvtier, which is not read here."""
    UNREADABLE = "unreadable"
    """An error of the medium or of permissions: nothing can be said."""
    HEADER = "broken header"
    LENGTH = "wrong length"
    PAYLOAD = "wrong checksum"
    PLACE = "misplaced"
    """It says that it is a chunk whose file is called otherwise, or lies elsewhere."""
    NO_FILE = "no regular file"
    SPACE = "broken space.json"


WRONG = frozenset(
    {Verdict.HEADER, Verdict.LENGTH, Verdict.PAYLOAD, Verdict.PLACE, Verdict.NO_FILE, Verdict.SPACE}
)
"""What is never served, and may be removed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that was listed, by its directories below the root's `kvtier-1`."""

    space: str
    spread: str
    """ "" for what lies in the space's directory itself."""
    name: str
    is_file: bool = True

    @property
    def path(self) -> str:
        """Below the root."""
        return "/".join(filter(None, ("kvtier-1", self.space, self.spread, self.name)))


Identity = tuple[int, int]
"""Inode and time of modification; an inode alone is soon another file's."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about a file. `identity` tells the file that was read from a later one of its name."""

    entry: Entry
    verdict: Verdict
    num_bytes: int = 0
    detail: str = ""
    identity: Identity | None = None


class Inspection:
    """Looks at one root. One thread; every method may raise OSError where directories cannot be read."""

    def __init__(self, root: str, disk: Disk | None = None) -> None:
        """Open the root. Raises OSError: it is not there, no directory, or may not be read."""
        self._disk = disk or Disk()
        self._places = Places.below(self._disk, root, create=False)
        self._buffer = mmap.mmap(-1, PIECE_BYTES)  # aligned to pages, as O_DIRECT wants it
        self._is_direct = True

    def close(self) -> None:
        """Close the root."""
        self._places.close()

    def entries(self) -> Iterator[Entry]:
        """List all that should be chunks, directory by directory; what goes meanwhile is passed over."""
        for space in sorted(self._disk.directories(self._places.fd)):
            with contextlib.suppress(FileNotFoundError), self._places.opened(self._places.fd, space) as fd:
                yield Entry(space, "", SPACE_FILE)
                for spread in sorted(self._disk.directories(fd)):
                    with contextlib.suppress(FileNotFoundError):
                        yield from self._listed(space, fd, spread)

    def _listed(self, space: str, space_fd: int, spread: str) -> Iterator[Entry]:
        with self._places.opened(space_fd, spread) as fd, os.scandir(fd) as found:
            listed = [Entry(space, spread, each.name, each.is_file(follow_symlinks=False)) for each in found]
        for entry in sorted(listed, key=lambda entry: entry.name):
            if entry.name.startswith(TEMPORARY) or entry.name.endswith(SUFFIX):
                yield entry

    def look_at(self, entry: Entry) -> Finding:
        """Read one file to its end, and check it."""
        if entry.name.startswith(TEMPORARY):
            return Finding(entry, Verdict.UNFINISHED)
        try:
            with self._parent(entry) as parent:
                if entry.name == SPACE_FILE and not entry.spread:
                    return self._look_at_space(entry, parent)
                if not entry.is_file:
                    return Finding(entry, Verdict.NO_FILE, identity=_identity(parent, entry.name))
                return self._look_at_chunk(entry, parent)
        except FileNotFoundError:
            return Finding(entry, Verdict.GONE)
        except OSError as error:
            return Finding(entry, Verdict.UNREADABLE, detail=error.strerror or str(error))

    @contextlib.contextmanager
    def _parent(self, entry: Entry) -> Iterator[int]:
        with self._places.opened(self._places.fd, entry.space) as space_fd:
            if not entry.spread:
                yield space_fd
                return
            with self._places.opened(space_fd, entry.spread) as fd:
                yield fd

    def _look_at_space(self, entry: Entry, parent: int) -> Finding:
        try:
            identity = _identity(parent, entry.name)
        except FileNotFoundError:
            if not any(True for _ in self._disk.directories(parent)):
                raise  # a daemon that is about to write it, or nothing at all
            return Finding(
                entry, Verdict.SPACE, detail="is missing: without an index its chunks are not found"
            )
        told = self._places.read_space(parent)
        if told is None:
            return Finding(entry, Verdict.SPACE, detail="names no space", identity=identity)
        if space_directory(told) != entry.space:
            detail = "names the space of another directory"
            return Finding(entry, Verdict.SPACE, detail=detail, identity=identity)
        return Finding(entry, Verdict.RIGHT)

    def _look_at_chunk(self, entry: Entry, parent: int) -> Finding:
        fd = self._open(parent, entry.name)
        try:
            opened = os.fstat(fd)
            verdict, detail = self._check(fd, entry, opened.st_size)
        finally:
            self._disk.close(fd)
        return Finding(entry, verdict, opened.st_size, detail, (opened.st_ino, opened.st_mtime_ns))

    def _open(self, parent: int, name: str) -> int:
        try:
            return self._disk.open(parent, name, direct=self._is_direct)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._is_direct:
                raise
            self._is_direct = False
            return self._disk.open(parent, name, direct=False)

    def _check(self, fd: int, entry: Entry, num_bytes: int) -> tuple[Verdict, str]:
        view = memoryview(self._buffer)
        length = self._fill(fd, view[:HEADER_BYTES], 0)
        if length < HEADER_BYTES:
            return Verdict.LENGTH, f"{num_bytes} bytes, less than a header"
        try:
            header = read_header(view[:HEADER_BYTES])
        except BrokenHeader:
            return Verdict.HEADER, ""
        except OtherFormat:
            return Verdict.OTHER_FORMAT, ""
        place = (space_directory(header.space), spread_directory(header.key), file_name(header.key))
        if place != (entry.space, entry.spread, entry.name):
            return Verdict.PLACE, f"belongs to {'/'.join(place)}"
        parts_end = part_offset(header.part_bytes, len(header.checksums) - 1) + header.part_bytes
        if num_bytes != file_bytes(header.num_bytes) or parts_end != header.num_bytes:
            return Verdict.LENGTH, f"{num_bytes} bytes instead of {file_bytes(header.num_bytes)}"
        return self._check_payload(fd, header)

    def _check_payload(self, fd: int, header: Header) -> tuple[Verdict, str]:
        """Hash the payload as a whole, and each part of it."""
        view = memoryview(self._buffer)
        whole = xxhash.xxh3_64()
        parts = [xxhash.xxh3_64() for _ in header.checksums]
        total = padded_bytes(header.num_bytes)
        for start in range(0, total, PIECE_BYTES):
            piece = view[: min(PIECE_BYTES, total - start)]
            if self._fill(fd, piece, HEADER_BYTES + start) != len(piece):
                return Verdict.LENGTH, "its end is missing"
            whole.update(piece)
            for part, digest in enumerate(parts):
                first = part_offset(header.part_bytes, part) - start
                digest.update(piece[max(first, 0) : max(first + header.part_bytes, 0)])
        if whole.intdigest() != header.payload_checksum:
            return Verdict.PAYLOAD, ""
        wrong = [
            part
            for part, (digest, recorded) in enumerate(zip(parts, header.checksums, strict=True))
            if (digest.intdigest() or 1) != recorded
        ]
        return (Verdict.PAYLOAD, f"of part {wrong[0]}") if wrong else (Verdict.RIGHT, "")

    def _fill(self, fd: int, target: memoryview, offset: int) -> int:
        """Read until `target` is full or the file ends; returns the bytes read."""
        filled = 0
        while filled < len(target):
            if filled % BLOCK_BYTES:
                break  # O_DIRECT reads a part of a block only where the file ends
            count = self._disk.read(fd, [target[filled:]], offset + filled)
            if count <= 0:
                break
            filled += count
        return filled

    def remove(self, finding: Finding) -> bool:
        """Remove what was found wrong; False if it is gone already, or another file has its name by now."""
        with contextlib.suppress(FileNotFoundError), self._parent(finding.entry) as parent:
            name = finding.entry.name
            if _identity(parent, name) == finding.identity:
                self._disk.unlink(parent, name)
                return True
        return False


def _identity(parent: int, name: str) -> Identity:
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    return found.st_ino, found.st_mtime_ns
