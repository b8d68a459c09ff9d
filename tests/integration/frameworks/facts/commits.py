"""What is kept, and when."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asgi_uow import UnitOfWorkMiddleware, after_commit
from asgi_uow.observers import UnitFinished
from tests.integration.frameworks.case import (
    creating,
    database_fact,
    fact,
    open_in,
    write,
)
from tests.integration.frameworks.site import Reply, Site
from tests.support.asgi import endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asgi_uow._asgi import ASGIApp
    from asgi_uow._decision import Headers
    from tests.integration.frameworks.case import Case
    from tests.integration.frameworks.site import Handler


@database_fact
async def p1_p4_committed_before_the_start(case: Case) -> None:
    """The row is committed when the start of the response reaches the server."""

    async def create() -> Reply:
        await write(1)
        return Reply("created", 201)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert ["created"] == exchange.chunks
    assert [[1]] == exchange.seen


@database_fact
async def p2_failed_commit(case: Case) -> None:
    """A failed COMMIT is one complete error response; no after-commit hook runs."""
    ran: list[str] = []

    def reply() -> Reply:
        after_commit(ran.append, "hook")
        return Reply("created", 201)

    routes = {
        "/broken": creating(case.write_and_break_commit, reply),
        "/whole": creating(lambda: write(1), reply),
    }
    async with case.serve(routes) as server:
        await case.check_failed(await server.request("/broken"))
        assert [] == ran
        await server.request("/whole")
    assert ["hook"] == ran


@database_fact
async def p2_failed_commit_before_a_stream(case: Case) -> None:
    """After a failed COMMIT no step of the response's generator runs."""
    ran: list[str] = []

    async def chunks() -> AsyncIterator[str]:
        ran.append("generator")
        yield "created"

    def reply() -> Reply:
        return Reply(chunks=chunks())

    routes = {
        "/broken": creating(case.write_and_break_commit, reply),
        "/whole": creating(lambda: write(1), reply),
    }
    async with case.serve(routes) as server:
        await case.check_failed(await server.request("/broken"))
        assert [] == ran
        await server.request("/whole")
    assert ["generator"] == ran


@fact
async def p2_failed_commit_before_a_background_task(case: Case) -> None:
    """After a failed COMMIT no background task runs."""
    ran: list[str] = []
    done = asyncio.Event()

    async def in_background() -> None:
        ran.append("background")
        done.set()

    def reply() -> Reply:
        return Reply("created", 201, background=in_background)

    routes = {
        "/broken": creating(case.write_and_break_commit, reply),
        "/whole": creating(lambda: write(1), reply),
    }
    async with case.serve(routes) as server:
        await case.check_failed(await server.request("/broken"))
        assert [] == ran
        await server.request("/whole")
        await asyncio.wait_for(done.wait(), timeout=5)
    assert ["background"] == ran


@fact
async def failed_commit_answered_by_error_app(case: Case) -> None:
    """An `error_app` of one's own answers a failed COMMIT."""
    app = case.app(
        Site({"/": creating(case.write_and_break_commit, Reply)}),
        error_app=endpoint(case.kept, 507),
    )
    async with case.run(app) as server:
        exchange = await server.request()
    assert 507 == exchange.status
    await case.check_rolled_back(exchange)


@fact
async def failed_commit_answered_by_the_framework(case: Case) -> None:
    """With `error_app=None` an error handler of the framework answers it."""
    site = Site(
        {"/": creating(case.write_and_break_commit, Reply)},
        error_handlers={Exception: lambda: Reply("nothing was kept", 507)},
    )
    async with case.run(case.app(site, error_app=None)) as server:
        exchange = await server.request()
    assert 507 == exchange.status
    assert ["nothing was kept"] == exchange.chunks
    assert exchange.is_complete
    await case.check_rolled_back(exchange)


@fact
async def redirect(case: Case) -> None:
    """A redirect after a form commits."""
    reply = Reply(status=303, headers={"location": "/notes"})
    async with case.serve({"/": creating(lambda: write(1), lambda: reply)}) as server:
        exchange = await server.request()
    assert 303 == exchange.status
    assert "/notes" == exchange.headers["location"]
    assert [[1]] == exchange.seen


@fact
async def commit_when(case: Case) -> None:
    """A `commit_when` of one's own sees the headers, which still reach the client."""

    def wants(_: int, headers: Headers) -> bool:
        return (b"x-keep", b"yes") in [(name.lower(), value) for name, value in headers]

    def writing(note: int, keep: str) -> Handler:
        reply = Reply("done", headers={"x-keep": keep})
        return creating(lambda: write(note), lambda: reply)

    site = Site({"/yes": writing(1, "yes"), "/no": writing(2, "no")})
    async with case.run(case.app(site, commit_when=wants)) as server:
        exchanges = [await server.request(path) for path in site.routes]
    assert [200, 200] == [each.status for each in exchanges]
    assert ["yes", "no"] == [each.headers["x-keep"] for each in exchanges]
    assert [1] == await case.kept()


@fact
async def head(case: Case) -> None:
    """HEAD commits as GET does."""
    heads = {"/": creating(lambda: write(1), Reply)}
    async with case.serve(heads=heads) as server:
        exchange = await server.request(method="HEAD")
    assert 200 == exchange.status
    assert [[1]] == exchange.seen


@fact
async def sync_handler(case: Case) -> None:
    """A handler that is not async registers hooks like any other."""
    ran: list[str] = []

    def create() -> Reply:
        after_commit(ran.append, "hook")
        return Reply("created", 201)

    async with case.serve(sync_routes={"/": create}) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert ["hook"] == ran


@fact
async def p12_untouched(case: Case) -> None:
    """A request that does not touch the database opens no connection."""
    async with case.serve({"/": creating(case.kept, Reply)}) as server:
        exchange = await server.request()
        assert 0 == open_in(case.db.engine)
        assert 0 == open_in(case.db.read_engine)
    assert 200 == exchange.status
    assert [] == case.events


async def check_one_unit(case: Case, app: ASGIApp, path: str, ran: list[str]) -> None:
    """One commit before the start, and the hook ran once."""
    async with case.run(app) as server:
        exchange = await server.request(path)
    assert 201 == exchange.status
    assert [[1]] == exchange.seen
    assert ["hook"] == ran
    assert [UnitFinished] == case.ends()


@fact
async def mounted_twice(case: Case) -> None:
    """Inside another middleware for the same database this one passes through."""
    ran: list[str] = []

    def reply() -> Reply:
        after_commit(ran.append, "hook")
        return Reply("created", 201)

    app = UnitOfWorkMiddleware(
        case.app(Site({"/": creating(lambda: write(1), reply)})),
        case.db,
        observers=(case.events.append,),
    )
    await check_one_unit(case, app, "/", ran)


@fact
async def mounted_application(case: Case) -> None:
    """An application mounted in this one, with the middleware, shares the unit."""
    ran: list[str] = []

    async def work() -> None:
        after_commit(ran.append, "hook")
        await write(1)

    mounted = UnitOfWorkMiddleware(endpoint(work, 201), case.db)
    app = case.app(Site(mounts={"/mounted": mounted}))
    await check_one_unit(case, app, "/mounted/notes", ran)
