"""Lookups through a real client and daemon, against bare round trips of as many bytes.

Real and bare calls take turns. A lookup is timed in the engine's thread, as an engine sees it; the request's
end, which gives its leases back, is outside the time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence

import grpc

from kvtier.v1 import offload_pb2 as pb
from kvtier_client.bench.block_client import BlockClient, chunk_key
from kvtier_client.bench.figures import BenchFailed, Timing, timed_ms, timing
from kvtier_client.context import ReqContext
from kvtier_client.reports import StoreReportItem

CHUNK_BYTES = 4096
FILL_KEYS = 4096
"""Chunks that are stored in one call."""
WARM_UP_CALLS = 20
FLOOR = "bare gRPC round trip"
HIT = bytes([pb.LOOKUP_STATUS_HIT])
HIT_UNLEASED = bytes([pb.LOOKUP_STATUS_HIT_UNLEASED])


def case_name(num_keys: int, *, lease: bool) -> str:
    """Name a case: "lookup 64 leased"."""
    return f"lookup {num_keys}{' leased' if lease else ''}"


def method_name(name: str) -> str:
    """Return the bare server's method for a case."""
    return name.replace(" ", "")


def reply_bytes(num_keys: int, *, lease: bool) -> int:
    """Return the size of a reply in which every key hits."""
    reply = pb.LookupResponse(boot_id="b" * 16, statuses=HIT * num_keys)
    if lease:
        reply.leased.add(first=0, count=num_keys)
        reply.slot_ids.extend(range(30_000, 30_000 + num_keys))
        reply.generations.extend([1] * num_keys)
    return reply.ByteSize()


def bare_methods(counts: Iterable[int]) -> dict[str, int]:
    """Return every bare method that these numbers of keys need, with the size of its reply."""
    return {
        method_name(case_name(count, lease=lease)): reply_bytes(count, lease=lease)
        for count in counts
        for lease in (False, True)
    }


def publish(blocks: BlockClient, first: int, count: int) -> None:
    """Store chunks whose bytes nobody reads. Raises BenchFailed where the daemon takes fewer."""
    for start in range(first, first + count, FILL_KEYS):
        numbers = range(start, min(start + FILL_KEYS, first + count))
        ctx = ReqContext(f"fill-{start}", None)
        keys = [chunk_key(number) for number in numbers]
        grant = blocks.scheduler.prepare_store(ctx, keys)
        if len(grant.slot_ids) != len(keys):
            reason = grant.reason or "no room"
            raise BenchFailed(f"the daemon took {len(grant.slot_ids)} of {len(keys)} chunks ({reason})")
        blocks.worker.report_store(StoreReportItem(0, grant.slot_ids, grant.generations, keys))
        blocks.flush()
        blocks.scheduler.finish(ctx.req_id)
    blocks.flush()


class LookupBench:
    """Interleaves real lookups with bare round trips."""

    def __init__(self, blocks: BlockClient, bare: grpc.Channel) -> None:
        self._blocks = blocks
        self._bare = bare
        self._serial = 0

    def real(self, keys: Sequence[bytes], *, lease: bool) -> float:
        """Time one lookup, in ms, by a request of its own. Raises BenchFailed if a key misses."""
        self._serial += 1
        ctx = ReqContext(f"bench-{self._serial}", None)
        scheduler = self._blocks.scheduler
        statuses = b""

        def ask() -> None:
            nonlocal statuses
            statuses = bytes(scheduler.lookup(ctx, keys, lease=lease).statuses)

        spent = timed_ms(ask)
        scheduler.finish(ctx.req_id)
        if not scheduler.flush_and_wait(10):
            raise BenchFailed(f"the daemon does not take the ends of requests: {scheduler.away_reason}")
        missed = len(keys) - statuses.count(HIT) - statuses.count(HIT_UNLEASED) * (not lease)
        if missed:
            raise BenchFailed(
                f"{missed} of {len(keys)} chunks are gone, or were not leased: other engines need the room; "
                "measure with a daemon of its own: leave --address out"
            )
        return spent

    def compare(
        self,
        name: str,
        keys: Sequence[bytes],
        lease: bool,
        calls: int,
        called: Callable[[], None] | None = None,
    ) -> tuple[list[float], list[float]]:
        """Times of real and bare calls in ms, taken in turns. `called` is called after each pair."""
        bare: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._bare.unary_unary(
            f"/bare.Bare/{method_name(name)}"
        )
        size = pb.LookupRequest(session_id="s" * 33, keys=keys, lease_id=1).ByteSize()
        request = secrets.token_bytes(size)
        for _ in range(WARM_UP_CALLS):
            bare(request)
            self.real(keys, lease=lease)
        real_ms, bare_ms = [], []
        for _ in range(calls):
            real_ms.append(self.real(keys, lease=lease))
            bare_ms.append(timed_ms(lambda: bare(request)))
            if called is not None:
                called()
        return real_ms, bare_ms


def measure(
    blocks: BlockClient, bare: grpc.Channel, counts: Sequence[int], calls: int, called: Callable[[], None]
) -> list[Timing]:
    """Store as many chunks as the largest count, and look up that many and fewer, leased and not."""
    publish(blocks, 0, max(counts))
    bench = LookupBench(blocks, bare)
    rows = []
    for count in counts:
        keys = [chunk_key(number) for number in range(count)]
        for lease in (False, True):
            name = case_name(count, lease=lease)
            rows.append(timing(name, FLOOR, *bench.compare(name, keys, lease, calls, called)))
    return rows
