"""Stop the daemon in order, and see it go."""

from __future__ import annotations

import argparse
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvtier_server.address import client_address, socket_path
from kvtier_server.cli.admin.asking import ask, print_json, waiting
from kvtier_server.cli.confirmation import confirm
from kvtier_server.cli.failure import Failure
from kvtier_server.units import UnitError, format_bytes, parse_duration

if TYPE_CHECKING:
    from kvtier.v1.admin_pb2 import DrainResponse, GetStatusResponse

SUMMARIES = {"drain": "stop the daemon in order, as SIGTERM does"}
DESCRIPTIONS = {
    "drain": """Have the daemon do what SIGTERM does: its health is NOT_SERVING, it grants nothing new,
gives copies and tiers their time (drain.copies, drain.tiers), and exits with 0. Engines go on without it and
compute; the pool keeps its chunks for the next start. A second drain is no error: it tells how far it is.
Exit code: 0 it drains, or with --wait it is gone; 1 it cannot; 2 a mistake or no daemon.

kvtier admin drain --wait                       before a node is rebooted, or as a preStop hook
kvtier admin drain --deadline 2min --yes        copies may take longer than drain.copies""",
}

POLL_S = 0.5
"""Between two questions how far it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this action."""
    parser.add_argument("--wait", action="store_true", help="return when the daemon is gone")
    parser.add_argument(
        "--deadline", metavar="TIME", help='longest wait for running copies: "30s" (default: drain.copies)'
    )
    parser.add_argument("--yes", action="store_true", help="do not ask on a terminal")


def run(args: argparse.Namespace) -> int:
    """Drain, once it is sure that it is meant, and wait if that is asked for."""
    deadline_ms = _deadline_ms(args.deadline)
    if not args.yes and sys.stdin.isatty():  # a hook that stops the daemon has nobody to ask, and means it
        confirm("stop the daemon? Engines go on, and compute what it holds.", "it goes on")
    from kvtier.v1 import admin_pb2

    process = _process_of(client_address(args.address, os.environ)) if args.wait else None
    request = admin_pb2.DrainRequest(deadline_ms=deadline_ms)
    reply = ask(args, "Drain", request, admin_pb2.DrainResponse, "the daemon is asked")
    if args.wait:
        if args.output == "table":
            print(told(reply), file=sys.stderr)
        with waiting("the daemon drains") as say:
            _wait_gone(args, process, reply.boot_id, say)
    if args.output == "json":
        print_json(reply, gone=args.wait)
    else:
        print("the daemon is gone" if args.wait else told(reply))
    return 0


def told(reply: DrainResponse) -> str:
    """Write what is held for a person."""
    copies = reply.loads + reply.stores
    return (
        f"draining: {reply.sessions} sessions, {reply.leases} leases, {copies} copies running "
        f"(waited for {reply.deadline_ms / 1000:.1f}s at most), {format_bytes(reply.queued_bytes)} to go down"
    )


def _deadline_ms(text: str | None) -> int:
    if text is None:
        return 0
    try:
        milliseconds = parse_duration(text) // 1_000_000
    except UnitError as error:
        raise Failure(f"--deadline: {error}", 2) from None
    if not 0 < milliseconds < 1 << 32:
        raise Failure(f'--deadline: {text} is no time to wait; write "30s", or leave it out', 2)
    return milliseconds


def _process_of(address: str) -> int | None:
    """Return a descriptor of the process that listens on a unix socket; None where that cannot be told."""
    path = socket_path(address)
    if path is None:
        return None
    try:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.connect(os.fspath(path))
            credentials = unix.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, _, _ = struct.unpack("3i", credentials)
        return os.pidfd_open(pid) if pid else None  # 0: it is in another container
    except OSError:
        return None  # nobody is there, which the call says better


def _wait_gone(
    args: argparse.Namespace, process: int | None, boot_id: str, say: Callable[[str], None]
) -> None:
    """Return when the daemon that answered is gone: its process, or where that cannot be seen its answers."""
    if process is None:
        while (status := _status(args)) is not None and status.boot_id == boot_id:
            say(_progress(status))
            time.sleep(POLL_S)
        return
    try:
        while not select.select([process], [], [], POLL_S)[0]:
            if sys.stderr.isatty() and (status := _status(args)) is not None and status.boot_id == boot_id:
                say(_progress(status))
    finally:
        os.close(process)


def _status(args: argparse.Namespace) -> GetStatusResponse | None:
    """Return the status; None if nobody answers. Not another Drain: it might reach, and stop, a successor."""
    from kvtier.v1 import admin_pb2

    try:
        return ask(args, "GetStatus", admin_pb2.GetStatusRequest(), admin_pb2.GetStatusResponse)
    except Failure:
        return None


def _progress(status: GetStatusResponse) -> str:
    leases = ", ".join(f"{lease.count} {lease.kind}" for lease in status.leases if lease.count)
    return f"the daemon drains: {len(status.sessions)} sessions, leases: {leases or 'none'}"
