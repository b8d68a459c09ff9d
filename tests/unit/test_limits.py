"""No wait at the end is without a limit, and nothing that is raised there is lost."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from anyio import to_thread
from sqlalchemy import AsyncAdaptedQueuePool, NullPool, Pool, event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only

from asgi_uow import Database, Outcome, current_read_session, current_session
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import Response, handle
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    SERVERS,
    behind_proxy,
    checked_out,
    on,
)
from tests.support.keys import Shop, create_table
from tests.support.private import Cause

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.servers import Backend, RecordingProxy, ServerBackend

SNAPSHOT: Mapping[str, Any] = {"read_isolation": "REPEATABLE READ"}


# A server that froze


async def use_and_freeze(proxy: RecordingProxy, *databases: Database) -> None:
    """Leave a snapshot and a transaction of each database open, and freeze."""
    for number, db in enumerate(databases):
        await current_read_session(db).execute("SELECT 1")
        await shop.insert(number, db)
    proxy.freeze()


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize("end", ["404", "404 with hooks", "exception", "doomed"])
async def test_frozen_server(backend: ServerBackend, end: str) -> None:
    """Whatever rolls back leaves within 10 s, although the server says nothing."""
    async with behind_proxy(backend, **SNAPSHOT) as (db, proxy):

        async def handler() -> None:
            await use_and_freeze(proxy, db)
            if end == "exception":
                raise KeyError
            if end == "doomed":
                current_session().journal.doom(KeyError())

        status = 404 if "404" in end else 200
        async with asyncio.timeout(10):
            response = await handle(handler, db, status=status, hooks="hooks" in end)

        assert response.unit.outcome is Outcome.ROLLED_BACK
        assert [0, 0] == checked_out(db)


@on(*SERVER_DRIVERS)
async def test_several_frozen_servers(backend: ServerBackend) -> None:
    """What did not answer is waited for once, not once for each database."""
    async with behind_proxy(backend, **SNAPSHOT) as (db, proxy):
        others = [Database.from_url(db.engine.url, **SNAPSHOT) for _ in range(2)]

        async def handler() -> None:
            await use_and_freeze(proxy, db, *others)

        async with asyncio.timeout(10):
            response = await handle(handler, db, *others, status=404)

        assert 404 == response.status
        assert [0] * 6 == checked_out(db, *others)
        for each in others:
            await each.dispose()


@on(*SERVER_DRIVERS)
async def test_frozen_replica(backend: ServerBackend) -> None:
    """A snapshot whose server froze delays what has nothing to do with it for 10 s."""
    async with behind_proxy(backend, **SNAPSHOT) as (db, proxy):

        async def handler() -> None:
            await current_read_session().execute("SELECT 1")
            proxy.freeze()

        async with asyncio.timeout(10):
            response = await handle(handler, db, hooks=True)

        assert ["commit"] == response.hooks
        assert [0, 0] == checked_out(db)


@on(*SERVER_DRIVERS)
async def test_closing_while_the_server_is_frozen(backend: ServerBackend) -> None:
    """The end of an application waits once for all connections, and not for ever."""
    async with behind_proxy(backend, pool_size=5) as (db, proxy):
        passed_in = Database(db.engine)  # gets a read engine that is closed for it
        engines = [db.engine, db.read_engine, passed_in.read_engine]
        async with AsyncExitStack() as used:
            for engine in engines * 5:
                await used.enter_async_context(engine.connect())
        before = asyncio.all_tasks()
        proxy.freeze()

        async with asyncio.timeout(8):
            await passed_in.dispose_owned()
            await db.dispose()

        assert set() == asyncio.all_tasks() - before


@on(*SERVER_DRIVERS)
async def test_a_loop_ends_while_the_server_is_frozen(backend: ServerBackend) -> None:
    """The end of `asyncio.run()` waits once for all connections as well."""
    async with behind_proxy(backend, pool_size=5) as (db, proxy):

        async def use() -> float:
            async with AsyncExitStack() as used:
                for _ in range(5):
                    await used.enter_async_context(db.engine.connect())
            proxy.freeze()
            return time.monotonic()

        used_until = await to_thread.run_sync(asyncio.run, use())
        assert time.monotonic() - used_until < 8


@on(*SERVERS)
@pytest.mark.parametrize("pool", [NullPool, AsyncAdaptedQueuePool])
async def test_closing_what_was_passed_in(
    backend: ServerBackend, pool: type[Pool]
) -> None:
    """It is closed whatever its pool, and serves again after that."""
    db = Database(create_async_engine(backend.url, poolclass=pool))
    for _ in range(2):
        async with db:
            await db.read.execute("SELECT 1")
            await db.write.execute("SELECT 1")
        await db.dispose()
        await eventually(0, backend.connections)


# What hangs


@on("aiosqlite")
@pytest.mark.parametrize("hangs", ["INSERT INTO items", "UPDATE idempotency_keys"])
async def test_last_statement_hangs(db: Database, backend: Backend, hangs: str) -> None:
    """The flush, and the row of a key, have `hook_timeout`; then all is rolled back."""

    def wait(_: object, __: object, statement: str, *___: object) -> None:
        if statement.startswith(hangs):
            await_only(asyncio.Event().wait())

    async def add() -> None:
        event.listen(db.engine.sync_engine, "before_cursor_execute", wait)
        current_session().add(shop.Item(id=2))

    await create_table(backend)
    site = Shop(db, hook_timeout=0.1)
    site.before = add
    async with asyncio.timeout(5):
        response = await site.post()

    assert 500 == response.status
    assert Cause.TIMEOUT is site.units[0].cause
    assert [] == await shop.items(backend)


@on("aiosqlite")
async def test_call_of_a_reader_hangs(db: Database) -> None:
    """A read session whose call never ends has `commit_timeout`, and 1 s to fail."""
    never, begun = asyncio.Event(), asyncio.Event()
    calls: list[asyncio.Task[object]] = []

    def wait(_: object) -> None:
        begun.set()
        await_only(never.wait())

    async def handler() -> None:
        calls.append(asyncio.create_task(current_read_session().run_sync(wait)))
        await begun.wait()

    async with asyncio.timeout(4):
        response = await handle(handler, db, commit_timeout=0.1)

    assert 200 == response.status
    assert [0, 0] == checked_out(db)
    never.set()
    await asyncio.wait(calls)


# What is no `Exception`


class Stop(BaseException):
    """Like `SystemExit`, at which the event loop itself would stop."""


@on(*DRIVERS)
@pytest.mark.parametrize("kind", [Stop, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("where", ["COMMIT", "ROLLBACK", "reading", "closing"])
async def test_base_exception_at_the_end(
    backend: Backend, db: Database, kind: type[BaseException], where: str
) -> None:
    """What ends more than a unit is raised when the unit has an outcome."""

    def stop(*_: object) -> None:
        raise kind

    async def handler() -> None:
        await shop.insert(1)

    name = {"COMMIT": "commit", "ROLLBACK": "rollback"}.get(where, "reset")
    engine = db.read_engine if where == "reading" else db.engine
    target = engine.sync_engine
    event.listen(target, name, stop, once=True)

    async def reading() -> None:
        await current_read_session().connection()

    response = Response()
    status = 404 if where in {"ROLLBACK", "closing"} else 200
    with pytest.raises(kind):
        await handle(
            reading if where == "reading" else handler,
            db,
            status=status,
            hooks=True,
            into=response,
        )

    outcomes = {"COMMIT": Outcome.UNKNOWN, "reading": Outcome.COMMITTED}
    assert outcomes.get(where, Outcome.ROLLED_BACK) is response.unit.outcome
    assert [0, 0] == checked_out(db)
    assert [] == await shop.items(backend)
