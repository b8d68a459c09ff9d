"""What a unit of work sets on its connection does not reach the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tests.support.databases import DRIVERS, memory_database, on
from tests.support.writes import driver_connection

if TYPE_CHECKING:
    from asgi_uow import Database

pytestmark = on(*DRIVERS, pool_size=1, max_overflow=0)

MARIADB = {
    "SET @seven = 7": "SELECT @seven",
    "/* a comment */ set @seven = 7": "SELECT @seven",
    "/*!40101 SET @seven = 7 */": "SELECT @seven",
    "SET LOCAL lock_wait_timeout = 7": "SELECT @@lock_wait_timeout",
    "USE information_schema": "SELECT database()",
}
SEVEN = "SELECT coalesce(current_setting('app.seven', true), '')"
POSTGRESQL = {
    "SET search_path TO seven": "SHOW search_path",
    "SET LOCAL app.seven = 6; SET app.seven = 7": SEVEN,
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY": (
        "SHOW default_transaction_read_only"
    ),
    "SELECT set_config('app.seven', '7', false)": SEVEN,
    "SELECT set_config('a.b', '7', true), set_config('app.seven', '7', false)": SEVEN,
    "SELECT set_config('app.seven', '7', false), CAST(round(7.7, 0) AS int)": SEVEN,
}
SQLITE = {"PRAGMA cache_size = 7": "PRAGMA cache_size"}


async def asked(db: Database, question: str) -> object:
    async with db:
        return await db.write.scalar(question)


async def stays(db: Database, statement: str | sa.Executable) -> bool:
    """Whether the next unit has the same connection of the driver."""
    async with db:
        await db.write.execute(statement)
        before = await driver_connection(db.write)
    async with db:
        return before is await driver_connection(db.write)


async def check(db: Database, statement: str, question: str) -> None:
    before = await asked(db, question)
    async with db:
        await db.write.execute(statement)
        assert before != await db.write.scalar(question)
    assert before == await asked(db, question)
    async with db.engine.begin() as connection:  # by hand
        await connection.exec_driver_sql(statement)
    assert before == await asked(db, question)


@on("asyncmy")
@pytest.mark.parametrize("statement", MARIADB)
async def test_mariadb(db: Database, statement: str) -> None:
    """Variables and the schema are what they were, for the next unit."""
    await check(db, statement, MARIADB[statement])


@on("psycopg")
@pytest.mark.parametrize("statement", POSTGRESQL)
async def test_psycopg(db: Database, statement: str) -> None:
    """So are settings, whichever way they are made."""
    await check(db, statement, POSTGRESQL[statement])


@on("asyncpg")
@pytest.mark.parametrize(
    "statement",
    [name for name in POSTGRESQL if ";" not in name],  # it takes one at a time
)
async def test_asyncpg(db: Database, statement: str) -> None:
    """It makes no difference which driver is told."""
    await check(db, statement, POSTGRESQL[statement])


@on("aiosqlite")
@pytest.mark.parametrize("statement", SQLITE)
async def test_sqlite(db: Database, statement: str) -> None:
    """A pragma of SQLite is a setting too."""
    await check(db, statement, SQLITE[statement])


@on("asyncpg", "psycopg")
async def test_a_setting_that_was_taken_back(db: Database) -> None:
    """RESET may take back what the connection was made with."""
    assert not await stays(db, "RESET ALL")


LASTING = {
    "mysql": [
        "CREATE TEMPORARY TABLE seven (id INTEGER)",
        "SELECT @seven := 7",
        "SELECT GET_LOCK('seven', 0)",
    ],
    "postgresql": [
        "CREATE TEMP TABLE seven (id INTEGER)",
        "LISTEN seven",
        "PREPARE seven AS SELECT 7",
        "SELECT pg_advisory_lock(7)",
        "SELECT set_config('app.seven', '7', 'f')",
        "SELECT set_config('app.seven', '7', 1 = 2), set_config('app.six', '6', true)",
    ],
    "sqlite": ["CREATE TEMP TABLE seven (id INTEGER)"],
}


async def test_what_lasts_too(db: Database) -> None:
    """Neither do locks, temporary tables and the like reach the next unit."""
    for statement in LASTING[db.engine.dialect.name]:
        assert not await stays(db, statement), statement


PLAIN = {
    "mysql": ["SET STATEMENT lock_wait_timeout = 7 FOR SELECT 7"],
    "postgresql": [
        "SET LOCAL search_path TO seven",
        "/* for one */ SET LOCAL search_path TO seven",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SET CONSTRAINTS ALL DEFERRED",
        "SELECT set_config('app.seven', CAST(7 AS text), true)",
    ],
    "sqlite": ["PRAGMA cache_size"],
}


async def test_what_does_not_last(db: Database) -> None:
    """What ends with its transaction, and SET in an UPDATE, cost no connection."""
    update = "UPDATE items\nSET id = 7"
    for statement in (update, *PLAIN[db.engine.dialect.name]):
        assert await stays(db, statement), statement


@on("asyncpg", "psycopg")
@pytest.mark.parametrize("local", [True, False])
async def test_parameters(db: Database, local: bool) -> None:
    """Whether `set_config` is for the transaction may be said by a parameter."""
    function = sa.func.set_config("app.seven", "7", local)
    assert local is await stays(db, sa.select(function))
    statement = sa.text("SELECT set_config('app.seven', '7', :local)")
    assert local is await stays(db, statement.bindparams(local=local))


async def test_in_memory() -> None:
    """In memory the connection is the database, and is kept with its settings."""
    async with memory_database() as db:
        assert await stays(db, "PRAGMA cache_size = 7")
        assert 7 == await asked(db, "PRAGMA cache_size")
