"""Tiers below the pool of a real daemon, byte for byte."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.raw_engine import PART_BYTES, RawEngine, namespace, to_keys

from kvtier.v1 import admin_pb2
from kvtier.v1 import offload_pb2 as pb
from kvtier_ops.checksum import part_checksum
from kvtier_ops.pool import MappedPool

HIT, PENDING, MISS = pb.LOOKUP_STATUS_HIT, pb.LOOKUP_STATUS_PENDING, pb.LOOKUP_STATUS_MISS
POOL_CHUNKS = 256
POOL_BYTES = POOL_CHUNKS * PART_BYTES
FILE_BYTES = 4096 + PART_BYTES
BATCH = 16
WAIT_MS = 1_900

EXAMPLE = '[[tiers]]\ntype = "example"\nname = "spare"\ncapacity = "64MiB"\n'


def filesystem(tmp_path: Path, more: str = "") -> str:
    root, state = tmp_path / "root", tmp_path / "state"
    return (
        f'[[tiers]]\ntype = "filesystem"\nname = "disk"\nroot = "{root}"\ncapacity = "64MiB"\n'
        f'reserve_free = 0.0\nstate_directory = "{state}"\n{more}'
    )


def objects(tmp_path: Path) -> str:
    return (
        f'[[tiers]]\ntype = "object"\nname = "bucket"\nurl = "file://{tmp_path}/objects"\n'
        f'capacity = "64MiB"\nstate_directory = "{tmp_path}/state"\n'
    )


class Copier:
    """An engine that writes and reads real bytes, and knows what it wrote."""

    def __init__(self, engine: RawEngine) -> None:
        self.engine = engine
        pool = engine.describe().pool
        self.pool = MappedPool.open(Path(pool.directory) / Path(pool.path).name, pool.pool_id)

    def store(self, keys: Sequence[bytes]) -> None:
        """Store chunks whose bytes follow from their keys, a batch of them with a request of its own."""
        for first in range(0, len(keys), BATCH):
            batch = keys[first : first + BATCH]
            request = f"store-{batch[0].hex()}"
            granted = self.engine.prepare_store(batch, request_id=request)
            assert set(granted.verdicts) == {pb.STORE_VERDICT_GRANTED}, granted.verdicts
            for slot_id, key in zip(granted.slot_ids, batch, strict=True):
                self.pool.slot_view(slot_id, PART_BYTES)[:] = list(content(key))
            checksums = [part_checksum(memoryview(content(key))) for key in batch]
            report = pb.StoreReport(
                slot_ids=granted.slot_ids, generations=granted.generations, keys=batch, checksums=checksums
            )
            self.engine.complete(self.engine.workers[0], store_reports=[report])
            self.finish(request)

    def finish(self, request: str) -> None:
        self.engine.stub.FinishRequest(
            pb.FinishRequestRequest(session_id=self.engine.session_id, request_ids=[request])
        )

    def load(self, keys: Sequence[bytes], request: str) -> int:
        """Look up with patience and check every byte that is served; returns how many chunks were."""
        found = self.engine.lookup(
            keys, lease_id=self.engine.new_lease_id(), request_id=request, pending_wait_ms=WAIT_MS
        )
        slots = dict(
            zip(
                [keys[i] for run in found.leased for i in range(run.first, run.first + run.count)],
                zip(found.slot_ids, found.generations, strict=True),
                strict=True,
            )
        )
        scheduler = self.engine.scheduler
        assert scheduler is not None
        waiting = {key for key, status in zip(keys, found.statuses, strict=True) if status == PENDING}
        while waiting:
            event = scheduler.wait_for("resolved").resolved
            waiting.discard(event.key)
            if event.status == HIT:
                slots[event.key] = (event.slot_id, event.generation)
        for key, (slot_id, generation) in slots.items():
            found_bytes = bytes(self.pool.slot_view(slot_id, PART_BYTES))
            assert self.pool.generation(slot_id) == generation
            assert found_bytes == content(key), f"wrong bytes under {key.hex()}"
        self.finish(request)
        return len(slots)


def content(key: bytes) -> bytes:
    return random.Random(key).randbytes(PART_BYTES)


@contextmanager
def copier(daemon: DaemonProcess, make_engine: MakeEngine, weights: str = "w") -> Iterator[Copier]:
    engine = make_engine(daemon, facts=namespace(weights_id=weights)).attach()
    own = Copier(engine)
    try:
        yield own
    finally:
        own.pool.close()
        engine.close()


def tier(daemon: DaemonProcess, name: str) -> admin_pb2.TierStatus:
    (found,) = [each for each in daemon.status().tiers if each.name == name]
    return found


def metric(daemon: DaemonProcess, name: str, tier_name: str, label: str = "") -> float:
    """Sum the samples of a metric of one tier."""
    lines = [line for line in daemon.page("/metrics")[1].splitlines() if line.startswith(f"{name}{{")]
    assert lines, f"there is no {name}"
    return sum(float(line.split()[-1]) for line in lines if f'tier="{tier_name}"' in line and label in line)


def wait_for_chunks(daemon: DaemonProcess, name: str, count: int) -> None:
    wait_until(lambda: tier(daemon, name).chunks >= count, "what is stored goes down")


@pytest.mark.parametrize("kind", ["example", "filesystem", "object"])
def test_a_working_set_four_times_the_pool_is_served_from_below(
    kind: str, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    config, name = {
        "example": (EXAMPLE, "spare"),
        "filesystem": (filesystem(tmp_path), "disk"),
        "object": (objects(tmp_path), "bucket"),
    }[kind]
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=config)
    wait_until(lambda: tier(daemon, name).health == "ok", "the tier is used")
    keys = to_keys(range(4 * POOL_CHUNKS))
    with copier(daemon, make_engine) as own:
        for first in range(0, len(keys), BATCH):
            own.store(keys[first : first + BATCH])
            wait_for_chunks(daemon, name, first + BATCH)
        prompts = [keys[first : first + BATCH] for first in range(0, len(keys), BATCH)]
        for number, prompt in enumerate(prompts):
            assert own.load(prompt, f"load-{number}") == BATCH, number
        assert tier(daemon, "primary").chunks <= POOL_CHUNKS
        assert tier(daemon, name).health == "ok"
        wait_until(
            lambda: metric(daemon, "kvtier_promotions_total", name, 'result="done"') > 0, "it is counted"
        )
        assert metric(daemon, "kvtier_cascade_bytes_total", name) >= len(keys) * PART_BYTES
        assert metric(daemon, "kvtier_promotion_bytes_total", name) > 0
        assert metric(daemon, "kvtier_promotion_duration_seconds_count", name) > 0
        assert metric(daemon, "kvtier_tier_healthy", name) == 1
        assert metric(daemon, "kvtier_backpressure_dropped_total", name) == 0


def test_chunks_on_disk_outlive_the_daemon_and_its_pool(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=filesystem(tmp_path))
    keys = to_keys(range(2 * BATCH))
    with copier(daemon, make_engine) as own:
        own.store(keys)
    daemon.stop()  # waits for what goes down
    daemon.start("--fresh")
    with copier(daemon, make_engine) as own:
        wait_until(lambda: tier(daemon, "disk").chunks == len(keys), "the index is read")
        assert own.load(keys, "again") == len(keys)


@pytest.mark.parametrize(
    "point", ["after_open", "after_write", "after_rename", "after_index", "after_delete"]
)
def test_a_daemon_that_is_killed_while_it_writes_serves_no_wrong_byte_after(
    point: str, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    # With room for 16 chunks chunks are deleted too.
    config = filesystem(tmp_path).replace('"64MiB"', f'"{16 * FILE_BYTES}"')
    nth = 1 if point == "after_index" else 12
    # The first three are passed by the I/O process, which runs on until it notices.
    action = "kill-parent" if point in ("after_open", "after_write", "after_rename") else "kill"
    env = {"KVTIER_FAULTS": f"filesystem.{point}={action}@{nth}"}
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=config, env=env)
    keys = to_keys(range(4 * BATCH))
    with copier(daemon, make_engine) as own:
        with contextlib.suppress(grpc.RpcError):  # it dies meanwhile
            own.store(keys)
        wait_until(lambda: daemon.exit_code() is not None, "the daemon dies at the point")
    assert daemon.exit_code() == -signal.SIGKILL
    successor = start_daemon(pool_bytes=POOL_BYTES, config=config)
    with copier(successor, make_engine) as own:
        for index in range(len(keys)):
            own.load(keys[index : index + 1], f"load-{index}")
        new = to_keys(range(1_000, 1_000 + BATCH))
        own.store(new)
        assert own.load(new, "new") == BATCH
    assert successor.exit_code() is None
