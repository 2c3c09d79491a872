"""Replay a recorded trace through a daemon with a pool too small for it and a filesystem tier below.

Every loaded byte is compared with what it must be, whether it was in the pool or came up from disk. What the
daemon serves must be what a plain loop with the same two capacities serves (`plain_tiers.py`), request by
request, from the pool and from the tier. So that this can be exact, a request begins when everything that
the one before it sent down has arrived: the tier has the plain loop's number of chunks, as many evictions
have been counted, and no chunk is pinned.

The row "all" has a pool of 1/8 of the working set and a tier that holds everything; its daemon is killed
twice (SIGKILL), once while chunks are on their way up, once while an engine writes into reserved slots, and
the request is played again on the daemon that is started after it. The row "half" has a tier that holds half
of what is stored, so that the tier evicts too; it plays the first third of the requests, as files are removed
one by one.

    python -m tests.benchmarks.replay_tiers [--requests 2000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum, auto
from pathlib import Path
from threading import Condition

from kvtier.v1 import admin_pb2, admin_pb2_grpc
from kvtier_client.bench.block_client import BlockClient, chunk_key
from kvtier_client.bench.replayer import MISS, Replayer, Slot, WrongByte
from kvtier_client.bench.traces import load_trace
from kvtier_client.context import ReqContext
from kvtier_client.listener import ClientListener
from kvtier_server.secondary.chunk_file import file_bytes

from ..daemon_process import WAIT_S, DaemonProcess, wait_until
from .plain_replay import DEFAULT_TRACE
from .plain_tiers import PlainTiers, Served
from .replay import CHUNK_BYTES, draw

HIT, PENDING = 1, 3
PROMOTION_WAIT_MS = 1_900
"""Below the daemon's own limit. A chunk that takes longer is a miss, and the replay fails: that is meant."""

POOL_SHARE = 8
"""The trace's distinct chunks are so many times the pool."""

HEAD = "{:6}{:>9}{:>9}{:>10}{:>10}{:>11}{:>11}{:>9}{:>9}{:>7}{:>8}"
ROW = "{:6}{:>9}{:>9}{:>10}{:>10}{:>11}{:>11}{:>9.4f}{:>9.4f}{:>7}{:>8.1f}"


class Moment(Enum):
    """When a daemon is killed."""

    PROMOTION = auto()
    """Chunks are on their way up into reserved slots."""
    STORE = auto()
    """An engine has slots reserved and has written into them, and has not said so."""


class _Killed(Exception):
    """The daemon was killed in the middle of a request."""


class Resolutions(ClientListener):
    """What became of the keys that lookups called PENDING."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._found: dict[tuple[int, bytes], Slot | None] = {}

    def on_resolved(self, lease_id: int, key: bytes, status: int, slot_id: int, generation: int) -> None:
        with self._changed:
            self._found[lease_id, key] = (slot_id, generation) if status == HIT else None
            self._changed.notify_all()

    def wait_for(self, lease_id: int, keys: Sequence[bytes]) -> list[Slot | None]:
        """Return the slot of each key, None for a miss, when all are decided. Raises RuntimeError."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: all((lease_id, key) in self._found for key in keys), WAIT_S
            ):
                raise RuntimeError(f"some of {len(keys)} PENDING keys were never resolved")
            return [self._found.pop((lease_id, key)) for key in keys]


class TieredReplayer(Replayer):
    """Plays requests against a daemon with a tier, and beside it against the plain loop."""

    def __init__(
        self,
        daemon: DaemonProcess,
        admin: admin_pb2_grpc.AdminServiceStub,
        blocks: BlockClient,
        resolutions: Resolutions,
        plain: PlainTiers,
    ) -> None:
        super().__init__(blocks, "lru")
        self.served = Served()
        self.plain_served = Served()
        self.kills = 0
        self._daemon = daemon
        self._admin = admin
        self._resolutions = resolutions
        self._plain = plain
        self._kill_at: Moment | None = None
        self._tier_hits = 0
        self._wait_quiet()

    def kill_at(self, moment: Moment) -> None:
        """Have the daemon killed at the next such moment."""
        self._kill_at = moment

    def play_both(self, hash_ids: Sequence[int]) -> None:
        """Play one request and compare. Raises AssertionError where the daemon differs, and WrongByte."""
        try:
            hits = self.play(hash_ids)
        except _Killed:
            self._restart()
            hits = self.play(hash_ids)
        served = Served(len(hash_ids), hits - self._tier_hits, self._tier_hits)
        plain = self._plain.serve(hash_ids)
        self.served.add(served)
        self.plain_served.add(plain)
        # A daemon that was killed knows the order of its pool as it was up to a second before.
        same = served.hits == plain.hits if self.kills else served == plain
        assert same, f"request {self.result.requests - 1}: the daemon {served}, the plain loop {plain}"
        self._wait_quiet()

    def _look_up(self, ctx: ReqContext, hash_ids: Sequence[int]) -> tuple[int, list[Slot], list[int]]:
        keys = [chunk_key(number) for number in hash_ids]
        answer = self._blocks.scheduler.lookup(ctx, keys, pending_wait_ms=PROMOTION_WAIT_MS)
        if answer.reason:
            raise RuntimeError(f"lookup failed: {answer.reason}")
        slots: dict[int, Slot | None] = {}
        leased = iter(zip(answer.slot_ids, answer.generations, strict=True))
        for first, count in answer.leased_runs:
            slots |= {index: next(leased) for index in range(first, first + count)}
        pending = [index for index, status in enumerate(answer.statuses) if status == PENDING]
        if pending:
            self._die_at(Moment.PROMOTION)
        arrived = self._resolutions.wait_for(answer.lease_id, [keys[index] for index in pending])
        slots |= zip(pending, arrived, strict=True)
        run: list[Slot] = []
        while (slot := slots.get(len(run))) is not None:
            run.append(slot)
        self._tier_hits = sum(index < len(run) for index in pending)
        gone = {index for index in pending if slots[index] is None}
        missing = [
            number
            for index, (number, status) in enumerate(zip(hash_ids, answer.statuses, strict=True))
            if status == MISS or index in gone
        ]
        return answer.lease_id, run, missing

    def _store(self, ctx: ReqContext, numbers: Sequence[int]) -> None:
        if self._kill_at is Moment.STORE:
            grant = self._blocks.scheduler.prepare_store(ctx, [chunk_key(number) for number in numbers])
            for slot_id in grant.slot_ids:
                self._blocks.slot(slot_id)[:] = 0xEE
            self._die_at(Moment.STORE)
        super()._store(ctx, numbers)

    def _die_at(self, moment: Moment) -> None:
        if self._kill_at is moment:
            self._kill_at = None
            self._daemon.kill()
            raise _Killed

    def _restart(self) -> None:
        """Start the daemon again and wait for both sessions; what it served before it serves again."""
        self.kills += 1
        blocks = self._blocks
        wait_until(lambda: not blocks.scheduler.attached and not blocks.worker.attached, "the clients notice")
        self._daemon.start()
        blocks.wait_attached()
        self._wait_quiet()

    def _wait_quiet(self) -> None:
        """Wait until the tier has what the plain loop's has, and nothing is on its way."""
        wait_until(self._is_quiet, f"the tier holds {len(self._plain.tier)} chunks")

    def _is_quiet(self) -> bool:
        status = self._admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=WAIT_S, wait_for_ready=True)
        pool, tier = status.tiers
        # Each store and each eviction moves this pair on by a step of its own, so it is met once.
        if tier.chunks != len(self._plain.tier) or pool.pinned_chunks:
            return False
        return bool(self.kills) or status.evictions["evict"] == self._plain.evictions


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Capacities in chunks."""

    name: str
    requests: int
    pool_chunks: int
    tier_chunks: int
    pool_hits: int
    tier_hits: int
    plain_hits: int
    hit_share: float
    plain_share: float
    kills: int
    seconds: float


@contextmanager
def tiered_daemon(pool_chunks: int, tier_chunks: int, chunk_bytes: int) -> Iterator[DaemonProcess]:
    """A daemon with a filesystem tier; both are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="kvtier-replay-") as folder:
        # One writer: the order in which chunks go down is the order in which the tier evicts them.
        config = (
            f'[[tiers]]\ntype = "filesystem"\nname = "disk"\nroot = "{folder}/root"\n'
            f'state_directory = "{folder}/state"\ncapacity = {tier_chunks * file_bytes(chunk_bytes)}\n'
            "low_water = 1.0\nreserve_free = 0.0\nwriters = 1\n"
        )
        with DaemonProcess(Path(folder), pool_chunks * chunk_bytes, policy="lru", config=config) as daemon:
            yield daemon.start()


def replay_with_tier(
    name: str,
    requests: Sequence[Sequence[int]],
    pool_chunks: int,
    tier_chunks: int,
    kills: Sequence[tuple[int, Moment]] = (),
    *,
    chunk_bytes: int = CHUNK_BYTES,
    show: bool = False,
) -> Row:
    """Play all requests; `kills` are (number of a request, moment). Raises WrongByte, AssertionError."""
    longest = max(map(len, requests))
    assert longest <= pool_chunks // 8, f"{longest} chunks must come up in one go; a larger pool is needed"
    resolutions = Resolutions()
    plain = PlainTiers(pool_chunks, tier_chunks)
    moments = dict(kills)
    with (
        tiered_daemon(pool_chunks, tier_chunks, chunk_bytes) as daemon,
        daemon.channel() as channel,
        BlockClient(daemon.address, chunk_bytes, listener=resolutions) as blocks,
    ):
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        replayer = TieredReplayer(daemon, admin, blocks, resolutions, plain)
        start = time.perf_counter()
        for number, hash_ids in enumerate(requests):
            if number in moments:
                replayer.kill_at(moments[number])
            replayer.play_both(hash_ids)
            if show and number % 50 == 0:
                share = replayer.served.hit_share
                draw(name, number, len(requests), share, time.perf_counter() - start)
        if show and sys.stderr.isatty():
            print(file=sys.stderr)
        assert replayer.kills == len(moments), f"{replayer.kills} of {len(moments)} kills came about"
        served, plain_served = replayer.served, replayer.plain_served
        return Row(
            name,
            len(requests),
            pool_chunks,
            tier_chunks,
            served.pool_hits,
            served.tier_hits,
            plain_served.hits,
            served.hit_share,
            plain_served.hit_share,
            replayer.kills,
            time.perf_counter() - start,
        )


def main() -> int:
    """Replay, compare, print a table. Exit code 1 if anything differs, 0 also if there is no trace."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE)
    parser.add_argument("--requests", type=int, default=0, help="only the first N (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    if not args.trace.exists():
        print(f"replay: skipped, there is no trace at {args.trace}; name one with --trace", file=sys.stderr)
        return 0
    requests = load_trace(args.trace)
    requests = requests[: args.requests] if args.requests else requests
    kills = [(len(requests) // 3, Moment.PROMOTION), (2 * len(requests) // 3, Moment.STORE)]
    print(
        HEAD.format(
            "tier", "requests", "pool", "tier", "pool hits", "tier hits", "plain hits", "share", "plain",
            "kills", "s",
        )
    )  # fmt: skip
    rows: list[Row] = []
    try:
        for name, played, tier_share, at in (
            ("all", requests, 1, kills),
            ("half", requests[: len(requests) // 3], 2, []),
        ):
            num_distinct = len({number for hash_ids in played for number in hash_ids})
            pool_chunks = max(num_distinct // POOL_SHARE, 8 * max(map(len, played)))
            row = replay_with_tier(name, played, pool_chunks, num_distinct // tier_share, at, show=True)
            rows.append(row)
            print(ROW.format(*asdict(row).values()), flush=True)
    except WrongByte as error:
        print(f"replay: WRONG BYTE: {error}", file=sys.stderr)
        return 1
    except AssertionError as error:
        print(f"replay: FAILED: {error}", file=sys.stderr)
        return 1
    print("every loaded byte was right, and the hits of every request are those of the plain loop")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
