"""Engines that die, or leave, in the middle of anything."""

from __future__ import annotations

import random
import signal

import pytest
from tests.conftest import StartDaemon
from tests.daemon_process import wait_until
from tests.faults.block_device import chunk_names
from tests.faults.conftest import StartEngine, repeats
from tests.faults.engine_process import (
    EngineEnded,
    EngineProcess,
    check_published_chunks,
    held,
    lease_count,
    wait_nothing_held,
)

POINTS = (
    "scheduler.lookup_async.before",
    "scheduler.lookup_async.after",
    "scheduler.request_credits.after",
    "on_credits.before",
    "on_credits.after",
    "scheduler.announce.after",
    "worker.before_store",
    "store.before_copy",
    "die in mid-copy",
    "store.after_copy",
    "worker.report_store.before",
    "worker.report_store.after",
    "worker.flush.after",
    "scheduler.flush.after",
    "scheduler.start_load.before",
    "scheduler.start_load.after",
    "load.before_copy",
    "load.after_copy",
    "worker.report_load.before",
    "worker.report_load.after",
    "scheduler.prepare_store.before",
    "scheduler.prepare_store.after",
    "scheduler.prepare_load.before",
    "scheduler.prepare_load.after",
    "scheduler.release.after",
    "scheduler.finish.after",
    "scheduler.flush_and_wait.after",
)
"""Before and after each Lookup, Prepare, copy and Complete, of both paths (credits, and calls with keys)."""


def live_until_killed(engine: EngineProcess, point: str, pick: random.Random) -> None:
    """Let an engine store and load in all its ways until it passes the point, which kills it."""
    by = signal.SIGKILL
    if point == "die in mid-copy":
        by = signal.SIGSEGV
        engine.ask("arm", point="store.before_copy", action="die_in_copy", nth=pick.randint(1, 4))
    else:
        engine.ask("arm", point=point, action="kill", nth=pick.randint(1, 2))
    with pytest.raises(EngineEnded) as ended:
        work(engine, pick)
    assert ended.value.code == -by, point


def work(engine: EngineProcess, pick: random.Random) -> None:
    """Store and load in every way an engine has."""
    for round_number in range(20):
        prompt = f"shared{pick.randrange(4)}"
        direct = f"direct{pick.randrange(1000)}"
        engine.ask("run", req=f"run-{round_number}", names=chunk_names(prompt, pick.randint(3, 9)))
        decoded = chunk_names(f"decoded{pick.randrange(4)}", 9)
        engine.ask("run", req=f"decode-{round_number}", names=decoded, num_decoded=pick.randint(3, 9))
        engine.ask("store", req=f"store-{round_number}", names=chunk_names(direct, pick.randint(1, 5)))
        engine.ask("read", req=f"read-{round_number}", names=chunk_names(prompt, 9))


@pytest.mark.parametrize("seed", repeats(5, 200))
def test_r1_an_engine_killed_anywhere_leaves_nothing_behind_and_no_half_stored_chunk(
    seed: int, start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """R1: SIGKILL before and after each Prepare, copy and Complete; a second engine checks what is left."""
    pick = random.Random(seed)
    daemon = start_daemon()
    reader = start_engine("reader").attach(daemon)
    first = start_engine().attach(daemon)  # what starts once in a daemon's life has started then
    first.ask("run", req="first", names=chunk_names("shared0", 4))
    assert first.close() == 0
    wait_nothing_held(daemon, engines=1)
    fds, threads = daemon.num_fds(), daemon.num_threads()
    names = [name for prompt in range(4) for name in chunk_names(f"shared{prompt}", 9)]
    names += [name for prompt in range(4) for name in chunk_names(f"decoded{prompt}", 9)]
    names += [name for prompt in range(1000) for name in chunk_names(f"direct{prompt}", 5)]

    next_one = start_engine()
    for point in POINTS:
        engine, next_one = next_one, start_engine()  # imports take longer than all the rest
        live_until_killed(engine.attach(daemon), point, pick)
        engine.kill()

        wait_nothing_held(daemon, engines=1)
        wait_until(lambda: daemon.num_fds() <= fds, f"descriptors are back at {fds} after {point}")
        check_published_chunks(daemon.pool_file)
        found = reader.ask("read", names=names)
        assert found["loaded"], f"nothing was left to check after {point}"
        assert (found["failed"], found["wrong"]) == ([], []), point
        wait_nothing_held(daemon, engines=1)
    assert daemon.num_threads() <= threads
    assert reader.ask("report")["errors"] == []


def test_r8_a_leased_lookup_is_let_go_when_its_request_ends(
    start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """R8: the client aborts after a leased lookup."""
    daemon = start_daemon()
    engine = start_engine().attach(daemon)
    names = chunk_names("prompt", 8)
    assert engine.ask("run", req="store", names=names)["num_stored"] == 8

    assert engine.ask("begin", req="abort", names=names)["num_hits"] == 8
    assert (lease_count(daemon, "lookup"), held(daemon)["pinned"]) == (1, 8)
    engine.ask("finish", req="abort")
    wait_until(lambda: lease_count(daemon, "lookup") == 0, "the lookup lease is gone")
    wait_until(lambda: held(daemon)["pinned"] == 0, "nothing is pinned")


@pytest.mark.parametrize("end", ["close", "kill"])
def test_r8_a_leased_lookup_is_let_go_when_its_session_ends(
    end: str, start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """R8: the client goes away after a leased lookup."""
    daemon = start_daemon()
    engine = start_engine().attach(daemon)
    names = chunk_names("prompt", 8)
    engine.ask("run", req="store", names=names)
    assert engine.ask("begin", req="abort", names=names)["num_hits"] == 8
    assert lease_count(daemon, "lookup") == 1

    getattr(engine, end)()
    wait_nothing_held(daemon)
