"""What is not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgi_uow import current_unit_of_work
from tests.integration.frameworks.case import creating, fact, open_in, write
from tests.integration.frameworks.site import Reply, Site, nothing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from asgi_uow import UnitOfWork
    from asgi_uow._asgi import ASGIApp
    from tests.integration.frameworks.case import Case
    from tests.support.asgi import Response


@fact
async def error_response(case: Case) -> None:
    """A 404, returned or raised, keeps nothing and reaches the client unchanged."""

    def site(work: Callable[[], Awaitable[None]]) -> Site:
        async def returned() -> Reply:
            await work()
            return Reply("no such note", 404, {"x-reason": "deleted"})

        async def raised() -> Reply:
            await work()
            raise case.framework.not_found()

        return Site({"/returned": returned, "/raised": raised})

    async def responses(app: ASGIApp) -> list[Response]:
        async with case.run(app) as server:
            return [await server.request(path) for path in ("/returned", "/raised")]

    expected = await responses(case.framework.application(site(nothing)))
    actual = await responses(case.app(site(lambda: write(1))))
    assert [404, 404] == [exchange.status for exchange in actual]
    assert [each.messages for each in expected] == [each.messages for each in actual]
    assert [[[]], [[]]] == [exchange.seen for exchange in actual]
    assert [] == await case.kept()


@fact
async def unknown_path(case: Case) -> None:
    """A path that nobody serves is the framework's 404, without a connection."""
    async with case.serve({"/somewhere": creating(nothing, Reply)}) as server:
        exchange = await server.request("/nowhere")
        assert 0 == open_in(case.db.engine)
    assert 404 == exchange.status
    assert exchange.is_complete
    assert [] == case.events


@fact
async def unhandled_exception(case: Case) -> None:
    """An unhandled exception is a 500 and keeps nothing."""

    async def create() -> Reply:
        await write(1)
        message = "a bug"
        raise ZeroDivisionError(message)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 500 == exchange.status
    assert exchange.is_complete
    assert [[]] == exchange.seen
    assert [] == await case.kept()


@fact
async def handled_exception(case: Case) -> None:
    """An error handler of the application is in the unit; its status decides."""
    units: list[UnitOfWork] = []

    def handle(status: int) -> Callable[[], Reply]:
        def respond() -> Reply:
            units.append(current_unit_of_work())
            return Reply("handled", status)

        return respond

    async def refuse() -> Reply:
        units.append(current_unit_of_work())
        await write(1)
        raise PermissionError

    async def excuse() -> Reply:
        units.append(current_unit_of_work())
        await write(2)
        raise FileExistsError

    async with case.serve(
        {"/refuse": refuse, "/excuse": excuse},
        error_handlers={PermissionError: handle(403), FileExistsError: handle(200)},
    ) as server:
        refused = await server.request("/refuse")
        excused = await server.request("/excuse")
    assert [403, 200] == [refused.status, excused.status]
    assert [["handled"], ["handled"]] == [refused.chunks, excused.chunks]
    assert [2] == await case.kept()
    assert [units[0], units[0], units[2], units[2]] == units


@fact
async def p4_exception_after_the_start(case: Case) -> None:
    """An exception in the middle of a response leaves the commit standing."""

    async def chunks() -> AsyncIterator[str]:
        yield "one"
        message = "a bug"
        raise ZeroDivisionError(message)

    def site(work: Callable[[], Awaitable[None]]) -> Site:
        return Site({"/": creating(work, lambda: Reply(chunks=chunks()))})

    async def response(app: ASGIApp) -> Response:
        async with case.run(app) as server:
            return await server.request()

    expected = await response(case.framework.application(site(nothing)))
    exchange = await response(case.app(site(lambda: write(1))))
    assert 200 == exchange.status
    assert ["one"] == exchange.chunks
    assert not exchange.is_complete
    assert type(expected.error) is type(exchange.error)
    assert [1] == await case.kept()
