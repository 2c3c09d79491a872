"""What an operator asks of a real daemon and orders it to do: the calls, and the commands that make them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, child_environment, wait_until
from tests.integration.test_operating_tiers import kvtier, wait_until_below
from tests.integration.test_tiers import EXAMPLE, copier, filesystem, metric, tier
from tests.raw_engine import PART_BYTES, RawEngine, namespace, refusal, to_key, to_keys

from kvtier.v1 import admin_pb2 as pb

Row = dict[str, Any]


def asked(daemon: DaemonProcess, action: str, *options: str) -> Row:
    """What a command answers with -o json; it must do well and say nothing else."""
    done = kvtier("admin", action, "--address", daemon.address, "-o", "json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    answer: Row = json.loads(done.stdout)
    return answer


def digest_of(daemon: DaemonProcess, engine: RawEngine) -> str:
    rows = daemon.status().sessions
    return next(session.namespace for session in rows if session.engine_id == engine.engine_id)


# -- What all calls have in common --


def test_calls_of_operators_are_timed_like_all_others(daemon: DaemonProcess) -> None:
    text = daemon.page("/metrics")[1]
    for method in set(pb.DESCRIPTOR.services_by_name["AdminService"].methods_by_name) - {"SetQuota"}:
        assert f'kvtier_rpc_duration_seconds_count{{code="OK",method="AdminService/{method}"}}' in text


# -- Listings --


def test_sessions_namespaces_and_tenants_are_listed(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    facts = namespace(weights_id="listed", num_parts=2)
    one = make_engine(daemon, "one", facts=facts, world_size=2, tenant="team-a").attach()
    two = make_engine(daemon, "two").attach()
    one.store(to_keys(range(3)))
    two.store([to_key(1)])

    sessions = asked(daemon, "sessions")["sessions"]
    assert [(s["engine_id"], s["role"], s["rank"], s["tenant"]) for s in sessions] == [
        ("one", "scheduler", 0, "team-a"),
        ("one", "worker", 0, "team-a"),
        ("one", "worker", 1, "team-a"),
        ("two", "scheduler", 0, ""),
        ("two", "worker", 0, ""),
    ]

    namespaces = asked(daemon, "namespaces")["namespaces"]
    assert [len(row["digest"]) for row in namespaces] == [32, 32]
    assert [(row["chunks"], row["used_bytes"], row["engines"]) for row in namespaces] == [
        (3, 3 * 2 * PART_BYTES, 1),
        (1, PART_BYTES, 1),
    ]
    assert namespaces[0]["facts"]["weights_id"] == "listed"
    assert one.admin.ListNamespaces(pb.ListNamespacesRequest()).namespaces[0].facts == facts
    assert namespaces[0]["digest"].startswith(sessions[0]["namespace"])

    tenants = asked(daemon, "tenants")["tenants"]
    assert [(t["tenant"], t["chunks"], t["engines"], t["quota_bytes"]) for t in tenants] == [
        ("team-a", 3, 1, 0),
        ("", 1, 1, 0),
    ]

    two.close()
    wait_until(lambda: len(asked(daemon, "sessions")["sessions"]) == 3, "a session that ended is gone")
    assert [row["engines"] for row in asked(daemon, "namespaces")["namespaces"]] == [1, 0]


def test_after_a_restart_chunks_without_an_engine_are_listed_with_what_is_known(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon, tenant="team-a").attach()
    engine.store([to_key(1)])
    digest = digest_of(daemon, engine)
    engine.close()
    assert daemon.stop() == 0
    daemon.start()
    (row,) = asked(daemon, "namespaces")["namespaces"]
    assert (row["digest"][:12], row["chunks"], row["engines"]) == (digest, 1, 0)
    shown = kvtier("admin", "namespaces", "--address", daemon.address).stdout
    assert f"{digest}  ? " in shown
    assert (
        asked(daemon, "explain", "--namespace", digest, "--tenant", "team-a", "--key", to_key(1).hex())[
            "verdict"
        ]
        == "resident"
    )


@pytest.mark.parametrize("action", ["sessions", "namespaces", "tenants"])
def test_tables_fit_into_80_columns_and_say_when_there_is_nothing(
    action: str, start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    shown = kvtier("admin", action, "--address", daemon.address)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"no {action}: ")
    facts = namespace(model="organisation/a-model-with-a-long-name-70b-instruct-fp8-dynamic")
    make_engine(daemon, "e" * 128, facts=facts, tenant="t" * 64).attach().store([to_key(1)])
    shown = kvtier("admin", action, "--address", daemon.address)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert len(shown.stdout.splitlines()) == {"sessions": 4, "namespaces": 3, "tenants": 3}[action]
    assert "…" in shown.stdout


# -- Evict --


def test_evict_frees_the_coldest_of_the_pool_and_is_counted(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    for number in range(8):
        engine.store([to_key(number)], f"r{number}")
    held = engine.lookup([to_key(0)], lease_id=engine.new_lease_id(), request_id="holds")
    assert len(held.slot_ids) == 1
    reply = asked(daemon, "evict", "--bytes", str(2 * PART_BYTES + 1), "--yes")
    assert reply == {
        "tier": "primary", "chunks": 3, "freed_bytes": 3 * PART_BYTES, "kept_chunks": 1, "over": True,
    }  # fmt: skip
    statuses = engine.lookup(to_keys(range(8)), request_id="after").statuses
    assert [status == 1 for status in statuses] == [True, False, False, False, True, True, True, True]
    wait_until(lambda: metric(daemon, "kvtier_evictions_total", "primary", 'reason="admin"') == 3, "counted")
    done = kvtier("admin", "evict", "--address", daemon.address, "--bytes", "1TiB", "--yes")
    assert done.stdout == "primary: 4 chunks evicted, 16KiB freed; 1 are held and stay\n"


def test_evict_of_a_lower_tier_waits_for_it_and_leaves_the_pool(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(config=EXAMPLE + filesystem(tmp_path))
    keys = to_keys(range(16))
    with copier(daemon, make_engine) as own:
        own.store(keys)
        for name in ("spare", "disk"):
            wait_until_below(daemon, name, 16)
            before = tier(daemon, name).used_bytes
            reply = asked(daemon, "evict", "--tier", name, "--bytes", str(before // 2), "--yes")
            assert (reply["tier"], reply["chunks"], reply["freed_bytes"]) == (name, 8, before // 2)
            assert tier(daemon, name).chunks == 8
        assert tier(daemon, "primary").chunks == 16
        assert own.load(keys, "again") == 16
    assert len(list((tmp_path / "root").rglob("*.chunk"))) == 8
    wait_until(lambda: metric(daemon, "kvtier_evictions_total", "disk", 'reason="admin"') == 8, "counted")


# -- Explain --


def test_explain_tells_of_a_key_and_of_a_request(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon(config="[admission]\nstore_threshold = 2\n")
    engine = make_engine(daemon, "writer").attach()
    ask = ("admin", "explain", "--address", daemon.address, "--namespace", digest_of(daemon, engine))
    shown = kvtier(*ask, "--key", to_key(1).hex())
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines() == [
        "never seen",
        "  primary: not resident",
        "  admission: offered 0 times, stored from 2 on",
        "  no event of it: the log of events has everything since the daemon's start",
    ]
    engine.lookup(to_keys([1, 2]), request_id="first")
    assert kvtier(*ask, "--key", to_key(1).hex()).stdout.startswith("filtered\n")
    engine.lookup(to_keys([1, 2]), request_id="second")
    granted = engine.prepare_store([to_key(1)], request_id="second")
    shown = kvtier(*ask, "--key", to_key(1).hex())
    assert shown.stdout.startswith("pending\n")
    assert "pending: engine 'writer' has been storing it for" in shown.stdout
    engine.report_stores(granted.slot_ids, granted.generations, [to_key(1)])
    texts = [key.hex() for key in to_keys([1, 2, 3])]
    shown = kvtier(*ask, "--key", texts[0], "--key", texts[1], "--key", f"0x{texts[2]}")
    assert [line.split()[-1] for line in shown.stdout.splitlines()[:3]] == ["resident", "wanted", "seen"]
    assert "the first 1 of 3 keys are there" in shown.stdout
    from_stdin = subprocess.run(
        [sys.executable, "-m", "kvtier_server", *ask, "--key", "-", "-o", "json"],
        env=child_environment(),
        input="\n".join(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    reply = json.loads(from_stdin.stdout)
    assert (reply["leading_hits"], reply["verdict"]) == (1, "wanted")
    assert [key["verdict"] for key in reply["keys"]] == ["resident", "wanted", "never seen"]
    assert [key["key"] for key in reply["keys"]] == texts


# -- Mistakes --


@pytest.fixture(scope="module")
def tiered_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("tiered"), config=EXAMPLE) as daemon:
        yield daemon.start()


@pytest.fixture
def tiered(tiered_daemon: DaemonProcess, make_engine: MakeEngine) -> RawEngine:
    return make_engine(tiered_daemon).attach()


@pytest.mark.parametrize(
    ("method", "request_", "field", "message"),
    [
        ("Evict", pb.EvictRequest(), "bytes", "say how much"),
        ("Evict", pb.EvictRequest(bytes=1, tier="x"), "tier", "tiers are primary, spare"),
        ("Evict", pb.EvictRequest(bytes=1, tier="x" * 60_000), "tier", "xx...'; tiers are primary, spare"),
        ("Drain", pb.DrainRequest(deadline_ms=3_600_001), "deadline_ms", "at most 3600000"),
        ("Explain", pb.ExplainRequest(namespace="a"), "key", "missing"),
        ("Explain", pb.ExplainRequest(namespace="a", key=b"1234"), "key", "4 bytes; 5 to 128"),
        ("Explain", pb.ExplainRequest(namespace="a", keys=[b"1"] * 1025), "keys", "1025 keys; 1 to 1024"),
        (
            "Explain",
            pb.ExplainRequest(namespace="a", key=b"12345", keys=[b"12345"]),
            "keys",
            "one of the two",
        ),
        ("Explain", pb.ExplainRequest(key=b"12345"), "namespace", "none is given; there "),
        ("Explain", pb.ExplainRequest(namespace="zz", key=b"12345"), "namespace", "begins with 'zz'; there "),
        ("Clear", pb.ClearRequest(namespace="zz"), "namespace", "begins with 'zz'; there "),
        ("Clear", pb.ClearRequest(), "everything", "no filter is given"),
    ],
)
def test_a_mistake_names_the_field_and_what_there_is(
    method: str, request_: Message, field: str, message: str, tiered: RawEngine
) -> None:
    failed = refusal(lambda: getattr(tiered.admin, method)(request_, timeout=WAIT_S))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")
    assert failed.metadata["field"] == field
    assert message in failed.message


def test_a_key_of_another_tenant_names_the_tenants(tiered: RawEngine, tiered_daemon: DaemonProcess) -> None:
    asked_for = pb.ExplainRequest(namespace=digest_of(tiered_daemon, tiered), tenant="nobody", key=b"12345")
    failed = refusal(lambda: tiered.admin.Explain(asked_for, timeout=WAIT_S))
    assert failed.metadata["field"] == "tenant"
    assert "there are ''" in failed.message


def test_quotas_are_not_there_and_say_so(tiered: RawEngine) -> None:
    failed = refusal(lambda: tiered.admin.SetQuota(pb.SetQuotaRequest(quota_bytes=1), timeout=WAIT_S))
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("evict", "--bytes", "2G", "--yes"), 'did you mean "2GiB"?'),
        (("evict", "--bytes", "0", "--yes"), "cannot be freed"),
        (("evict", "--bytes", "1GiB", "--tier", "tape", "--yes"), "tiers are primary, spare"),
        (("evict", "--bytes", "1GiB"), "Nobody is there to ask; add --yes"),
        (("explain", "--namespace", "a", "--key", "zz"), "'zz' is not a key in hex"),
        (("explain", "--namespace", "a", "--key", "-"), "no key was on stdin"),
        (("drain", "--deadline", "5"), "'5' has no unit"),
        (("drain", "--deadline", "2h"), "deadline_ms: 7200000; at most 3600000"),
    ],
)
def test_commands_say_what_is_wrong_and_exit_2(
    options: Sequence[str], message: str, tiered_daemon: DaemonProcess
) -> None:
    refused = kvtier("admin", options[0], "--address", tiered_daemon.address, *options[1:])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert message in refused.stderr
    assert tiered_daemon.status().state == "serving"


@pytest.mark.parametrize("action", ["sessions", "drain", "evict"])
def test_without_a_daemon_every_action_says_so(action: str, tmp_path: Path) -> None:
    options = {"evict": ("--bytes", "1GiB", "--yes"), "drain": ("--wait",)}.get(action, ())
    refused = kvtier("admin", action, "--address", f"unix://{tmp_path}/no.sock", *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no daemon at unix://" in refused.stderr


@pytest.mark.parametrize(("answer", "code", "stays"), [(b"n\n", 1, True), (b"y\n", 0, False)])
@pytest.mark.parametrize("action", [("drain",), ("evict", "--bytes", "1GiB")], ids=["drain", "evict"])
def test_on_a_terminal_what_changes_something_asks_first(
    action: Sequence[str],
    answer: bytes,
    code: int,
    stays: bool,
    start_daemon: StartDaemon,
    make_engine: MakeEngine,
) -> None:
    daemon = start_daemon()
    make_engine(daemon).attach().store([to_key(1)])
    keyboard, terminal = os.openpty()
    try:
        os.write(keyboard, answer)
        done = subprocess.run(
            [sys.executable, "-m", "kvtier_server", "admin", *action, "--address", daemon.address],
            env=child_environment(),
            stdin=terminal,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("[y/N]") == 1
    if stays:
        assert daemon.status().state == "serving"
        assert tier(daemon, "primary").chunks == 1
    elif action[0] == "drain":
        assert daemon.wait() == 0
    else:
        assert tier(daemon, "primary").chunks == 0


# -- Drain --


def test_drain_is_sigterm_and_tells_what_is_held(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    engine.store([to_key(2)])
    granted = engine.prepare_store([to_key(1)])
    load = engine.new_lease_id()
    engine.prepare_load([to_key(2)], lease_id=load)
    reply = engine.admin.Drain(pb.DrainRequest(), timeout=WAIT_S)
    assert (reply.leases, reply.sessions, reply.loads, reply.stores, reply.queued_bytes) == (2, 2, 1, 1, 0)
    assert (reply.boot_id, reply.pid) == (engine.describe().boot_id, daemon.pid)
    assert 0 < reply.deadline_ms <= 10_000
    assert engine.scheduler is not None
    assert engine.scheduler.wait_for("draining").draining.deadline_ms == 10_000
    wait_until(lambda: daemon.health() == "NOT_SERVING", "its health says so")
    for call in (
        lambda: engine.lookup([to_key(2)], lease_id=engine.new_lease_id()),
        lambda: engine.prepare_store([to_key(3)]),
        make_engine(daemon).attach_scheduler,
    ):
        failed = refusal(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    engine.report_stores(granted.slot_ids, granted.generations, [to_key(1)])
    again = engine.admin.Drain(pb.DrainRequest(), timeout=WAIT_S)
    assert (again.stores, again.loads) == (0, 1)
    assert again.deadline_ms <= reply.deadline_ms, "a repeat without a deadline leaves it"
    engine.complete(engine.workers[0], load_reports=[{"lease_id": load}])
    assert daemon.wait() == 0
    assert engine.scheduler.wait_for_end() is grpc.StatusCode.OK
    daemon.start()
    hits = make_engine(daemon, facts=engine.facts).attach().lookup(to_keys([1, 2])).statuses
    assert list(hits) == [1, 1], "what was copied while it drained is there"


def test_a_drain_has_a_deadline_of_its_own_and_a_repeat_may_shorten_it(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    engine.prepare_store([to_key(1)])
    assert engine.admin.Drain(pb.DrainRequest(deadline_ms=600_000), timeout=WAIT_S).deadline_ms > 590_000
    assert daemon.health() == "NOT_SERVING"
    assert asked(daemon, "drain", "--deadline", "50ms")["deadline_ms"] <= 50
    assert daemon.wait() == 0
    assert '"left_copies": 1' in daemon.log_text()


def test_a_sigterm_after_a_drain_is_the_first_one(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    """A supervisor's preStop hook drains, and then it sends SIGTERM."""
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    granted = engine.prepare_store([to_key(1)])
    engine.admin.Drain(pb.DrainRequest(), timeout=WAIT_S)
    daemon.signal(signal.SIGTERM)
    wait_until(lambda: daemon.health() == "NOT_SERVING", "it drains")
    engine.report_stores(granted.slot_ids, granted.generations, [to_key(1)])
    assert daemon.wait() == 0
    assert "stopped_at_once" not in daemon.log_text()


def test_drain_wait_returns_when_the_process_is_gone(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    granted = engine.prepare_store([to_key(1)])
    draining = subprocess.Popen(
        [sys.executable, "-m", "kvtier_server", "admin", "drain", "--wait", "--address", daemon.address],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: daemon.health() == "NOT_SERVING", "it drains")
    assert draining.poll() is None, "a copy runs, and so does the daemon"
    engine.report_stores(granted.slot_ids, granted.generations, [to_key(1)])
    out, said = draining.communicate(timeout=WAIT_S)
    assert (draining.returncode, out) == (0, "the daemon is gone\n")
    assert said.startswith("draining: 2 sessions, 1 leases, 1 copies running (waited for ")
    assert not Path(f"/proc/{daemon.pid}/exe").exists(), "gone, or not yet taken by its parent"
    assert daemon.wait() == 0


def test_drain_wait_shows_on_a_terminal_that_it_goes_on(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    daemon = start_daemon()
    engine = make_engine(daemon).attach()
    granted = engine.prepare_store([to_key(1)])
    screen, terminal = os.openpty()
    command = [sys.executable, "-m", "kvtier_server", "admin", "drain", "--wait", "--yes", "--address"]
    with subprocess.Popen(
        [*command, daemon.address], env=child_environment(TERM="xterm"), stdin=terminal, stderr=terminal
    ) as draining:
        os.close(terminal)
        written = b""

        def shows(text: bytes) -> Callable[[], bool]:
            def is_shown() -> bool:
                nonlocal written
                written += os.read(screen, 1 << 16)
                return text in written

            return is_shown

        wait_until(shows(b"2 sessions, leases: 1 store"), "it shows what is held")
        engine.report_stores(granted.slot_ids, granted.generations, [to_key(1)])
        assert draining.wait(WAIT_S) == 0
    os.close(screen)
    assert daemon.wait() == 0


def test_a_pool_whose_file_is_removed_is_degraded_and_says_what_to_do(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    shutil.rmtree(daemon.pool_directory)
    wait_until(lambda: daemon.status().state == "degraded", "the daemon has seen it")
    told = daemon.status().tiers[0].health
    assert str(daemon.pool_directory) in told
    assert "restart the daemon: kill" in told
    wait_until(lambda: daemon.page("/readyz") == (200, "degraded\n"), "it goes on serving")
    wait_until(
        lambda: 'kvtier_io_errors_total{errno="ENOENT",tier="primary"} 1.0' in daemon.page("/metrics")[1],
        "the metric counts it",
    )
    for _ in range(3):
        daemon.status()
    assert daemon.log_text().count("pool_file_gone") == 1
