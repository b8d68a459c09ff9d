"""What the wrapper did from which this library grew; all of it stays."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from sanic import Sanic
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, QueuePool

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import ReadOnlySessionError
from tests.integration.frameworks.driver import Server
from tests.servers.plugin import make_backend
from tests.support.asgi import endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.servers import Backend, SQLiteBackend

COUNT = "SELECT count(*) FROM users"
INSERT = "INSERT INTO users (name) VALUES (:name)"
PENDING = "SELECT name FROM users WHERE status = :status ORDER BY name"


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture(params=["aiosqlite", "asyncmy"])
async def origin(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """An empty table of users on the databases that the origin ran on."""
    counted = "AUTO_INCREMENT" if request.param == "asyncmy" else ""
    async with make_backend(request, request.param) as backend:
        await backend.execute(
            f"""CREATE TABLE users (
                id INTEGER PRIMARY KEY {counted},
                name VARCHAR(40),
                status VARCHAR(40) DEFAULT 'PENDING'
            )"""
        )
        yield backend


@pytest.fixture
async def db(origin: Backend) -> AsyncIterator[Database]:
    db = Database.from_url(origin.url)
    yield db
    await db.dispose()


def open_in(engine: AsyncEngine) -> int:
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedin() + engine.pool.checkedout()


# Statements as text


async def test_write_and_read(origin: Backend, db: Database) -> None:
    """Text takes its parameters by name, on both sessions."""
    async with db:
        await db.write.execute(INSERT, name="Ann")
        await db.write.execute(INSERT, name="Bob")
    assert 2 == await origin.scalar(COUNT)
    async with db:
        result = await db.read.execute(PENDING, status="PENDING")
        assert [("Ann",), ("Bob",)] == [tuple(row) for row in result]
        assert 2 == await db.read.scalar(COUNT)
        assert "Bob" == await db.read.scalar(f"{PENDING} DESC", status="PENDING")
        scalars = await db.read.scalars(PENDING, status="PENDING")
        assert ["Ann", "Bob"] == scalars.all()


async def test_stream(db: Database) -> None:
    """So do the two that stream."""
    async with db:
        await db.write.execute(INSERT, name="Ann")
        await db.write.execute(INSERT, name="Bob")
    async with db:
        rows = await db.read.stream(PENDING, status="PENDING")
        assert [("Ann",), ("Bob",)] == [tuple(row) async for row in rows]
        names = await db.read.stream_scalars(PENDING, status="PENDING")
        assert ["Ann", "Bob"] == [name async for name in names]


async def test_parameters_given_twice(db: Database) -> None:
    """Parameters in a mapping and by name at once are a mistake."""
    async with db:
        with pytest.raises(TypeError, match="as a mapping or by name"):
            await db.read.execute(PENDING, {"status": "PENDING"}, status="DONE")
        assert 0 == await db.read.scalar(COUNT, {})


# Sessions


async def test_read_session(db: Database) -> None:
    """The read session is not the write session, and each is one per unit."""
    async with db:
        assert db.read is not db.write
        assert db.read is db.read
        assert db.write is db.write


async def test_flush_on_the_read_session(origin: Backend, db: Database) -> None:
    """The read session refuses to flush and names the session to write with."""
    async with db:
        db.read.add(User(name="Ann"))
        with pytest.raises(ReadOnlySessionError, match=r"current_session\(\)"):
            await db.read.flush()
        db.read.expunge_all()
    assert 0 == await origin.scalar(COUNT)


async def test_text_that_writes_on_the_read_session(
    origin: Backend, db: Database
) -> None:
    """Text that writes is refused by the database itself."""
    async with db:
        with pytest.raises(ReadOnlySessionError) as caught:
            await db.read.execute(INSERT, name="Ann")
        refusals = {
            "sqlite": "attempt to write a readonly database",
            "mariadb": "Cannot execute statement in a READ ONLY transaction",
        }
        assert refusals[origin.name] in str(caught.value.__cause__)
    assert 0 == await origin.scalar(COUNT)


async def test_objects_after_the_commit(origin: Backend, db: Database) -> None:
    """What was written can be read after the commit: nothing expires."""
    async with db:
        ann = User(name="Ann")
        db.write.add(ann)
    assert 1 == await origin.scalar(COUNT)
    assert ("Ann", 1) == (ann.name, ann.id)


async def test_lazy(db: Database) -> None:
    """Nothing connects before a session executes, and then that one alone."""
    async with db:
        assert db.read is not db.write
        assert 0 == open_in(db.engine) + open_in(db.read_engine)
        await db.read.scalar(COUNT)
        assert (0, 1) == (open_in(db.engine), open_in(db.read_engine))


# The end of a unit


@pytest.mark.parametrize(("forced", "kept"), [(False, 0), (True, 1)])
async def test_commit_on_exit(origin: Backend, forced: bool, kept: int) -> None:
    """With commit_on_exit=False nothing is kept, unless it is forced."""
    db = Database.from_url(origin.url, commit_on_exit=False)
    async with db:
        await db.write.execute(INSERT, name="Ann")
        if forced:
            uow.force_commit()
    await db.dispose()
    assert kept == await origin.scalar(COUNT)


class HTTPError(Exception):
    """As frameworks raise it, for errors and for redirects."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"status {status_code}")
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "kept"),
    [(HTTPError(302), 1), (HTTPError(404), 0), (ZeroDivisionError(), 0)],
    ids=["redirect", "not found", "bug"],
)
async def test_exception(
    origin: Backend, db: Database, error: Exception, kept: int
) -> None:
    """An exception rolls back, unless it is a redirect, and always goes on."""

    async def work() -> None:
        async with db:
            await db.write.execute(INSERT, name="Ann")
            raise error

    with pytest.raises(type(error)) as caught:
        await work()
    assert error is caught.value
    assert kept == await origin.scalar(COUNT)


# Handlers after the commit


async def test_post_process(origin: Backend, db: Database) -> None:
    """Handlers, async or not, run in order after the commit, with their arguments."""
    calls: list[tuple[str, object]] = []

    async def index(name: str, *, boost: int) -> None:
        calls.append((f"{name} x {boost}", await origin.scalar(COUNT)))

    def notify(name: str) -> None:
        calls.append((name, "notified"))

    async with db:
        uow.after_commit(index, "Ann", boost=2)
        uow.after_commit(notify, "Ann")
        await db.write.execute(INSERT, name="Ann")
        assert [] == calls
    assert [("Ann x 2", 1), ("Ann", "notified")] == calls


async def test_failing_handler(
    origin: Backend, db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that fails is logged; the others run and the work is kept."""
    ran: list[str] = []

    async def broken() -> None:
        message = "no mail server"
        raise ConnectionError(message)

    async with db:
        await db.write.execute(INSERT, name="Ann")
        uow.after_commit(broken)
        uow.after_commit(ran.append, "the other one")
    assert ["the other one"] == ran
    assert 1 == await origin.scalar(COUNT)
    assert "no mail server" in caplog.text


async def test_rolled_back(db: Database) -> None:
    """After a rollback no handler runs."""
    ran: list[str] = []

    async def work() -> None:
        async with db:
            uow.after_commit(ran.append, "never")
            raise HTTPError(404)

    with pytest.raises(HTTPError):
        await work()
    assert [] == ran


async def test_deferred(db: Database) -> None:
    """A deferred function runs after the commit, where its predicate says so."""
    propagated: list[tuple[str, int]] = []

    def is_propagation_enabled(name: str, *, priority: int = 0) -> bool:
        return name != "Bob" and priority < 9

    @uow.deferred(when=is_propagation_enabled)
    async def propagate(name: str, *, priority: int = 0) -> None:
        propagated.append((name, priority))

    @uow.deferred
    def always(name: str) -> None:
        propagated.append((name, -1))

    async with db:
        propagate("Ann", priority=1)
        propagate("Bob")
        always("Bob")
        assert [] == propagated
    assert [("Ann", 1), ("Bob", -1)] == propagated
    assert "propagate" == propagate.__name__


async def test_deferred_methods(db: Database) -> None:
    """Methods of all kinds wait for the commit; their predicate gets `self` too."""

    class Mailer:
        sent: ClassVar[list[str]] = []

        def __init__(self, *, enabled: bool) -> None:
            self.enabled = enabled

        def is_enabled(self, name: str) -> bool:
            return self.enabled and name != ""

        @uow.deferred(when=is_enabled)
        def send(self, name: str) -> None:
            """Send a mail."""
            self.sent.append(name)

        @staticmethod
        @uow.deferred
        def greet(name: str) -> None:
            Mailer.sent.append(f"static {name}")

        @classmethod
        @uow.deferred
        async def make(cls, name: str) -> None:
            cls.sent.append(f"class {name}")

    async with db:
        Mailer(enabled=True).send("Ann")
        Mailer(enabled=True).send("")
        Mailer(enabled=False).send("Bob")
        Mailer.greet("Cid")
        Mailer.make("Dan")
        assert [] == Mailer.sent
    assert ["Ann", "static Cid", "class Dan"] == Mailer.sent
    assert "Send a mail." == Mailer.send.__doc__
    assert ["self", "name"] == list(inspect.signature(Mailer.send).parameters)


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_deferred_above_the_wrong_decorator(kind: Callable[..., object]) -> None:
    """Decorators in the wrong order are an error at once, which says the right one."""
    with pytest.raises(TypeError, match="above @deferred"):
        uow.deferred(kind(print))  # type: ignore[call-overload]


async def always() -> bool:
    raise NotImplementedError


class Always:
    async def __call__(self) -> bool:
        raise NotImplementedError


@pytest.mark.parametrize("when", [always, functools.partial(always), Always()])
def test_deferred_with_an_async_predicate(when: Callable[[], bool]) -> None:
    """A predicate whose answer would have to be awaited is an error at once."""
    with pytest.raises(TypeError, match=r"(?i)always.*cannot be async"):
        uow.deferred(when=when)


def test_deferred_with_a_predicate_that_is_none() -> None:
    """A value in the place of the predicate is an error at once."""
    always: Any = True
    with pytest.raises(TypeError, match="the predicate is a function"):
        uow.deferred(when=always)


async def test_deferred_with_arguments_of_any_name(db: Database) -> None:
    """A function keeps its signature, whatever its parameters are called."""
    exported: list[tuple[str, str]] = []

    def is_due(fn: str, when: str) -> bool:
        return fn != when

    def export(fn: str, when: str) -> None:
        exported.append((fn, when))

    async with db:
        uow.deferred(when=is_due)(export)(fn="a.csv", when="now")
        uow.after_commit(export, fn="b.csv", when="later")

    assert [("a.csv", "now"), ("b.csv", "later")] == exported


async def test_handlers_that_never_ran(db: Database) -> None:
    """A unit that is dropped with hooks that never ran is a ResourceWarning."""

    async def abandon() -> None:
        await db.__aenter__()
        uow.after_commit(print, "never")

    async def abandoned() -> None:
        await asyncio.create_task(abandon())  # in a context of its own
        await asyncio.sleep(0)  # the loop lets go of the task, and of its context
        gc.collect()

    with pytest.warns(ResourceWarning, match="hooks that never ran"):
        await abandoned()


async def test_request(origin: Backend, db: Database) -> None:
    """In a request the same names work without `async with`."""
    seen: list[object] = []

    async def handler() -> None:
        await db.write.execute(INSERT, name="Ann")
        seen.append(await db.read.scalar(COUNT))
        assert db.write is uow.current_unit_of_work().session()

    exchange = await Server(uow.UnitOfWorkMiddleware(endpoint(handler), db)).request()
    assert 200 == exchange.status
    assert [1] == seen
    assert 1 == await origin.scalar(COUNT)


# Configuration


def as_it_is(value: object) -> object:
    return value


@pytest.mark.parametrize("cast", [as_it_is, str], ids=["typed", "text"])
async def test_sanic_config(
    sqlite: SQLiteBackend, cast: Callable[[object], object]
) -> None:
    """The keys of a Sanic application's config make the engines."""
    app = Sanic("origin", configure_logging=False)
    app.config.update(
        {
            "DATABASE_URL": sqlite.url,
            "DATABASE_READ_URLS": sqlite.url,
            "DATABASE_ECHO": cast(False),
            "DATABASE_ECHO_POOL": cast(False),
            "DATABASE_POOL_SIZE": cast(3),
            "DATABASE_MAX_OVERFLOW": cast(4),
            "DATABASE_POOL_PRE_PING": cast(True),
            "DATABASE_POOL_RECYCLE": cast(60),
            "DATABASE_POOL_TIMEOUT": cast(2.5),
        }
    )
    Sanic.unregister_app(app)
    db = Database.from_config(app.config)
    for engine in (db.engine, *db.readers):
        pool = engine.pool
        assert isinstance(pool, QueuePool)
        assert (3, 4, 60, True) == (
            pool.size(),
            pool._max_overflow,
            pool._recycle,
            pool._pre_ping,
        )
        assert 2.5 == pool.timeout()
        assert not engine.echo
    assert db.read_engine not in db.readers
    async with db:
        assert 1 == await db.write.scalar("SELECT 1")
    await db.dispose()


async def test_sanic_config_without_a_pool(sqlite: SQLiteBackend) -> None:
    """The class of the pool is named in the config too."""
    app = Sanic("origin", configure_logging=False)
    app.config.DATABASE_URL = sqlite.url
    app.config.DATABASE_POOL_CLASS = "NullPool"
    Sanic.unregister_app(app)
    db = Database.from_config(app.config)
    assert isinstance(db.engine.pool, NullPool)
    async with db:
        assert 1 == await db.read.scalar("SELECT 1")
    await db.dispose()
