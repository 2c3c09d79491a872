"""Core time of the calls on an engine's path, without gRPC: what one thread of the daemon spends on each.

    python tests/benchmarks/bench_core.py [--json FILE]

A full pool of 100,000 one-unit slots. PrepareStore of 2,048 keys evicts for every one of them, also past
30,000 pinned chunks at the cold end; with the slot table in memory (the core alone) and with the real one on
a pool file. Lookups and reports are of 2,048 keys too. p50 and p99 over the rounds, in milliseconds of the
thread's processor time.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.server.core.slots_in_memory import FakeLocks, SlotsInMemory

from kvtier_ops.layout import SLOT_UNIT_BYTES, TensorLayout
from kvtier_ops.namespace import GroupFacts, NamespaceFacts
from kvtier_ops.pool import Pool
from kvtier_server.core.grants import StoreAnswer
from kvtier_server.core.instances import Applicant, Role, Session
from kvtier_server.core.limits import Limits
from kvtier_server.core.tiering import Core
from kvtier_server.policies.loader import make_policy
from kvtier_server.pool_slots import PoolSlots
from kvtier_server.primary.size_classes import SlotTable

NUM_SLOTS = 100_000
NUM_KEYS = 2_048
NUM_PINNED = 30_000
ROUNDS = 30

FACTS = NamespaceFacts(
    "bench", "w0", "bfloat16", "sha256", 16, 1, "NHD", (GroupFacts(16, SLOT_UNIT_BYTES, 0, ()),)
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    call: str
    policy: str
    table: str
    p50_ms: float
    p99_ms: float


class Bench:
    """A core with one engine attached, and a clock that stands still."""

    def __init__(self, policy: str, table: SlotTable) -> None:
        serial = itertools.count(1)
        self.locks = FakeLocks()
        self.core = Core(
            NUM_SLOTS * SLOT_UNIT_BYTES,
            table,
            lambda capacity: make_policy(policy, capacity),
            self.locks,
            lambda: next(serial),
            Limits(max_leases=1 << 20),
        )
        self.core.books.primary.slabs.backed_bytes = NUM_SLOTS * SLOT_UNIT_BYTES
        self.scheduler = self._attach(Role.SCHEDULER)
        self.worker = self._attach(Role.WORKER)
        self._keys = itertools.count()
        self._leases = itertools.count(1)

    def _attach(self, role: Role) -> Session:
        geometry = ((TensorLayout("layer", SLOT_UNIT_BYTES),),) if role is Role.WORKER else None
        applicant = Applicant(
            "bench", 1, role, 0, 1, "", self.locks.take(f"lock-{role}"), 0, geometry=geometry
        )
        return self.core.attach(f"session-{role}", applicant, FACTS, 0)

    def new_keys(self) -> list[bytes]:
        return [next(self._keys).to_bytes(32, "big") + bytes(4) for _ in range(NUM_KEYS)]

    def new_lease(self) -> int:
        return next(self._leases)

    def prepare(self, keys: Sequence[bytes], request_id: str) -> StoreAnswer:
        request = self.core.books.request(self.scheduler.instance, request_id)
        return self.core.grants.prepare_store(self.scheduler, request, keys, (), self.new_lease(), 0)

    def report(self, keys: Sequence[bytes], answer: StoreAnswer) -> None:
        assert len(answer.slot_ids) == len(keys), "not everything was granted"
        checksums = [1] * len(keys)
        self.core.completions.report_store(
            self.worker, 0, answer.slot_ids, answer.generations, keys, checksums, set()
        )

    def look_up(self, keys: Sequence[bytes], request_id: str, lease: int = 0) -> None:
        request = self.core.books.request(self.scheduler.instance, request_id)
        answer = self.core.lookups.lookup(self.scheduler, request, keys, 0, lease)
        assert set(answer.statuses) == {1}, "a chunk is missing"

    def finish(self, request_id: str) -> None:
        self.core.finish(self.scheduler.instance, request_id)
        self.settle()

    def settle(self) -> None:
        """Do what was put off, as the daemon does between calls."""
        while self.core.books.settle():
            pass

    def fill(self) -> list[list[bytes]]:
        """Store until the pool is full. Returns the keys, oldest first."""
        stored = []
        for number in range(-(-NUM_SLOTS // NUM_KEYS)):
            keys = self.new_keys()
            self.report(keys, self.prepare(keys, f"fill-{number}"))
            self.finish(f"fill-{number}")
            stored.append(keys)
        return stored


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of this thread's processor time: waiting for a busy machine is not the core's."""
    started = time.thread_time_ns()
    run()
    return (time.thread_time_ns() - started) / 1e6


def row(call: str, policy: str, table: str, times_ms: Sequence[float]) -> Row:
    p99 = sorted(times_ms)[min(len(times_ms) - 1, len(times_ms) * 99 // 100)]
    return Row(call, policy, table, round(statistics.median(times_ms), 3), round(p99, 3))


def stores(bench: Bench) -> tuple[list[float], list[float]]:
    """Times of PrepareStore, every key of which evicts a chunk, and of the report that publishes."""
    prepares, reports = [], []
    for number in range(ROUNDS):
        keys, answers, request_id = bench.new_keys(), [], f"store-{number}"
        prepares.append(timed(lambda: answers.append(bench.prepare(keys, request_id))))  # noqa: B023
        reports.append(timed(lambda: bench.report(keys, answers[0])))  # noqa: B023
        bench.finish(request_id)
    return prepares, reports


def lookups(bench: Bench, keys: list[bytes], *, leased: bool) -> list[float]:
    """Times of a Lookup of resident keys, each by a request of its own."""
    times = []
    for number in range(ROUNDS * 4):
        lease = bench.new_lease() if leased else 0
        request_id = f"look-{number}"
        fresh = [bytes(bytearray(key)) for key in keys]  # as from the wire: their hash is not known yet
        times.append(timed(lambda: bench.look_up(fresh, request_id, lease)))  # noqa: B023
        bench.finish(request_id)
    return times


def measure(policy: str, table_name: str, table: SlotTable) -> Iterator[Row]:
    bench = Bench(policy, table)
    stored = bench.fill()
    gc.collect()
    gc.freeze()  # as the daemon does, and like it without full collections
    gc.set_threshold(50_000, 20, 1 << 30)
    yield row("Lookup", policy, table_name, lookups(bench, stored[-1], leased=False))
    yield row("Lookup, leased", policy, table_name, lookups(bench, stored[-1], leased=True))
    prepares, reports = stores(bench)
    yield row("PrepareStore, evicting", policy, table_name, prepares)
    yield row("Complete, publishing", policy, table_name, reports)
    # What is coldest now is pinned; the next to go stand behind it.
    coldest = stored[ROUNDS + 2 :][: NUM_PINNED // NUM_KEYS]
    for keys in coldest:
        bench.look_up(keys, "pins", bench.new_lease())
    bench.settle()
    yield row(f"PrepareStore past {NUM_PINNED} pinned", policy, table_name, stores(bench)[0])
    gc.unfreeze()


def rows() -> Iterator[Row]:
    for policy in ("lru", "arc"):
        yield from measure(policy, "memory", SlotsInMemory(NUM_SLOTS))
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        pool = Pool.create(Path(folder) / "pool", NUM_SLOTS * SLOT_UNIT_BYTES)
        try:
            yield from measure("arc", "pool file", PoolSlots(pool))
        finally:
            pool.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    arguments = parser.parse_args()
    results = []
    print(f"{'call, 2,048 keys':<34} {'policy':<7} {'slot table':<10} {'p50 ms':>8} {'p99 ms':>8}")
    for result in rows():
        results.append(result)
        print(
            f"{result.call:<34} {result.policy:<7} {result.table:<10} "
            f"{result.p50_ms:>8.3f} {result.p99_ms:>8.3f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
