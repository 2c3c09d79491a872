"""The metrics page of a real daemon."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import DaemonProcess, wait_until
from tests.raw_engine import RawEngine, failure, to_keys
from tests.server.metric_contract import METRICS, PREFIX, PROMISED
from tests.stall import Stall

from kvtier.v1 import offload_pb2 as pb

Sample = tuple[tuple[str, str], ...]


def scrape(daemon: DaemonProcess) -> dict[str, tuple[str, dict[Sample, float]]]:
    """Kind and samples of every metric, by name; of a histogram those of `_count`."""
    status, text = daemon.page("/metrics")
    assert status == 200
    found: dict[str, tuple[str, dict[Sample, float]]] = {}
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")
        counted = family.name + {"counter": "_total", "histogram": "_count"}.get(family.type, "")
        samples = {tuple(sorted(s.labels.items())): s.value for s in family.samples if s.name == counted}
        found[name] = (family.type, samples)
    return found


def value(daemon: DaemonProcess, name: str, **labels: str) -> float:
    """One sample; fails where there is none."""
    return scrape(daemon)[name][1][tuple(sorted(labels.items()))]


@pytest.fixture
def with_tier(start_daemon: StartDaemon, tmp_path: Path) -> DaemonProcess:
    return start_daemon(
        config=f"""
        [[tiers]]
        type = "filesystem"
        root = "{tmp_path / "chunks"}"
        capacity = "8MiB"
        writes_per_day = "1GiB"
        state_directory = "{tmp_path / "state"}"
        """
    )


def test_the_page_has_every_metric_of_the_list_and_no_other(
    with_tier: DaemonProcess, make_engine: MakeEngine
) -> None:
    make_engine(with_tier).attach()
    wait_until(lambda: bool(scrape(with_tier)["engine_info"][1]), "the engine is seen")
    wait_until(lambda: bool(scrape(with_tier)["tier_disk_free_bytes"][1]), "the tier has seen its disk")
    found = scrape(with_tier)
    assert {name: kind for name, (kind, _) in found.items()} == {
        name: contract.kind for name, contract in METRICS.items()
    }
    labels = {name: {tuple(sorted(dict(s))) for s in samples} for name, (_, samples) in found.items()}
    assert labels == {
        name: set() if contract.needs_device else {tuple(sorted(contract.labels))}
        for name, contract in METRICS.items()
    }


def test_without_tiers_and_engines_only_their_metrics_have_no_samples(daemon: DaemonProcess) -> None:
    empty = {name for name, (_, samples) in scrape(daemon).items() if not samples}
    assert empty == {
        name
        for name, contract in METRICS.items()
        if contract.appears_later
        or contract.needs_device
        or (contract.needs_tiers and name != "promotion_duration_seconds")
    } | {"promotion_duration_seconds"}


def test_counters_begin_at_0_with_every_label_that_a_dashboard_may_ask_for(with_tier: DaemonProcess) -> None:
    for name in PROMISED:
        kind, samples = scrape(with_tier)[name]
        if kind == "counter" or (kind == "histogram" and name != "rpc_duration_seconds"):
            assert samples, name
            assert set(samples.values()) == {0.0}, name
    methods = {dict(labels)["method"] for labels in scrape(with_tier)["rpc_duration_seconds"][1]}
    called = pb.DESCRIPTOR.services_by_name["OffloadService"].methods
    assert {f"OffloadService/{method.name}" for method in called} <= methods
    errors = {dict(labels)["errno"] for labels in scrape(with_tier)["io_errors_total"][1]}
    assert {"EIO", "ENOSPC", "ETIMEDOUT", "other"} <= errors
    assert value(with_tier, "tenant_used_bytes", tenant="default") == 0
    assert value(with_tier, "quota_refused_total", tenant="default") == 0


def test_a_tiers_disk_its_reserve_and_its_budget_are_told(with_tier: DaemonProcess) -> None:
    wait_until(lambda: bool(scrape(with_tier)["tier_disk_free_bytes"][1]), "the tier has seen its disk")
    size = value(with_tier, "tier_disk_size_bytes", tier="filesystem")
    assert 0 < value(with_tier, "tier_disk_free_bytes", tier="filesystem") <= size
    assert value(with_tier, "tier_disk_reserve_bytes", tier="filesystem") == int(0.05 * size)
    assert value(with_tier, "tier_disk_daily_budget_bytes", tier="filesystem") == 1 << 30


def test_an_error_of_a_tiers_io_is_counted(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(
        env={"KVTIER_FAULTS": "filesystem.after_open=error"},
        config=f"""
        [[tiers]]
        type = "filesystem"
        root = "{tmp_path / "chunks"}"
        capacity = "8MiB"
        io = "threads"
        state_directory = "{tmp_path / "state"}"
        """,
    )
    make_engine(daemon).attach().store(to_keys([1]))
    wait_until(
        lambda: value(daemon, "io_errors_total", tier="filesystem", errno="other") > 0,
        "the error is counted",
    )
    assert value(daemon, "io_errors_total", tier="filesystem", errno="EIO") == 0


def test_what_engines_say_their_tokens_cost_adds_up(daemon: DaemonProcess, engine: RawEngine) -> None:
    before = [value(daemon, name) for name in COSTS]
    for _ in range(2):
        engine.complete(
            costs=pb.Costs(loaded_tokens=100, load_seconds=0.5, computed_tokens=50, compute_seconds=2.0)
        )
    assert [value(daemon, name) - was for name, was in zip(COSTS, before, strict=True)] == [200, 1, 100, 4]


COSTS = ("loaded_tokens_total", "load_seconds_total", "computed_tokens_total", "compute_seconds_total")


@pytest.mark.parametrize(
    "costs",
    [
        pb.Costs(load_seconds=float("inf")),
        pb.Costs(compute_seconds=float("nan")),
        pb.Costs(load_seconds=-1.0),
        pb.Costs(loaded_tokens=1 << 63),
    ],
)
def test_costs_that_cannot_be_are_not_counted(
    daemon: DaemonProcess, engine: RawEngine, costs: pb.Costs
) -> None:
    before = [value(daemon, name) for name in COSTS]
    engine.complete(costs=costs)
    assert [value(daemon, name) for name in COSTS] == before


def test_a_refused_attach_counts_under_its_grpc_code(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(daemon)
    request = engine.attach_request(pb.SESSION_ROLE_SCHEDULER)
    request.instance_nonce = 0
    assert failure(lambda: engine.open_session(request)).code.name == "INVALID_ARGUMENT"
    assert value(daemon, "rpc_duration_seconds", method="OffloadService/Attach", code="INVALID_ARGUMENT") == 1


def test_what_cannot_be_pinned_is_no_hit(start_daemon: StartDaemon, make_engine: MakeEngine) -> None:
    daemon = start_daemon(config="[limits]\npin_share = 0.05\n")
    engine = make_engine(daemon).attach()
    keys = to_keys(range(80))
    engine.store(keys[:40])
    engine.store(keys[40:])
    answer = engine.lookup(keys, lease_id=engine.new_lease_id())
    hits, unleased = (
        answer.statuses.count(status) for status in (pb.LOOKUP_STATUS_HIT, pb.LOOKUP_STATUS_HIT_UNLEASED)
    )
    assert hits
    assert unleased
    wait_until(
        lambda: value(daemon, "lookup_keys_total", result="hit_unleased") == unleased, "the metrics say so"
    )
    assert value(daemon, "lookup_keys_total", result="hit") == hits


def test_a_scrape_is_answered_while_the_loop_is_blocked(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    stall = Stall(tmp_path, "slots.before_published")
    daemon = start_daemon(env=stall.env)
    engine = make_engine(daemon).attach()
    granted = engine.prepare_store(to_keys([1]))
    stall.arm()
    report = engine.stub.Complete.future(
        pb.CompleteRequest(
            session_id=engine.workers[0].id,
            store_reports=[
                pb.StoreReport(
                    slot_ids=granted.slot_ids,
                    generations=granted.generations,
                    keys=to_keys([1]),
                    checksums=[0],
                )
            ],
        ),
        timeout=60,
    )
    stall.wait_until_hung()
    try:
        for _ in range(3):
            assert scrape(daemon).keys() == METRICS.keys()
        assert not report.done()
        assert daemon.page("/livez")[0] in {200, 503}
    finally:
        stall.let_go()
    report.result(timeout=60)
