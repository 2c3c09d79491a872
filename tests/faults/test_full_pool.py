"""A pool that is far too small: what does not fit is refused, and said so."""

from __future__ import annotations

from tests.conftest import StartDaemon
from tests.faults.block_device import chunk_names, key_of
from tests.faults.conftest import StartEngine
from tests.faults.engine_process import check_published_chunks, held, wait_nothing_held

REQUESTS = 30
CHUNKS = 14
"""30 x 14 chunks are ten times the 42 that the pool has room for."""


def test_o1_fast_stores_claim_nothing_that_cannot_be_loaded_or_was_not_reported_evicted(
    start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """O1: 30 stores at once; every key has a verdict, every granted one is there or reported as evicted."""
    daemon = start_daemon(pool_bytes="1MiB")
    engine = start_engine().attach(daemon)
    requests = {f"store-{n}": chunk_names(f"prompt{n}", CHUNKS) for n in range(REQUESTS)}
    for req, names in requests.items():
        engine.tell("store", req=req, names=names, wait=False)
    granted: list[str] = []
    refused: dict[str, int] = {}
    evicted: set[bytes] = set()
    for names in requests.values():
        answer = engine.answer()
        assert answer["reason"] == ""
        assert list(answer["verdicts"]) == names
        for name, verdict in answer["verdicts"].items():
            if verdict == "GRANTED":
                granted.append(name)
            else:
                refused[verdict] = refused.get(verdict, 0) + 1
        evicted |= {bytes.fromhex(key) for key in answer["evicted"]}
    assert engine.ask("join", reqs=list(requests))["lost"] == []
    assert set(refused) <= {"FULL", "INFLIGHT"}
    assert len(granted) + sum(refused.values()) == REQUESTS * CHUNKS
    counted = {reason.upper(): count for reason, count in daemon.status().store_refused.items() if count}
    assert counted == refused

    everything = [name for names in requests.values() for name in names]
    resident = [name for name in granted if key_of(name) not in evicted]
    assert evicted <= set(map(key_of, granted))
    found = engine.ask("read", names=everything)
    assert (found["loaded"], found["failed"], found["wrong"]) == (resident, [], [])
    assert check_published_chunks(daemon.pool_file) == len(resident) > 0
    assert engine.ask("report")["worker"]["items_not_ok"] == 0
    wait_nothing_held(daemon, engines=1)


def test_o1_chunks_without_a_credit_are_counted_as_skipped(
    start_daemon: StartDaemon, start_engine: StartEngine
) -> None:
    """O1: the same by the way that waits for nothing; stored, skipped and evicted add up."""
    daemon = start_daemon(pool_bytes="1MiB")
    engine = start_engine().attach(daemon)
    stored: list[str] = []
    for number in range(REQUESTS):
        names = chunk_names(f"prompt{number}", CHUNKS)
        answer = engine.ask("run", req=f"run-{number}", names=names)
        assert len(answer["stored"]) + sum(answer["skipped"].values()) == CHUNKS
        assert answer["lost"] == []
        stored += answer["stored"]
    evicted = daemon.status().evictions["evict"]
    hits = engine.ask("hits", names=stored)
    assert len(hits) == len(stored) - evicted
    assert check_published_chunks(daemon.pool_file) == len(hits)
    assert held(daemon)["reserved"] == engine.ask("held_credits")
    found = engine.ask("read", names=stored)
    assert (found["loaded"], found["failed"], found["wrong"]) == (hits, [], [])
