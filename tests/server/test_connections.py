from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvtier_server.connections import cut_connections


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen(sockets: ExitStack, where: str) -> tuple[socket.socket, str]:
    """A listener, and its address as the daemon writes it."""
    if where == "unix":
        directory = sockets.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-run-"))
        listener = sockets.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{directory}/s")
        listener.listen()
        return listener, f"unix://{directory}/s"
    listener = sockets.enter_context(socket.create_server((where, 0)))
    return listener, f"{where}:{listener.getsockname()[1]}"


def connect(sockets: ExitStack, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection: the client's, the accepted one."""
    client = sockets.enter_context(socket.socket(listener.family))
    client.settimeout(30)
    client.connect(listener.getsockname())
    accepted = sockets.enter_context(listener.accept()[0])
    accepted.settimeout(30)
    return client, accepted


@pytest.mark.parametrize("where", ["unix", "127.0.0.1"])
def test_what_was_accepted_at_an_address_is_cut_though_its_peer_does_not_read(
    sockets: ExitStack, where: str
) -> None:
    listener, address = listen(sockets, where)
    ends = [connect(sockets, listener) for _ in range(3)]
    full = ends[0][1]
    full.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while full.send(bytes(65_536)):
            pass
    assert cut_connections([address]) == 3
    with pytest.raises(BrokenPipeError):
        full.send(b"x")
    assert all(client.recv(1) == b"" for client, _ in ends[1:])


@pytest.mark.parametrize("where", ["unix", "127.0.0.1"])
def test_listeners_other_addresses_and_files_are_left_alone(
    sockets: ExitStack, where: str, tmp_path: Path
) -> None:
    file = sockets.enter_context((tmp_path / "file").open("w+"))
    others = [connect(sockets, listen(sockets, kind)[0]) for kind in ("unix", "127.0.0.1")]
    pair = socket.socketpair()
    others.append((sockets.enter_context(pair[0]), sockets.enter_context(pair[1])))
    listener, address = listen(sockets, where)
    assert cut_connections([address]) == 0
    for client, accepted in [*others, connect(sockets, listener)]:
        accepted.sendall(b"x")
        assert client.recv(1) == b"x"
    assert file.write("x") == 1
