"""Where the unit of the request is to be found, and where not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from asgi_uow import current_session, current_unit_of_work, unit_of_work
from asgi_uow.errors import NoUnitOfWorkError, UnitOfWorkClosedError
from tests.integration.frameworks.case import (
    count,
    creating,
    database_fact,
    fact,
    open_in,
    write,
)
from tests.integration.frameworks.site import Injected, Reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asgi_uow import UnitOfWork
    from tests.integration.frameworks.case import Case


@fact
async def middleware(case: Case) -> None:
    """A middleware of the framework's own is in the unit, on its way back too."""
    units: list[UnitOfWork] = []

    async def before() -> None:
        units.append(current_unit_of_work())
        await write(1)

    async def create() -> Reply:
        units.append(current_unit_of_work())
        await write(2)
        return Reply("created", 201)

    async def after() -> None:
        units.append(current_unit_of_work())
        await write(3)

    async with case.serve(
        {"/": create}, middleware=before, middleware_after=after
    ) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert [[1, 2, 3]] == exchange.seen
    assert [units[0]] * 3 == units


@fact
async def dependencies(case: Case) -> None:
    """Dependencies, async or not, are in the unit."""
    units: list[UnitOfWork] = []

    async def first() -> str:
        units.append(current_unit_of_work())
        await write(1)
        return "first"

    def second() -> str:
        units.append(current_unit_of_work())
        return "second"

    async def create() -> Reply:
        units.append(current_unit_of_work())
        return Reply("created", 201)

    injected = {"/": Injected(create, first, second)}
    async with case.serve(injected=injected) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert [[1]] == exchange.seen
    assert [units[0]] * 3 == units


@fact
async def p11_dependencies_at_once(case: Case) -> None:
    """Two dependencies that use the session at once take turns."""

    async def first() -> str:
        await write(1)
        return "first"

    async def second() -> str:
        await write(2)
        return "second"

    async def create() -> Reply:
        await write(3)
        return Reply("created", 201)

    injected = {"/": Injected(create, first, second)}
    async with case.serve(injected=injected) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert [[1, 2, 3]] == exchange.seen


@fact
async def dependency_with_yield(case: Case) -> None:
    """A dependency with `yield`, async or not, is in the unit on both sides."""
    steps: list[tuple[str, UnitOfWork]] = []
    units_of_second: list[UnitOfWork] = []

    async def first() -> AsyncIterator[str]:
        steps.append(("enter", current_unit_of_work()))
        try:
            yield "first"
        finally:
            steps.append(("exit", current_unit_of_work()))

    def second() -> Iterator[str]:
        units_of_second.append(current_unit_of_work())
        try:
            yield "second"
        finally:
            units_of_second.append(current_unit_of_work())

    def reply() -> Reply:
        steps.append(("handle", current_unit_of_work()))
        return Reply("created", 201)

    broken = creating(case.write_and_break_commit, reply)
    injected = {
        "/broken": Injected(broken, first, second),
        "/whole": Injected(creating(lambda: write(1), reply), first, second),
    }
    async with case.serve(injected=injected) as server:
        await case.check_failed(await server.request("/broken"))
        exchange = await server.request("/whole")
    assert 201 == exchange.status
    assert [[1]] == exchange.seen
    names, units = zip(*steps, strict=True)
    assert ("enter", "handle", "exit", "enter", "handle", "exit") == names
    assert (*[units[0]] * 3, *[units[3]] * 3) == units
    assert [*[units[0]] * 2, *[units[3]] * 2] == units_of_second


@fact
async def thread(case: Case) -> None:
    """What runs in a thread, the framework's own way, is in the unit."""
    units: list[UnitOfWork] = []

    async def create() -> Reply:
        units.append(current_unit_of_work())
        units.append(await case.framework.in_thread(current_unit_of_work))
        return Reply("created", 201)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert [units[0], units[0]] == units


@fact
async def to_thread(case: Case) -> None:
    """What `asyncio.to_thread` runs is in the unit."""
    units: list[UnitOfWork] = []

    async def create() -> Reply:
        units.append(current_unit_of_work())
        units.append(await asyncio.to_thread(current_unit_of_work))
        return Reply("created", 201)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
    assert 201 == exchange.status
    assert [units[0], units[0]] == units


@fact
async def event_listener(case: Case) -> None:
    """A listener to an event finds the unit of the request, or none, never another."""
    heard = asyncio.Event()

    async def listen() -> None:
        try:
            await write(1)
        except NoUnitOfWorkError:
            async with case.db:
                await write(2)
        heard.set()

    async with case.serve(listeners={"/": listen}) as server, unit_of_work(case.db):
        await server.request()
        await asyncio.wait_for(heard.wait(), timeout=5)
    expected = [1] if case.framework.listens_in_unit else [2]
    assert expected == await case.kept()


@fact
async def p9_task(case: Case) -> None:
    """A task that a handler starts is in the unit, and refused once it is over."""
    wrote, sent = asyncio.Event(), asyncio.Event()
    started: list[asyncio.Task[None]] = []

    async def outlive() -> None:
        await write(1)
        wrote.set()
        await sent.wait()
        with pytest.raises(UnitOfWorkClosedError, match="async with db:"):
            current_session()

    async def create() -> Reply:
        started.append(asyncio.create_task(outlive()))
        await wrote.wait()
        await write(2)
        return Reply("created", 201)

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
        sent.set()
        await asyncio.gather(*started)
    assert [[1, 2]] == exchange.seen


@fact
async def websocket(case: Case) -> None:
    """A websocket has no unit, whatever context it starts in; a message has one."""

    async def on_message(text: str) -> str:
        with pytest.raises(NoUnitOfWorkError, match="async with db:"):
            current_unit_of_work()
        async with case.db:
            await write(int(text))
            return await count()

    async with (
        case.serve(websockets={"/ws": on_message}) as server,
        unit_of_work(case.db),
    ):
        answers = await server.websocket(["1", "2"])
    assert ["1", "2"] == answers
    assert [1, 2] == await case.kept()


@fact
async def lifespan(case: Case) -> None:
    """Start-up and shutdown run without a unit, and may open one."""

    async def write_in_a_unit_of_its_own(note: int) -> None:
        with pytest.raises(NoUnitOfWorkError, match="async with db:"):
            current_unit_of_work()
        async with case.db:
            await write(note)

    async def start() -> None:
        await write_in_a_unit_of_its_own(1)

    async def stop() -> None:
        await write_in_a_unit_of_its_own(2)

    async with case.serve(startup=start, shutdown=stop):
        assert [1] == await case.kept()
    assert [1, 2] == await case.kept()


@database_fact
async def shutdown(case: Case) -> None:
    """The engines that `from_url` made are closed when the application shuts down."""

    async def create() -> Reply:
        await write(1)
        return Reply(chunks=chunks())

    async def chunks() -> AsyncIterator[str]:
        yield await count()

    async with case.serve({"/": create}) as server:
        exchange = await server.request()
        assert 1 == open_in(case.db.engine)
        assert 1 == open_in(case.db.read_engine)
    assert ["1"] == exchange.chunks
    assert 0 == open_in(case.db.engine)
    assert 0 == open_in(case.db.read_engine)
