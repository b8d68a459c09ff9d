"""Sessions that are led to another engine, and engines with several databases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.ext.asyncio import create_async_engine

import asgi_uow as uow
from asgi_uow import Database, current_session, errors
from tests.support import shop
from tests.support.databases import DRIVERS, SERVER_DRIVERS, checked_out, on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.servers import Backend, ServerBackend, SQLiteBackend

AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}
INSERT = "INSERT INTO items (id) VALUES (1)"


async def on_the_connection(_: Database) -> None:
    await current_session().connection(execution_options=AUTOCOMMIT)


async def on_the_connection_in_use(_: Database) -> None:
    await current_session().execute("SELECT 1")
    connection = await current_session().connection()
    await (await connection.execution_options(**AUTOCOMMIT)).execute(sa.text(INSERT))


async def on_another_engine(db: Database) -> None:
    engine = db.engine.execution_options(**AUTOCOMMIT)
    await current_session().execute(INSERT, bind_arguments={"bind": engine.sync_engine})


async def on_the_statement(_: Database) -> None:
    sa.text(INSERT).execution_options(**AUTOCOMMIT)


WAYS = [
    on_the_connection,
    on_the_connection_in_use,
    on_another_engine,
    on_the_statement,
]


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize("way", WAYS)
async def test_autocommit_is_refused_every_time(
    backend: ServerBackend, way: Callable[[Database], Awaitable[None]]
) -> None:
    """However AUTOCOMMIT is asked for, also on a connection used before; none stays."""
    await shop.create(backend)
    db = Database.from_url(backend.url, pool_size=1, max_overflow=0)
    refused = (errors.ConfigurationError, InvalidRequestError, ArgumentError)
    for _ in range(3):
        async with db:
            await current_session().execute("SELECT 1")
        with pytest.raises(refused, match=r"AUTOCOMMIT|isolation_level|engine"):
            async with db:
                await way(db)
        with pytest.raises(ZeroDivisionError):
            async with db:
                await shop.insert(1)
                raise ZeroDivisionError
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)
    await db.dispose()


@on(*SERVER_DRIVERS)
async def test_engine_that_becomes_autocommit(backend: ServerBackend) -> None:
    """AUTOCOMMIT for the whole engine is refused also after connections were used."""
    await shop.create(backend)
    db = Database.from_url(backend.url, pool_size=1, max_overflow=0)
    async with db:
        await current_session().execute("SELECT 1")
    db.engine.sync_engine.update_execution_options(**AUTOCOMMIT)
    for _ in range(3):
        with pytest.raises(errors.ConfigurationError, match="AUTOCOMMIT"):
            async with db:
                await shop.insert(1)
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)
    await db.dispose()


@on(*DRIVERS)
async def test_bind_arguments_are_refused_every_time(backend: Backend) -> None:
    """A statement that names another engine is not executed there."""
    await shop.create(backend)
    other = create_async_engine(backend.url)
    db = Database(create_async_engine(backend.url))
    arguments = {"bind": other.sync_engine}
    for _ in range(3):
        with pytest.raises(errors.ConfigurationError, match="bind_arguments"):
            async with db:
                insert = "INSERT INTO items (id) VALUES (1)"
                await db.write.execute(insert, bind_arguments=arguments)
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)
    assert 0 == other.sync_engine.pool.checkedout()  # type: ignore[attr-defined]
    await db.dispose()
    await other.dispose()


@on(*DRIVERS)
@pytest.mark.parametrize("options", [{}, AUTOCOMMIT])
async def test_read_session_on_another_engine(
    backend: Backend, options: dict[str, str]
) -> None:
    """A read that names an engine which can write is refused, every time."""
    await shop.create(backend)
    db = Database.from_url(backend.url)
    other = create_async_engine(backend.url, **options)
    for engine in (other, db.engine):
        arguments = {"bind": engine.sync_engine}
        for _ in range(2):
            with pytest.raises(errors.ConfigurationError, match="bind_arguments"):
                async with db:
                    await db.read.execute(INSERT, bind_arguments=arguments)
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)
    assert 0 == other.sync_engine.pool.checkedout()  # type: ignore[attr-defined]
    await db.dispose()
    await other.dispose()


# One engine, several databases


async def test_engine_has_one_use(sqlite: SQLiteBackend) -> None:
    """What one Database writes on, another cannot read on, nor the other way round."""
    await shop.create(sqlite)
    engines = [create_async_engine(sqlite.url) for _ in range(3)]
    writer, reader, third = engines
    first = Database(writer, readers=[reader])
    refused = pytest.raises(errors.ConfigurationError, match="an engine for each use")
    with refused:
        Database(third, readers=[writer])
    with refused:
        Database(reader)
    with refused:
        Database(third, readers=[reader], read_isolation="REPEATABLE READ")
    same_pool = writer.execution_options(logging_token="reader")
    with pytest.raises(errors.ConfigurationError, match="an engine for each use"):
        Database(third, readers=[same_pool])
    with pytest.raises(errors.ConfigurationError, match="cannot be the writer"):
        Database(writer, readers=[same_pool])
    second = Database(writer, readers=[reader])
    for db in (first, second):
        async with db:
            await shop.insert(1)
            uow.set_rollback_only("only to see that it can")
        async with db:
            assert 0 == await db.read.scalar(shop.COUNT)
            with pytest.raises(errors.ReadOnlySessionError):
                await db.read.execute(INSERT)
    for engine in (*engines, first.read_engine, second.read_engine):
        await engine.dispose()


@on(*SERVER_DRIVERS)
async def test_two_databases_on_one_engine(backend: ServerBackend) -> None:
    """A block of one inside a block of the other has an outcome of its own."""
    await shop.create(backend)
    engine = create_async_engine(backend.url)
    one, two = Database(engine), Database(engine, read_isolation="REPEATABLE READ")
    with pytest.raises(ZeroDivisionError):
        async with one:
            await shop.insert(1, one)
            async with two:
                await shop.insert(2, two)
                assert [2] == (await two.read.scalars(shop.SELECT)).all()
            raise ZeroDivisionError
    async with two, one:
        assert [2] == (await one.read.scalars(shop.SELECT)).all()
        assert [2] == (await two.read.scalars(shop.SELECT)).all()
        await backend.execute("INSERT INTO items (id) VALUES (3)")
        assert [2, 3] == (await one.read.scalars(shop.SELECT)).all()
        assert [2] == (await two.read.scalars(shop.SELECT)).all()
    assert [2, 3] == await shop.items(backend)
    assert [0, 0, 0, 0] == checked_out(one, two)
    for db in (one, two):
        await db.dispose()
