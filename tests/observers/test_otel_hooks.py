"""What OpenTelemetry's SDK is really given: hooks, and requests side by side."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import TYPE_CHECKING

import pytest
from opentelemetry import trace
from opentelemetry.trace import StatusCode

import asgi_uow as uow
from asgi_uow import Database
from tests.support.databases import on
from tests.support.shop import insert, insert_orphan
from tests.support.telemetry import Telemetry, exception_of, fail

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = on("aiosqlite")


# Hooks


@pytest.mark.parametrize(
    ("register", "status"),
    [
        (uow.before_commit, 200),
        (uow.after_commit, 200),
        (uow.after_response, 200),
        (uow.after_rollback, 404),
    ],
)
async def test_failing_hook(
    db: Database,
    telemetry: Telemetry,
    register: Callable[[Callable[[], None]], None],
    status: int,
) -> None:
    """A hook that raises is an error of its own span, and counted once."""

    async def work() -> None:
        register(fail)

    await telemetry.handle(work, db, status=status)
    phase = register.__name__
    assert [(None, "unit of work"), ("unit of work", f"{phase} fail")] == telemetry.tree
    span = telemetry.span(f"{phase} fail")
    recorded = exception_of(span)
    assert "ZeroDivisionError" == recorded["exception.type"]
    assert "a bug" == recorded["exception.message"]
    assert "ZeroDivisionError: a bug\n" in str(recorded["exception.stacktrace"])
    about = {"asgi_uow.hook.phase": phase, "asgi_uow.hook.name": "fail"}
    assert about.items() <= dict(span.attributes or {}).items()
    assert [(about, 1)] == telemetry.metrics["asgi_uow.hook.failures"]


class Mute(Exception):  # noqa: N818  # no name of a mistake
    """Has no message, and fails when it is asked for it."""

    def __str__(self) -> str:
        raise LookupError


async def test_error_without_a_message(db: Database, telemetry: Telemetry) -> None:
    """The span of a hook ends whatever the hook raised, and whatever that can say."""

    async def hook() -> None:
        raise Mute

    async def work() -> None:
        uow.after_commit(hook)

    await telemetry.handle(work, db)
    recorded = exception_of(telemetry.span(f"after_commit {hook.__qualname__}"))
    assert f"{__name__}.Mute" == recorded["exception.type"]
    assert "message cannot be read" == recorded["exception.message"]
    assert "Mute: message cannot be read\n" in str(recorded["exception.stacktrace"])


async def test_hook_that_takes_too_long(db: Database, telemetry: Telemetry) -> None:
    """It is an error too, and counted once."""

    async def forever() -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        uow.after_commit(forever)

    await telemetry.handle(work, db, hook_timeout=0.01)
    [_, span] = telemetry.spans
    assert "asyncio.exceptions.CancelledError" == exception_of(span)["exception.type"]
    [(_, count)] = telemetry.metrics["asgi_uow.hook.failures"]
    assert 1 == count


async def test_hook_with_a_session(db: Database, telemetry: Telemetry) -> None:
    """The unit that a hook has for itself is below the hook's span."""

    async def hook() -> None:
        await insert(2)

    async def work() -> None:
        await insert(1)
        uow.after_commit(hook)
        uow.after_response(insert, 3)

    await telemetry.handle(work, db)
    name = f"after_commit {hook.__qualname__}"
    assert sorted(telemetry.tree, key=str) == sorted(
        [
            (None, "unit of work"),
            ("unit of work", "commit"),
            ("unit of work", name),
            (name, "unit of work"),
            ("unit of work", "commit"),
            ("unit of work", "after_response insert"),
            ("after_response insert", "unit of work"),
            ("unit of work", "commit"),
        ],
        key=str,
    )
    assert 1 == len({span.context.trace_id for span in telemetry.spans if span.context})
    assert [3] == [count for _, count in telemetry.metrics["asgi_uow.units"]]
    assert "asgi_uow.hook.failures" not in telemetry.metrics


async def test_hook_whose_commit_fails(db: Database, telemetry: Telemetry) -> None:
    """Its own unit is in error, not the request's."""

    async def work() -> None:
        uow.after_commit(insert_orphan)

    await telemetry.handle(work, db)
    codes = {
        (around, name): span.status.status_code
        for (around, name), span in zip(telemetry.tree, telemetry.spans, strict=True)
    }
    assert codes == {
        (None, "unit of work"): StatusCode.UNSET,
        ("unit of work", "after_commit insert_orphan"): StatusCode.UNSET,
        ("after_commit insert_orphan", "unit of work"): StatusCode.ERROR,
        ("unit of work", "commit"): StatusCode.ERROR,
    }
    [(_, count)] = telemetry.metrics["asgi_uow.hook.failures"]
    assert 1 == count


@pytest.mark.parametrize("threaded", [False, True])
async def test_hook_is_current(
    db: Database, telemetry: Telemetry, threaded: bool
) -> None:
    """What is traced inside a hook is below the hook; the request keeps its span."""
    tracer = telemetry.traces.get_tracer("app")
    seen: list[trace.Span] = []

    def call() -> None:
        tracer.start_span("HTTP POST").end()

    async def hook() -> None:
        call()

    async def work() -> None:
        with tracer.start_as_current_span("handler"):
            for register in (uow.before_commit, uow.after_commit, uow.after_response):
                register(call if threaded else hook)
            seen.append(trace.get_current_span())
        seen.append(trace.get_current_span())

    with tracer.start_as_current_span("request") as span:
        await telemetry.handle(work, db)
        assert span is trace.get_current_span() is seen[1]
        tracer.start_span("last").end()
    hooks = [name for around, name in telemetry.tree if around == "unit of work"]
    phases = [name.partition(" ")[0] for name in hooks]
    assert ["before_commit", "after_commit", "after_response"] == phases
    assert [(name, "HTTP POST") for name in hooks] == [
        each for each in telemetry.tree if each[1] == "HTTP POST"
    ]
    assert ("handler", "unit of work") in telemetry.tree
    assert ("request", "last") == telemetry.tree[-1]


# Several requests, and after them


async def test_several_at_once(db: Database, telemetry: Telemetry) -> None:
    """The spans of requests that run at the same time do not mix."""
    tracer = telemetry.traces.get_tracer("server")
    together = asyncio.Barrier(5)

    async def one(number: int) -> None:
        async def work() -> None:
            uow.current_read_session()
            uow.after_commit(together.wait)
            await together.wait()

        with tracer.start_as_current_span(f"request {number}"):
            await telemetry.handle(work, db)

    await asyncio.gather(*map(one, range(5)))
    by_trace: dict[int, list[str]] = {}
    for span in telemetry.spans:
        assert span.context is not None
        by_trace.setdefault(span.context.trace_id, []).append(span.name)
    assert 5 == len(by_trace)
    hook = f"after_commit {asyncio.Barrier.wait.__qualname__}"
    for names in by_trace.values():
        assert ["unit of work", hook] == names[1:]
        assert names[0].startswith("request ")


async def test_no_leak(db: Database, telemetry: Telemetry) -> None:
    """Nothing is kept of a unit that is gone."""
    units: list[weakref.ref[uow.UnitOfWork]] = []

    async def hook() -> None:
        units.append(weakref.ref(uow.current_unit_of_work()))
        await insert(2)

    async def work() -> None:
        units.append(weakref.ref(uow.current_unit_of_work()))
        uow.before_commit(insert, 1)
        uow.after_commit(hook)

    await telemetry.handle(work, db)
    gc.collect()
    assert [None, None] == [unit() for unit in units]
