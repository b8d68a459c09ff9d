"""Reads that are transactions of their own: what is sent for them, and what is not."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import Database, after_commit, set_rollback_only
from asgi_uow.errors import (
    ConfigurationError,
    ReadOnlySessionError,
    TransactionGoneError,
)
from tests.servers import eventually
from tests.support import shop
from tests.support.databases import (
    POOLED,
    SERVER_DRIVERS,
    behind_proxy,
    on,
    shop_database,
)
from tests.test_docs import PGBOUNCER, run_blocks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.servers import MariaDBBackend, ServerBackend
    from tests.servers.pgbouncer import PgBouncerBackend

    Execute = Callable[[str], Awaitable[object]]

INSERT = "INSERT INTO items (id) VALUES (1)"
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"
SENT = {
    "asyncmy": ["START TRANSACTION READ ONLY", shop.COUNT, "ROLLBACK"],
    "asyncpg": [BEGIN, f"PREPARE {shop.COUNT}", shop.COUNT, "ROLLBACK"],
    "psycopg": [BEGIN, shop.COUNT, "ROLLBACK"],
}


@on(*SERVER_DRIVERS)
async def test_read_only_transactions(backend: ServerBackend) -> None:
    """Behind a pooler a read is a read-only transaction, and no session is set."""
    async with behind_proxy(backend, pooler="transaction") as (db, proxy):
        async with db:
            assert 0 == await db.read.scalar(shop.COUNT)
        assert [] == [trip for trip in proxy.trips if trip.startswith("SET SESSION")]
        proxy.clear()
        async with db:
            assert 0 == await db.read.scalar(shop.COUNT)
        assert SENT[backend.driver] == proxy.trips


@on(*SERVER_DRIVERS)
async def test_session_pooler(backend: ServerBackend) -> None:
    """Where each client has a connection of its own, reads are as without a pooler."""
    async with behind_proxy(backend, pooler="session") as (db, proxy):
        for _ in range(2):
            proxy.clear()
            async with db:
                assert 0 == await db.read.scalar(shop.COUNT)
        assert [shop.COUNT] == proxy.trips


@pytest.mark.parametrize("pooler", ["transaction", "session"])
async def test_nobody_is_killed(mariadb: MariaDBBackend, pooler: str) -> None:
    """The number that a proxy gives a connection is a stranger's on the server."""
    async with behind_proxy(mariadb, pooler=pooler) as (db, proxy), db:

        async def running() -> int:
            return await mariadb.running(mariadb.slow)

        statement = asyncio.create_task(db.write.execute(mariadb.slow))
        await eventually(1, running)
        proxy.clear()
        statement.cancel()
        await asyncio.wait((statement,))
        assert statement.cancelled()
        assert [] == proxy.trips
        await mariadb.kill_connections()
        set_rollback_only("cancelled")


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("postgresql://u@h/d", {"pooler": "statement"}),
        ("postgresql://u@h/d", {"pooler": True}),
        ("sqlite:///app.db", {"pooler": "transaction"}),
        (
            "mysql://u@h/d",
            {"pooler": "transaction", "read_isolation": "REPEATABLE READ"},
        ),
    ],
)
def test_poolers_that_cannot_be(url: str, options: dict[str, Any]) -> None:
    """What cannot work is refused where it is said."""
    with pytest.raises(ConfigurationError, match="pooler"):
        Database.from_url(url, **options)


def test_two_phases_behind_a_pooler() -> None:
    """What ends a prepared transaction is in no transaction: it may go astray."""
    engine = create_async_engine("postgresql+asyncpg://u@h/d")
    with pytest.raises(ConfigurationError, match="twophase"):
        Database(engine, pooler="transaction", twophase=True)


@on("asyncpg", "psycopg", *POOLED)
async def test_a_snapshot(backend: ServerBackend) -> None:
    """`read_isolation` gives the reads of a unit one snapshot there too."""
    options = {"pooler": "transaction", "read_isolation": "REPEATABLE READ"}
    async with shop_database(backend, **options) as db:
        for number in range(2):
            async with db:
                assert number == await db.read.scalar(shop.COUNT)
                await backend.execute(f"INSERT INTO items (id) VALUES ({number})")
                assert number == await db.read.scalar(shop.COUNT)


IN_TRANSACTIONS = ("asyncmy", "asyncpg@4", "psycopg@4")
ENDS = {
    "autocommit": "SET autocommit=1",
    "commit": "COMMIT",
    "commit and write": f"COMMIT; {INSERT}",
    "rollback": "/* what was read */ ROLLBACK",
    "table": "CREATE TABLE IF NOT EXISTS made (id INTEGER)",
    "truncate": "TRUNCATE TABLE parents",
}


@pytest.mark.parametrize("end", ENDS)
@on(*IN_TRANSACTIONS, pooler="transaction")
async def test_the_end_of_a_read(
    backend: ServerBackend, db: Database, end: str
) -> None:
    """What would end the read-only transaction is refused, and nothing is written."""
    statements = (ENDS[end], INSERT, "COMMIT")
    async with db:
        for statement in statements:
            with suppress(DBAPIError), pytest.raises(ReadOnlySessionError):
                await db.read.execute(statement)
        connection = await db.read.connection()
        for statement in statements:
            with suppress(DBAPIError), pytest.raises(ReadOnlySessionError):
                await connection.exec_driver_sql(statement)
    assert [] == await shop.items(backend)
    with pytest.raises(Exception, match="made"):
        await backend.fetch("SELECT * FROM made")


@pytest.mark.parametrize(
    "options", [{"isolation_level": "AUTOCOMMIT"}, {"postgresql_readonly": False}]
)
@on(*IN_TRANSACTIONS, pooler="transaction")
async def test_options_that_write(db: Database, options: dict[str, Any]) -> None:
    """A connection that would not be read-only is refused where it is asked for."""
    async with db:
        with pytest.raises(ReadOnlySessionError, match="AUTOCOMMIT"):
            await db.read.connection(execution_options=options)
        assert 0 == await db.read.scalar(shop.COUNT)


async def test_other_options(mariadb: MariaDBBackend) -> None:
    """Options that leave the transaction read-only are as they are elsewhere."""
    options = {"isolation_level": "READ COMMITTED"}
    async with shop_database(mariadb, pooler="transaction") as db, db:
        await db.read.connection(execution_options=options)
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute(INSERT)


@pytest.mark.parametrize("given", [True, False])
@on("asyncmy", "psycopg@4", pooler="transaction")
async def test_a_hidden_end(
    backend: ServerBackend, db: Database, *, given: bool
) -> None:
    """What no text shows is an error as well; the next read begins anew."""
    end = "/*! COMMIT */" if backend.driver == "asyncmy" else "SELECT 1; COMMIT"
    async with db:
        ended = (await db.read.connection()) if given else None
        with pytest.raises(TransactionGoneError):
            await (ended or db.read).execute(text(end))
        for each in (ended, db.read) if ended is not None else ():
            with pytest.raises(PendingRollbackError):
                await each.execute(text(INSERT))
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute(INSERT)
        rows = await db.read.stream(shop.SELECT)
        assert [] == await rows.all()
    assert [] == await shop.items(backend)


# Behind PgBouncer


async def stranger(backend: PgBouncerBackend, stack: AsyncExitStack) -> Execute:
    """Another application, which uses the driver alone."""
    url = make_url(backend.url)
    if backend.driver == "asyncpg":
        import asyncpg

        options: dict[str, Any] = url.translate_connect_args(username="user")
        raw = await asyncpg.connect(**options, statement_cache_size=0)
        stack.push_async_callback(raw.close)
        return raw.execute  # type: ignore[no-any-return]
    import psycopg

    options = url.translate_connect_args(username="user", database="dbname")
    connection = await psycopg.AsyncConnection.connect(
        **options, prepare_threshold=None, autocommit=True
    )
    await stack.enter_async_context(connection)
    return lambda statement: connection.execute(statement.encode())


@on(*POOLED)
async def test_read_and_write(backend: PgBouncerBackend, db: Database) -> None:
    """Reads, writes and hooks do what they do without; a read cannot write."""
    seen: list[object] = []

    async def look() -> None:
        seen.append(await shop.items(backend))

    for number in range(8):
        async with db:
            assert number == await db.read.scalar(shop.COUNT)
            with pytest.raises(ReadOnlySessionError):
                await db.read.execute(INSERT)
            assert number == await db.read.scalar(shop.COUNT)
        async with db:
            await shop.insert(number, db)
            await db.read.execute("SELECT :text", text="of the writer's transaction")
            after_commit(look)
    assert [list(range(number + 1)) for number in range(8)] == seen


@on(*POOLED)
async def test_others_are_not_disturbed(
    backend: PgBouncerBackend, db: Database
) -> None:
    """Another application behind the same PgBouncer can write, whatever we read."""
    done = asyncio.Event()

    async def read() -> None:
        while not done.is_set():
            async with db:
                await db.read.scalar(shop.COUNT)
                rows = await db.read.stream_scalars(shop.SELECT)
                await rows.all()

    async with AsyncExitStack() as stack:
        others = [await stranger(backend, stack) for _ in range(4)]
        readers = [asyncio.create_task(read()) for _ in range(4)]

        async def write(place: int) -> None:
            for number in range(20):
                row = 100 * place + number
                await others[place](f"INSERT INTO items (id) VALUES ({row})")

        try:
            await asyncio.gather(*map(write, range(4)))
        finally:
            done.set()
            await asyncio.gather(*readers)
    assert 80 == await backend.scalar(shop.COUNT)
    await db.dispose()
    async with AsyncExitStack() as stack:
        for number in range(8):
            other = await stranger(backend, stack)
            await other(f"INSERT INTO items (id) VALUES ({1000 + number})")


@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize("native", [True, False])
@on(*POOLED)
async def test_cancellation(
    backend: PgBouncerBackend, db: Database, access: str, *, native: bool
) -> None:
    """A cancelled statement ends on the server, and nobody else's does."""
    scope = anyio.CancelScope()

    async def execute() -> None:
        with scope:
            async with db:
                await getattr(db, access).execute(backend.slow)

    async def running() -> int:
        return await backend.running(backend.slow)

    statement = asyncio.create_task(execute())
    await eventually(1, running)
    (statement if native else scope).cancel()
    await asyncio.wait((statement,))
    await eventually(0, running)
    async with AsyncExitStack() as stack:
        other = await stranger(backend, stack)
        await other(INSERT)
    async with db:
        assert 1 == await db.read.scalar(shop.COUNT)


@on(*POOLED)
async def test_found(backend: PgBouncerBackend) -> None:
    """PgBouncer is found without being told of: reads set nothing there."""
    await shop.create(backend)
    nothing = dict(Database.from_url(backend.url).driver.pooled_args)
    db = Database(create_async_engine(backend.url, connect_args=nothing))
    async with db:
        if backend.driver == "psycopg":  # which takes several statements at once
            with pytest.raises(TransactionGoneError):
                await db.read.execute("SELECT 1; COMMIT")
        assert 0 == await db.read.scalar(shop.COUNT)
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute(INSERT)
    async with AsyncExitStack() as stack:
        for number in range(8):
            other = await stranger(backend, stack)
            await other(f"INSERT INTO items (id) VALUES ({number})")
    async with db:
        await db.write.execute("INSERT INTO items (id) VALUES (8)")
    async with db:
        assert 9 == await db.read.scalar(shop.COUNT)
    await db.dispose()


@on("asyncpg@4", "psycopg@4")
async def test_found_on_connections_of_others(backend: PgBouncerBackend) -> None:
    """PgBouncer is found too where the application connects by itself."""
    await shop.create(backend)
    nothing = dict(Database.from_url(backend.url).driver.pooled_args)
    engine = create_async_engine(backend.url, connect_args=nothing)

    @event.listens_for(engine.sync_engine, "do_connect")
    def connect(dialect: Any, _: object, args: Any, options: Any) -> Any:
        return dialect.connect(*args, **options)

    db = Database(engine)
    async with db:
        assert 0 == await db.read.scalar(shop.COUNT)
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute(INSERT)
    await db.dispose()


@on(*POOLED)
async def test_found_with_prepared_statements(backend: PgBouncerBackend) -> None:
    """Where statements are kept that cannot work there, the error names the option."""
    await shop.create(backend)
    db = Database.from_url(backend.url)
    for session in ("read", "write"):
        async with db:
            with pytest.raises(ConfigurationError) as caught:
                await getattr(db, session).execute(shop.COUNT)
        assert 'Pass pooler="transaction"' in str(caught.value)
        # Where that is wrong others would find their connections read-only.
        assert 'pooler="session"' not in str(caught.value)
    await db.dispose()


@on("asyncpg@4")
async def test_page(backend: PgBouncerBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page shows does what the page says."""
    await backend.execute("CREATE TABLE items (name TEXT)")
    monkeypatch.setenv("DATABASE_URL", backend.url)
    await anyio.to_thread.run_sync(run_blocks, PGBOUNCER)


@on(*SERVER_DRIVERS[1:], *POOLED[1::2])
async def test_round_trips(backend: ServerBackend) -> None:
    """Reads and writes cost the round trips that the page says."""
    requests = {
        "one `SELECT` on the read session": ("read", shop.COUNT),
        "one `INSERT` on the write session": ("write", INSERT),
    }
    name = f"{backend.driver}, pooler" if backend.options else backend.driver
    rows = re.findall(r"^\| (.+) \|$", PGBOUNCER.read_text("utf-8"), re.MULTILINE)
    head, *table = [row.split(" | ") for row in rows]
    documented = {row[0]: int(row[head.index(name)]) for row in table}
    measured = {}
    async with behind_proxy(backend) as (db, proxy):
        for request, (session, statement) in requests.items():
            for _ in range(2):  # the first connects and prepares
                await backend.execute("DELETE FROM items")
                proxy.clear()
                async with db:
                    await getattr(db, session).execute(statement)
                measured[request] = len(proxy.trips)
    assert documented == measured
