"""What a service manager is told (sd_notify): the daemon serves, how it is, it stops, it lives.

Owns the messages to `$NOTIFY_SOCKET` and when they go; without one there is nobody to tell, and nothing here
does anything. What is true is the daemon's business. On the loop's thread: no send ever waits, and what the
manager has no room for goes with the next beat.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, MutableMapping

import structlog

log = structlog.get_logger("kvtier.notify")

BEAT_S = 1.0
"""Longest time between two looks at whether there is something to say."""

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_MAX_ADDRESS_BYTES = 107


class Notifier:
    """One daemon's line to its service manager. `address`: of a datagram socket, "" = there is no manager.

    `watchdog_s`: how long the manager accepts silence before it ends the daemon, None = for ever.
    """

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = watchdog_s
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self._unsent: dict[str, str] = {}
        self._told_status = ""

    @classmethod
    def take(cls, env: MutableMapping[str, str], pid: int) -> Notifier:
        """Make one from what the manager put into the environment, and take it out.

        Child processes must not find it there: they would speak for the daemon. A variable that no manager
        writes so is as good as none, with a warning.
        """
        address, watchdog_usec, watchdog_pid = (env.pop(name, "") for name in _VARIABLES)
        is_path = address.startswith(("/", "@")) and len(address.encode()) <= _MAX_ADDRESS_BYTES
        if address and not is_path:
            log.warning(
                "notify_socket_unusable", address=address, effect="the service manager is told nothing"
            )
        watchdog_s = None
        if watchdog_usec.isascii() and watchdog_usec.isdigit() and watchdog_pid in ("", str(pid)):
            watchdog_s = int(watchdog_usec) / 1e6 or None
        return cls(address if is_path else "", watchdog_s)

    @property
    def beat_s(self) -> float:
        """Time between two beats: a third of the manager's patience, so that two may come late."""
        return min(BEAT_S, self._watchdog_s / 3) if self._watchdog_s is not None else BEAT_S

    def ready(self, status: str) -> None:
        """Say that the daemon serves."""
        self._tell(READY="1", STATUS=status)

    def stopping(self, status: str) -> None:
        """Say that it has begun to stop."""
        self._tell(STOPPING="1", STATUS=status)

    def beat(self, status: str) -> None:
        """Say that the loop comes round, and how the daemon is if that has changed."""
        fields = {} if status == self._told_status else {"STATUS": status}
        if self._watchdog_s is not None:
            fields["WATCHDOG"] = "1"
        self._tell(**fields)

    async def beat_forever(self, status: Callable[[], str]) -> None:
        """Beat until cancelled. Returns at once where there is nobody to tell."""
        while self._socket is not None:
            await asyncio.sleep(self.beat_s)
            self.beat(status())

    def close(self) -> None:
        """Say what is left, as far as there is room, and no more. A second call does nothing."""
        self._tell()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, **fields: str) -> None:
        """Send fields, with those that found no room before."""
        if self._socket is None:
            return
        self._unsent |= fields
        if not self._unsent:
            return
        self._told_status = self._unsent.get("STATUS", self._told_status)
        text = "\n".join(f"{name}={' '.join(value.split())}" for name, value in self._unsent.items())
        # No room or no manager, which may be starting again: the next beat tries once more.
        with contextlib.suppress(OSError):
            self._socket.sendto(text.encode(), self._address)
            self._unsent.clear()
