"""Spans that a daemon sends to a real collector, and calls that never notice what becomes of them."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import grpc
import pytest
from tests.certificate_authority import CertificateAuthority
from tests.client.builders import make_client
from tests.conftest import MakeEngine, StartDaemon
from tests.daemon_process import WAIT_S, DaemonProcess, wait_until
from tests.integration.collector import Collector
from tests.raw_engine import RawEngine, failure, to_key, to_keys

from kvtier.v1 import offload_pb2 as pb
from kvtier_client import ClientOptions, ReqContext, Role

MARKER = b"MARKER-OF-A-KEY-"


def otel(port: int, **settings: object) -> str:
    written = "".join(f"{name} = {value}\n" for name, value in settings.items())
    return f'[otel]\nendpoint = "http://127.0.0.1:{port}"\n{written}'


def new_parent(*, sampled: bool = True) -> tuple[str, str, str]:
    """A caller's trace: its header, its trace id, its span id."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return f"00-{trace_id}-{span_id}-0{int(sampled)}", trace_id, span_id


def spans_counted(daemon: DaemonProcess, result: str) -> float:
    name = f'kvtier_trace_spans_total{{result="{result}"}} '
    (line,) = [line for line in daemon.page("/metrics")[1].splitlines() if line.startswith(name)]
    return float(line.removeprefix(name))


def traced_lookup(engine: RawEngine, keys: list[bytes], header: str, **fields: int) -> pb.LookupResponse:
    context = pb.RequestContext(request_id="traced")
    request = pb.LookupRequest(session_id=engine.session_id, context=context, keys=keys, **fields)  # type: ignore[arg-type]
    return engine.stub.Lookup(request, timeout=WAIT_S, metadata=(("traceparent", header),))


def test_lookup_load_and_store_are_spans_of_the_callers_trace(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    with Collector() as collector:
        daemon = start_daemon(config=otel(collector.port, share=0.0))
        engine = make_engine(daemon, tenant="tenant-of-mine").attach()
        header, trace_id, span_id = new_parent()
        keys = [MARKER + to_key(number) for number in range(3)]
        traced_lookup(engine, keys, header)
        prepared = pb.PrepareStoreRequest(
            session_id=engine.session_id,
            context=pb.RequestContext(request_id="traced"),
            keys=keys,
            lease_id=engine.new_lease_id(),
        )
        granted = engine.stub.PrepareStore(prepared, timeout=WAIT_S, metadata=(("traceparent", header),))
        stored = pb.StoreReport(
            slot_ids=granted.slot_ids,
            generations=granted.generations,
            keys=keys,
            checksums=[0] * 3,
            bytes=3 * 4096,
            seconds=0.25,
        )
        engine.complete(engine.workers[0], store_reports=[stored])
        lookup_lease, load_lease = engine.new_lease_id(), engine.new_lease_id()
        found = traced_lookup(engine, keys, header, lease_id=lookup_lease)
        start = pb.LoadStart(lookup_lease_id=lookup_lease, load_lease_id=load_lease, slot_ids=found.slot_ids)
        engine.complete(load_starts=[start])
        loaded = pb.LoadReport(lease_id=load_lease, bytes=3 * 4096, seconds=0.5)
        engine.complete(engine.workers[0], load_reports=[loaded])
        missing = pb.PrepareLoadRequest(
            session_id=engine.session_id,
            context=pb.RequestContext(request_id="traced"),
            keys=[MARKER + to_key(9)],
            lease_id=engine.new_lease_id(),
        )
        failure(lambda: engine.stub.PrepareLoad(missing, metadata=(("traceparent", header),)))
        wait_until(lambda: len(collector.spans) >= 6, "six spans arrive")
        assert {span.trace_id for span in collector.spans} == {trace_id}
        assert {span.service for span in collector.spans} == {"kvtier"}
        first, second = sorted(collector.named("kvtier.lookup"), key=lambda span: span.start_ns)
        assert (first.parent_id, second.parent_id) == (span_id, span_id)
        assert (first.attributes["kvtier.keys"], first.attributes["kvtier.hits"]) == (3, 0)
        assert (second.attributes["kvtier.hits"], second.attributes["kvtier.leased"]) == (3, 3)
        (load,), (store,) = collector.named("kvtier.load"), collector.named("kvtier.store")
        for span, seconds in ((load, 0.5), (store, 0.25)):
            assert span.attributes["kvtier.bytes"] == 3 * 4096
            assert span.end_ns - span.start_ns == pytest.approx(seconds * 1e9)
        (refused,) = collector.named("kvtier.prepare_load")
        assert refused.is_error
        assert refused.attributes["kvtier.reason"] == "NOT_RESIDENT"
        assert len(str(first.attributes["kvtier.tenant"])) == 8
        sent = b"".join(collector.raw)
        for secret in (MARKER[:8], MARKER.hex()[:16].encode(), b"tenant-of-mine"):
            assert secret not in sent
        wait_until(lambda: spans_counted(daemon, "exported") == 6, "they are counted")


def test_what_the_caller_does_not_sample_makes_no_span_and_untraced_calls_by_their_share(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    with Collector() as collector:
        daemon = start_daemon(config=otel(collector.port, share=1.0))
        engine = make_engine(daemon).attach()
        traced_lookup(engine, [to_key(1)], new_parent(sampled=False)[0])
        for nonsense in ("", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "01-aa-bb-00", "x" * 5000):
            traced_lookup(engine, [to_key(2)], nonsense)
        wait_until(
            lambda: len(collector.named("kvtier.lookup")) >= 4, "untraced calls have traces of their own"
        )
        assert all(not span.parent_id for span in collector.named("kvtier.lookup"))
        assert len({span.trace_id for span in collector.spans}) == 4


def test_the_client_tells_the_trace_of_a_request_of_its_parameters_or_of_the_thread(
    start_daemon: StartDaemon,
) -> None:
    with Collector() as collector:
        daemon = start_daemon(config=otel(collector.port, share=0.0))
        of_request, of_params, of_thread = new_parent(), new_parent(), new_parent()
        options = ClientOptions(
            lookup_deadline_ms=5000, prepare_deadline_ms=5000, trace_context=lambda: of_thread[0]
        )
        scheduler = make_client(daemon.address, options=options)
        worker = make_client(daemon.address, role=Role.WORKER, options=options)
        for client in (scheduler, worker):
            client.start()
        try:
            assert scheduler.wait_attached(WAIT_S)
            assert worker.wait_attached(WAIT_S)
            wait_until(lambda: scheduler.ready, "the scheduler knows the worker")
            scheduler.lookup(ReqContext("a", trace_parent=of_request[0]), [to_key(1)])
            scheduler.lookup(ReqContext("b", {"traceparent": of_params[0]}), [to_key(1)])
            scheduler.lookup(ReqContext("c"), [to_key(1)])
            scheduler.prepare_store(ReqContext("d", {"other": 5}), [to_key(1)])
            wait_until(lambda: len(collector.spans) >= 4, "four spans arrive")
        finally:
            scheduler.close()
            worker.close()
        lookups = sorted(collector.named("kvtier.lookup"), key=lambda span: span.start_ns)
        assert [span.trace_id for span in lookups] == [of_request[1], of_params[1], of_thread[1]]
        assert [span.trace_id for span in collector.named("kvtier.prepare_store")] == [of_thread[1]]


def test_a_trace_context_that_raises_or_says_nonsense_costs_no_call(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()

    def broken() -> str:
        raise RuntimeError("no tracer")

    for asked in (broken, lambda: "nonsense\n", lambda: None):
        options = ClientOptions(lookup_deadline_ms=5000, prepare_deadline_ms=5000, trace_context=asked)  # type: ignore[arg-type]
        client = make_client(daemon.address, options=options)
        client.start()
        try:
            assert client.wait_attached(WAIT_S), client.away_reason
            assert client.lookup(ReqContext("r"), [to_key(1)], lease=False).boot_id
        finally:
            client.close()


def test_a_collector_that_hangs_or_is_away_costs_spans_and_no_call(
    start_daemon: StartDaemon, make_engine: MakeEngine
) -> None:
    with Collector() as collector:
        collector.answer.clear()
        daemon = start_daemon(config=otel(collector.port, share=1.0, max_queued=50, timeout='"500ms"'))
        engine = make_engine(daemon).attach()
        for number in range(400):
            assert len(engine.lookup([to_key(number)]).statuses) == 1
        wait_until(lambda: spans_counted(daemon, "dropped") > 0, "a full queue drops")
        wait_until(lambda: spans_counted(daemon, "failed") > 0, "what was not answered has failed")
    for number in range(100):
        engine.lookup([to_key(number)])
    dropped = spans_counted(daemon, "dropped")
    wait_until(lambda: spans_counted(daemon, "failed") + dropped >= 100, "nobody takes them")
    assert daemon.health() == "SERVING"
    assert daemon.stop() == 0


def test_spans_go_to_a_collector_with_a_certificate(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    issued = CertificateAuthority(tmp_path / "ca").issue_for_daemon()
    credentials = grpc.ssl_server_credentials([(issued.key.read_bytes(), issued.cert.read_bytes())])
    with Collector(credentials) as collector:
        config = (
            f'[otel]\nendpoint = "https://localhost:{collector.port}"\nca_file = "{issued.ca}"\nshare = 1.0\n'
        )
        daemon = start_daemon(config=config)
        make_engine(daemon).attach().lookup(to_keys([1, 2]))
        wait_until(lambda: len(collector.named("kvtier.lookup")) == 1, "the span arrives")


def without_opentelemetry(tmp_path: Path) -> dict[str, str]:
    """An environment in which it cannot be imported."""
    blocked = tmp_path / "blocked" / "opentelemetry"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('No module named opentelemetry')\n")
    return {"PYTHONPATH": f"{blocked.parent}:{':'.join(sys.path)}"}


def test_without_the_extra_an_endpoint_ends_the_start_with_what_to_install(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, config=otel(1), env=without_opentelemetry(tmp_path)) as daemon:
        assert daemon.launch().wait() == 2
        assert "pip install '.[server,otel]'" in daemon.log_text()
        assert "Traceback" not in daemon.log_text()


def test_without_an_endpoint_nothing_of_opentelemetry_is_needed(
    start_daemon: StartDaemon, make_engine: MakeEngine, tmp_path: Path
) -> None:
    daemon = start_daemon(env=without_opentelemetry(tmp_path))
    engine = make_engine(daemon).attach()
    traced_lookup(engine, [to_key(1)], new_parent()[0])
    assert "kvtier_trace_spans" not in daemon.page("/metrics")[1]
