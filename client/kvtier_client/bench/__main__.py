"""The process behind `kvtier bench`: measure one thing and print it.

Takes one argument, the settings as JSON (`Settings`); `kvtier bench` is what people type. Owns the daemon
that it starts, unless it is given the address of one that runs, and the exit code: 0 = measured, 1 = it could
not be measured or a loaded byte was wrong, 130 = interrupted.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from kvtier_client.bench import report
from kvtier_client.bench.block_client import BlockClient
from kvtier_client.bench.figures import BenchFailed, percentile, timed_ms
from kvtier_client.bench.replayer import Replayer, WrongByte
from kvtier_client.bench.traces import TraceError, load_trace, num_distinct, possible_hits, synthetic_trace
from kvtier_client.private_daemon import Daemon, DaemonFailed
from kvtier_client.progress import Progress
from kvtier_ops.layout import TensorLayout

MIN_POOL_BYTES = 16 << 20
REPLAY_CHUNK_BYTES = 4096
"""Hits do not depend on it."""
PROGRESS_AFTER_S = 1.0
"""Work that takes longer shows how far it is."""
ATTACH_TIMEOUT_S = 5.0
"""For a daemon that answers; one that refuses says why, and goes on refusing."""
MAX_KEYS = 8192
"""What a daemon takes in one call."""
SPARE_SLOTS = 16
"""Of a private daemon's pool, so that no store waits for a slot."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `kvtier bench` was asked for. Fields that a kind does not need are not looked at."""

    kind: str
    """lookup, copy or replay."""
    address: str = ""
    """Of a daemon that runs; empty = one of its own."""
    seed: int = 0
    json: bool = False
    keys: Sequence[int] = (64, 2048)
    """lookup: numbers of keys in a call."""
    calls: int = 200
    """lookup: calls of each kind."""
    copy_bytes: int = 256 << 20
    """copy: bytes of all chunks."""
    chunk_bytes: int = 2 << 20
    """copy: bytes of a chunk, of 32 layers."""
    rounds: int = 3
    """copy: passes over all chunks."""
    trace: str = ""
    """replay: a file; empty = a synthetic trace that follows from the seed."""
    requests: int = 0
    """replay: how many at most; 0 = all of the file, or 500."""
    pool_share: float = 0.1
    """replay: the pool of a private daemon, as a part of the trace's distinct chunks."""
    policy: str = "lru"
    """replay: of a private daemon."""


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    settings = Settings(**json.loads(arguments[0]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_once)
    try:
        result = KINDS[settings.kind](settings)
    except KeyboardInterrupt:
        print("kvtier bench: interrupted; everything was cleaned up", file=sys.stderr)
        return 130
    except (BenchFailed, DaemonFailed, WrongByte, RuntimeError, ValueError) as error:
        print(f"kvtier bench: {error}", file=sys.stderr)
        return 1
    head = {
        "bench": settings.kind,
        "seed": settings.seed,
        "daemon": settings.address or "private",
        "cpus": len(os.sched_getaffinity(0)),
    }
    if settings.json:
        print(json.dumps({**head, **result}, indent=2))
    else:
        print("\n".join(report.lines(settings.kind, result)))
    return 0


def _end_once(_number: int, _frame: FrameType | None) -> None:
    """End as Ctrl-C does; further signals would only interrupt the cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _lookup(settings: Settings) -> dict[str, object]:
    from kvtier_client.bench import lookups
    from kvtier_client.bench.bare_server import bare_channel

    counts = sorted(set(settings.keys))
    # An engine may pin half of a pool.
    pool_bytes = max(2 * (max(counts) + SPARE_SLOTS) * lookups.CHUNK_BYTES, MIN_POOL_BYTES)
    total = 2 * len(counts) * settings.calls
    with (
        _directory() as folder,
        _engine(settings, folder, pool_bytes, lookups.CHUNK_BYTES) as blocks,
        bare_channel(folder, lookups.bare_methods(counts)) as bare,
        _progress("lookups", total) as called,
    ):
        rows = lookups.measure(blocks, bare, counts, settings.calls, called)
    return {"rows": [asdict(row) for row in rows]}


def _copy(settings: Settings) -> dict[str, object]:
    from kvtier_client.bench import copies

    num_chunks = max(settings.copy_bytes // settings.chunk_bytes, 1)
    if num_chunks > MAX_KEYS:
        raise BenchFailed(
            f"{num_chunks} chunks are more than the {MAX_KEYS} of one call; copy less (--bytes), "
            "or in larger chunks (--chunk-bytes)"
        )
    page_bytes = settings.chunk_bytes // copies.LAYERS
    # An engine may pin half of a pool.
    pool_bytes = max(2 * (num_chunks + SPARE_SLOTS) * settings.chunk_bytes, MIN_POOL_BYTES)
    with (
        _directory() as folder,
        _engine(settings, folder, pool_bytes, settings.chunk_bytes, copies.tensors_of(page_bytes)) as blocks,
        _progress("rounds of copies", 4 * (settings.rounds + 1)) as called,
    ):
        rows = copies.measure(blocks, page_bytes, num_chunks, settings.rounds, settings.seed, called)
    return {
        "chunk_bytes": settings.chunk_bytes,
        "chunks": num_chunks,
        "rows": [
            {
                **asdict(row),
                "gib_s": _gib_s(settings.chunk_bytes, row.p50_ms),
                "floor_gib_s": _gib_s(settings.chunk_bytes, row.floor_p50_ms),
            }
            for row in rows
        ],
    }


def _gib_s(num_bytes: int, milliseconds: float) -> float:
    return round(num_bytes / (1 << 30) / (milliseconds / 1e3), 2) if milliseconds else 0.0


def _replay(settings: Settings) -> dict[str, object]:
    if settings.trace:
        requests = load_trace(Path(settings.trace), settings.requests)
    else:
        requests = synthetic_trace(settings.seed, settings.requests or 500)
    if not requests:
        raise TraceError(f"{settings.trace} has no request")
    distinct = num_distinct(requests)
    longest = max(map(len, requests))
    capacity = max(round(distinct * settings.pool_share), 2 * longest, (1 << 20) // REPLAY_CHUNK_BYTES)
    times_ms = []
    with (
        _directory() as folder,
        _engine(
            settings, folder, capacity * REPLAY_CHUNK_BYTES, REPLAY_CHUNK_BYTES, policy=settings.policy
        ) as blocks,
        _progress("requests", len(requests)) as called,
    ):
        replayer = Replayer(blocks, settings.policy)
        for hash_ids in requests:
            times_ms.append(timed_ms(partial(replayer.play, hash_ids)))
            called()
    done = replayer.result
    return {
        "trace": settings.trace or "synthetic",
        "pool_chunks": 0 if settings.address else capacity,
        "policy": "" if settings.address else settings.policy,
        "requests": done.requests,
        "chunks": done.input_chunks,
        "distinct_chunks": distinct,
        "stored_chunks": done.stored_chunks,
        "hits": done.hit_chunks,
        "hit_share": round(done.hit_share, 4),
        "possible_hit_share": round(possible_hits(requests) / done.input_chunks, 4),
        "p50_ms": round(percentile(times_ms, 0.5), 3),
        "p99_ms": round(percentile(times_ms, 0.99), 3),
        "seconds": round(sum(times_ms) / 1e3, 3),
    }


KINDS: dict[str, Callable[[Settings], dict[str, object]]] = {
    "lookup": _lookup,
    "copy": _copy,
    "replay": _replay,
}


@contextmanager
def _directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kvtier-run-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _engine(
    settings: Settings,
    folder: Path,
    pool_bytes: int,
    part_bytes: int,
    tensors: Sequence[TensorLayout] = (),
    policy: str = "lru",
) -> Iterator[BlockClient]:
    """An engine of the daemon to be measured, in a namespace of its own, which is empty afterwards."""
    with ExitStack() as stack:
        address = settings.address
        if not address:
            name = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
            daemon = Daemon(folder, "daemon", name, str(pool_bytes), folder, options=("--policy", policy))
            address = stack.enter_context(daemon).start().address
            daemon.wait_backed()
        blocks = BlockClient(
            address,
            part_bytes,
            f"kvtier-bench-{os.getpid()}",
            weights_id=secrets.token_hex(8),
            tensors=tensors,
            attach_timeout_s=ATTACH_TIMEOUT_S,
        )
        with blocks:
            if settings.address:
                stack.callback(_drop, blocks)
            yield blocks


def _drop(blocks: BlockClient) -> None:
    if not blocks.clear():
        print(
            "kvtier bench: the daemon did not drop what was stored; it will be evicted in its turn",
            file=sys.stderr,
        )


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    progress = Progress(label, total, after_s=PROGRESS_AFTER_S)
    try:
        yield progress.advance
    finally:
        progress.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
