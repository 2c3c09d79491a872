"""The mirror of a daemon's index: exact whenever nothing happens, whatever has happened before."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import CHANNEL_OPTIONS, WAIT_S, DaemonProcess, child_environment, wait_until
from tests.pool_records import published_in
from tests.raw_engine import RawEngine, failure_of, namespace, to_key, to_keys

from kvtier.v1 import admin_pb2, events_pb2, events_pb2_grpc
from kvtier.v1 import offload_pb2 as pb
from kvtier_client import mirror as mirror_module
from kvtier_client.mirror import IndexMirror, main
from kvtier_client.mirrored_index import MirroredIndex

KEYS = 900
"""Different chunks of an engine; the pool holds 256 of all."""


class Load:
    """An engine that stores and looks up at random until it is stopped, over as many daemons as there are."""

    def __init__(self, daemon: DaemonProcess, seed: int) -> None:
        self._daemon = daemon
        self._random = random.Random(seed)
        self._facts = namespace(weights_id=f"load-{seed}")
        self._runs = threading.Event()
        self._rests = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"load-{seed}", daemon=True)
        self._serial = 0
        self._thread.start()

    def go(self) -> None:
        self._rests.clear()
        self._runs.set()

    def rest(self) -> None:
        """Stop for a while; returns when no call is under way."""
        self._runs.clear()
        assert self._rests.wait(WAIT_S)

    def stop(self) -> None:
        self._stopped.set()
        self._runs.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped.is_set():
            # Whatever a killed daemon does to a raw engine: the next one is attached anew.
            with (
                contextlib.suppress(grpc.RpcError, AssertionError, OSError),
                RawEngine(self._daemon.address, facts=self._facts, tenant="load") as engine,
            ):
                engine.attach()
                while not self._stopped.is_set():
                    if not self._runs.is_set():
                        self._rests.set()
                        self._runs.wait()
                        continue
                    self._step(engine)

    def _step(self, engine: RawEngine) -> None:
        self._serial += 1
        request = f"request-{self._serial}"
        first = self._random.randrange(KEYS)
        keys = to_keys(range(first, first + self._random.randrange(1, 24)))
        match self._random.randrange(600):
            case 0:
                engine.admin.Clear(admin_pb2.ClearRequest(tenant="load"), timeout=WAIT_S)
            case 1:
                weights_id = self._random.choice(["a", "b"])
                engine.stub.Reset(pb.ResetRequest(session_id=engine.session_id, weights_id=weights_id))
            case step if step < 240:
                lease = engine.new_lease_id()
                engine.lookup(keys, lease_id=lease, request_id=request, pending_wait_ms=50)
            case _:
                granted = engine.prepare_store(keys, request_id=request)
                pairs = zip(keys, granted.verdicts, strict=True)
                stored = [key for key, verdict in pairs if verdict == pb.STORE_VERDICT_GRANTED]
                engine.report_stores(granted.slot_ids, granted.generations, stored)
        engine.complete(finished_request_ids=[request])


@contextmanager
def mirror_of(daemon: DaemonProcess, digest: str = "") -> Iterator[IndexMirror]:
    mirror = IndexMirror(daemon.address, digest)
    mirror.start()
    try:
        yield mirror
    finally:
        mirror.close()


def snapshot_of(daemon: DaemonProcess) -> set[tuple[str, str, str, int, bytes]]:
    index = MirroredIndex()
    with grpc.insecure_channel(daemon.address, options=CHANNEL_OPTIONS) as channel:
        stub = events_pb2_grpc.EventsServiceStub(channel)
        for reply in stub.Snapshot(events_pb2.SnapshotRequest(), timeout=WAIT_S):
            index.apply(reply.events)
    return set(index.chunks())


def wait_until_exact(daemon: DaemonProcess, mirror: IndexMirror) -> None:
    """At rest mirror, snapshot and the pool's file must agree, and soon: nothing else is under way."""

    def agree() -> bool:
        try:
            there = snapshot_of(daemon)
        except grpc.RpcError as error:  # tiers are still at work, and the log is short
            if failure_of(error).reason != "EVENTS_GONE":
                raise
            return False
        chunks = mirror.chunks()
        in_pool = {chunk[1:] for chunk in chunks if chunk[0] == "primary"}
        if chunks != there or in_pool != published_in(daemon.pool_file):
            return False
        counts = mirror.counts()  # a tier that has had no chunk yet is in none of its events
        return all(counts.get(tier.name, 0) == tier.chunks for tier in daemon.status().tiers)

    wait_until(agree, "the mirror is the index")


def filesystem(tmp_path: Path) -> str:
    # With room for some 1,000 chunks, so that it evicts too.
    return (
        f'[[tiers]]\ntype = "filesystem"\nname = "disk"\nroot = "{tmp_path}/root"\ncapacity = "8MiB"\n'
        f'reserve_free = 0.0\nstate_directory = "{tmp_path}/state"\n'
        '[[tiers]]\ntype = "example"\nname = "spare"\ncapacity = "2MiB"\n'
    )


def wait_for_events(mirror: IndexMirror, count: int) -> None:
    """Wait until so many events more have come, with whatever snapshots between them."""
    began = mirror.state
    wait_until(
        lambda: (
            mirror.state.boot_id != began.boot_id or mirror.state.next_sequence > began.next_sequence + count
        ),
        "a lot happens",
    )


def wait_for_boot_of(daemon: DaemonProcess, mirror: IndexMirror) -> None:
    boot_id = daemon.status().boot_id
    wait_until(lambda: mirror.state.boot_id == boot_id, "it has found the new daemon")


@pytest.mark.parametrize("limits", ["", "[limits]\nevents = 40\nevent_keys = 400\n"])
def test_it_is_exact_after_every_rest_over_daemons_that_are_killed_under_load(
    limits: str, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """With a log that is much too short it is as exact, after more snapshots."""
    daemon = start_daemon(pool_bytes="1MiB", config=limits + filesystem(tmp_path))
    loads = [Load(daemon, seed) for seed in range(2)]
    filled: set[str] = set()
    with mirror_of(daemon) as mirror:
        try:
            for number in range(3):
                for load in loads:
                    load.go()
                assert mirror.wait_live(WAIT_S)
                if number:
                    wait_for_events(mirror, 300)
                    daemon.restart()
                    wait_for_boot_of(daemon, mirror)
                wait_for_events(mirror, 300)
                for load in loads:
                    load.rest()
                wait_until_exact(daemon, mirror)
                assert mirror.state.is_live
                filled |= {tier for tier, count in mirror.counts().items() if count}
            assert mirror.state.num_snapshots >= 3
            assert filled == {"primary", "disk", "spare"}
        finally:
            for load in loads:
                load.stop()


def test_a_lost_connection_costs_no_snapshot_where_the_daemon_still_has_the_events(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon, tenant="team").attach()
    engine.store(to_keys(range(3)))
    assert engine.scheduler is not None
    attached = engine.scheduler.attached
    with mirror_of(daemon) as mirror:
        assert mirror.wait_live(WAIT_S)
        wait_until_exact(daemon, mirror)
        assert mirror._call is not None
        mirror._call.cancel()  # what a cut connection looks like to it
        engine.store(to_keys(range(3, 9)), "meanwhile")
        wait_until_exact(daemon, mirror)
        assert (mirror.state.num_snapshots, mirror.state.problem.split(":")[0]) == (1, "cancelled")
        assert mirror.tiers_of(attached.namespace_digest, "team", attached.epoch, to_key(8)) == ("primary",)
        assert mirror.tiers_of(attached.namespace_digest, "", attached.epoch, to_key(8)) == ()
        assert mirror.tiers_of(attached.namespace_digest, "team", attached.epoch + 1, to_key(8)) == ()


def test_it_begins_before_its_daemon_and_outlives_it(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    daemon.kill()
    with mirror_of(daemon) as mirror:
        wait_until(lambda: mirror.state.problem.startswith("unavailable"), "it says that nobody is there")
        assert not mirror.state.is_live
        daemon.start()
        assert mirror.wait_live(WAIT_S)
        assert daemon.stop() == 0
        wait_until(lambda: not mirror.state.is_live, "it notices")
    mirror.close()


def test_it_does_not_count_as_live_while_its_daemon_is_silent(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "SILENCE_S", 2.0)
    daemon = start_daemon()
    with mirror_of(daemon) as mirror:
        assert mirror.wait_live(WAIT_S)
        daemon.signal(signal.SIGSTOP)
        wait_until(lambda: not mirror.state.is_live, "it notices the silence")
        daemon.signal(signal.SIGCONT)
        wait_until(lambda: mirror.state.is_live, "it hears of it again")
        assert mirror.state.num_snapshots == 1


def test_one_namespace_alone_can_be_mirrored(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon()
    wanted, other = make_engine(daemon).attach(), make_engine(daemon).attach()
    other.store(to_keys(range(5)))
    wanted.store(to_keys(range(2)))
    assert wanted.scheduler is not None
    digest = wanted.scheduler.attached.namespace_digest
    with mirror_of(daemon, digest) as mirror:
        assert mirror.wait_live(WAIT_S)
        other.store(to_keys(range(5, 9)), "more")
        wanted.store(to_keys(range(2, 4)), "more")
        wait_until(lambda: mirror.counts() == {"primary": 4}, "it has what is its own")
        assert {chunk[1] for chunk in mirror.chunks()} == {digest}


def test_the_command_says_what_each_tier_holds(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon(config='[[tiers]]\ntype = "example"\nname = "spare"\ncapacity = "1MiB"\n')
    make_engine(daemon).attach().store(to_keys(range(7)))
    wait_until(lambda: daemon.status().tiers[1].chunks == 7, "it is below too")
    said = subprocess.run(
        [sys.executable, "-m", "kvtier_client.mirror", "--once", "--address", daemon.address],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    ).stdout
    assert said.startswith("primary 7  spare 7  event "), said
    assert "lag 0." in said


def test_the_command_says_that_nobody_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "ONCE_S", 0.5)
    assert main(["--address", f"unix://{tmp_path}/s", "--once"]) == 2
    assert "primary 0  event 0  not live: unavailable" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_with_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--address", "/run/kvtier.sock"])
    assert "write unix:///run/kvtier.sock" in capsys.readouterr().err
