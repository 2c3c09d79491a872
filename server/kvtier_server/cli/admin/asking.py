"""One call of the AdminService, with the patience and the errors of a command; and printing its answer."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from kvtier_server.cli.connection import explain, open_channel

if TYPE_CHECKING:
    from google.protobuf.message import Message

ReplyT = TypeVar("ReplyT", bound="Message")

REPLY_MARGIN_S = 0.5
"""What the daemon answers before the call's deadline, where it waits for something."""

SHOW_AFTER_S = 1.0
"""Shorter work needs no sign of life."""


def wait_ms(args: argparse.Namespace) -> int:
    """Return how long the daemon may wait before it answers, for a call that ends after --timeout."""
    return max(int((args.timeout - REPLY_MARGIN_S) * 1000), 1)


def ask(
    args: argparse.Namespace, method: str, request: Message, reply_type: type[ReplyT], doing: str = ""
) -> ReplyT:
    """Call `method` and return its reply. Raises Failure. `doing` is shown on a terminal that waits."""
    address, channel = open_channel(args)
    import grpc

    from kvtier.v1 import admin_pb2_grpc

    with channel, waiting(doing) if doing else contextlib.nullcontext():
        try:
            reply = getattr(admin_pb2_grpc.AdminServiceStub(channel), method)(request, timeout=args.timeout)
        except grpc.RpcError as error:
            raise explain(error, address, args) from None
    assert isinstance(reply, reply_type), f"{method} answered {type(reply)}"
    return reply


@contextlib.contextmanager
def waiting(doing: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is waited for, if that is a terminal and it takes longer than a moment.

    Yields a function that replaces the text.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    status = Console(stderr=True, highlight=False, markup=False, emoji=False).status(f"{doing} ...")
    timer = threading.Timer(SHOW_AFTER_S, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda text: status.update(f"{text} ...")
    finally:
        timer.cancel()
        timer.join()
        status.stop()


def print_json(message: Message, **more: bool) -> None:
    """Print a reply as JSON, every field under its proto name, and what the command itself knows."""
    from kvtier_server.cli.status import to_dict

    print(json.dumps({**to_dict(message), **more}, indent=2))
