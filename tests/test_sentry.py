"""What Sentry is really sent: a real client, its transport recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import sentry_sdk
from sentry_sdk.integrations.dedupe import DedupeIntegration
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import Transport
from sqlalchemy import event as sa_event

from asgi_uow import (
    Database,
    UnitOfWorkMiddleware,
    after_commit,
    current_session,
)
from asgi_uow.observers import LoggingObserver
from asgi_uow.sentry import SentryObserver
from tests.frameworks.driver import Server, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator

    from sentry_sdk.envelope import Envelope

    from asgi_uow.observers import Observer
    from tests.frameworks.driver import Exchange
    from tests.servers import MariaDBBackend, SQLiteBackend

AUTHOR = "CREATE TABLE author (name VARCHAR(40) PRIMARY KEY)"
NOTE = """CREATE TABLE note (
    name VARCHAR(40) PRIMARY KEY,
    author VARCHAR(40) REFERENCES author (name) DEFERRABLE INITIALLY DEFERRED
)"""
SECRET = "hunter2-of-ann"


class RecordingTransport(Transport):
    """Keeps the bytes that would have been sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.sent.append(envelope.serialize())

    @property
    def events(self) -> list[Any]:
        return [json.loads(sent.splitlines()[2]) for sent in self.sent]


@contextmanager
def sentry() -> Generator[RecordingTransport, None, None]:
    """Have a client as `sentry_sdk.init()` makes it, for this context alone."""
    transport = RecordingTransport()
    client = sentry_sdk.Client(
        dsn="https://key@sentry.invalid/1",
        transport=transport,
        default_integrations=False,  # they would stay for the other tests
        integrations=[LoggingIntegration(), DedupeIntegration()],
    )
    with sentry_sdk.isolation_scope() as scope:
        scope.set_client(client)
        yield transport


@pytest.fixture
async def db(sqlite: SQLiteBackend) -> AsyncIterator[Database]:
    await sqlite.execute(AUTHOR, NOTE)
    db = Database.from_url(sqlite.url)
    yield db
    await db.dispose()


async def request(
    db: Database,
    work: Callable[[], Awaitable[object]],
    *observers: Observer,
    status: int = 200,
) -> Exchange:
    """Do some work as a request does, and answer."""
    app = UnitOfWorkMiddleware(
        answering(work, status), db, observers=observers or (SentryObserver(),)
    )
    return await Server(app).request()


async def write() -> None:
    await current_session().execute("INSERT INTO note (name) VALUES (:n)", n=SECRET)


async def break_commit() -> None:
    await current_session().execute(
        "INSERT INTO note VALUES (:name, :author)", name=SECRET, author=SECRET
    )


def exceptions(event: Any) -> list[str]:
    """Name the exceptions of an event, the one underneath first."""
    return [each["type"] for each in event["exception"]["values"]]


async def test_success(db: Database) -> None:
    """Nothing is sent for a unit that ended as intended, whichever way."""
    with sentry() as transport:
        await request(db, write)
        await request(db, write, status=404)
    assert [] == transport.sent


async def test_failing_hook(db: Database) -> None:
    """A failing hook arrives with `comment` and `handler`; the others still run."""
    ran: list[str] = []

    def send_mail() -> None:
        message = "no mail server"
        raise ConnectionError(message)

    async def work() -> None:
        after_commit(ran.append, "first")
        after_commit(send_mail)
        after_commit(ran.append, "last")

    with sentry() as transport:
        exchange = await request(db, work)
    assert 200 == exchange.status
    assert ["first", "last"] == ran
    [event] = transport.events
    assert ["ConnectionError"] == exceptions(event)
    assert "no mail server" == event["exception"]["values"][0]["value"]
    assert "after_commit hook failed" == event["extra"]["comment"]
    assert send_mail.__qualname__ == event["extra"]["handler"]


async def test_failed_commit(db: Database) -> None:
    """A failed COMMIT arrives once, with what is underneath."""
    with sentry() as transport:
        exchange = await request(db, break_commit)
    assert 500 == exchange.status
    [event] = transport.events
    assert "CommitFailedError" == exceptions(event)[-1]
    assert "IntegrityError" in exceptions(event)
    assert "unit of work not kept: rolled back" == event["extra"]["comment"]
    assert event["extra"]["handler"] is None


async def test_beside_the_logging_observer(db: Database) -> None:
    """Where Sentry also watches the log, the observer's event is the one.

    Sentry drops an exception that it has just been sent, hence the observer's place
    before the one that logs.
    """
    with sentry() as transport:
        await request(db, break_commit, SentryObserver(), LoggingObserver())
    [event] = transport.events
    assert "unit of work not kept: rolled back" == event["extra"]["comment"]


async def test_failed_release(db: Database) -> None:
    """A connection that had to be thrown away arrives too."""

    async def work() -> None:
        await write()
        sa_event.listen(db.engine.sync_engine, "rollback", disk_fails, once=True)

    def disk_fails(_: object) -> None:
        message = "the disk is gone"
        raise OSError(message)

    with sentry() as transport:
        await request(db, work, status=404)
    [event] = transport.events
    assert ["OSError"] == exceptions(event)
    assert "session failed" in event["extra"]["comment"]
    assert event["extra"]["handler"] is None


# What is not sent


async def test_no_parameters_of_a_failed_commit(db: Database) -> None:
    """What was written does not go to Sentry when COMMIT fails."""
    with sentry() as transport:
        await request(db, break_commit)
    [sent] = transport.sent
    assert SECRET.encode() not in sent


async def test_no_parameters_of_a_failed_statement(
    db: Database, sqlite: SQLiteBackend
) -> None:
    """What was to be written does not go to Sentry when a statement fails."""
    await sqlite.execute(f"INSERT INTO note (name) VALUES ('{SECRET}')")

    async def hook() -> None:
        async with db:
            await write()

    async def work() -> None:
        after_commit(hook)

    with sentry() as transport:
        await request(db, work)
    [event] = transport.events
    assert "IntegrityError" in exceptions(event)
    [sent] = transport.sent
    assert SECRET.encode() not in sent


async def test_no_url(mariadb: MariaDBBackend) -> None:
    """Neither the URL of the database nor its password goes to Sentry."""
    url = mariadb.url.replace("//app@", f"//app:{SECRET}@")
    db = Database.from_url(url)

    async def hook() -> None:
        async with db:
            await db.write.execute("SELECT 1")

    async def work() -> None:
        after_commit(hook)

    with sentry() as transport:
        await request(db, work)
    await db.dispose()
    [event] = transport.events
    assert "OperationalError" in exceptions(event)
    [sent] = transport.sent
    assert SECRET.encode() not in sent
    assert b"mysql+asyncmy://" not in sent


# Imports


def test_imports_nothing_optional() -> None:
    """`import asgi_uow` imports no driver, no framework and nothing of an extra."""
    code = "import asgi_uow, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    imported = set(result.stdout.split())
    assert "asgi_uow" in imported
    optional = {
        *("aiosqlite", "asyncmy", "asyncpg", "psycopg"),
        *("fastapi", "httpx", "sanic", "starlette", "uvicorn"),
        *("opentelemetry", "pytest", "sentry_sdk"),
        *("asgi_uow.otel", "asgi_uow.pytest_plugin", "asgi_uow.sanic"),
        *("asgi_uow.sentry", "asgi_uow.testing"),
    }
    assert set() == optional & imported
