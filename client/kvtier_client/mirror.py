"""An exact mirror of a daemon's index, kept across reconnects: for routers, and an example of a consumer.

    mirror = IndexMirror("unix:///run/kvtier/kvtier.sock")
    mirror.start()
    mirror.wait_live(10)
    mirror.tiers_of(namespace, tenant, epoch, key)  # ("primary", "disk")
    mirror.close()

    python -m kvtier_client.mirror --address unix:///run/kvtier/kvtier.sock

Owns one thread, which follows the daemon: a snapshot, then the events from the number that came with it.
After a lost connection it goes on where it was, if the same daemon still has those events; after an overflow
and with a new daemon it takes another snapshot. What it says is always the index as it was at one event; how
long ago, `state` tells. Until there is a first snapshot it is empty, and while another one is being taken it
stays what it was. Tiers that cannot list what they hold are named in `state`, and not in it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from kvtier.v1 import events_pb2 as pb
from kvtier.v1 import events_pb2_grpc
from kvtier_client.channel import open_channel, parse_address, read_failure
from kvtier_client.mirrored_index import MirroredIndex
from kvtier_client.tls import VARIABLES, TlsFiles, TlsUnusable

logger = logging.getLogger(__name__)

ReplyT = TypeVar("ReplyT")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
"""Between two attempts to follow a daemon; doubled up to the longest."""

SILENCE_S = 5.0
"""A daemon says something every second: after this much silence the mirror does not count as live."""

CLOSE_S = 5.0

LINE_EVERY_S, ONCE_S = 1.0, 10.0
"""Of the command: between two lines, and the longest wait for the only one."""


class OutOfStep(Exception):
    """The mirror cannot be carried on with events: it takes a new snapshot."""


@dataclass(frozen=True, slots=True)
class MirrorState:
    """How the mirror stands."""

    is_live: bool
    """It is the index as it was `heard_s` ago, give or take the tenth of a second in which events gather."""
    boot_id: str
    next_sequence: int
    """All events before it are in the mirror."""
    heard_s: float
    """Seconds since the daemon said something; infinite before the first word."""
    num_snapshots: int
    problem: str
    """Why it is not followed now, or was not last; "" = nothing has been wrong yet."""
    unlisted_tiers: tuple[str, ...]


@dataclass(slots=True)
class _Copy:
    """An index that is being followed. With all events before `exact_sequence` in it, it is exact."""

    index: MirroredIndex
    boot_id: str
    next_sequence: int
    exact_sequence: int
    unlisted_tiers: tuple[str, ...]


class IndexMirror:
    """Follows one daemon. Every method may be called from any thread."""

    def __init__(self, address: str, namespace: str = "", tls: TlsFiles | None = None) -> None:
        """`namespace`: the digest of the only one to mirror; "" = all. `tls`: for an address of TCP, of a
        certificate that the daemon lets observe. Raises ValueError for no address.
        """
        self._target = parse_address(address, tls)
        self._tls = tls
        self._namespace = namespace
        self._lock = threading.Condition()
        self._shown = _Copy(MirroredIndex(), "", 0, 0, ())
        self._copy: _Copy | None = None
        """The one that is followed: `_shown`, once it is exact. None = a snapshot is needed."""
        self._follows = False
        self._heard_at = float("-inf")
        self._num_snapshots = 0
        self._problem = ""
        self._call: grpc.Call | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-mirror", daemon=True)

    def start(self) -> None:
        """Begin to follow the daemon; it need not be there yet."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and the connection. What was mirrored can still be asked for."""
        with self._lock:
            self._closed.set()
            if self._call is not None:
                self._call.cancel()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

    def tiers_of(self, namespace: str, tenant: str, epoch: int, key: bytes) -> tuple[str, ...]:
        """Name the tiers that hold a chunk, the pool ("primary") first; () = none is known to."""
        with self._lock:
            return self._shown.index.tiers_of((namespace, tenant, epoch), key)

    def counts(self) -> dict[str, int]:
        """Count the chunks of each tier."""
        with self._lock:
            return self._shown.index.counts()

    def chunks(self) -> set[tuple[str, str, str, int, bytes]]:
        """Copy the mirror: (tier, namespace, tenant, epoch, key) of every chunk. For tests and tools."""
        with self._lock:
            return set(self._shown.index.chunks())

    @property
    def state(self) -> MirrorState:
        """Tell how the mirror stands now."""
        with self._lock:
            heard_s = time.monotonic() - self._heard_at
            return MirrorState(
                self._follows and heard_s < SILENCE_S,
                self._shown.boot_id,
                self._shown.next_sequence,
                heard_s,
                self._num_snapshots,
                self._problem,
                self._shown.unlisted_tiers,
            )

    def wait_live(self, timeout_s: float) -> bool:
        """Wait until the mirror is live; False if it is not after `timeout_s`."""
        with self._lock:
            return self._lock.wait_for(lambda: self._follows, timeout_s)

    # The thread

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closed.is_set():
            before = self._heard_at
            problem = self._follow_once()
            with self._lock:
                self._follows = False
                self._call = None
                is_news, self._problem = problem != self._problem, problem
            if self._closed.is_set():
                return
            if is_news:
                logger.info("the mirror of %s is behind: %s", self._target, problem)
            pause_s = FIRST_PAUSE_S if self._heard_at > before else min(2 * pause_s, LONGEST_PAUSE_S)
            self._closed.wait(pause_s)

    def _follow_once(self) -> str:
        """Follow the daemon until something is in the way; returns what."""
        try:
            with open_channel(self._target, self._tls) as channel:
                stub = events_pb2_grpc.EventsServiceStub(channel)
                if self._copy is None:
                    self._copy = self._take_snapshot(stub)
                self._watch(stub, self._copy)
        except OutOfStep as error:
            self._copy = None
            return str(error)
        except TlsUnusable as error:
            return str(error)  # a file may be there at the next attempt
        except grpc.RpcError as error:
            failed = read_failure(error)
            if failed.reason in {"events_gone", "bad_request"}:
                self._copy = None
            return f"{failed.reason}: {failed.details}"
        except Exception:
            # A bug of ours: whatever is in the mirror, it is made anew.
            logger.exception("the mirror of %s failed", self._target)
            self._copy = None
            return "internal error; the log has it"
        return "the daemon ended the stream"

    def _take_snapshot(self, stub: events_pb2_grpc.EventsServiceStub) -> _Copy:
        """Copy the index; with the events from its number on it becomes exact."""
        index = MirroredIndex()
        last: pb.SnapshotResponse | None = None
        for reply in self._replies(stub.Snapshot(pb.SnapshotRequest(namespace=self._namespace))):
            index.apply(reply.events)
            last = reply
        if last is None or not last.next_sequence:
            raise OutOfStep("a snapshot ended in the middle")
        with self._lock:
            self._num_snapshots += 1
        tiers = tuple(last.unlisted_tiers)
        return _Copy(index, last.boot_id, last.next_sequence, last.exact_sequence, tiers)

    def _watch(self, stub: events_pb2_grpc.EventsServiceStub, copy: _Copy) -> None:
        """Apply events to a copy, which is shown from the moment on when it is exact."""
        asked = pb.WatchRequest(
            from_sequence=copy.next_sequence, boot_id=copy.boot_id, namespace=self._namespace
        )
        for reply in self._replies(stub.Watch(asked)):
            if reply.boot_id != copy.boot_id:
                raise OutOfStep(f"another boot, {reply.boot_id}")
            if reply.overflow:
                raise OutOfStep("overflow: events came faster than they were read")
            with self._lock:
                copy.index.apply(reply.events)
                copy.next_sequence = reply.next_sequence
                if not self._follows and copy.next_sequence >= copy.exact_sequence:
                    self._shown, self._follows = copy, True
                    self._lock.notify_all()

    def _replies(self, call: Iterator[ReplyT]) -> Iterator[ReplyT]:
        """Read a stream that `close` can end."""
        assert isinstance(call, grpc.Call), call
        with self._lock:
            self._call = call
            if self._closed.is_set():
                call.cancel()
        for reply in call:
            self._heard_at = time.monotonic()
            yield reply


def main(argv: Sequence[str] | None = None) -> int:
    """Mirror a daemon and say every second how many chunks each tier holds. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m kvtier_client.mirror",
        description=main.__doc__,
        epilog="Over TCP with certificates: KVTIER_TLS_CA, KVTIER_TLS_CERT, KVTIER_TLS_KEY.",
    )
    parser.add_argument("--address", default=os.environ.get("KVTIER_ADDRESS", ""), help="of the daemon")
    parser.add_argument("--namespace", default="", help="mirror only this one: all digits of its digest")
    parser.add_argument("--once", action="store_true", help="one line, when the mirror is live; else exit 2")
    args = parser.parse_args(argv)
    try:
        tls = TlsFiles.given({name: os.environ.get(variable, "") for name, variable in VARIABLES.items()})
        mirror = IndexMirror(args.address, args.namespace, tls)
    except ValueError as error:
        parser.error(f"--address: {error}")
    mirror.start()
    try:
        if args.once:
            is_live = mirror.wait_live(ONCE_S)
            print(_line(mirror), file=sys.stdout if is_live else sys.stderr)
            return 0 if is_live else 2
        while True:
            is_live = mirror.wait_live(LINE_EVERY_S)
            print(_line(mirror), flush=True)  # noqa: T201 the command's output
            if is_live:
                time.sleep(LINE_EVERY_S)
    except KeyboardInterrupt:
        return 0
    finally:
        mirror.close()


def _line(mirror: IndexMirror) -> str:
    state = mirror.state
    counts = "  ".join(f"{tier} {count}" for tier, count in mirror.counts().items())
    how = f"lag {state.heard_s:.2f} s" if state.is_live else f"not live: {state.problem or 'no snapshot yet'}"
    return f"{counts}  event {max(state.next_sequence - 1, 0)}  {how}"


if __name__ == "__main__":
    sys.exit(main())
