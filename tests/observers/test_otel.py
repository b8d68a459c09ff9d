"""What OpenTelemetry's SDK is really given: spans and metrics of units of work."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import StatusCode
from sqlalchemy import event as sa_event
from sqlalchemy import make_url

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.otel import OpenTelemetryObserver
from tests.support.asgi import handle
from tests.support.databases import SERVERS, on, shop_database
from tests.support.shop import insert, insert_orphan
from tests.support.telemetry import Telemetry, exception_of, fail

if TYPE_CHECKING:
    from tests.servers import PostgreSQLBackend, ServerBackend, SQLiteBackend

pytestmark = on("aiosqlite")

SECRET = "hunter2-of-ann"
SECONDS = "db.client.connection.use_time"


async def insert_one() -> None:
    await insert(1)


# The ends of a unit


async def test_committed(db: Database, telemetry: Telemetry) -> None:
    """A unit is a span and its commit another, with the database's own attributes."""
    await telemetry.handle(insert_one, db)
    assert [(None, "unit of work"), ("unit of work", "commit")] == telemetry.tree
    path = make_url(db.name).database
    about = {
        "asgi_uow.databases": (db.name,),
        "db.namespace": path,
        "db.system.name": "sqlite",
    }
    unit, commit = telemetry.spans
    ended = {**about, "asgi_uow.outcome": "committed"}
    assert ended.items() <= dict(unit.attributes or {}).items()
    assert about == commit.attributes
    assert [StatusCode.UNSET] * 2 == [
        each.status.status_code for each in (unit, commit)
    ]
    assert unit.end_time == commit.end_time
    assert (unit.start_time or 0) <= (commit.start_time or 0)
    expected = [({"asgi_uow.outcome": "committed"}, 1)]
    assert expected == telemetry.metrics["asgi_uow.units"]


async def test_rolled_back_for_the_status(db: Database, telemetry: Telemetry) -> None:
    """An intended rollback is no error; its cause is named."""
    await telemetry.handle(insert_one, db, status=404)
    assert [(None, "unit of work"), ("unit of work", "rollback")] == telemetry.tree
    ended = {"asgi_uow.outcome": "rolled back", "asgi_uow.cause": "status"}
    unit, rollback = telemetry.spans
    assert ended.items() <= dict(unit.attributes or {}).items()
    assert StatusCode.UNSET is unit.status.status_code is rollback.status.status_code
    assert [(ended, 1)] == telemetry.metrics["asgi_uow.units"]


async def test_reason(db: Database, telemetry: Telemetry) -> None:
    """What set_rollback_only() was told is an attribute, but none of the counter."""

    async def dry_run() -> None:
        uow.set_rollback_only("dry run")
        uow.current_session()

    await telemetry.handle(dry_run, db)
    [unit] = telemetry.spans
    ended = {"asgi_uow.outcome": "rolled back", "asgi_uow.cause": "explicit"}
    expected = {**ended, "asgi_uow.databases": (), "asgi_uow.reason": "dry run"}
    assert expected.items() <= dict(unit.attributes or {}).items()
    assert [(ended, 1)] == telemetry.metrics["asgi_uow.units"]


async def test_failed_commit(db: Database, telemetry: Telemetry) -> None:
    """A failed COMMIT is an error of both spans, with the exception and its code."""
    await telemetry.handle(insert_orphan, db)
    assert [(None, "unit of work"), ("unit of work", "commit")] == telemetry.tree
    unit, commit = telemetry.spans
    recorded = exception_of(unit)
    assert "asgi_uow.errors.CommitFailedError" == recorded["exception.type"]
    assert "cause: commit_failed" in str(recorded["exception.message"])
    assert "sqlite3.IntegrityError: " in str(recorded["exception.stacktrace"])
    attributes = dict(unit.attributes or {})
    assert "asgi_uow.errors.CommitFailedError" == attributes["error.type"]
    code = attributes["db.response.status_code"]
    assert "SQLITE_CONSTRAINT_FOREIGNKEY" == code
    assert StatusCode.ERROR is commit.status.status_code
    assert () == commit.events
    ended = {"asgi_uow.outcome": "rolled back", "asgi_uow.cause": "commit_failed"}
    assert [(ended, 1)] == telemetry.metrics["asgi_uow.units"]


async def test_untouched(db: Database, telemetry: Telemetry) -> None:
    """A request that asks for no session and registers nothing leaves no trace."""

    async def health() -> None:
        uow.current_unit_of_work()

    await telemetry.handle(health, db)
    assert [] == telemetry.spans
    assert {"asgi_uow.units", SECONDS}.isdisjoint(telemetry.metrics)


async def test_untouched_and_failed(db: Database, telemetry: Telemetry) -> None:
    """Nor does one that fails although it never asked for anything."""

    async def health() -> None:
        uow.current_unit_of_work()

    def fail(status: int, headers: list[tuple[bytes, bytes]]) -> bool:
        return status // len(headers) > 0

    response = await telemetry.handle(health, db, commit_when=fail)
    assert 500 == response.status
    assert [] == telemetry.spans


async def test_two_databases(
    db: Database, postgresql: PostgreSQLBackend, telemetry: Telemetry
) -> None:
    """Several databases are only listed."""
    async with shop_database(postgresql) as other:

        async def work() -> None:
            await insert(1)
            await insert(1, other)

        await telemetry.handle(work, db, other)
    without_user = other.name.replace("postgres@", "")
    expected = {"asgi_uow.databases": (db.name, without_user)}
    assert expected == telemetry.span("commit").attributes


# Connections


@on(*SERVERS)
async def test_connections(
    db: Database, backend: ServerBackend, telemetry: Telemetry
) -> None:
    """How long connections were held is measured by database and access."""
    url = make_url(backend.url)

    async def work() -> None:
        await uow.current_read_session().execute("SELECT 1")
        await uow.current_session().execute("SELECT 1")

    await telemetry.handle(work, db)
    scheme, _, address = backend.url.partition("://")
    pool = f"{scheme}://{address.partition('@')[2]}"
    about = {"db.client.connection.pool.name": pool}
    assert telemetry.metrics[SECONDS] == [
        ({**about, "asgi_uow.access": "write"}, 1),
        ({**about, "asgi_uow.access": "read"}, 1),
    ]
    assert telemetry.span("commit").attributes == {
        "asgi_uow.databases": (pool,),
        "db.namespace": url.database,
        "db.system.name": url.get_backend_name(),
        "server.address": url.host,
        "server.port": url.port,
    }


async def test_failed_release(db: Database, telemetry: Telemetry) -> None:
    """A connection that was thrown away was held too."""

    async def work() -> None:
        await insert(1)
        sa_event.listen(db.engine.sync_engine, "rollback", disk_fails, once=True)

    def disk_fails(_: object) -> None:
        message = "the disk is gone"
        raise OSError(message)

    await telemetry.handle(work, db, status=404)
    [(about, count)] = telemetry.metrics[SECONDS]
    assert ("write", 1) == (about["asgi_uow.access"], count)


# What is not recorded


async def test_no_data(postgresql: PostgreSQLBackend, telemetry: Telemetry) -> None:
    """No parameter, and no value that the server put into its message."""
    await postgresql.execute(
        "CREATE TABLE users (name text UNIQUE DEFERRABLE INITIALLY DEFERRED)",
        f"INSERT INTO users VALUES ('{SECRET}')",
    )
    url = postgresql.url.replace("postgres@", f"postgres:{SECRET}@")
    db = Database.from_url(url, hide_parameters=False)

    async def work() -> None:
        await uow.current_session().execute("INSERT INTO users VALUES (:n)", n=SECRET)

    async def hook() -> None:
        await uow.current_session().execute("INSERT INTO nowhere VALUES (:n)", n=SECRET)

    async def work_in_hook() -> None:
        uow.after_commit(hook)

    await telemetry.handle(work, db)
    await telemetry.handle(work_in_hook, db)
    await db.dispose()
    recorded = [span.to_json() for span in telemetry.spans]
    assert [] == [each for each in recorded if SECRET in each]
    unit = exception_of(telemetry.spans[0])
    assert "driver code 23505" in str(unit["exception.stacktrace"])
    in_hook = exception_of(telemetry.span(f"after_commit {hook.__qualname__}"))
    expected = "driver code 42P01\n[SQL: INSERT INTO nowhere VALUES ($1)]"
    assert expected == in_hook["exception.message"]


# Without an SDK


async def test_no_provider(db: Database, backend: SQLiteBackend) -> None:
    """With the API alone nothing is recorded and nothing fails."""
    current: list[trace.Span] = []

    async def work() -> None:
        await insert(1)
        uow.before_commit(insert, 2)
        uow.after_commit(lambda: current.append(trace.get_current_span()))
        uow.after_commit(fail)

    exchange = await handle(work, db, observers=[OpenTelemetryObserver()])
    assert (200, None) == (exchange.status, exchange.error)
    assert [False] == [span.is_recording() for span in current]
    assert 2 == await backend.scalar("SELECT count(*) FROM items")


def test_imports_the_api_alone() -> None:
    """The SDK is the application's to choose."""
    code = "import asgi_uow.otel, sys; print('opentelemetry.sdk' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert "False\n" == done.stdout
