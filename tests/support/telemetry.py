"""OpenTelemetry's SDK with what it was given kept in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from asgi_uow.otel import OpenTelemetryObserver
from tests.support.asgi import handle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import ReadableSpan

    from asgi_uow import Database
    from tests.support.asgi import Handler, Response

CONNECTION = "db.client.connection."


class Telemetry:
    """An SDK of its own, and what it was given."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        self.traces = TracerProvider()
        self.traces.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meters = MeterProvider(metric_readers=[self._metrics])
        self.observer = OpenTelemetryObserver(self.traces, self.meters)

    def shutdown(self) -> None:
        self.traces.shutdown()
        self.meters.shutdown()

    async def handle(
        self, work: Handler, *databases: Database, **options: Any
    ) -> Response:
        """Have some work done as a request does it, and observe that."""
        return await handle(work, *databases, observers=[self.observer], **options)

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans that have ended, by the time of their start."""
        ended = self._spans.get_finished_spans()
        return sorted(ended, key=lambda span: span.start_time or 0)

    @property
    def tree(self) -> list[tuple[str | None, str]]:
        """Every span with the name of the span around it."""
        names = {span.context.span_id: span.name for span in self.spans if span.context}
        return [
            (names.get(span.parent.span_id) if span.parent else None, span.name)
            for span in self.spans
        ]

    def span(self, name: str) -> ReadableSpan:
        [span] = [each for each in self.spans if each.name == name]
        return span

    @property
    def metrics(self) -> dict[str, list[tuple[Mapping[str, object], float]]]:
        """Per metric its attributes, and the count of what was added or recorded."""
        data = self._metrics.get_metrics_data()
        return {
            metric.name: [
                (
                    dict(point.attributes or {}),
                    getattr(point, "value", 0) or getattr(point, "count", 0),
                )
                for point in metric.data.data_points
            ]
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def pool(self, url: str, access: str = "write") -> dict[str, float]:
        """What the gauges say of a database's pools, by state or by instrument."""
        name = pool_name(url) + (" read" if access == "read" else "")
        about = {f"{CONNECTION}pool.name": name, "asgi_uow.access": access}
        return {
            str(
                found.get(f"{CONNECTION}state", metric.removeprefix(CONNECTION))
            ): number
            for metric, points in self.metrics.items()
            for found, number in points
            if not metric.endswith("_time") and about.items() <= found.items()
        }


def pool_name(url: str) -> str:
    """The URL without user, password and query."""
    scheme, _, address = url.partition("?")[0].partition("://")
    return f"{scheme}://{address.rpartition('@')[2]}"


def fail() -> None:
    message = "a bug"
    raise ZeroDivisionError(message)


def exception_of(span: ReadableSpan) -> Mapping[str, object]:
    """Give the attributes of the only exception that was recorded."""
    assert StatusCode.ERROR is span.status.status_code
    [event] = span.events
    assert "exception" == event.name
    return dict(event.attributes or {})
