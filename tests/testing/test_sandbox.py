"""A sandbox: units of work behave as outside of it, and nothing is left behind."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import text

import asgi_uow as uow
from asgi_uow import Database, errors
from asgi_uow._testing import shared
from asgi_uow.testing import lose_commit_answer, sandbox
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, memory_database, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.servers import Backend

pytestmark = on(*DRIVERS)

INSERT = "INSERT INTO items (id) VALUES (:id)"
SLOW = (  # SQLite is not interrupted: that would roll the sandbox back
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3000000)"
    " SELECT count(*) FROM n"
)
IDS = "SELECT id FROM items ORDER BY id"


@asynccontextmanager
async def same_with(backend: Backend, **options: Any) -> AsyncGenerator[Database]:
    """Another `Database` with other options, on the shop that is there already."""
    db = Database.from_url(backend.url, **options)
    yield db
    await db.dispose()


async def ids(db: Database) -> list[int]:
    """The rows as the next unit of work sees them."""
    async with db:
        return list(await db.read.scalars(IDS))


async def test_commit_is_seen_by_the_next_unit_and_left_nowhere(
    db: Database, backend: Backend
) -> None:
    """What a unit commits is there until the sandbox ends, and for nobody else."""
    async with sandbox(db):
        async with db as unit:
            await db.write.execute(INSERT, id=1)
        assert uow.Outcome.COMMITTED is unit.outcome
        assert [1] == await ids(db)
        assert [] == await shop.items(backend)

    assert [] == await ids(db)
    assert [] == await shop.items(backend)


async def test_rollback_undoes_its_unit_alone(db: Database) -> None:
    """An exception undoes the work of its unit, and what others have kept stays."""
    async with sandbox(db):
        async with db:
            await db.write.execute(INSERT, id=1)
        with pytest.raises(ZeroDivisionError):
            async with db:
                await db.write.execute(INSERT, id=2)
                raise ZeroDivisionError
        assert [1] == await ids(db)


async def test_failed_statement_dooms_its_unit(db: Database) -> None:
    """An error that the database answers with a rollback is that of the unit alone."""
    async with sandbox(db):
        async with db:
            await db.write.execute(INSERT, id=1)
        with pytest.raises(sa_exc.IntegrityError):
            async with db:
                await db.write.execute(INSERT, id=2)
                await db.write.execute(INSERT, id=1)
        async with db:
            await db.write.execute(INSERT, id=3)
        assert [1, 3] == await ids(db)


async def test_read_session_cannot_write(db: Database) -> None:
    """A write on the read session is refused, by text too."""
    async with sandbox(db):
        with pytest.raises(errors.ReadOnlySessionError):
            async with db:
                await db.read.execute(INSERT, id=1)
        async with db:
            await db.write.execute(INSERT, id=2)
            assert [2] == list(await db.read.scalars(IDS))


async def test_savepoints_are_undone_alone(db: Database) -> None:
    """A savepoint of a unit is one in the sandbox too."""
    async with sandbox(db):
        async with db:
            await db.write.execute(INSERT, id=1)
            with pytest.raises(sa_exc.IntegrityError):
                async with uow.savepoint():
                    await db.write.execute(INSERT, id=1)
            await db.write.execute(INSERT, id=2)
        assert [1, 2] == await ids(db)


async def test_concurrent_units_take_turns(db: Database) -> None:
    """Units of several tasks wait for each other, and all are kept."""

    async def work(number: int) -> None:
        async with db:
            await db.read.scalars(IDS)
            await db.write.execute(INSERT, id=number)
            await asyncio.sleep(0)
            await db.write.execute(INSERT, id=100 + number)
            if number % 2:
                uow.set_rollback_only("odd")

    async with sandbox(db):
        await asyncio.gather(*(work(each) for each in range(1, 9)))
        assert [2, 4, 6, 8, 102, 104, 106, 108] == await ids(db)


async def test_engine_itself_is_in_the_sandbox(db: Database, backend: Backend) -> None:
    """What fixtures do with the engine past units is seen, and undone too."""
    async with sandbox(db):
        async with db.engine.begin() as connection:
            await connection.execute(text(INSERT), {"id": 1})
        assert [1] == await ids(db)
    assert [] == await shop.items(backend)


async def test_stream(db: Database) -> None:
    """A stream gives its rows beside other statements."""
    async with sandbox(db), db:
        await db.write.execute(INSERT, id=1)
        rows = [row.id async for row in await db.read.stream(IDS)]
        assert [1] == rows


async def test_cancelled_statement_leaves_the_sandbox_whole(
    db: Database, backend: Backend
) -> None:
    """A statement that is cancelled is stopped; what was kept before is still there."""
    async with sandbox(db):
        async with db:
            await db.write.execute(INSERT, id=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), db:
                await db.write.execute(INSERT, id=2)
                await db.write.execute(getattr(backend, "slow", SLOW))
        assert [1] == await ids(db)


# What a transaction of a unit leaves to COMMIT, and what an error leaves


@on("aiosqlite", "asyncpg", "psycopg")
async def test_deferred_constraint_fails_the_commit(db: Database) -> None:
    """COMMIT refuses an orphan, as it does outside, and the next unit is fine."""
    async with sandbox(db):
        response = await handle(shop.insert_orphan, db)
        assert 500 == response.status
        assert uow.Outcome.ROLLED_BACK is response.units[0].outcome
        async with db:
            await shop.insert(1)
        assert [1] == await ids(db)


async def test_error_page_reads_beside_an_aborted_transaction(db: Database) -> None:
    """A doomed unit still reads, and what it has done is undone all the same."""
    found: list[object] = []

    async def fail_then_read() -> None:
        await shop.insert(2)
        async with uow.savepoint():
            await shop.insert(3)
        async with uow.savepoint():
            await shop.insert(4)
            with suppress(sa_exc.IntegrityError):
                await shop.insert(1)
            found.extend(await db.read.scalars(IDS))

    async with sandbox(db):
        async with db:
            await shop.insert(1)
        await handle(fail_then_read, db, status=409)
        assert 1 in found
        assert [1] == await ids(db)


@on("asyncpg", "psycopg")
async def test_aborted_transaction_stays_aborted(db: Database) -> None:
    """A read beside it does not let the unit go on."""
    async with sandbox(db):
        with suppress(errors.DoomedError):
            async with db:
                await shop.insert(1)
                with pytest.raises(sa_exc.IntegrityError):
                    await shop.insert(1)
                await db.read.scalars(IDS)
                with pytest.raises(sa_exc.DBAPIError, match="aborted"):
                    await shop.insert(2)
        assert [] == await ids(db)


@on("asyncpg", "psycopg")
async def test_commit_of_an_aborted_transaction_keeps_nothing(db: Database) -> None:
    """A commit past units is answered as PostgreSQL does: by a rollback."""
    async with sandbox(db):
        async with db.engine.connect() as connection:
            await connection.execute(text(INSERT), {"id": 1})
            with pytest.raises(sa_exc.IntegrityError):
                await connection.execute(text(INSERT), {"id": 1})
            await connection.commit()
        assert [] == await ids(db)


@on("asyncmy", "asyncpg", "psycopg")
async def test_autocommit_keeps_each_statement(db: Database) -> None:
    """A connection in AUTOCOMMIT is in the sandbox, and what fails is undone alone."""
    async with sandbox(db):
        async with db.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text(INSERT), {"id": 1})
            with pytest.raises(sa_exc.IntegrityError):
                await connection.execute(text(INSERT), {"id": 1})
            await connection.execute(text(INSERT), [{"id": 2}, {"id": 3}])
            await connection.rollback()
        assert {1} <= set(await ids(db))


@on("asyncpg", "psycopg")
async def test_settings_of_on_begin_hold_for_its_reads(
    backend: Backend, db: Database
) -> None:
    """What `on_begin` sets is there for each statement of a read's transaction."""

    async def set_tenant(session: uow.Session) -> None:
        await session.execute("SELECT set_config('app.tenant', :name, true)", name="t")

    async with same_with(backend, on_begin=set_tenant) as own, sandbox(own), own:
        asked = "SELECT current_setting('app.tenant')"
        assert "t" == await own.read.scalar(asked)
        assert "t" == await own.write.scalar(asked)
        async with own.read_engine.begin() as connection:
            assert 1 == await connection.scalar(text("SELECT 1"))


# What cannot be done in a sandbox


async def test_second_transaction_of_a_unit_is_refused(db: Database) -> None:
    """An independent unit inside one that has written would wait for ever."""
    async with sandbox(db), db:
        await shop.insert(1)
        refused = errors.SandboxError, errors.NestedUnitOfWorkError
        with pytest.raises(refused):
            async with uow.unit_of_work(db, independent=True):
                await shop.insert(2)


async def test_waiting_has_an_end(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a block that nobody leaves gets an error that names it."""
    monkeypatch.setattr(shared, "WAIT", 0.1)
    async with sandbox(db), db:
        await shop.insert(1)
        response = await handle(partial(shop.insert, 2), db)
        assert isinstance(response.error, errors.SandboxError)
        assert "<UnitOfWork active on" in str(response.error)
    async with sandbox(db), db.engine.connect() as connection:
        await connection.execute(text(INSERT), {"id": 1})
        with pytest.raises(errors.SandboxError, match="A connection of an engine"):
            await ids(db)


async def test_transaction_control_by_text(db: Database) -> None:
    """BEGIN, COMMIT and ROLLBACK by text are those of their connection."""
    async with sandbox(db):
        async with db.engine.begin():
            pass  # there is nothing to commit
        async with db.engine.connect() as connection:
            for number, end in (1, "COMMIT"), (2, "ROLLBACK"):
                await connection.exec_driver_sql("BEGIN")
                await connection.execute(text(INSERT), {"id": number})
                await connection.exec_driver_sql(end)
        assert [1] == await ids(db)


@on("asyncpg")
async def test_savepoints_by_text(db: Database) -> None:
    """However a savepoint is spelt, the server knows it."""
    async with sandbox(db):
        async with db.engine.begin() as connection:
            await connection.exec_driver_sql("SAVEPOINT mine")
            await connection.execute(text(INSERT), {"id": 1})
            await connection.exec_driver_sql("RELEASE SAVEPOINT MINE")
        assert [1] == await ids(db)


async def test_stream_of_the_read_session(db: Database) -> None:
    """A stream that a read session opens first gives its rows."""
    async with sandbox(db):
        async with db:
            await shop.insert(1)
        async with db:
            rows = [row.id async for row in await db.read.stream(IDS)]
        assert [1] == rows


async def test_connection_that_was_closed(db: Database) -> None:
    """What is left of a connection is refused as a driver would."""
    async with sandbox(db):
        async with db.engine.connect() as connection:
            raw: Any = await connection.get_raw_connection()
            raw.dbapi_connection.close()
            with pytest.raises(sa_exc.OperationalError, match="connection is closed"):
                await connection.execute(text(IDS))
        async with db.engine.connect() as connection:
            await connection.execute(text(INSERT), {"id": 1})
            raw = await connection.get_raw_connection()
            raw.dbapi_connection.close()
            assert [] == await ids(db)  # what was open has been rolled back by now
            with pytest.raises(sa_exc.OperationalError, match="connection is closed"):
                await connection.commit()
        assert [] == await ids(db)


@on("asyncmy")
async def test_ddl_is_refused(db: Database) -> None:
    """MariaDB would commit everything for it; temporary tables are welcome."""
    async with sandbox(db):
        with pytest.raises(sa_exc.ProgrammingError, match="CREATE TABLE would end"):
            async with db:
                await db.write.execute("CREATE TABLE more (id INTEGER)")
        async with db:
            await db.write.execute("CREATE TEMPORARY TABLE more (id INTEGER)")


@on("asyncmy")
async def test_locking_tables_is_refused(db: Database) -> None:
    """MariaDB commits for it too."""
    async with sandbox(db):
        with pytest.raises(errors.SandboxError, match="LOCK would end"):
            async with db:
                await db.read.execute("LOCK TABLES items READ")


async def test_database_made_in_a_sandbox(db: Database) -> None:
    """A second `Database` on the engine is in it, reads alike, and lives on."""
    async with sandbox(db):
        mine = Database(db.engine)
        with pytest.raises(errors.ReadOnlySessionError):
            async with mine:
                await mine.read.execute(INSERT, id=1)
        assert [] == await ids(mine)
    assert [] == await ids(mine)
    await mine.dispose()


@on("asyncmy")
async def test_tables_without_savepoints_are_refused(
    db: Database, backend: Backend
) -> None:
    """What is written to MyISAM could not be undone."""
    await backend.execute("CREATE TABLE old (id INTEGER) ENGINE=MyISAM")
    with pytest.raises(errors.SandboxError, match="written to old stays"):
        await sandbox(db).__aenter__()


@on("asyncmy")
async def test_autocommitted_procedure_ends_the_sandbox(
    db: Database, backend: Backend
) -> None:
    """The same on a connection past units."""
    await backend.execute("CREATE PROCEDURE commits() COMMIT")
    async with sandbox(db):
        with pytest.raises(errors.SandboxError, match="nothing more can be done"):
            async with db.engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(text("CALL commits()"))
                await connection.execute(text(IDS))


@on("asyncmy")
async def test_what_ends_the_transaction_ends_the_sandbox(
    db: Database, backend: Backend
) -> None:
    """After a procedure that commits nothing more can be done, and an error says so."""
    await backend.execute("CREATE PROCEDURE commits() COMMIT")
    async with sandbox(db):
        async with db:
            await shop.insert(1)
        with pytest.raises(errors.UnitOfWorkFailedError):
            async with db:
                await db.write.execute("CALL commits()")
        with pytest.raises(errors.SandboxError, match="nothing more can be done"):
            await ids(db)


@on("asyncpg", "psycopg", "asyncmy")
async def test_two_phase_commits_are_refused(backend: Backend, db: Database) -> None:
    """What is prepared would be kept."""
    async with same_with(backend, twophase=True) as own, sandbox(own):
        with pytest.raises((errors.SandboxError, AttributeError, errors.AsgiUowError)):
            async with own:
                await shop.insert(1)


async def test_driver_itself_is_out_of_reach(db: Database) -> None:
    """What goes past SQLAlchemy is refused with the reason."""
    async with sandbox(db), db.engine.connect() as connection:
        raw: Any = await connection.get_raw_connection()
        with pytest.raises(AttributeError, match="Go through SQLAlchemy"):
            assert raw.driver_connection.copy_records_to_table


async def test_sandbox_is_entered_once(db: Database) -> None:
    """One object is for one block; after it nothing is done in it any more."""
    box = sandbox(db)
    async with box, AsyncExitStack() as late:
        connection = await late.enter_async_context(db.engine.connect())
        await connection.execute(text(IDS))
        left = late.pop_all()
    with pytest.raises(errors.SandboxError, match="Entered before"):
        await box.__aenter__()
    with pytest.raises(errors.SandboxError, match="has ended"):
        await connection.execute(text(INSERT), {"id": 1})
    await left.aclose()


async def test_cancelled_entering_leaves_nothing_open(
    db: Database, backend: Backend
) -> None:
    """A sandbox whose entering was cancelled is closed again."""
    entering = asyncio.create_task(sandbox(db).__aenter__())
    await asyncio.sleep(0)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    async with sandbox(db):  # on SQLite it would wait
        assert [] == await ids(db)


async def test_inner_sandbox_leaves_other_databases_to_the_outer(
    db: Database, other: Database
) -> None:
    """A sandbox of one database inside that of another: both are in theirs."""
    async with sandbox(other):
        async with sandbox(db), uow.unit_of_work(db, other):
            await shop.insert(1, db)
            await shop.insert(1, other)
        assert [1] == await ids(other)
    assert [] == await ids(other)
    assert [] == await ids(db)


@pytest.mark.usefixtures("tmp_path")
async def test_memory() -> None:
    """The one connection of a database in memory is the sandbox's, and comes back."""
    async with memory_database() as db:
        async with sandbox(db):
            async with db:
                await shop.insert(1)
                assert [1] == list(await db.read.scalars(IDS))
            assert [1] == await ids(db)
        assert [] == await ids(db)


async def test_second_sandbox_of_a_memory_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is one connection, which the first has; the second gives up in time."""
    async with memory_database() as db:
        async with sandbox(db):
            monkeypatch.setattr(shared, "WAIT", 0.1)
            with pytest.raises(errors.SandboxError, match="in use by another sandbox"):
                await sandbox(db).__aenter__()
        assert [] == await ids(db)


@on("asyncpg")
async def test_unknown_outcome_is_not_waited_for(
    backend: Backend, db: Database
) -> None:
    """`resolve_unknown` can ask PostgreSQL for a whole transaction alone."""
    async with same_with(backend, resolve_unknown=True) as own, sandbox(own):
        with pytest.raises(errors.OutcomeUnknownError):
            async with lose_commit_answer(own), own:
                await shop.insert(1)
        assert [1] == await ids(own)
