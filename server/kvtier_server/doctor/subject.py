"""Which daemon is meant: its address, its pool and its tiers, as `kvtier serve` or a running one has them."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier_ops.directory import default_pool_directory
from kvtier_ops.locks import DAEMON_LOCK_FILE
from kvtier_server.doctor.machine import Machine

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import GetStatusResponse
    from kvtier_server.config import Config
    from kvtier_server.config_tiers import TierSettings


@dataclass(frozen=True, slots=True)
class Subject:
    """What the checks are about. A pool of 0 bytes: nobody has said how large."""

    address: str
    name: str
    pool_directory: Path
    pool_bytes: int
    sessions: int
    """What limits.sessions allows."""
    tiers: tuple[TierSettings, ...]
    command: tuple[str, ...] = ("kvtier", "serve")
    """What starts it."""

    @classmethod
    def of_config(cls, config: Config, options: tuple[str, ...]) -> Subject:
        """Take the daemon that this configuration would start."""
        return cls(
            address=config.server.address,
            name=config.server.name,
            pool_directory=config.pool_directory,
            pool_bytes=config.pool.bytes,
            sessions=config.limits.sessions,
            tiers=config.tiers,
            command=("kvtier", "serve", *options),
        )

    @classmethod
    def unconfigured(cls, address: str) -> Subject:
        """Take what can be said of a daemon whose configuration cannot be read here."""
        return cls(address, "default", default_pool_directory("default"), 0, 0, ())

    def as_served(self, machine: Machine, status: GetStatusResponse) -> Subject:
        """Take the pool from the daemon that runs, and how it was started, where that can be seen."""
        if not status.pool.path:
            return self
        served = dataclasses.replace(
            self,
            name=status.pool.name,
            pool_directory=Path(status.pool.path).parent,
            pool_bytes=status.pool.data_bytes,
        )
        pid = served.served_by(machine)
        command = machine.command(pid) if pid is not None else ()
        return dataclasses.replace(served, command=command) if "serve" in command else served

    def served_by(self, machine: Machine) -> int | None:
        """Return the process that holds the pool, None where there is none that can be seen from here.

        Not what stands in the lock's file: a daemon in another container writes a pid that is not ours.
        """
        return machine.lock_holder(self.pool_directory / DAEMON_LOCK_FILE)

    def serve(self, *more: str) -> str:
        """Return the command that starts this daemon, with `more` options, which outdo those before."""
        return shlex.join([*self.command, *more])


def stop_first(pid: int | None) -> str:
    """Return what ends a running daemon, and waits for that; to stand before what starts another."""
    return f"kill {pid} && tail --pid={pid} -f /dev/null && " if pid is not None else ""
