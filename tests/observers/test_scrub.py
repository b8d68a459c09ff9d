"""People's data and passwords stay here: what Sentry is sent for real errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Enum, literal, make_url, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_uow import Database, after_commit, current_session
from asgi_uow.errors import PartialCommitError
from asgi_uow.observers import ImplicitCommit, LoggingObserver, ReaderFailed
from asgi_uow.sentry import SentryObserver
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, SERVERS, on
from tests.support.observer import Events
from tests.support.tracker import exceptions, sentry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.servers import Backend, PostgreSQLBackend, ServerBackend
    from tests.support.tracker import RecordingTransport

pytestmark = on(*DRIVERS)

SECRET = "hunter2-of-ann"
PASSWORD = "correct-horse"
CODES = {
    "aiosqlite": "SQLITE_CONSTRAINT_PRIMARYKEY",
    "asyncmy": "1062",
    "asyncpg": "23505",
    "psycopg": "23505",
}


class Base(DeclarativeBase):
    """Mapped to the one table here."""


class User(Base):
    """Somebody whose name is nobody's business."""

    __tablename__ = "users"
    name: Mapped[str] = mapped_column(primary_key=True)


async def insert() -> None:
    await current_session().execute("INSERT INTO users VALUES (:name)", name=SECRET)


async def prepare(backend: Backend, constraint: str = "PRIMARY KEY") -> Database:
    """Have a user of that name; a second one will be an error that shows it."""
    await backend.execute(
        f"CREATE TABLE users (name VARCHAR(40) {constraint})",
        f"INSERT INTO users VALUES ('{SECRET}')",
    )
    return Database.from_url(backend.url, hide_parameters=False)


@pytest.fixture
async def db(postgresql: PostgreSQLBackend) -> AsyncIterator[Database]:
    """A database whose messages hold the values, and whose URL has a password."""
    db = await prepare(postgresql)
    url = make_url(postgresql.url).set(password=PASSWORD)
    await db.dispose()
    db = Database.from_url(
        url.render_as_string(hide_password=False), hide_parameters=False
    )
    yield db
    await db.dispose()


async def send(
    db: Database, work: Callable[[], Awaitable[object]], **options: object
) -> RecordingTransport:
    """Give what Sentry was sent for some work of a request."""
    with sentry(**options) as transport:
        await handle(work, db, observers=[SentryObserver(), LoggingObserver()])
    return transport


async def send_from_hook(
    db: Database, hook: Callable[[], Awaitable[object]], **options: object
) -> RecordingTransport:
    async def work() -> None:
        after_commit(hook)

    return await send(db, work, **options)


def values(transport: RecordingTransport) -> dict[str, str]:
    """Give the messages of the only event by the class of the exception."""
    [event] = transport.events
    return {each["type"]: each["value"] for each in event["exception"]["values"]}


def assert_no_data(transport: RecordingTransport) -> None:
    [sent] = transport.sent
    assert SECRET.encode() not in sent
    assert PASSWORD.encode() not in sent


async def test_statement(backend: Backend) -> None:
    """Of a failed statement class, driver code and placeholders are left."""
    db = await prepare(backend)
    transport = await send_from_hook(db, insert)
    await db.dispose()
    assert_no_data(transport)
    message = values(transport)["IntegrityError"]
    [event] = transport.events
    outermost = event["exception"]["values"][-1]["value"]
    code = CODES[backend.driver]
    assert outermost.startswith(f"driver code {code}\n[SQL: INSERT INTO users VALUES (")
    assert message.startswith(f"driver code {code}")
    assert code == str(event["extra"]["code"])


@pytest.mark.parametrize("whole", [False, True])
async def test_literals(backend: Backend, whole: bool) -> None:
    """What was written into a statement is not sent, nor is it where one is quoted."""
    db = await prepare(backend)

    async def hook() -> None:
        try:
            await current_session().execute(f"INSERT INTO users VALUES ('{SECRET}')")
        except DBAPIError as error:
            if whole:
                raise
            raise RuntimeError(error.statement) from None

    transport = await send_from_hook(db, hook)
    await db.dispose()
    assert_no_data(transport)
    code = CODES[backend.driver]
    expected = f"driver code {code}\n[SQL: INSERT]"
    assert expected in [text.partition("\n(")[0] for text in values(transport).values()]


@on("asyncmy")
async def test_password_in_ddl(backend: Backend) -> None:
    """A password in DDL that has committed is neither sent, nor logged, nor told."""
    db = await prepare(backend)
    events = Events()

    async def work() -> None:
        await current_session().execute("INSERT INTO users VALUES ('bob')")
        statement = f"CREATE USER {SECRET[:7]} IDENTIFIED BY '{SECRET}'"
        await current_session().execute(statement)

    with sentry() as transport:
        observers = [SentryObserver(), LoggingObserver(), events]
        response = await handle(work, db, status=404, observers=observers)
    await db.dispose()
    assert [] == [sent for sent in transport.sent if SECRET.encode() in sent]
    assert isinstance(response.error, PartialCommitError)
    assert SECRET[:7] not in f"{events} {response.error}"
    assert "CREATE USER" == events.only(ImplicitCommit).statement


async def test_log(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """The traceback that is logged shows where it was, and no data of a statement."""
    db = await prepare(backend)

    async def work() -> None:
        after_commit(in_words)

    async def in_words() -> None:
        await current_session().execute(f"INSERT INTO users VALUES ('{SECRET}')")

    await handle(work, db, observers=[LoggingObserver()])
    await db.dispose()
    assert "in_words failed" in caplog.text
    assert f"driver code {CODES[backend.driver]}\n[SQL: INSERT]" in caplog.text
    assert ", in in_words" in caplog.text
    literal = f"'{SECRET}'"
    assert literal not in caplog.text


async def test_refused_statement(backend: Backend) -> None:
    """A refused COMMIT is named without what stands behind it."""
    db = await prepare(backend)

    async def hook() -> None:
        await current_session().execute("SELECT 1")
        await current_session().execute(f"COMMIT /* {SECRET} */")

    transport = await send_from_hook(db, hook)
    await db.dispose()
    assert_no_data(transport)
    shown = values(transport)["ManagedTransactionError"]
    assert shown.startswith("COMMIT was called by hand")


async def test_commit(postgresql: PostgreSQLBackend) -> None:
    """The same where it is COMMIT that fails."""
    db = await prepare(postgresql, "UNIQUE DEFERRABLE INITIALLY DEFERRED")
    transport = await send(db, insert)
    await db.dispose()
    assert_no_data(transport)
    assert "driver code 23505" == values(transport)["UniqueViolationError"]


@on(*SERVERS)
async def test_url(backend: ServerBackend) -> None:
    """The same where no connection could be made; the URL is not sent either."""
    url = make_url(backend.url).set(password=PASSWORD, database="nowhere")
    db = Database.from_url(url.render_as_string(hide_password=False))

    async def hook() -> None:
        await current_session().execute("SELECT 1")

    transport = await send_from_hook(db, hook)
    await db.dispose()
    assert_no_data(transport)
    assert f"{url.drivername}://".encode() not in transport.sent[0]
    assert "driver code" in str(values(transport))


async def test_wrong_parameter(db: Database) -> None:
    """What the driver itself could not convert is not sent."""

    async def hook() -> None:
        await current_session().execute("SELECT CAST(:n AS integer)", n=SECRET)

    transport = await send_from_hook(db, hook)
    assert_no_data(transport)
    assert "DataError" in values(transport)


async def test_wrong_value(db: Database) -> None:
    """Nor what SQLAlchemy could not convert: what is behind its error is left out."""

    async def hook() -> None:
        kind = Enum("red", "green", name="colour", validate_strings=True)
        await current_session().execute(select(literal(SECRET, kind)))

    transport = await send_from_hook(db, hook)
    assert_no_data(transport)
    assert "message left out" == values(transport)["LookupError"]


# Behind other exceptions


async def wrapped() -> None:
    try:
        await insert()
    except DBAPIError as error:
        message = f"could not save: {error}, {error.orig}"
        raise RuntimeError(message) from error


async def in_context() -> None:
    try:
        await insert()
    except DBAPIError as error:
        raise KeyError(str(error.orig))  # noqa: B904  # what people do


async def without_cause() -> None:
    try:
        await insert()
    except DBAPIError as error:
        message = f"could not save: {error}"
        raise RuntimeError(message) from None


async def in_group() -> None:
    errors: list[Exception] = []
    for _ in range(2):
        try:
            async with current_session().begin_nested():
                await insert()
        except DBAPIError as error:
            errors.append(error)
    message = "several"
    raise ExceptionGroup(message, errors)


async def with_note() -> None:
    try:
        await insert()
    except DBAPIError as error:
        error.add_note(f"while {SECRET} signed up")
        raise


async def in_vain() -> None:
    """Go on with a session of SQLAlchemy after a flush that failed."""
    engine = current_session().bind
    async with AsyncSession(engine) as session:
        session.add(User(name=SECRET))
        with pytest.raises(DBAPIError):
            await session.flush()
        await session.get(User, "")


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (wrapped, "RuntimeError"),
        (in_context, "KeyError"),
        (without_cause, "RuntimeError"),
        (in_group, "ExceptionGroup"),
        (with_note, "IntegrityError"),
        (in_vain, "PendingRollbackError"),
    ],
)
async def test_behind(
    db: Database, hook: Callable[[], Awaitable[object]], expected: str
) -> None:
    """The data is not sent with the exception of somebody else, nor with a note."""
    transport = await send_from_hook(db, hook)
    assert_no_data(transport)
    [event] = transport.events
    assert expected == exceptions(event)[-1]


def shown_whole(error: DBAPIError) -> str:
    return repr(str(error))


def shown_of_driver(error: DBAPIError) -> str:
    return f"could not save: {error.orig!r}"


def said_by_driver(error: DBAPIError) -> str:
    return str(error.orig and error.orig.args[-1])


@pytest.mark.parametrize("quote", [repr, shown_whole, shown_of_driver, said_by_driver])
async def test_quoted(backend: Backend, quote: Callable[[DBAPIError], str]) -> None:
    """However an exception quotes a message of the database, the data is left out."""
    db = await prepare(backend)

    async def hook() -> None:
        try:
            await insert()
        except DBAPIError as error:
            raise RuntimeError(quote(error)) from None

    transport = await send_from_hook(db, hook)
    await db.dispose()
    assert_no_data(transport)
    assert f"driver code {CODES[backend.driver]}" in values(transport)["RuntimeError"]


async def test_own_words(db: Database) -> None:
    """What others say in their exceptions is sent, and so are their notes."""

    async def hook() -> None:
        try:
            await insert()
        except DBAPIError as error:
            message = f"could not save: {error.orig}!"
            later = RuntimeError(message)
            later.add_note("second attempt")
            raise later from error

    transport = await send_from_hook(db, hook)
    expected = "could not save: driver code 23505!\nsecond attempt"
    assert expected == values(transport)["RuntimeError"]


@pytest.mark.filterwarnings("ignore:The send_default_pii:DeprecationWarning")
async def test_on_demand(db: Database) -> None:
    """With `send_default_pii` the messages are sent as they are; the URL never is."""
    transport = await send_from_hook(db, insert, send_default_pii=True)
    assert f"Key (name)=({SECRET}) already exists" in str(transport.events)
    assert PASSWORD.encode() not in transport.sent[0]


# Breadcrumbs


async def test_breadcrumbs(db: Database) -> None:
    """What is logged leaves no data in the breadcrumbs of what is sent later."""
    log = LoggingObserver()

    async def work() -> None:
        for hook in (insert, wrapped):
            after_commit(hook)
        after_commit(log, ReaderFailed("sqlite://", ValueError(SECRET), 0.1))
        after_commit(insert)

    transport = await send(db, work)
    assert 3 == len(transport.sent)
    crumbs = transport.events[-1]["breadcrumbs"]["values"]
    assert "asgi_uow" in {crumb["category"] for crumb in crumbs}
    assert "after ValueError" in str(crumbs)
    assert [] == [sent for sent in transport.sent if SECRET.encode() in sent]
