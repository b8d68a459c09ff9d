"""Each request has a unit of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx

from asgi_uow import current_session, current_unit_of_work
from tests.integration.frameworks.case import fact, write
from tests.integration.frameworks.site import Reply

if TYPE_CHECKING:
    from asgi_uow import Session, UnitOfWork
    from tests.integration.frameworks.case import Case
    from tests.integration.frameworks.site import Handler


@fact
async def p9_concurrent_requests(case: Case) -> None:
    """Of two requests at once each has a session and a fate of its own."""
    sessions: list[Session] = []
    both = asyncio.Barrier(2)

    def writes(note: int, status: int) -> Handler:
        async def create() -> Reply:
            sessions.append(current_session())
            await both.wait()
            await write(note)
            return Reply(status=status)

        return create

    routes = {"/1": writes(1, 201), "/2": writes(2, 409)}
    async with case.serve(routes) as server:
        exchanges = await asyncio.gather(*map(server.request, routes))
    assert [201, 409] == [exchange.status for exchange in exchanges]
    assert sessions[0] is not sessions[1]
    assert [1] == await case.kept()


@fact
async def p9_nested_request(case: Case) -> None:
    """A request made in-process by a handler has a unit and a fate of its own."""
    units: list[UnitOfWork] = []

    async def inner() -> Reply:
        units.append(current_unit_of_work())
        await write(1)
        return Reply("inner", 201)

    async def outer() -> Reply:
        units.append(current_unit_of_work())
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://server"
        ) as client:
            response = await client.get("/inner")
        units.append(current_unit_of_work())
        await write(2)
        return Reply(response.text, 404)

    async with case.serve({"/inner": inner, "/outer": outer}) as server:
        exchange = await server.request("/outer")
    assert 404 == exchange.status
    assert ["inner"] == exchange.chunks
    assert [1] == await case.kept()
    before, nested, after = units
    assert before is after
    assert before is not nested
