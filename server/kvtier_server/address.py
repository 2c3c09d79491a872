"""Where a daemon listens: the default socket, and what an address may look like.

Imported by every command, so it needs only the standard library. It opens no socket and makes no directory.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path

UNIX_PREFIX = "unix://"

MAX_SOCKET_PATH_BYTES = 107
"""`sun_path` of Linux is 108 bytes, the last of them a NUL; bind's own message for more names nothing."""


class AddressError(ValueError):
    """An address that no daemon can have. The message shows what one looks like; nothing was opened."""


def default_address(env: Mapping[str, str], uid: int | None = None) -> str:
    """Return the socket that daemon and commands agree on when nobody names one: one per user."""
    uid = os.getuid() if uid is None else uid
    if uid == 0:
        return f"{UNIX_PREFIX}/run/kvtier/kvtier.sock"
    runtime = env.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and Path(runtime).is_dir():
        return f"{UNIX_PREFIX}{os.path.normpath(runtime)}/kvtier/kvtier.sock"
    return f"{UNIX_PREFIX}/tmp/kvtier-{uid}/kvtier.sock"


def client_address(given: str | None, env: Mapping[str, str]) -> str:
    """Return the address a command talks to: the flag, else KVTIER_ADDRESS, else the default socket."""
    return given or env.get("KVTIER_ADDRESS") or default_address(env)


def socket_path(address: str) -> Path | None:
    """Return the file of a unix socket address, None for a TCP address."""
    return Path(address.removeprefix(UNIX_PREFIX)) if address.startswith(UNIX_PREFIX) else None


def parse_host_port(text: str, example_port: int = 9470) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`. Port 0 = any free one. Raise AddressError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise AddressError(f"{text!r} is ambiguous; write an IPv6 address as [::1]:{example_port}")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise AddressError(f"{text!r} is not host:port; for example 127.0.0.1:{example_port}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches `host`. Names but localhost are not resolved: they move."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_remote(address: str) -> bool:
    """Tell whether other machines may reach an address that `check_listen_address` has let through."""
    return socket_path(address) is None and not is_loopback(parse_host_port(address)[0])


def parse_address(address: str) -> Path | tuple[str, int]:
    """Return a unix socket's absolute path, or host and port. Raise AddressError, which names a slip."""
    path = socket_path(address)
    if path is not None:
        if not path.is_absolute() or path.name in ("", ".."):
            raise AddressError(f"{address!r} is no address; {_ABSOLUTE}")
        return path
    if "://" in address:
        raise AddressError(
            f"{address!r} is a URL, and the service speaks gRPC at host:port; for example 127.0.0.1:9470"
        )
    rest = address.removeprefix("unix:")
    if rest.startswith("/"):
        raise AddressError(f"{address!r} is no address; did you mean {UNIX_PREFIX}{rest}?")
    if rest != address or "/" in address:
        raise AddressError(f"{address!r} is no address; {_ABSOLUTE}")
    return parse_host_port(address)


_ABSOLUTE = f"write an absolute path: {UNIX_PREFIX}/run/kvtier/kvtier.sock"


def check_listen_address(address: str) -> None:
    """Raise AddressError unless a daemon can listen there: a short unix socket path, or host:port.

    Whether it may, where other machines reach it, depends on [tls].
    """
    path = parse_address(address)
    if not isinstance(path, Path):
        return
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH_BYTES:
        raise AddressError(
            f"its path has {size} bytes, Linux allows {MAX_SOCKET_PATH_BYTES} for a socket; "
            "use a shorter directory, for example unix:///tmp/kvtier.sock"
        )
