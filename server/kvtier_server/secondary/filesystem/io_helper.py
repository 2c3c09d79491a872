"""The process that does a filesystem tier's I/O: `python -P -m kvtier_server...io_helper SETTINGS`.

Maps the pool, and has one thread for each socket that it was given; each takes one chunk after the other from
its socket, and answers. In a process of its own the hashing and the copying share no interpreter lock with
the daemon that answers the engines.

Ends when the daemon ends, which the socket `life` tells. It shares the daemon's lock on the pool, so that
nobody else takes the pool over while a read of a daemon that is gone may still arrive in it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import sys
import threading
import traceback

from kvtier_server.secondary.filesystem.chunk_files import ChunkFiles
from kvtier_server.secondary.filesystem.disk import Disk
from kvtier_server.secondary.filesystem.io_wire import (
    LAYOUT,
    MAX_BYTES,
    pack_bug,
    pack_error,
    pack_result,
    unpack_request,
)
from kvtier_server.secondary.filesystem.places import Places


def main(arguments: list[str]) -> None:
    """Work until the daemon is gone. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is the daemon's to answer
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = json.loads(arguments[0])
    if settings["layout"] != LAYOUT:
        sys.exit("another version of kvtier was installed under its daemon; start the daemon anew")
    life = socket.socket(fileno=settings["life"])
    pool = mmap.mmap(settings["pool"], settings["pool_bytes"], offset=settings["pool_offset"])
    disk = Disk()
    files = ChunkFiles(
        disk,
        Places(disk, settings["root"]),
        memoryview(pool),
        durability=settings["durability"],
        direct=settings["direct"],
        token=settings["token"],
    )
    for fd in settings["channels"]:
        channel = socket.socket(fileno=fd)
        threading.Thread(target=_serve, args=(channel, files), name=f"io-{fd}", daemon=True).start()
    with contextlib.suppress(OSError):
        life.send(b"r")
        life.recv(1)
    os._exit(0)  # whatever the threads are in: the daemon waits for the end of the process, or is gone


def _serve(channel: socket.socket, files: ChunkFiles) -> None:
    with contextlib.suppress(OSError):  # the daemon is gone
        while message := channel.recv(MAX_BYTES):
            channel.send(_answer(message, files))


def _answer(message: bytes, files: ChunkFiles) -> bytes:
    try:
        return pack_result(files.run(*unpack_request(message)))
    except OSError as error:
        return pack_error(error)
    except Exception:  # noqa: BLE001 - the daemon logs it
        return pack_bug(traceback.format_exc())


if __name__ == "__main__":
    main(sys.argv[1:])
