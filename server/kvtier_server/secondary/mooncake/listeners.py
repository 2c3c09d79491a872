"""Who may connect to the ports that the transfer engine opens.

The engine listens on every address of the machine and has no setting that changes it; and whoever connects to
its data port may read and write the memory that it has registered. So a filter is laid on each listening
socket of this process: packets for any other address than the chosen one, and all packets where nobody is to
connect, are dropped by the kernel. Connections that this process opens itself are not concerned.

Owns the filter, a program of classic BPF. Imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct

_SO_ATTACH_FILTER = 26
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: offsets from here on are those of the IP header
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _IF_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x15, 0x06
_ALL, _NOTHING = 0xFFFFFFFF, 0
_IPV4_DESTINATION = 16

_Instruction = tuple[int, int, int, int]


def filter_listeners(address: str) -> int:
    """Let only IPv4 packets for `address` reach the listening sockets; "" = none. Returns how many.

    Raises OSError if a filter is refused, which leaves a socket open to all.
    """
    listeners = [found for name in os.listdir("/proc/self/fd") if (found := _listener(int(name))) is not None]
    for listener in listeners:
        with listener:
            attach(listener, address)
    return len(listeners)


def attach(listener: socket.socket, address: str) -> None:
    """Lay the filter on one socket. Raises OSError."""
    program = _program(address)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    listener.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(code))
    )


def _listener(fd: int) -> socket.socket | None:
    """Return a socket of its own over a listening TCP socket, None for anything else."""
    try:
        found = socket.socket(fileno=os.dup(fd))
    except OSError:
        return None  # no socket, or the descriptor with which the directory itself was read
    try:
        is_listening = found.family in {socket.AF_INET, socket.AF_INET6} and found.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        )
    except OSError:
        is_listening = False
    if is_listening:
        return found
    found.close()
    return None


def _program(address: str) -> list[_Instruction]:
    drop: _Instruction = (_RETURN, 0, 0, _NOTHING)
    if not address:
        return [drop]
    (destination,) = struct.unpack("!I", socket.inet_aton(address))
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_IF_EQUAL, 0, 3, 4),  # IPv4, or dropped
        (_LOAD_WORD, 0, 0, _NETWORK_HEADER + _IPV4_DESTINATION),
        (_IF_EQUAL, 0, 1, destination),
        (_RETURN, 0, 0, _ALL),
        drop,
    ]
