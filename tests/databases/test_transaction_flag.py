"""The transaction that is committed is the one that was begun, whatever texts say."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import asyncmy.errors
import pytest
from sqlalchemy.exc import DBAPIError

import asgi_uow as uow
from asgi_uow import Database, Outcome, errors
from asgi_uow.observers import UnitFinished
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, checked_out, on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.servers.backend import Backend, ServerBackend


async def driver_connection() -> Any:
    connection = await uow.current_session().connection()
    return (await connection.get_raw_connection()).driver_connection


async def execute_by_the_driver(statement: str) -> None:
    raw = await driver_connection()
    if hasattr(raw, "execute"):
        await raw.execute(statement)
    else:  # asyncmy
        async with raw.cursor() as cursor:
            await cursor.execute(statement)


PROCEDURES = (
    "CREATE PROCEDURE commits() BEGIN INSERT INTO items (id) VALUES (7); COMMIT; END",
    "CREATE PROCEDURE rolls_back() ROLLBACK",
    (
        "CREATE PROCEDURE hides() BEGIN DECLARE EXIT HANDLER FOR SQLEXCEPTION ROLLBACK;"
        " INSERT INTO items (id) VALUES (1); END"
    ),
    "CREATE PROCEDURE defines() CREATE TABLE defined (id INT)",
    "CREATE PROCEDURE commits_and_fails() BEGIN COMMIT; SIGNAL SQLSTATE '45000'; END",
    (
        "CREATE PROCEDURE rolls_back_and_fails()"
        " BEGIN ROLLBACK; SIGNAL SQLSTATE '45000'; END"
    ),
    "CREATE PROCEDURE fails() SIGNAL SQLSTATE '45000'",
)
TEXTS = {
    "asyncmy": (
        "/*!COMMIT*/",
        "/*M! ROLLBACK */",
        "EXECUTE IMMEDIATE 'COMMIT'",
        "EXECUTE IMMEDIATE 'ROLLBACK'",
        "SET @a=1, autocommit=1",
        "SET STATEMENT max_statement_time=10 FOR CREATE TABLE other (id INT)",
        "IF 1=1 THEN COMMIT; END IF",
        "LOCK TABLE items WRITE",
        "XA BEGIN 'x'",
        "CALL commits()",
        "CALL rolls_back()",
        "CALL hides()",
        "CALL defines()",
    ),
    "psycopg": ("SELECT 1; COMMIT", ";ROLLBACK"),
}
BY_THE_DRIVER = ("driver: COMMIT", "driver: ROLLBACK")


async def send(form: str) -> None:
    """Have the transaction ended, without a word to the unit of work."""
    if form.startswith("driver: "):
        await execute_by_the_driver(form.removeprefix("driver: "))
    else:
        await uow.current_session().execute(form)


async def check(
    db: Database, backend: Backend, form: str, status: int, *, goes_on: bool
) -> None:
    """No success and no hook for it, and no rollback that is said to be proven."""

    async def handler() -> None:
        await shop.insert(1)
        await send(form)
        if goes_on:
            await shop.insert(2)

    response = await handle(handler, db, hooks=True, status=status)

    finished = response.events.only(UnitFinished)
    kept = await shop.items(backend)
    assert "commit" not in response.hooks
    assert response.error is not None
    assert finished.outcome is not Outcome.COMMITTED
    if finished.outcome is Outcome.ROLLED_BACK:
        assert [] == kept
    else:
        assert [] == response.hooks
    assert [0, 0] == checked_out(db)
    after = await handle(lambda: shop.insert(99), db)
    assert 200 == after.status
    assert [*kept, 99] == await shop.items(backend)


each_way = pytest.mark.parametrize(
    ("status", "goes_on"), [(200, False), (200, True), (404, False), (404, True)]
)


@on("asyncmy")
@each_way
@pytest.mark.parametrize("form", [*TEXTS["asyncmy"], *BY_THE_DRIVER])
async def test_ended_on_mariadb(
    db: Database, backend: Backend, form: str, status: int, *, goes_on: bool
) -> None:
    """P2: nor by a comment, a procedure, a variable or the driver's own cursor."""
    await backend.execute(*PROCEDURES)
    await check(db, backend, form, status, goes_on=goes_on)


@on("psycopg")
@each_way
@pytest.mark.parametrize("form", [*TEXTS["psycopg"], *BY_THE_DRIVER])
async def test_ended_on_psycopg(
    db: Database, backend: Backend, form: str, status: int, *, goes_on: bool
) -> None:
    """P2: nor by several statements in one text, or the driver's own cursor."""
    await check(db, backend, form, status, goes_on=goes_on)


@on("asyncpg", "aiosqlite")
@each_way
@pytest.mark.parametrize("form", BY_THE_DRIVER)
async def test_ended_by_the_driver(
    db: Database, backend: Backend, form: str, status: int, *, goes_on: bool
) -> None:
    """P2: nor by the driver's own connection."""
    await check(db, backend, form, status, goes_on=goes_on)


async def read() -> None:
    await uow.current_session().execute("SELECT id FROM items")


async def write_in_a_savepoint() -> None:
    async with uow.savepoint():
        await shop.insert(3)


async def undo_a_savepoint() -> None:
    async with uow.savepoint() as savepoint:
        await shop.insert(4)
        await savepoint.rollback()


async def read_past_the_session() -> None:
    connection = await uow.current_session().connection()
    await connection.exec_driver_sql("SELECT 1")


ORDINARY: dict[str, Callable[[], Awaitable[object]]] = {
    "read": read,
    "savepoint": write_in_a_savepoint,
    "savepoint undone": undo_a_savepoint,
    "past the session": read_past_the_session,
}


@on(*DRIVERS)
@pytest.mark.parametrize("first", ORDINARY)
@pytest.mark.parametrize("then", ORDINARY)
async def test_ordinary_statements(
    db: Database, backend: Backend, first: str, then: str
) -> None:
    """What ends no transaction is committed, in any order."""

    async def handler() -> None:
        if first != then:
            await ORDINARY[first]()
        await ORDINARY[then]()
        await shop.insert(1)

    response = await handle(handler, db, hooks=True)

    assert 200 == response.status
    assert ["commit"] == response.hooks
    assert 1 in await shop.items(backend)


@on("asyncmy")
@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TEMPORARY TABLE other (id INT)",
        "ANALYZE SELECT id FROM items",
        "CALL only_reads()",
        "SET @a=1",
    ],
)
async def test_statements_that_end_nothing(
    db: Database, backend: Backend, statement: str
) -> None:
    """Nor does what only looks like something that would."""
    await backend.execute("CREATE PROCEDURE only_reads() SELECT id FROM items")

    async def handler() -> None:
        await uow.current_session().execute(statement)
        await shop.insert(1)
        await uow.current_session().execute(statement.replace("other", "another"))

    response = await handle(handler, db, hooks=True)

    assert 200 == response.status
    assert ["commit"] == response.hooks


@on("aiosqlite", "asyncpg")
async def test_the_error_says_what_happened(db: Database) -> None:
    """The next statement is refused, and the failure names the likely mistake."""

    async def handler() -> None:
        await shop.insert(1)
        await execute_by_the_driver("ROLLBACK")
        with pytest.raises(errors.TransactionGoneError):
            await shop.insert(2)

    response = await handle(handler, db)

    assert isinstance(response.error, errors.OutcomeUnknownError)
    assert "was not seen; it may or may not have been kept" in str(response.error)
    assert isinstance(response.error.__cause__, errors.ManagedTransactionError)


FAILING = ("commits_and_fails", "rolls_back_and_fails")


@on("asyncmy")
@pytest.mark.parametrize("procedure", FAILING)
@pytest.mark.parametrize(
    ("by", "status"),
    [("session", 200), ("session", 404), ("session", 500), ("driver", 200)],
)
async def test_a_procedure_that_ends_it_and_fails(
    db: Database, backend: Backend, procedure: str, by: str, status: int
) -> None:
    """P13: its error does not say so, hence the server is asked."""
    await backend.execute(*PROCEDURES)

    async def handler() -> None:
        await shop.insert(1)
        try:
            call = f"CALL {procedure}()"
            if by == "driver":
                await execute_by_the_driver(call)
            await uow.current_session().execute(call)
        except (DBAPIError, asyncmy.errors.MySQLError):
            if status == 500:
                raise

    response = await handle(handler, db, hooks=True, status=status)

    assert Outcome.UNKNOWN is response.events.only(UnitFinished).outcome
    assert [] == response.hooks
    assert [1] * (procedure == FAILING[0]) == await shop.items(backend)


@on("asyncmy")
@pytest.mark.parametrize(("status", "hook"), [(200, "commit"), (404, "rollback")])
async def test_a_procedure_that_only_fails(
    db: Database, backend: Backend, status: int, hook: str
) -> None:
    """The handler may go on after it, as after any error."""
    await backend.execute(*PROCEDURES)

    async def handler() -> None:
        await shop.insert(1)
        with pytest.raises(DBAPIError):
            await uow.current_session().execute("CALL fails()")

    response = await handle(handler, db, hooks=True, status=status)

    assert status == response.status
    assert [hook] == response.hooks
    assert [1] * (status == 200) == await shop.items(backend)


@on("asyncmy", "psycopg")
@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (";COMMIT", Outcome.UNKNOWN),
        ("/* a page */ SELECT 1", Outcome.ROLLED_BACK),
    ],
)
async def test_no_answer_to_what_may_end_it(
    backend: ServerBackend, text: str, outcome: Outcome
) -> None:
    """P13: where a statement may hide a COMMIT, its lost answer is that of a COMMIT."""
    await shop.create(backend)
    if backend.driver == "asyncmy":
        await backend.execute(*PROCEDURES)
        text = text.replace(";COMMIT", "CALL commits()")

    async def handler() -> None:
        await shop.insert(1)
        await uow.current_session().execute(text)

    async with backend.proxy() as proxy:
        db = Database.from_url(backend.through(proxy.port))
        proxy.cut_after(lambda trip: trip == text.strip(";"))
        response = await handle(handler, db, hooks=True)
        await db.dispose()

    assert outcome is response.events.only(UnitFinished).outcome
    assert ["rollback"] * (outcome is Outcome.ROLLED_BACK) == response.hooks


@on("asyncpg", "psycopg", "aiosqlite")
@pytest.mark.parametrize(
    ("end", "outcome"), [("", Outcome.ROLLED_BACK), ("COMMIT", Outcome.UNKNOWN)]
)
async def test_the_driver_is_used_first(
    db: Database, backend: Backend, end: str, outcome: Outcome
) -> None:
    """P13: what the driver itself sends first is in the transaction, too."""

    async def handler() -> None:
        await execute_by_the_driver("INSERT INTO items (id) VALUES (1)")
        if end:
            await execute_by_the_driver(end)
        raise LookupError

    response = await handle(handler, db, hooks=True)

    assert outcome is response.events.only(UnitFinished).outcome
    assert ["rollback"] * (not end) == response.hooks
    assert [1] * bool(end) == await shop.items(backend)
    if end:  # nobody else answers it
        assert 500 == response.status
        assert isinstance(response.error, errors.OutcomeUnknownError)


@on("asyncpg", "psycopg")
async def test_cancelled_by_the_handler(db: Database) -> None:
    """What is in doubt is told, and not by the cancellation of a statement before."""
    with pytest.raises(errors.OutcomeUnknownError):
        async with db:
            await shop.insert(1)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await db.write.execute("DO $$ BEGIN PERFORM pg_sleep(30); END $$")
    assert [0, 0] == checked_out(db)


@on("aiosqlite", "asyncpg", "psycopg", "asyncmy")
@pytest.mark.parametrize("status", [200, 404])
async def test_closed_by_the_handler(db: Database, status: int) -> None:
    """A connection that the handler has closed is in doubt: it cannot be asked."""

    async def handler() -> None:
        await shop.insert(1)
        closing = (await driver_connection()).close()
        if closing is not None:  # asyncmy's is not async
            await closing

    response = await handle(handler, db, hooks=True, status=status)

    assert 500 == response.status
    assert Outcome.UNKNOWN is response.events.only(UnitFinished).outcome
    assert [0, 0] == checked_out(db)


@on("asyncpg")
async def test_timeout_of_the_driver(db: Database) -> None:
    """A statement that asyncpg has given up is in flight no more."""

    async def handler() -> None:
        await shop.insert(1)
        raw = await driver_connection()
        with suppress(TimeoutError):
            await raw.execute("SELECT pg_sleep(30)", timeout=0.05)

    async with asyncio.timeout(20):
        response = await handle(handler, db, hooks=True, status=404, commit_timeout=60)

    assert 404 == response.status
    assert ["rollback"] == response.hooks


@on("asyncpg", "psycopg", "aiosqlite")
async def test_cancelled_before_commit(db: Database) -> None:
    """Who was cancelled before COMMIT is told so, also if the outcome is in doubt."""
    units: list[uow.UnitOfWork] = []
    waiting = asyncio.Event()

    async def work() -> None:
        async with db as unit:
            units.append(unit)
            await shop.insert(1)
            await execute_by_the_driver("COMMIT")
            uow.before_commit(wait)

    async def wait() -> None:
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await waiting.wait()
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    assert Outcome.UNKNOWN is units[0].outcome
    assert [0, 0] == checked_out(db)
