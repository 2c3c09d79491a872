"""Spans on their way out: a bounded queue and the thread that empties it.

Owns what is counted of it. Whatever the collector does, calls never notice: a full queue drops, a collector
that is away costs this thread's time. In small pieces, because encoding holds the interpreter.
"""

from __future__ import annotations

from collections import deque
from threading import Event, Thread
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span
    from opentelemetry.sdk.trace.export import SpanExporter

PIECE_SPANS = 32
"""Encoded in one go: some 30 us each, so a millisecond of the interpreter."""
COLLECT_S = 1.0
"""How long the first span of a piece waits for others."""
RESULTS = ("exported", "dropped", "failed")


class SpanQueue:
    """A span processor of OpenTelemetry's SDK. `on_end` is called on the loop's thread and never waits."""

    def __init__(self, exporter: SpanExporter, max_queued: int, registry: CollectorRegistry) -> None:
        self._exporter = exporter
        self._queue: deque[ReadableSpan] = deque()
        self._max_queued = max_queued
        self._wanted = Event()
        self._stopping = Event()
        counter = Counter(
            "kvtier_trace_spans",
            "Spans by what became of them: exported, dropped (the queue was full), failed (not taken).",
            ("result",),
            registry=registry,
        )
        self._counts = {result: counter.labels(result) for result in RESULTS}
        self._thread = Thread(target=self._run, name="kvtier-spans", daemon=True)
        self._thread.start()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Do nothing: a span is sent when it is over."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span that is over, or drop it."""
        if not span.context or not span.context.trace_flags.sampled:
            return
        if len(self._queue) >= self._max_queued or self._stopping.is_set():
            self._counts["dropped"].inc()
            return
        self._queue.append(span)
        self._wanted.set()

    def _on_ending(self, span: Span) -> None:
        """Called by newer SDKs before `on_end`."""

    def shutdown(self) -> None:
        """Stop; `close` is the daemon's."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Wait for nothing: nobody is made to wait for spans."""
        del timeout_millis
        return not self._queue

    def close(self, timeout_s: float) -> None:
        """Send what is queued as far as the time allows, and drop the rest."""
        self._stopping.set()
        self._wanted.set()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._exporter.shutdown()

    def _run(self) -> None:
        while self._queue or not self._stopping.is_set():
            self._wanted.wait()
            self._wanted.clear()
            if len(self._queue) < PIECE_SPANS:
                self._stopping.wait(COLLECT_S)
            while self._queue:
                self._send([self._queue.popleft() for _ in range(min(PIECE_SPANS, len(self._queue)))])

    def _send(self, spans: list[ReadableSpan]) -> None:
        try:
            is_taken = self._exporter.export(spans).name == "SUCCESS"
        except Exception:  # noqa: BLE001 a library's trouble must not end the thread
            is_taken = False
        self._counts["exported" if is_taken else "failed"].inc(len(spans))
