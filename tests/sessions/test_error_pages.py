"""What an error page reads after the database has rolled the work back."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import select

import asgi_uow as uow
from asgi_uow import current_read_session, current_session
from asgi_uow.errors import TransactionGoneError
from tests.support import shop
from tests.support.asgi import handle, respond, serve
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    checked_out,
    memory_database,
    on,
)
from tests.support.shop import Item
from tests.support.site import site_with

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_uow import Database, Session
    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send
    from tests.servers import Backend, ServerBackend

    Failure: TypeAlias = Callable[[Backend], Awaitable[None]]

pytestmark = on(*DRIVERS)

DUPLICATE = "INSERT INTO items (id) VALUES (1)"


async def fail_to_flush(_: Backend | None = None) -> None:
    current_session().add(Item(id=1))
    await current_session().flush()


async def fail_on_the_server(backend: Backend) -> None:
    deadlock = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213"
    await current_session().execute(
        deadlock if backend.name == "mariadb" else DUPLICATE
    )


async def lose_the_connection(backend: Backend) -> None:
    await backend.kill_connections()  # type: ignore[attr-defined]
    await current_session().execute("SELECT 1")


def page(fail: Callable[[], Awaitable[None]]) -> ASGIApp:
    """Make an application whose handler writes, reads and fails, with an error page.

    The handler and the page read with the same sessions: that of the request, and one
    of a parallel task.
    """

    async def read(session: Session) -> list[int]:
        return sorted((await session.scalars(select(Item.id))).all())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with uow.parallel_read() as parallel:
            sessions = current_read_session(), parallel
            await shop.insert(2)
            kept = [await session.get(Item, 1) for session in sessions]
            assert all(kept)
            found = [await read(session) for session in sessions]
            assert [[1, 2]] * 2 == found
            try:
                await fail()
            except (sa_exc.DBAPIError, TransactionGoneError):
                found = await asyncio.gather(*map(read, sessions))
                assert kept == [await session.get(Item, 1) for session in sessions]
                assert [1, 1] == [each.id for each in kept if each is not None]
                await respond(send, 409, str(found).encode())

    return app


async def check(db: Database, backend: Backend, fail: Failure) -> None:
    await backend.execute(DUPLICATE)

    response = await serve(page(lambda: fail(backend)), db)

    assert (409, None) == (response.status, response.error)
    assert [str([[1], [1]])] == response.chunks
    assert [0, 0] == checked_out(db)
    assert [1] == await shop.items(backend)


async def test_error_page_reads_after_a_failed_flush(
    db: Database, backend: Backend
) -> None:
    """The page reads what is there without the work that SQLAlchemy has rolled back."""
    await check(db, backend, fail_to_flush)


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize("fail", [fail_on_the_server, lose_the_connection])
async def test_error_page_reads_without_the_transaction(
    db: Database, backend: ServerBackend, fail: Failure
) -> None:
    """An aborted transaction, a deadlock or a lost connection leave the page alone."""
    await check(db, backend, fail)


async def roll_back(_: Backend | None = None) -> None:
    await current_session().execute("INSERT OR ROLLBACK INTO items (id) VALUES (1)")


@pytest.mark.parametrize("fail", [fail_to_flush, roll_back])
async def test_error_page_reads_in_memory(fail: Callable[[], Awaitable[None]]) -> None:
    """There is one connection, so the page reads on that of the failed work."""
    async with memory_database() as db:
        async with db:
            await db.write.execute(DUPLICATE)

        response = await serve(page(fail), db)

        assert (409, None) == (response.status, response.error)
        assert [str([[1], [1]])] == response.chunks
        async with db:
            assert [1] == (await db.read.scalars(shop.SELECT)).all()


async def test_error_page_reads_inside_a_savepoint(db: Database) -> None:
    """A flush that fails in a savepoint leaves reads in the transaction around it."""
    async with db:
        await shop.insert(1)
        with pytest.raises(sa_exc.DBAPIError):
            async with uow.savepoint():
                await shop.insert(2)
                try:
                    await fail_to_flush()
                finally:
                    assert [1] == (await db.read.scalars(shop.SELECT)).all()
        assert [1] == (await db.read.scalars(shop.SELECT)).all()


@on("asyncpg", "psycopg")
async def test_reads_join_again_after_the_savepoint(db: Database) -> None:
    """A read sees what the unit has written once ROLLBACK TO has undone the failure."""
    async with db:
        await shop.insert(1)
        with pytest.raises(sa_exc.IntegrityError):
            async with uow.savepoint():
                try:
                    await db.write.execute(DUPLICATE)
                finally:
                    assert [] == (await db.read.scalars(shop.SELECT)).all()
        assert [1] == (await db.read.scalars(shop.SELECT)).all()


@on("asyncpg", "psycopg")
async def test_read_that_fails_in_a_savepoint_undoes_no_write(
    db: Database, backend: Backend
) -> None:
    """A read that aborts the writer's transaction dooms what that has written."""

    async def handler() -> None:
        await shop.insert(1)
        with suppress(sa_exc.DBAPIError):
            async with uow.savepoint():
                assert 1 == await db.read.scalar(shop.COUNT)
                await shop.insert(2)
                with pytest.raises(sa_exc.DBAPIError):
                    await db.read.execute("SELECT 1 / 0")
                assert 0 == await db.read.scalar(shop.COUNT)

    response = await handle(handler, db)

    assert 500 == response.status
    assert [] == await shop.items(backend)


@on(*SERVER_DRIVERS)
async def test_error_page_reads_from_a_replica(backend: ServerBackend) -> None:
    """Where the writer's server may be lost, nothing binds the page to it."""
    async with site_with(backend, backend.url) as site:

        async def handler() -> None:
            await shop.insert(1)
            await site.read()
            with pytest.raises(sa_exc.DBAPIError):
                await lose_the_connection(backend)
            await site.read()

        assert 409 == (await site.send(handler, 409)).status
        assert [1, 0] == site.found
        assert [True] == site.used()
