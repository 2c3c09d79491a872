"""Real daemons with a tier on a real S3 server, byte for byte, whatever becomes of the server."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.integration.test_tiers import (
    BATCH,
    POOL_BYTES,
    POOL_CHUNKS,
    Copier,
    copier,
    metric,
    tier,
    wait_for_chunks,
)
from tests.raw_engine import to_keys

from .ceph import Ceph


def is_well(daemon: DaemonProcess) -> bool:
    return tier(daemon, "s3").health == "ok"


def with_index(table: str, directory: Path) -> str:
    return f'{table}state_directory = "{directory}"\n'


def store_all(own: Copier, daemon: DaemonProcess, keys: list[bytes]) -> None:
    """Store, at the pace at which chunks go down."""
    before = tier(daemon, "s3").chunks
    for first in range(0, len(keys), BATCH):
        own.store(keys[first : first + BATCH])
        wait_for_chunks(daemon, "s3", before + first + BATCH)


def load_all(own: Copier, keys: list[bytes], name: str) -> int:
    """Load, with every byte checked; returns how many chunks were served."""
    prompts = [keys[first : first + BATCH] for first in range(0, len(keys), BATCH)]
    return sum(own.load(prompt, f"{name}-{number}") for number, prompt in enumerate(prompts))


def test_a_working_set_larger_than_the_pool_comes_back_from_s3(
    s3_table: str, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=with_index(s3_table, tmp_path / "state"))
    wait_until(lambda: is_well(daemon), "the store has answered")
    keys = to_keys(range(3 * POOL_CHUNKS))
    with copier(daemon, make_engine) as own:
        store_all(own, daemon, keys)
        assert load_all(own, keys, "load") == len(keys)
        assert tier(daemon, "primary").chunks <= POOL_CHUNKS
        assert is_well(daemon)
        wait_until(
            lambda: metric(daemon, "kvtier_promotions_total", "s3", 'result="done"') > 0, "it is counted"
        )
        assert metric(daemon, "kvtier_promotions_total", "s3", 'result="failed"') == 0
        assert metric(daemon, "kvtier_checksum_failures_total", "s3") == 0


def test_what_one_daemon_stored_the_other_loads(
    s3_table: str, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    one = start_daemon(pool_bytes=POOL_BYTES, config=with_index(s3_table, tmp_path / "one"))
    other = start_daemon(pool_bytes=POOL_BYTES, config=with_index(s3_table, tmp_path / "other"))
    for daemon in (one, other):
        wait_until(lambda daemon=daemon: is_well(daemon), "the store has answered")  # type: ignore[misc]
    keys = to_keys(range(4 * BATCH))
    with copier(one, make_engine) as own:
        store_all(own, one, keys)
    with copier(other, make_engine) as own:
        assert load_all(own, keys, "load") == len(keys)
        wait_until(
            lambda: metric(other, "kvtier_promotions_total", "s3", 'result="done"') == len(keys),
            "every chunk is counted",
        )
        # And what both compute is stored once.
        both = to_keys(range(1_000, 1_000 + BATCH))
        with copier(one, make_engine) as first:
            store_all(first, one, both)
        used = tier(other, "s3").used_bytes
        store_all(own, other, both)
        assert tier(other, "s3").used_bytes == used


def test_a_server_that_hangs_is_a_miss_and_the_tier_comes_back_by_itself(
    s3_table: str, ceph: Ceph, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=with_index(s3_table, tmp_path / "state"))
    wait_until(lambda: is_well(daemon), "the store has answered")
    keys = to_keys(range(2 * POOL_CHUNKS))
    with copier(daemon, make_engine) as own:
        store_all(own, daemon, keys)
        own.store(to_keys(range(6_000, 6_000 + BATCH)))  # on its way down when the server stops
        with ceph.stopped_gateway():
            # No call fails; what the pool has is served, what only the server has is not.
            served = load_all(own, keys[: 4 * BATCH], "hanging")
            assert served < 4 * BATCH
            wait_until(lambda: not is_well(daemon), "the tier is degraded")
            assert daemon.health() == "SERVING"
            own.store(to_keys(range(5_000, 5_000 + BATCH)))
            assert own.load(to_keys(range(5_000, 5_000 + BATCH)), "new") == BATCH, "the pool works as ever"
        wait_until(lambda: is_well(daemon), "the tier is well again", timeout_s=60)
        assert load_all(own, keys, "after") == len(keys)


def test_a_server_that_is_killed_is_a_miss_and_the_tier_comes_back_by_itself(
    s3_table: str, ceph: Ceph, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(pool_bytes=POOL_BYTES, config=with_index(s3_table, tmp_path / "state"))
    wait_until(lambda: is_well(daemon), "the store has answered")
    keys = to_keys(range(2 * POOL_CHUNKS))
    with copier(daemon, make_engine) as own:
        store_all(own, daemon, keys)
        own.store(to_keys(range(5_000, 5_000 + BATCH)))  # on its way down when the server dies
        ceph.kill_gateway()
        try:
            assert load_all(own, keys[: 4 * BATCH], "dead") < 4 * BATCH
            wait_until(lambda: not is_well(daemon), "the tier is degraded")
            assert daemon.health() == "SERVING"
        finally:
            ceph.start_gateway()
        wait_until(lambda: is_well(daemon), "the tier is well again", timeout_s=60)
        assert load_all(own, keys, "after") == len(keys)
        more = to_keys(range(6_000, 6_000 + BATCH))
        before = tier(daemon, "s3").chunks
        own.store(more)
        wait_for_chunks(daemon, "s3", before + BATCH)


def test_a_daemon_starts_beside_a_server_that_is_not_there_and_uses_it_when_it_is(
    s3_table: str, ceph: Ceph, start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    ceph.kill_gateway()
    try:
        daemon = start_daemon(pool_bytes=POOL_BYTES, config=with_index(s3_table, tmp_path / "state"))
        wait_until(lambda: "cannot be used" in tier(daemon, "s3").health, "it says why")
        keys = to_keys(range(BATCH))
        with copier(daemon, make_engine) as own:
            own.store(keys)
            assert own.load(keys, "load") == BATCH
            assert own.load(to_keys(range(100, 200)), "cold") == 0
    finally:
        ceph.start_gateway()
    wait_until(lambda: is_well(daemon), "it is used", timeout_s=60)


def test_a_daemon_starts_beside_a_bucket_that_is_not_there(
    s3_table: str, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    lines = [line for line in s3_table.splitlines() if not line.startswith("url")]
    table = "\n".join([*lines, 'url = "s3://no-such-bucket/chunks"', ""])
    daemon = start_daemon(config=with_index(table, tmp_path / "state"))
    wait_until(lambda: "NoSuchBucket" in tier(daemon, "s3").health, "it says why")
    assert daemon.health() == "SERVING"
