"""What each engine says of a conflict, at the wire, and what becomes of the request.

Engines that are not here are PostgreSQL or MariaDB behind a proxy, which puts the error
of that engine in the place of an answer and leaves the transaction as it would.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pytest
from sqlalchemy.exc import DBAPIError

import asgi_uow as uow
from asgi_uow import Outcome, Retry, UnitOfWorkMiddleware, current_session, errors
from asgi_uow.observers import CommitFailed, RetryScheduled
from tests.support import shop
from tests.support.asgi import Client, Response, respond
from tests.support.cockroach import cockroach
from tests.support.conflicts import READ, WRITE, deadlock
from tests.support.databases import behind_proxy, checked_out, on, shop_database

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSessionTransaction

    from asgi_uow import Database
    from asgi_uow._asgi import Message, Receive, Scope, Send
    from tests.servers import MariaDBBackend, RecordingProxy, ServerBackend

    Handler: TypeAlias = Callable[[], Awaitable[object]]

At: TypeAlias = Literal["statement", "commit"]
Becomes: TypeAlias = Literal["replayed", "503", "500", "unknown"]
Row: TypeAlias = tuple[str, str, str, At, Becomes]
"""The engine, the code, the text, where it comes, what becomes of the request."""

on_postgresql = on("asyncpg", "psycopg")
on_mariadb = on("asyncmy")

RESTART = "restart transaction: TransactionRetryWithProtoRefreshError: WriteTooOldError"
SERIALIZE = "could not serialize access due to concurrent update"
OC000 = "change conflicts with another transaction, please retry: (OC000)"
OC001 = "schema has been updated by another transaction, please retry: (OC001)"
CITUS = "canceling the transaction since it was involved in a distributed deadlock"
AMBIGUOUS = "result is ambiguous: error=rpc error [exhausted]"

POSTGRESQL: list[Row] = [
    ("PostgreSQL", "40001", SERIALIZE, "statement", "replayed"),
    ("PostgreSQL", "40001", SERIALIZE, "commit", "replayed"),
    ("PostgreSQL", "40P01", "deadlock detected", "statement", "replayed"),
    ("PostgreSQL", "55P03", "could not obtain lock on row", "statement", "replayed"),
    ("PostgreSQL", "57014", "due to statement timeout", "statement", "500"),
    ("PostgreSQL", "53300", "too many clients already", "statement", "503"),
    ("PostgreSQL", "0A000", "cached plan must not change", "statement", "500"),
    ("PostgreSQL", "40003", "completion unknown", "commit", "unknown"),
    ("CockroachDB", "40001", RESTART, "statement", "replayed"),
    ("CockroachDB", "40001", RESTART, "commit", "replayed"),
    ("CockroachDB", "40003", AMBIGUOUS, "commit", "unknown"),
    ("YugabyteDB", "40001", SERIALIZE, "statement", "replayed"),
    ("YugabyteDB", "40001", "current transaction is aborted", "commit", "replayed"),
    ("YugabyteDB", "40P01", "aborted due to deadlock", "statement", "replayed"),
    ("YugabyteDB", "YB003", SERIALIZE, "commit", "replayed"),
    ("YugabyteDB", "XX000", "schema version mismatch", "statement", "500"),
    ("Citus", "40P01", CITUS, "statement", "replayed"),
    ("Citus", "40001", SERIALIZE, "statement", "replayed"),
    ("Citus", "08006", "connection to the remote node failed", "statement", "503"),
    ("Aurora DSQL", "40001", OC000, "commit", "replayed"),
    ("Aurora DSQL", "40001", OC001, "commit", "replayed"),
    ("Aurora DSQL", "40001", OC001, "statement", "replayed"),
]

DEADLOCK = "Deadlock found when trying to get lock; try restarting transaction"
CHANGED = "Record has changed since last read in table 'counters'"
WAITED = "Lock wait timeout exceeded; try restarting transaction"
NOWAIT = "Statement aborted because lock(s) could not be acquired immediately"
PLUGIN = "Plugin instructed the server to rollback the current transaction."
QUOTED = 'Got error 149 "Lock deadlock; Retry transaction" during COMMIT'
WSREP = "WSREP has not yet prepared node for application use"
# Not "Not connected", which SQLAlchemy takes for a lost connection.
FRAGMENT = "Error while appending streaming replication fragment"
STALE = "Write Conflict, txnStartTS is stale"
SCHEMA = "Information schema is changed during the execution of the statement"

MYSQL: list[Row] = [
    ("MariaDB", "1213 40001", DEADLOCK, "statement", "replayed"),
    ("MariaDB", "1020", CHANGED, "statement", "replayed"),
    ("MariaDB", "1205", WAITED, "statement", "replayed"),
    ("MySQL", "3572", NOWAIT, "statement", "replayed"),
    ("MySQL", "1614 XA102", "XA_RBDEADLOCK", "statement", "replayed"),
    ("MySQL", "1613 XA106", "XA_RBTIMEOUT", "statement", "replayed"),
    ("MySQL", "3024", "maximum statement execution time", "statement", "500"),
    ("MySQL", "1180", "Got error 28 during COMMIT", "commit", "unknown"),
    ("Galera", "1213 40001", DEADLOCK, "commit", "replayed"),
    ("Galera", "1213 40001", DEADLOCK, "statement", "replayed"),
    ("Galera", "1047 08S01", WSREP, "statement", "replayed"),
    ("Galera", "1047 08S01", WSREP, "commit", "replayed"),
    ("Galera", "1180", FRAGMENT, "commit", "unknown"),
    ("Group Replication", "3101 40000", PLUGIN, "commit", "replayed"),
    ("Group Replication", "1180", QUOTED, "commit", "replayed"),
    ("Group Replication", "1181", QUOTED, "commit", "replayed"),
    ("Group Replication", "1290", "--super-read-only", "statement", "replayed"),
    ("TiDB", "8002", "retryable, cannot be retried", "commit", "replayed"),
    ("TiDB", "8005", STALE, "commit", "replayed"),
    ("TiDB", "8022", "KV error safe to retry", "commit", "replayed"),
    ("TiDB", "8028", SCHEMA, "commit", "replayed"),
    ("TiDB", "8028", SCHEMA, "statement", "replayed"),
    ("TiDB", "9007", "Write conflict, txnStartTS=1", "commit", "replayed"),
    ("TiDB", "9007", "Write conflict, txnStartTS=1", "statement", "replayed"),
    ("TiDB", "1213 40001", DEADLOCK, "statement", "replayed"),
    ("TiDB", "1205", WAITED, "statement", "replayed"),
]
UNDOES = {"1213", "1020", "1614", "1613", "8028", "9007"}
"""At a statement of MySQL's family: what leaves nothing of the transaction."""
SOON: dict[str, Any] = {"backoff": 0.001}


def instead(code: str, at: At) -> str:
    """Give what leaves a real server's transaction where that error would."""
    if len(code.partition(" ")[0]) == 5:
        return "SELECT 1/0" if at == "statement" else "ROLLBACK"
    undone = at == "commit" or code.partition(" ")[0] in UNDOES
    return "ROLLBACK" if undone else "DO 0"


def is_write(trip: str) -> bool:
    return trip == WRITE


def is_commit(trip: str) -> bool:
    return trip == "COMMIT"


def is_savepoint(trip: str) -> bool:
    return trip.startswith("SAVEPOINT sa_")  # not what psycopg does by itself


class Site:
    """An application that counts, and the answers it gives."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.attempts: list[int] = []
        self.response = Response()

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        await receive()
        unit = uow.current_unit_of_work()
        self.attempts.append(unit.attempt)
        self.response.units.append(unit)
        uow.after_commit(self.response.hooks.append, "commit")
        uow.after_rollback(self.response.hooks.append, "rollback")
        await self.handler()
        await respond(send)

    async def serve(self, db: Database, attempts: int = 2) -> Response:
        app = UnitOfWorkMiddleware(
            self,
            db,
            retry=Retry(attempts=attempts, **SOON),
            observers=[self.response.events],
        )
        return await Client(app).request(receive=nothing, into=self.response)


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def write() -> None:
    await current_session().execute(WRITE)


@asynccontextmanager
async def engine(
    backend: ServerBackend, name: str = ""
) -> AsyncGenerator[tuple[Database, RecordingProxy]]:
    """A database of that engine, with one counter."""
    async with behind_proxy(backend) as (db, proxy):
        await backend.execute("CREATE TABLE counters (value INTEGER)")
        await backend.execute("INSERT INTO counters VALUES (0)")
        if name == "CockroachDB":
            own = uow.Database.from_url(cockroach(backend.through(proxy.port)))
            yield own, proxy
            await own.dispose()
        else:
            yield db, proxy


async def check(backend: ServerBackend, row: Row) -> None:
    name, code, text, at, becomes = row
    async with engine(backend, name) as (db, proxy):
        site = Site(write)
        fits = is_write if at == "statement" else is_commit
        proxy.refuse(fits, code, text, instead=instead(code, at))
        response = await site.serve(db)
        assert [0, 0] == checked_out(db)
        outcomes = [each.outcome for each in response.units]
        scheduled = [str(each.code) for each in response.events.of(RetryScheduled)]
        kept = await backend.scalar(READ)
    if becomes == "replayed":
        assert (200, None, [1, 2]) == (response.status, response.error, site.attempts)
        assert [Outcome.ROLLED_BACK, Outcome.COMMITTED] == outcomes
        assert ["rollback", "commit"] == response.hooks
        assert ["149" if text == QUOTED else code.partition(" ")[0]] == scheduled
        assert [] == response.events.of(CommitFailed)
        assert 1 == kept
        return
    assert ([1], []) == (site.attempts, scheduled)
    assert 0 == kept
    if becomes == "unknown":
        assert ([Outcome.UNKNOWN], []) == (outcomes, response.hooks)
        assert isinstance(response.error, errors.OutcomeUnknownError)
        assert 500 == response.status
        return
    assert ([Outcome.ROLLED_BACK], ["rollback"]) == (outcomes, response.hooks)
    if becomes == "503":
        assert (503, "1") == (response.status, response.headers["retry-after"])
    else:  # it leaves the application, for the server to answer
        assert isinstance(response.error, DBAPIError)
        assert [] == response.messages


def named(row: Row) -> str:
    return "-".join(row[:2] + row[3:]).replace(" ", "_")


@on_postgresql
@pytest.mark.parametrize("row", POSTGRESQL, ids=named)
async def test_engines_like_postgresql(backend: ServerBackend, row: Row) -> None:
    """What is proven undone by a conflict is replayed; what is not, is not."""
    await check(backend, row)


@on_mariadb
@pytest.mark.parametrize("row", MYSQL, ids=named)
async def test_engines_like_mysql(backend: ServerBackend, row: Row) -> None:
    """What is proven undone by a conflict is replayed; what is not, is not."""
    await check(backend, row)


CONFLICTS = {
    "asyncmy": ("9007", "Write conflict", "ROLLBACK"),
    "asyncpg": ("40001", RESTART, "SELECT 1/0"),
    "psycopg": ("40001", RESTART, "SELECT 1/0"),
}


def refuse_often(proxy: RecordingProxy, driver: str, times: int = 1) -> None:
    code, text, sql = CONFLICTS[driver]
    for _ in range(times):
        proxy.refuse(is_write, code, text, instead=sql)


@on("asyncmy", "asyncpg", "psycopg")
async def test_used_up(backend: ServerBackend) -> None:
    """After the last attempt the client is asked to come again."""
    async with engine(backend) as (db, proxy):
        refuse_often(proxy, backend.driver, times=2)
        response = await (site := Site(write)).serve(db)
        assert (503, "1") == (response.status, response.headers["retry-after"])
        assert [1, 2] == site.attempts
        assert 0 == await backend.scalar(READ)


@on("asyncmy", "asyncpg", "psycopg")
async def test_a_conflict_that_is_swallowed(backend: ServerBackend) -> None:
    """What comes after it is not committed alone: all of it is done again."""

    async def go_on() -> None:
        with suppress(DBAPIError):
            await write()
        with suppress(DBAPIError):  # PostgreSQL refuses this too
            await shop.insert(1)

    async with engine(backend) as (db, proxy):
        refuse_often(proxy, backend.driver)
        response = await (site := Site(go_on)).serve(db)
        assert (200, None, [1, 2]) == (response.status, response.error, site.attempts)
        assert 1 == await backend.scalar(READ)
        assert [1] == await shop.items(backend)


# Inside a savepoint


async def nested() -> None:
    async with current_session().begin_nested():
        await write()


async def nested_in_a_hook() -> None:
    await current_session().execute("SELECT 1")
    uow.before_commit(nested)


@on_mariadb
@pytest.mark.parametrize("handler", [nested, nested_in_a_hook])
async def test_a_conflict_takes_the_savepoint_away(
    backend: ServerBackend, handler: Handler
) -> None:
    """What surfaces is 1305, a savepoint that is gone; the first error counts."""
    async with engine(backend) as (db, proxy):
        refuse_often(proxy, backend.driver)
        response = await (site := Site(handler)).serve(db)
        assert (200, None, [1, 2]) == (response.status, response.error, site.attempts)
        assert [9007] == [each.code for each in response.events.of(RetryScheduled)]
        assert 1 == await backend.scalar(READ)
        refuse_often(proxy, backend.driver, times=2)
        response = await (site := Site(handler)).serve(db)
        assert (503, "1") == (response.status, response.headers["retry-after"])
        assert [1, 2] == site.attempts
        assert 1 == await backend.scalar(READ)


@on_mariadb
async def test_a_deadlock_takes_the_savepoint_away(backend: MariaDBBackend) -> None:
    """So does a real one; MariaDB has ended the transaction with all in it."""
    async with shop_database(backend) as db:
        await backend.execute("INSERT INTO items (id) VALUES (1), (2), (3), (4), (5)")

        async def handler() -> None:
            await shop.insert(6)
            if uow.current_unit_of_work().attempt == 1:
                async with current_session().begin_nested():
                    await deadlock(backend)

        response = await (site := Site(handler)).serve(db)
        assert (200, None, [1, 2]) == (response.status, response.error, site.attempts)
        assert [1213] == [each.code for each in response.events.of(RetryScheduled)]
        assert [1, 2, 3, 4, 5, 6] == await shop.items(backend)


@on_postgresql
@pytest.mark.parametrize("name", ["CockroachDB", "PostgreSQL"])
async def test_a_conflict_in_a_savepoint(backend: ServerBackend, name: str) -> None:
    """On PostgreSQL the rest may be committed; after a restart on CockroachDB not."""

    async def go_on() -> None:
        await write()
        with suppress(DBAPIError):
            await nested()

    attempts = {"CockroachDB": [1, 2], "PostgreSQL": [1]}[name]
    async with engine(backend, name) as (db, proxy):
        writes = iter([False, True])  # the second of the first attempt
        code, text, sql = CONFLICTS[backend.driver]
        proxy.refuse(
            lambda trip: is_write(trip) and next(writes), code, text, instead=sql
        )
        response = await (site := Site(go_on)).serve(db)
        assert (200, None) == (response.status, response.error)
        assert attempts == site.attempts
        assert len(attempts) == await backend.scalar(READ)


@on_postgresql
async def test_a_rollback_to_a_savepoint_is_refused(backend: ServerBackend) -> None:
    """So does CockroachDB after a restart; what is raised then hides nothing."""
    async with engine(backend, "CockroachDB") as (db, proxy):
        refuse_often(proxy, backend.driver)
        unimplemented = "unimplemented: cannot rollback to savepoint after error"
        proxy.refuse(
            lambda trip: trip.startswith("ROLLBACK TO"),
            "0A000",
            unimplemented,
            instead="SELECT 1/0",
        )
        response = await (site := Site(nested)).serve(db)
        assert (200, None, [1, 2]) == (response.status, response.error, site.attempts)
        assert ["40001"] == [each.code for each in response.events.of(RetryScheduled)]
        assert 1 == await backend.scalar(READ)


REFUSED = {
    "asyncmy": ("1235 42000", "This version doesn't yet support 'SAVEPOINT'", "DO 0"),
    "asyncpg": ("0A000", "unsupported statement: Savepoint", "SELECT 1/0"),
    "psycopg": ("0A000", "unsupported statement: Savepoint", "SELECT 1/0"),
}


def begin_nested() -> AsyncSessionTransaction:
    return current_session().begin_nested()


@on("asyncmy", "asyncpg", "psycopg")
async def test_a_server_without_savepoints(backend: ServerBackend) -> None:
    """`savepoint()` says so where the server refuses SAVEPOINT, and what else to do."""
    async with engine(backend) as (db, proxy):
        code, text, sql = REFUSED[backend.driver]
        for block in (uow.savepoint, begin_nested):
            proxy.refuse(is_savepoint, code, text, instead=sql)
            with pytest.raises(errors.NoSavepointsError, match="no savepoints") as said:
                async with db:
                    await write()
                    async with block():
                        await write()
            assert isinstance(said.value.__cause__, DBAPIError)
        assert [0, 0] == checked_out(db)
        assert 0 == await backend.scalar(READ)


@on("asyncmy", "asyncpg", "psycopg")
async def test_a_conflict_at_a_savepoint(backend: ServerBackend) -> None:
    """A SAVEPOINT that meets a conflict is replayed like any statement."""
    async with engine(backend) as (db, proxy):
        code, text, sql = CONFLICTS[backend.driver]
        proxy.refuse(is_savepoint, code, text, instead=sql)

        async def twice() -> None:
            await write()
            await nested()

        response = await (site := Site(twice)).serve(db)
        assert (200, None, [1, 2]) == (response.status, response.error, site.attempts)
        assert 2 == await backend.scalar(READ)


@on("psycopg")
async def test_a_server_without_savepoints_can_be_connected_to(
    backend: ServerBackend,
) -> None:
    """SQLAlchemy looks for a type in a savepoint, unless it is told not to."""
    async with behind_proxy(backend, use_native_hstore=False) as (db, proxy):
        code, text, sql = REFUSED[backend.driver]
        refused = proxy.refuse(
            lambda trip: trip.startswith("SAVEPOINT"), code, text, instead=sql
        )
        async with db:
            await shop.insert(1)
        assert not refused.fired.is_set()
    assert [1] == await shop.items(backend)
