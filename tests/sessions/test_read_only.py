"""What the read session refuses: the table of docs/read-and-write.md, measured."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import column, event, insert, table
from sqlalchemy.exc import DBAPIError

from asgi_uow import Database
from asgi_uow.errors import ReadOnlySessionError
from tests.servers import eventually
from tests.support import ROOT, shop
from tests.support.databases import DRIVERS, SERVER_DRIVERS, on
from tests.support.private import code_of, means
from tests.support.writes import (
    BY_THE_SESSION,
    CALLS,
    INSERT,
    ROUTINES,
    SELECT,
    driver_connection,
)

if TYPE_CHECKING:
    from asgi_uow import Session
    from tests.servers import Backend, ServerBackend
    from tests.support.writes import Call

pytestmark = on(*DRIVERS)

PAGE = ROOT / "docs" / "read-and-write.md"
JOINED = "After `db.write` was used"
HEAD = ["On the read session", *DRIVERS, JOINED]
OUTSIDE = "-"
"""There is no such statement, or nothing to switch off."""
CODES = {
    "aiosqlite": "SQLITE_READONLY",
    "asyncmy": 1792,
    "asyncpg": "25006",
    "psycopg": "25006",
}
LATE = "INSERT INTO items (id) VALUES (77)"
LEAK = ", and the next unit can write"


def documented(column: str) -> dict[str, str]:
    """The rows of the table whose head is ours, and one of its columns."""
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in re.findall(r"^\|.+\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    ]
    start = lines.index(HEAD) + 2
    rows = lines[start : start + len(CALLS)]
    return {row[0]: row[HEAD.index(column)] for row in rows}


# What comes of them


async def attempt(session: Session, row: str, call: Call) -> str:
    """Say as the table does what came of it."""
    try:
        await call(session)
    except Exception as error:  # noqa: BLE001  # each driver has errors of its own
        outcome: Exception | None = error
    else:
        outcome = None
    if not isinstance(outcome, ReadOnlySessionError):
        return "error" if outcome else "allowed"
    assert "current_session()" in str(outcome)
    if row in BY_THE_SESSION:
        assert outcome.__cause__ is None
    else:
        assert means(outcome.__cause__, "read_only")
    return "refused"


async def next_unit(db: Database) -> str:
    """Write on the read session first, then read and write as one should."""
    async with db:
        refused = await attempt(db.read, "", lambda session: session.execute(LATE))
        assert [1] == (await db.read.scalars(f"{SELECT} LIMIT 1")).all()
        await db.write.execute("INSERT INTO items (id) VALUES (5)")
    return "" if refused == "refused" else LEAK


@pytest.fixture
async def stocked(backend: Backend) -> Backend:
    """A shop with one item, and routines that would add another."""
    await shop.create(backend)
    await backend.execute(
        "INSERT INTO items (id) VALUES (1)", *ROUTINES[backend.driver]
    )
    return backend


def small(backend: Backend) -> Database:
    """A database with one connection to read and one to write."""
    return Database.from_url(backend.url, pool_size=1, max_overflow=0)


async def test_read_session_cannot_write(stocked: Backend) -> None:
    """What the table says is refused is, and no setting reaches the next unit."""
    measured = dict.fromkeys(CALLS, OUTSIDE)
    for row, calls in CALLS.items():
        if stocked.driver in calls:
            db = small(stocked)
            async with db:
                measured[row] = await attempt(db.read, row, calls[stocked.driver])
            assert [1] == await shop.items(stocked)
            measured[row] += await next_unit(db)
            await db.dispose()
            await stocked.execute("DELETE FROM items WHERE id > 1")
    assert documented(stocked.driver) == measured


async def test_reads_in_the_writers_transaction(stocked: Backend) -> None:
    """After the unit has used its write session, the session alone refuses."""
    measured = {
        row: outcome
        for row, outcome in documented(JOINED).items()
        if outcome == OUTSIDE or stocked.driver not in CALLS[row]
    }
    for row in CALLS.keys() - measured.keys():
        db = small(stocked)
        async with db:
            await db.write.execute("SELECT 1")
            measured[row] = await attempt(db.read, row, CALLS[row][stocked.driver])
            await db.write.execute("INSERT INTO items (id) VALUES (10)")
        assert 10 in await shop.items(stocked)
        await db.dispose()
        await stocked.execute(
            "DELETE FROM items",
            "DROP TABLE IF EXISTS other",
            "INSERT INTO items (id) VALUES (1)",
        )
    assert documented(JOINED) == measured


@on(*DRIVERS[:3])
async def test_stream_that_writes(stocked: Backend) -> None:
    """`stream()` is refused as `execute()` is; psycopg has no cursor for it at all."""
    db = small(stocked)
    async with db:
        with pytest.raises(ReadOnlySessionError):
            await db.read.stream(f"{INSERT} RETURNING id")
    assert "" == await next_unit(db)
    assert [1, 5] == await shop.items(stocked)
    await db.dispose()


async def test_memory_is_one_connection() -> None:
    """In memory reads share the writer's connection: text that writes is kept."""
    db = Database.from_url("sqlite://")
    async with db:
        await db.write.execute("CREATE TABLE items (id INTEGER)")
    async with db:
        await db.read.execute(INSERT)
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute(insert(shop.Item).values(id=3))
    async with db:
        assert [2] == (await db.read.scalars(SELECT)).all()
    await db.dispose()


# The connection afterwards


async def test_refusal_costs_no_connection(stocked: Backend) -> None:
    """After a refusal the very same connection serves the next unit."""
    db = small(stocked)
    used = []
    for _ in range(2):
        async with db:
            with pytest.raises(ReadOnlySessionError) as refused:
                await db.read.execute(INSERT)
            assert CODES[stocked.driver] == code_of(refused.value.__cause__)
            used.append(await driver_connection(db.read))
    assert used[0] is used[1]
    assert "" == await next_unit(db)
    await db.dispose()


async def test_reading_goes_on_after_a_refusal(stocked: Backend) -> None:
    """In the unit itself both sessions go on too, and its work is kept."""
    db = small(stocked)
    async with db:
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute(INSERT)
        assert [1] == (await db.read.scalars(SELECT)).all()
        await db.write.execute(INSERT)
        assert [1, 2] == (await db.read.scalars(SELECT)).all()
    assert [1, 2] == await shop.items(stocked)
    await db.dispose()


async def test_read_only_after_an_error(stocked: Backend) -> None:
    """A statement that fails leaves a connection that reads, and only reads."""
    db = small(stocked)
    async with db:
        with pytest.raises(DBAPIError):
            await db.read.execute("SELECT nothing FROM nowhere")
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute(INSERT)
    assert "" == await next_unit(db)
    await db.dispose()


@pytest.mark.parametrize(
    "options", [{"isolation_level": "SERIALIZABLE"}, {"postgresql_readonly": False}]
)
@on(*DRIVERS[1:])
async def test_options_of_one_unit(
    stocked: ServerBackend, options: dict[str, object]
) -> None:
    """What one unit asks of its connection costs the next no round trip."""
    async with stocked.proxy() as proxy:
        url = stocked.through(proxy.port)
        db = Database.from_url(url, pool_size=1, max_overflow=0)
        for asked in ({}, options, {}):  # asyncpg prepares again after a change
            async with db:
                await db.read.connection(execution_options=asked)
                await db.read.execute(SELECT)
        proxy.clear()
        async with db:
            await db.read.execute(SELECT)
        assert [SELECT] == proxy.trips
        assert "" == await next_unit(db)
        await db.dispose()


@on(*DRIVERS[2:])
async def test_options_that_allow_writes(stocked: ServerBackend) -> None:
    """A transaction that a unit may write in leaves nothing to the next unit."""
    options = {"isolation_level": "SERIALIZABLE", "postgresql_readonly": False}
    db = small(stocked)
    async with db:
        await db.read.connection(execution_options=options)
        await db.read.execute(SELECT)
    assert "" == await next_unit(db)
    assert [1, 5] == await shop.items(stocked)
    await db.dispose()


@on(*SERVER_DRIVERS)
async def test_read_only_after_a_cancellation(stocked: ServerBackend) -> None:
    """The connection that replaces a cancelled one is read-only from the start."""
    slow = stocked.slow

    async def count() -> int:
        return await stocked.running(slow)

    db = small(stocked)
    async with db:
        statement = asyncio.create_task(db.read.execute(slow))
        await eventually(1, count)
        statement.cancel()
        await asyncio.wait((statement,))
        assert statement.cancelled()
    assert "" == await next_unit(db)
    assert 0 == await count()
    await db.dispose()


@on("aiosqlite")
async def test_read_only_after_a_cancellation_of_sqlite(stocked: Backend) -> None:
    """The same on SQLite, where the statement is stopped and the connection closed."""
    loop, running = asyncio.get_running_loop(), asyncio.Event()

    def note() -> int:
        loop.call_soon_threadsafe(running.set)
        return 1

    endless = "WITH RECURSIVE n(i) AS (SELECT note() UNION ALL SELECT i + 1 FROM n)"
    db = small(stocked)
    async with db:
        raw = await driver_connection(db.read)
        await raw.create_function("note", 0, note)
        statement = asyncio.create_task(
            db.read.execute(f"{endless} SELECT count(*) FROM n")
        )
        await running.wait()
        statement.cancel()
        await asyncio.wait((statement,))
        assert statement.cancelled()
    assert "" == await next_unit(db)
    await db.dispose()


async def test_other_options_change_nothing(backend: Backend) -> None:
    """Execution options that leave the connection as it is cost no reconnect."""
    await shop.create(backend)
    db = Database.from_url(backend.url)
    made: list[object] = []

    def note(connection: object, _: object) -> None:
        made.append(connection)

    event.listen(db.read_engine.sync_engine, "connect", note)
    for _ in range(2):
        async with db:
            await db.read.connection(execution_options={"logging_token": "mine"})
            await db.read.scalar("SELECT count(*) FROM items")
    await db.dispose()
    assert 1 == len(made)


@pytest.mark.parametrize("method", ["execute", "scalar", "scalars"])
async def test_statements_inside_run_sync(stocked: Backend, method: str) -> None:
    """Inside `run_sync` an INSERT is refused before it is sent."""
    db = small(stocked)
    statement = insert(table("items", column("id"))).values(id=7)
    async with db:
        with pytest.raises(ReadOnlySessionError):
            await db.read.run_sync(lambda session: getattr(session, method)(statement))
    assert [1] == await shop.items(stocked)
    await db.dispose()


async def test_dml_that_names_another_clause(db: Database) -> None:
    """What `bind_arguments` say does not hide what is executed."""
    items = table("items", column("id"))
    arguments = {"clause": items}
    async with db:
        await shop.insert(1)  # so that reads join the writer's transaction
        with pytest.raises(ReadOnlySessionError, match="INSERT"):
            statement = insert(items).values(id=2)
            await db.read.execute(statement, bind_arguments=arguments)
