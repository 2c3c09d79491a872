"""Copies that go on after their slots were given up: they neither tear a chunk nor pass for one."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.faults.block_device import PART_BYTES, chunk_names, content_of, key_of
from tests.faults.conftest import StartEngine
from tests.faults.engine_process import (
    EngineProcess,
    check_published_chunks,
    held,
    lease_count,
    open_pool,
    wait_nothing_held,
)
from tests.faults.socket_proxy import SocketProxy

SMALL_POOL = "1MiB"
"""42 chunks."""


def fill(engine: EngineProcess, prompt: str, num_requests: int = 20) -> list[str]:
    """Store some pools' worth of chunks; each request's own must all find a place. Returns all names."""
    names: list[str] = []
    for number in range(num_requests):
        some = chunk_names(f"{prompt}-{number}", 10)
        verdicts = engine.ask("store", req=f"{prompt}-{number}", names=some)["verdicts"]
        assert set(verdicts.values()) == {"GRANTED"}
        names += some
    return names


def check_everything(daemon: DaemonProcess, reader: EngineProcess, names: list[str]) -> None:
    """Every chunk that is there has its own bytes: in the pool, and as loaded."""
    found = reader.ask("read", names=names)
    assert (found["failed"], found["wrong"]) == ([], [])
    assert len(found["loaded"]) == check_published_chunks(daemon.pool_file) > 0


def stop_in_mid_store(engine: EngineProcess, names: list[str]) -> None:
    """Let an engine store, and stop it in the third chunk between its look at the generation and the copy."""
    engine.ask("arm", point="store.before_copy", action="stop", nth=3)
    engine.tell("store", req="zombie", names=names)
    engine.wait_stopped()


def assert_late_write(daemon: DaemonProcess, slot_id: int, name: str) -> None:
    """The zombie did write: without this the test would have shown nothing."""
    pool = open_pool(daemon.pool_file)
    view = pool.slot_view(slot_id, PART_BYTES)
    assert np.array_equal(view, content_of(key_of(name)))
    del view
    pool.close()


@pytest.mark.parametrize("loss", ["daemon restarted", "connection cut", "connection cut, engine replaced"])
def test_r9_slots_of_a_zombie_writer_are_nobody_elses_until_it_has_drained(
    loss: str, start_daemon: StartDaemon, start_engine: StartEngine, tmp_path: Path
) -> None:
    """R9: SIGSTOP in mid-copy, stream gone, others fill the pool; its late writes tear nothing."""
    daemon = start_daemon(pool_bytes=SMALL_POOL)
    with SocketProxy(daemon, tmp_path / "proxy.sock") as proxy:
        zombie = start_engine("zombie").attach(proxy.address)
        other = start_engine("other").attach(daemon)
        names = chunk_names("zombie", 8)
        stop_in_mid_store(zombie, names)
        assert held(daemon)["reserved"] == 8

        if loss == "daemon restarted":
            boot_id = daemon.status().boot_id
            daemon.restart()
            other.ask("wait_ready", not_boot=boot_id)
        else:
            proxy.cut()
        wait_until(lambda: held(daemon)["quarantined"] == 8, "what it may write is quarantined")
        if loss == "connection cut, engine replaced":
            start_engine("zombie").attach(daemon).ask("run", req="new", names=chunk_names("new", 4))
        stored = fill(other, "other")
        assert held(daemon)["quarantined"] == 8

        zombie.resume()
        answer = zombie.answer()
        assert set(answer["lost"]) >= set(names[2:])
        assert_late_write(daemon, answer["slot_ids"][2], names[2])
        everything = [*names, *stored, *chunk_names("new", 4)]
        check_everything(daemon, other, everything)
        if loss == "connection cut, engine replaced":
            zombie.kill()  # its seat is taken for as long as the new one lives
        else:
            zombie.ask("wait_ready")
        wait_until(lambda: held(daemon)["quarantined"] == 0, "its slots are free again")
        everything += fill(other, "afterwards")
        check_everything(daemon, other, everything)


def test_r9_slots_of_a_zombie_writer_are_free_when_it_is_dead(
    start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """R9: what was quarantined for a process is free once its lock is."""
    daemon = start_daemon(pool_bytes=SMALL_POOL)
    zombie = start_engine().attach(daemon)
    stop_in_mid_store(zombie, chunk_names("zombie", 8))
    daemon.restart()
    assert held(daemon)["quarantined"] == 8
    zombie.kill()
    wait_nothing_held(daemon)
    other = start_engine().attach(daemon)
    check_everything(daemon, other, fill(other, "other"))


@pytest.mark.parametrize("verify_loads", ["always", "sampled", "off"])
def test_r10_a_load_from_a_slot_that_was_given_away_fails(
    verify_loads: str, start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """R10: the lease expires and the slots are rewritten between the reader's look at them and its copy."""
    daemon = start_daemon(pool_bytes=SMALL_POOL, config='[leases]\ncopy = "500ms"\n')
    reader = start_engine("reader").attach(daemon, verify_loads=verify_loads)
    names = chunk_names("old", 8)
    reader.ask("store", req="store", names=names)
    reader.ask("arm", point="load.before_copy", action="stop")
    reader.tell("read", names=names)
    reader.wait_stopped()
    wait_until(lambda: lease_count(daemon, "load") == 0, "its lease has expired")
    writer = start_engine("writer").attach(daemon)
    stored = fill(writer, "new")
    assert writer.ask("hits", names=names) == []

    reader.resume()
    answer = reader.answer()
    assert (answer["loaded"], answer["failed"], answer["right_in_memory"]) == ([], names, [])
    assert answer["untouched"] == names[1:], "the first chunk was to be copied, and be another's"
    wait_until(lambda: "kvtier_loads_torn_total 8.0" in metrics_text(daemon), "torn loads are counted")
    check_everything(daemon, writer, stored)


@pytest.mark.parametrize("change", [("--fresh",), ("--pool-bytes", "2MiB")])
def test_a_job_made_for_a_pool_that_was_replaced_loads_nothing_from_the_new_one(
    change: tuple[str, ...], start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """It is on its way from scheduler to worker while a pool of other bytes takes the old one's place."""
    daemon = start_daemon(pool_bytes=SMALL_POOL)
    names = chunk_names("prompt", 4)
    reader = start_engine("reader").attach(daemon)
    assert reader.ask("run", req="first", names=names)["stored"] == names
    assert reader.ask("begin", req="second", names=names)["num_hits"] == 4
    reader.ask("make_load", req="second", num_chunks=4)

    boot_id = daemon.status().boot_id
    daemon.restart(*change)
    writer = start_engine("writer").attach(daemon)
    stored = fill(writer, "other", num_requests=4)
    reader.ask("wait_ready", not_boot=boot_id)
    answer = reader.ask("submit_load", req="second")
    assert (answer["loaded"], answer["failed"], answer["right_in_memory"]) == ([], names, [])
    assert answer["untouched"] == names
    check_everything(daemon, writer, stored)


def metrics_text(daemon: DaemonProcess) -> str:
    """What the daemon shows to Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{daemon.metrics_port}/metrics", timeout=5) as reply:
        return str(reply.read().decode())
