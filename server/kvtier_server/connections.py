"""Connections that gRPC has accepted and cannot end: found among the files of this process, and cut.

gRPC does not close a connection while a write to it is pending. To a peer that is stopped, or never reads,
one is pending for ever, and the server's end waits for it. gRPC hands out no connections, and no option of it
ends such a one: they all close it in the same way.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable

from kvtier_server.address import parse_host_port, socket_path


def cut_connections(addresses: Iterable[str]) -> int:
    """Cut every connection that was accepted at one of these addresses; returns how many.

    Whoever owns the connection finds its reads and writes failing, and closes it. Takes about 10 µs for each
    open file of the process. Raises OSError if no more file can be opened.
    """
    names = {_local_name(address) for address in addresses}
    num_cut = 0
    for entry in os.listdir("/proc/self/fd"):
        connection = _socket_of(int(entry))
        if connection is None:
            continue
        with connection:
            if _name_of(connection) in names and not _listens(connection):
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # the peer has gone by itself
                    continue
                num_cut += 1
    return num_cut


def _socket_of(number: int) -> socket.socket | None:
    """Return a socket of this process under a number of its own, as its owner may close it any time."""
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return None
    except OSError:
        return None
    own = os.dup(number)
    try:
        return socket.socket(fileno=own)
    except OSError:  # it has become another file meanwhile
        os.close(own)
        return None


def _local_name(address: str) -> str | int:
    """Say how the local end of a connection to an address is recognized: the socket's path, or the port."""
    path = socket_path(address)
    return os.fspath(path) if path is not None else parse_host_port(address)[1]


def _name_of(connection: socket.socket) -> str | int | None:
    if connection.type != socket.SOCK_STREAM:
        return None
    if connection.family == socket.AF_UNIX:
        return os.fsdecode(connection.getsockname())
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        return int(connection.getsockname()[1])
    return None


def _listens(connection: socket.socket) -> bool:
    return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
