"""Traces and metrics: `observers=(OpenTelemetryObserver(), LoggingObserver())`.

Needs the extra `otel`, which is OpenTelemetry's API alone; nothing is switched on by
installing it. Without an SDK, or with none configured, nothing is recorded.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

from opentelemetry import context, metrics, trace
from sqlalchemy import URL, make_url

from asgi_uow import observers as of
from asgi_uow._databases import loops
from asgi_uow._databases.driver_errors import Redactor, code_of, message_of, name_of
from asgi_uow._decision import Cause, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextvars import Token

    from opentelemetry.trace import Span
    from opentelemetry.util.types import Attributes, AttributeValue

    Running: TypeAlias = tuple[Span, Token[context.Context]]

__all__ = ["OpenTelemetryObserver"]

# Seconds, as the semantic conventions have them; the SDK's own are milliseconds.
BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
CONNECTION = "db.client.connection."
# Of pools: instruments, units, and what they show of a `PoolState`.
POOLS = (
    ("count", "{connection}", "idle", "used"),
    ("idle.max", "{connection}", "most_idle"),
    ("max", "{connection}", "most"),
    ("pending_requests", "{request}", "waiting"),
)
METHODS = tuple("CONNECT DELETE GET HEAD OPTIONS PATCH POST PUT TRACE".split())  # noqa: SIM905
NO_SPAN = trace.INVALID_SPAN
NOT_PROVEN = {Outcome.UNKNOWN, Outcome.PARTIAL}
# Causes of a rollback where a commit was wanted.
NOT_KEPT = {Cause.BEFORE_COMMIT, Cause.COMMIT_FAILED, Cause.TIMEOUT}


class OpenTelemetryObserver:
    """Records spans and metrics of units of work, of the global providers by default.

    A span `unit of work` per unit, from its first session or hook to its outcome, with
    what was done in it; below it `commit` or `rollback`, and a span per hook, which is
    the current one while the hook runs. Counters `asgi_uow.units` and
    `asgi_uow.hook.failures`, histograms and pools as `db.client.connection.*`. Of
    database errors only class, code and the statement without literals are recorded.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer("asgi_uow", tracer_provider=tracer_provider)
        meter = metrics.get_meter("asgi_uow", meter_provider=meter_provider)
        self._units = meter.create_counter("asgi_uow.units", "{unit}")
        self._failures = meter.create_counter("asgi_uow.hook.failures", "{failure}")
        self._held, self._waited = (
            meter.create_histogram(
                CONNECTION + name, "s", explicit_bucket_boundaries_advisory=BUCKETS
            )
            for name in ("use_time", "wait_time")
        )
        for name, unit, *shown in POOLS:
            look = functools.partial(_look_at_pools, shown)
            meter.create_observable_up_down_counter(CONNECTION + name, [look], unit)
        self._spans: WeakKeyDictionary[object, Span] = WeakKeyDictionary()
        self._running: WeakKeyDictionary[object, Running] = WeakKeyDictionary()

    def __call__(self, event: of.Event, /) -> None:
        if isinstance(event, of.UnitStarted):
            span = self._tracer.start_span("unit of work", start_time=event.at)
            self._spans[event.unit] = span
        elif isinstance(event, of.HeldIdle):
            self._add_idle(event, self._spans.get(event.unit, NO_SPAN))
        elif isinstance(event, of.UnitFinished):
            self._finish(event, self._spans[event.unit])
        elif isinstance(event, of.CommitFailed):
            # A unit that nothing was asked of has no span, and can fail too.
            _fail(self._spans.get(event.unit, NO_SPAN), event.error)
        elif isinstance(event, of.HookStarted):
            about, name = _hook(event), f"{event.phase} {event.hook}"
            span = self._start(name, self._spans[event.of], about, event.at)
            token = context.attach(trace.set_span_in_context(span))
            self._running[event.unit] = (span, token)
        elif isinstance(event, of.HookFinished):
            self._finish_hook(event, self._running.pop(event.unit))
        elif isinstance(event, of.HookFailed):
            self._failures.add(1, _hook(event))
        elif isinstance(event, of.ConnectionReleased):
            self._held.record(event.seconds, _pool(event.database, event.access))

    def _add_idle(self, event: of.HeldIdle, span: Span) -> None:
        if span.is_recording():  # a read session can hold one after the outcome
            about = _databases((event.database,))
            about["asgi_uow.connection.idle"] = event.seconds
            about["asgi_uow.connection.place"] = event.place
            span.add_event("asgi_uow.connection.held_idle", about, event.at)

    def _finish_hook(self, event: of.HookFinished, running: Running) -> None:
        span, token = running
        context.detach(token)
        if event.error is not None:
            _fail(span, event.error)
        span.end(event.at)
        # Of the others HookFailed tells, also of what is found after their end.
        if event.phase == "before_commit" and isinstance(event.error, Exception):
            self._failures.add(1, _hook(event))

    def _finish(self, event: of.UnitFinished, span: Span) -> None:
        ended = {"asgi_uow.outcome": event.outcome.value}
        if event.cause is not None:
            ended["asgi_uow.cause"] = event.cause.value
        self._units.add(1, ended)
        failed = event.outcome in NOT_PROVEN or event.cause in NOT_KEPT
        databases = _databases(event.databases)
        span.set_attributes({**ended, **databases, **_figures(event)})
        for used in event.usage:
            # Reads connect more than once; one that never held any waited in vain.
            if used.access == "write" and used.held:
                self._waited.record(used.waited, _pool(used.database, used.access))
        spans = [span]
        if event.databases:
            wanted = failed or event.outcome is Outcome.COMMITTED
            started = event.at - round(event.ending * 1e9)
            name = "commit" if wanted else "rollback"
            spans.append(self._start(name, span, databases, started))
        for each in spans:
            if failed:
                each.set_status(trace.StatusCode.ERROR)
            each.end(event.at)

    def _start(self, name: str, above: Span, about: Attributes, at: int) -> Span:
        around = trace.set_span_in_context(above)
        return self._tracer.start_span(name, around, attributes=about, start_time=at)


def _fail(span: Span, error: BaseException) -> None:
    """Record what `Span.record_exception` does, without people's data."""
    if span.is_recording():
        redact, kind = Redactor(error), name_of(type(error))
        attributes = {
            "exception.type": kind,
            "exception.message": redact(message_of(error)),
            "exception.stacktrace": redact.stacktrace(),
        }
        span.add_event("exception", attributes)
        span.set_attribute("error.type", kind)
        if (code := code_of(error)) is not None:
            span.set_attribute("db.response.status_code", str(code))
        span.set_status(trace.StatusCode.ERROR)


def _hook(event: of.HookStarted | of.HookFinished | of.HookFailed) -> dict[str, str]:
    return {"asgi_uow.hook.phase": event.phase, "asgi_uow.hook.name": event.hook}


def _figures(event: of.UnitFinished) -> dict[str, AttributeValue]:
    """Say what it was for and what was done in it; what takes time, in seconds."""
    statements, method = event.statements, event.method
    is_known = method is None or method in METHODS
    figures: dict[str, AttributeValue | None] = {
        "asgi_uow.reason": event.reason,
        "http.request.method": method if is_known else "_OTHER",
        "http.request.method_original": None if is_known else method,
        # Neither http.route nor url.path: nothing tells which of them it is.
        "asgi_uow.path": event.path,
        "asgi_uow.attempt": event.attempt if event.attempt > 1 else None,
        "asgi_uow.replayed": event.replayed or None,
        "asgi_uow.statement.count": statements.count,
        "asgi_uow.statement.seconds": statements.seconds,
        "asgi_uow.statement.slowest": statements.slowest,
        "asgi_uow.connection.waited": event.waited,
        "asgi_uow.connection.held": event.held,
        "asgi_uow.connection.idle": event.idle,
        "asgi_uow.hook.count": event.hooks,
        "asgi_uow.hook.seconds": event.hook_seconds,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _look_at_pools(shown: Sequence[str], _: object) -> Iterator[metrics.Observation]:
    """Add up the pools of one name; called by the thread of an exporter."""
    found: dict[tuple[URL, str, str], list[int | None]] = {}
    for pool in loops.pool_states():
        for each in shown:
            key = _without_user(pool.url), pool.access, each
            found.setdefault(key, []).append(getattr(pool, each))
    for (url, access, each), numbers in found.items():
        about = _pool(url, access)
        if access == "read":  # the writer, which may be that server, has another pool
            about[f"{CONNECTION}pool.name"] += " read"
        if len(shown) > 1:
            about[f"{CONNECTION}state"] = each
        if None not in numbers:
            yield metrics.Observation(sum(filter(None, numbers)), about)


def _pool(name: str | URL, access: str) -> dict[str, str]:
    pool = _without_user(name).render_as_string()
    return {f"{CONNECTION}pool.name": pool, "asgi_uow.access": access}


def _without_user(name: str | URL) -> URL:
    url = make_url(name)
    return URL.create(url.drivername, None, None, url.host, url.port, url.database)


def _databases(names: tuple[str, ...]) -> dict[str, AttributeValue]:
    """Name the databases; one alone also as the semantic conventions want it."""
    urls = [_without_user(name) for name in names]
    shown = tuple(url.render_as_string() for url in urls)
    known: dict[str, AttributeValue | None] = {"asgi_uow.databases": shown}
    if len(urls) == 1:
        [url] = urls
        known["db.system.name"] = url.get_backend_name()
        known["db.namespace"] = url.database
        known |= {"server.address": url.host, "server.port": url.port}
    return {name: value for name, value in known.items() if value is not None}
