"""What Sentry is really sent: a real client, its transport recorded."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event as sa_event

from asgi_uow import Database, after_commit, after_response, current_session
from asgi_uow.observers import LoggingObserver
from asgi_uow.sentry import SentryObserver
from tests.support.asgi import handle
from tests.support.tracker import exceptions, sentry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.servers import SQLiteBackend

AUTHOR = "CREATE TABLE author (name VARCHAR(40) PRIMARY KEY)"
NOTE = """CREATE TABLE note (
    name VARCHAR(40) PRIMARY KEY,
    author VARCHAR(40) REFERENCES author (name) DEFERRABLE INITIALLY DEFERRED
)"""
SECRET = "hunter2-of-ann"


@pytest.fixture
async def db(sqlite: SQLiteBackend) -> AsyncIterator[Database]:
    await sqlite.execute(AUTHOR, NOTE)
    db = Database.from_url(sqlite.url)
    yield db
    await db.dispose()


async def write() -> None:
    await current_session().execute("INSERT INTO note (name) VALUES (:n)", n=SECRET)


async def break_commit() -> None:
    await current_session().execute(
        "INSERT INTO note VALUES (:name, :author)", name=SECRET, author=SECRET
    )


async def test_success(db: Database) -> None:
    """Nothing is sent for a unit that ended as intended, whichever way."""
    with sentry() as transport:
        await handle(write, db, observers=[SentryObserver()])
        await handle(write, db, observers=[SentryObserver()], status=404)
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
        exchange = await handle(work, db, observers=[SentryObserver()])
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
        exchange = await handle(break_commit, db, observers=[SentryObserver()])
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
        await handle(break_commit, db, observers=[SentryObserver(), LoggingObserver()])
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
        await handle(work, db, observers=[SentryObserver()], status=404)
    [event] = transport.events
    assert ["OSError"] == exceptions(event)
    comment = event["extra"]["comment"]
    assert "closing the session failed" == comment
    assert ["{{ default }}", comment] == event["fingerprint"]
    assert event["extra"]["handler"] is None


@pytest.mark.parametrize("raised", [True, False])
async def test_fingerprint_of_a_hook(db: Database, raised: bool) -> None:
    """One issue per hook and phase, within those that Sentry would make."""

    async def hook() -> None:
        await break_commit()
        if raised:
            raise ZeroDivisionError

    async def work() -> None:
        after_response(hook)

    with sentry() as transport:
        await handle(work, db, observers=[SentryObserver()])
    [event] = transport.events
    group = ["after_response", hook.__qualname__]
    assert ["{{ default }}", *group] == event["fingerprint"]


async def test_fingerprint_of_a_commit(db: Database) -> None:
    """One issue per outcome, cause and driver code; they are extras too."""
    with sentry() as transport:
        await handle(break_commit, db, observers=[SentryObserver()])
    [event] = transport.events
    group = ["rolled back", "commit_failed", "SQLITE_CONSTRAINT_FOREIGNKEY"]
    assert ["{{ default }}", *group] == event["fingerprint"]
    extra = event["extra"]
    assert group == [extra["outcome"], extra["cause"], extra["code"]]


async def test_no_client(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Without sentry_sdk.init() nothing happens."""
    assert 500 == (await handle(break_commit, db, observers=[SentryObserver()])).status
    assert [] == caplog.records


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
