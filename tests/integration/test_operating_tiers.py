"""What an operator asks of a real daemon's tiers: status, health, metrics, verify, clear."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, child_environment, wait_until
from tests.integration.test_tiers import BATCH, EXAMPLE, FILE_BYTES, copier, filesystem, metric, tier
from tests.raw_engine import PART_BYTES, namespace, refusal, to_keys

from kvtier.v1 import admin_pb2


def kvtier(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "kvtier_server", *arguments],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def clear(daemon: DaemonProcess, *options: str) -> tuple[int, dict[str, tuple[int, int]]]:
    """Exit code, and chunks dropped and kept by tier."""
    done = kvtier("admin", "clear", "--address", daemon.address, "--yes", "-o", "json", *options)
    assert done.stderr == "", done.stderr
    reply = json.loads(done.stdout)
    rows = {row["tier"]: (row["chunks"], row["kept_chunks"]) for row in reply["tiers"]}
    assert reply["chunks"] == sum(chunks for chunks, _ in rows.values())
    return done.returncode, rows


def wait_until_below(daemon: DaemonProcess, name: str, count: int) -> None:
    wait_until(
        lambda: tier(daemon, name).chunks == count and not daemon.status().tiers[0].pinned_chunks,
        "all chunks are below",
    )


def test_clear_empties_pool_and_tiers_but_for_what_is_held(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(config=EXAMPLE + filesystem(tmp_path))
    keys = to_keys(range(2 * BATCH))
    with copier(daemon, make_engine) as own:
        own.store(keys)
        for name in ("spare", "disk"):
            wait_until_below(daemon, name, len(keys))
        held = own.engine.lookup(keys[:3], lease_id=own.engine.new_lease_id(), request_id="holds")
        assert len(held.slot_ids) == 3
        assert clear(daemon, "--tier", "all") == (
            0,
            {"primary": (len(keys) - 3, 3), "spare": (len(keys), 0), "disk": (len(keys), 0)},
        )
        assert not list((tmp_path / "root").rglob("*.chunk"))
        own.finish("holds")
        assert own.load(keys, "again") == 3
        assert clear(daemon, "--tier", "pool")[1] == {"primary": (3, 0)}
        assert own.load(keys, "once more") == 0
        own.store(keys[:BATCH])  # it works as before
        assert own.load(keys, "at last") == BATCH

    def cleared() -> list[float]:
        return [
            metric(daemon, "kvtier_evictions_total", name, 'reason="clear"') for name in ("primary", "disk")
        ]

    wait_until(lambda: sum(cleared()) >= 2 * len(keys), "a snapshot has counted it all")
    assert cleared() == [len(keys), len(keys)]


def test_clear_of_one_namespace_leaves_the_others(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(config=filesystem(tmp_path))
    keys = to_keys(range(BATCH))
    with copier(daemon, make_engine, "one") as one, copier(daemon, make_engine, "two") as two:
        for own in (one, two):
            own.store(keys)
        wait_until_below(daemon, "disk", 2 * BATCH)
        digest = next(s.namespace for s in daemon.status().sessions if s.engine_id == one.engine.engine_id)
        assert clear(daemon, "--namespace", digest) == (0, {"primary": (BATCH, 0), "disk": (BATCH, 0)})
        assert clear(daemon, "--tenant", "nobody") == (0, {"primary": (0, 0), "disk": (0, 0)})
        assert (one.load(keys, "r"), two.load(keys, "r")) == (0, BATCH)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "say what to clear"),
        (("--tier", "tape"), 2, "there is no tier 'tape'; tiers are primary, spare"),
        (("--namespace", "xyz"), 2, "no namespace of the pool begins with 'xyz'"),
    ],
)
def test_clear_says_what_is_wrong_with_the_call(
    options: tuple[str, ...], code: int, message: str, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(config=EXAMPLE)
    refused = kvtier("admin", "clear", "--address", daemon.address, "--yes", *options)
    assert (refused.returncode, refused.stdout) == (code, "")
    assert message in refused.stderr
    asked = kvtier("admin", "clear", "--address", daemon.address, "--tier", "all")
    assert (asked.returncode, "add --yes" in asked.stderr) == (2, True)


def test_a_clear_without_a_filter_is_refused_on_the_wire(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    engine = make_engine(start_daemon(config=EXAMPLE))
    assert refusal(lambda: engine.admin.Clear(admin_pb2.ClearRequest())).reason == "BAD_REQUEST"


def test_verify_beside_a_running_daemon_finds_every_file_right(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    # Room for 16 chunks, so that files come and go while they are read.
    config = filesystem(tmp_path).replace('"64MiB"', f'"{16 * FILE_BYTES}"')
    daemon = start_daemon(pool_bytes=512 * PART_BYTES, config=config)
    with copier(daemon, make_engine) as own:
        for round_number in range(6):
            own.store(to_keys(range(64 * round_number, 64 * round_number + 64)))
            done = kvtier("verify", "--path", str(tmp_path / "root"), "-o", "json")
            assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert tier(daemon, "disk").health == "ok"


def test_each_tier_has_a_health_name(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(config=EXAMPLE + filesystem(tmp_path))
    for name in ("kvtier.tier.spare", "kvtier.tier.disk", ""):
        assert daemon.health(name) == "SERVING"
    assert daemon.health("kvtier.tier.tape") == "NOT_FOUND"
    asked = kvtier("health", "--address", daemon.address, "--tier", "disk")
    assert (asked.returncode, asked.stdout) == (0, "SERVING\n")
    for name in ("tape", "t" * 200):
        asked = kvtier("health", "--address", daemon.address, "--tier", name)
        assert (asked.returncode, asked.stdout) == (2, "")
        assert repr(name) in asked.stderr


def test_a_tier_whose_root_cannot_be_written_to_degrades_the_daemon_and_recovers(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(config=EXAMPLE + filesystem(tmp_path))
    root = tmp_path / "root" / "kvtier-1"
    with copier(daemon, make_engine) as own:
        own.store(to_keys(range(1)))
        wait_until_below(daemon, "disk", 1)
        (space,) = root.iterdir()
        away = space.rename(tmp_path / "away")
        space.write_text("a file where a directory should be: every store fails")
        own.store(to_keys(range(10, 10 + BATCH)))
        wait_until(lambda: daemon.status().state == "degraded", "the tier is given up")
        wait_until(lambda: daemon.health("kvtier.tier.disk") == "NOT_SERVING", "its health says so")
        assert daemon.health() == daemon.health("kvtier.tier.spare") == "SERVING"
        assert daemon.page("/readyz") == (200, "degraded\n")
        shown = kvtier("status", "--address", daemon.address)
        assert shown.returncode == 1
        assert "tier disk: left alone after NotADirectoryError" in shown.stdout
        asked = kvtier("health", "--address", daemon.address, "--tier", "disk")
        assert (asked.returncode, asked.stdout) == (1, "NOT_SERVING\n")
        assert metric(daemon, "kvtier_tier_healthy", "disk") == 0
        space.unlink()
        away.rename(space)

        numbers = iter(range(1_000, 100_000))

        def recovers() -> bool:
            own.store(to_keys([next(numbers)]))
            return tier(daemon, "disk").health == "ok"

        wait_until(recovers, "it is tried again by itself")
        wait_until(lambda: daemon.status().state == "serving", "the daemon serves in full")
        wait_until(lambda: daemon.health("kvtier.tier.disk") == "SERVING", "its health says so")


def test_what_a_tier_refuses_is_a_metric(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(config=filesystem(tmp_path, "min_offers = 2\n"))
    assert metric(daemon, "kvtier_tier_refused_total", "disk") == 0
    with copier(daemon, make_engine, namespace().weights_id) as own:
        own.store(to_keys(range(BATCH)))
        wait_until(
            lambda: metric(daemon, "kvtier_tier_refused_total", "disk", 'reason="too_few_offers"') == BATCH,
            "it is counted",
        )
    assert tier(daemon, "disk").chunks == 0
    assert tier(daemon, "disk").health == "ok"
